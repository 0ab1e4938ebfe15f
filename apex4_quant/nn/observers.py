"""Whether something looks at what passes between some modules of a decoder layer: then everything there must be a tensor.

Looked for are hooks of these modules or of all modules, a `forward` that somebody put on one of them (accelerate), and modules
that were replaced (adapters of peft wrap them). This is asked in every call of a layer, so it must cost little: the tables to
look into are gathered once.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..private_names import child_modules, global_hook_tables, hook_tables


def has_own_forward(module: nn.Module) -> bool:
    """Whether calling the module does what its class says: nobody put another `forward` on it."""
    forward = module.__dict__.get("forward")
    # accelerate leaves the class's own method on a module whose hook it has removed.
    return forward is None or (
        getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    )


class Observers:
    """Of the modules `names` below `root`, and of those on the way to them.

    The `forward` of `owned` is not looked at: its owner may have set that one itself, and knows.
    """

    def __init__(self, root: nn.Module, names: Iterable[str], owned: nn.Module) -> None:
        places: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        for name in names:
            parent = root
            for part in name.split("."):
                child = parent.get_submodule(part)
                places[id(parent), part] = parent, part, child
                parent = child
        modules = list({id(child): child for _, _, child in places.values()}.values())
        self._hooks = tuple(table for module in modules for table in hook_tables(module))
        self._modules = (root, *(module for module in modules if module is not owned))
        self._children = tuple((child_modules(parent), name, child) for parent, name, child in places.values())

    def there_are(self) -> bool:
        for table in (*global_hook_tables(), *self._hooks):
            if table:
                return True
        for module in self._modules:
            if "forward" in module.__dict__ and not has_own_forward(module):
                return True
        return any(children.get(name) is not child for children, name, child in self._children)
