"""The processes that work on one run together: `Group` for one, which asks nobody, and `Ranks` for those that torchrun starts.

Every method is called by all ranks, in the same order, or by none. One process computes what it computed before there were
several, to the last bit. Several compute the same again as long as there are as many: sums are taken in a fixed order.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from ..environment import SECONDS_TO_WAIT, TIMEOUT
from ..errors import Apex4Error, UsageError
from ..progress import step
from .shares import Share, share_of

_P = ParamSpec("_P")
_T = TypeVar("_T")


class RankLost(Apex4Error):
    """Another rank does not answer. What is finished is kept: exit code 75."""

    exit_code = 75


class Group:
    """One process alone, rank 0 of 1."""

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, total: int) -> Share:
        """Which of `total` entries are this rank's."""
        return share_of(total, self.rank, self.size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, of tensors of one shape, in their place."""
        return values

    def sum_of_numbers(self, values: Sequence[float]) -> list[float]:
        """The sum of each, in float64."""
        return list(values)

    def norms(self, values: torch.Tensor) -> torch.Tensor:
        """Norms float32 [n] of parts of vectors -> of the vectors."""
        return values

    def mean(self, value: torch.Tensor, count: int) -> torch.Tensor:
        """The mean over all ranks' numbers: `value` is that of the `count` here, float32 []."""
        return value

    def broadcast(self, values: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Those of rank `source`, in the place of the others'."""
        return values

    def gather_share(self, own: torch.Tensor, total: int) -> torch.Tensor:
        """Shares [n, ...] of `total` entries, of `share`, -> all, [total, ...]."""
        return own

    def gather_rows(self, own: torch.Tensor) -> torch.Tensor:
        """Any number of rows of every rank, [n, ...], one after the other in the order of ranks."""
        return own

    def gather(self, value: _T) -> list[_T]:
        """Of every rank one object that can be pickled."""
        return [value]

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What `make` returns on rank 0, which alone calls it."""
        return make()

    def any(self, flag: bool) -> bool:
        """Whether one of the ranks says yes."""
        return flag

    def barrier(self) -> None:
        """Return when all ranks are here."""

    def require_equal(self, found: dict[str, Any]) -> None:
        """Raise UsageError, on every rank, unless what each rank has found, by what it is, is the same on all."""
        everyones = self.gather(found)
        for rank, other in enumerate(everyones):
            for name in everyones[0]:
                if other.get(name) != everyones[0][name]:
                    shown = [str(each.get(name)) for each in (everyones[0], other)]
                    values = f" ({shown[1]}, and {shown[0]})" if all(len(text) < 40 for text in shown) else ""
                    raise UsageError(
                        f"rank {rank} has another {name} than rank 0{values}: give every rank the same files, versions and settings"
                    )


def _communicating(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """torch.distributed raises RuntimeErrors of many kinds; all of them end the group."""

    @wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            with step("other ranks"):
                return method(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RankLost(f"another rank does not answer ({_first_line(error)})") from error

    return call


def _seconds_to_wait() -> int:
    text = os.environ.get(TIMEOUT, str(SECONDS_TO_WAIT))
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= 10**6:
        raise UsageError(f"{TIMEOUT} is {text!r}: give a whole number of seconds, 1 or more")
    return int(text)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class Ranks(Group):
    """This process among those of a launcher. `join` before anything else; tensors of GPUs go by NCCL, others by gloo."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @classmethod
    def join(cls, on_gpu: bool, store: Store) -> Ranks:
        """By the variables of torchrun, and a `store` that all ranks have. Raises RankLost, or UsageError if there are fewer
        GPUs than ranks of this host."""
        backend = "gloo"
        if on_gpu:
            local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            here = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            if here > found:
                raise UsageError(
                    f"{here} ranks were started here and torch finds {found} CUDA GPUs: "
                    "start one rank a GPU, or give --device cpu"
                )
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        wait = timedelta(seconds=_seconds_to_wait())
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        _communicating(dist.init_process_group)(backend, timeout=wait, store=store, rank=rank, world_size=size)
        return cls()

    @_communicating
    def leave(self) -> None:
        """When all are done."""
        self.barrier()
        dist.destroy_process_group()

    @_communicating
    def sum(self, values: torch.Tensor) -> torch.Tensor:
        whole = values.contiguous()
        dist.all_reduce(whole)
        return values if whole is values else values.copy_(whole)

    def sum_of_numbers(self, values: Sequence[float]) -> list[float]:
        summed: list[float] = self.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        return summed

    def norms(self, values: torch.Tensor) -> torch.Tensor:
        # In float64: of one rank the root of the square is then the number itself.
        return self.sum(values.double().square()).sqrt().to(values.dtype)

    def mean(self, value: torch.Tensor, count: int) -> torch.Tensor:
        total = self.sum(torch.tensor([float(value) * count if count else 0.0, count], dtype=torch.float64))
        return (total[0] / total[1]).to(value.dtype)

    @_communicating
    def broadcast(self, values: torch.Tensor, source: int = 0) -> torch.Tensor:
        whole = values.contiguous()
        dist.broadcast(whole, source)
        return whole

    @_communicating
    def gather_share(self, own: torch.Tensor, total: int) -> torch.Tensor:
        return self._gathered(own, [share_of(total, rank, self.size).size for rank in range(self.size)])

    @_communicating
    def gather_rows(self, own: torch.Tensor) -> torch.Tensor:
        counts = torch.empty(self.size, dtype=torch.int64)
        dist.all_gather_into_tensor(counts, torch.tensor([len(own)]))
        return self._gathered(own, counts.tolist())

    def _gathered(self, own: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """All parts are sent at the size of the largest: backends differ in what they make of others."""
        most, sent = max(counts), own.contiguous()
        if len(own) < most:
            sent = torch.cat([sent, own.new_zeros(most - len(own), *own.shape[1:])])
        parts = own.new_empty(len(counts) * most, *own.shape[1:])
        dist.all_gather_into_tensor(parts, sent)
        if min(counts) == most:
            return parts
        return torch.cat([part[:count] for part, count in zip(parts.split(most), counts, strict=True)])

    @_communicating
    def gather(self, value: _T) -> list[_T]:
        found: list[_T] = [value] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], _T]) -> _T:
        made: _T = self._from_first(make() if self.is_first else None)
        return made

    @_communicating
    def _from_first(self, made: Any) -> Any:
        found = [made]
        dist.broadcast_object_list(found, 0)
        return found[0]

    def any(self, flag: bool) -> bool:
        return self.sum_of_numbers([float(flag)])[0] > 0

    def barrier(self) -> None:
        self.sum_of_numbers([1.0])
