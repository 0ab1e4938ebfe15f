"""What one call of a module has made so far: kept for that call alone, in the thread that makes it.

A server calls one model from several threads at once. So nothing of a call may stand on the model's own objects. A
CallScope belongs to one module (a decoder layer). Its two hooks open a fresh `Call` when the module is called and drop it
when the call ends, whatever happens in it; each thread has its own.

While torch.compile traces, the call stands in a plain attribute, since dynamo does not trace thread-local storage. Tracing is
done by one thread at a time, and in what was compiled nothing of the call is left.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

ATTRIBUTE = "apex4_call_scope"  # of the module


class Call:
    """One call of the scope's module. Each who keeps something has a key of its own from `CallScope.new_key`."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}


class _OfThread(threading.local):
    call: Call | None = None

    def __reduce__(self) -> tuple[type[_OfThread], tuple[()]]:
        return _OfThread, ()  # of a copy of the model no call is going on


class CallScope:
    """The calls of one module. Made by `of`, which gives a module the same scope every time."""

    def __init__(self) -> None:
        self._of_thread = _OfThread()
        self._traced: Call | None = None
        self._keys = 0
        self._hooks: tuple[RemovableHandle, ...] = ()

    @staticmethod
    def of(module: nn.Module) -> CallScope:
        scope = getattr(module, ATTRIBUTE, None)
        if not isinstance(scope, CallScope):
            scope = CallScope()
            setattr(module, ATTRIBUTE, scope)
            scope._hooks = (
                module.register_forward_pre_hook(scope._enter),
                module.register_forward_hook(scope._leave, always_call=True),
            )
        return scope

    @staticmethod
    def remove_from(module: nn.Module) -> None:
        """Take the scope and its hooks off the module, if it has one."""
        scope = getattr(module, ATTRIBUTE, None)
        if isinstance(scope, CallScope):
            for hook in scope._hooks:
                hook.remove()
            delattr(module, ATTRIBUTE)

    def new_key(self) -> int:
        self._keys += 1
        return self._keys

    def current(self) -> Call | None:
        """The call that this thread is in, or None."""
        return self._traced if torch.compiler.is_compiling() else self._of_thread.call

    def _enter(self, *_: Any) -> None:
        self._become(Call())

    def _leave(self, *_: Any) -> None:
        self._become(None)

    def _become(self, call: Call | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = call
        else:
            self._of_thread.call = call
