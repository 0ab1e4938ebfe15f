"""From a command to its ranks: `ranks` around the work of one, `launch` for `--gpus G`, which starts G of them here.

`launch` is torchrun for one host, made of torchrun's own parts, with two things that it does not do: its exit code is that of
the ranks, and a signal lets them finish what is in flight. The ranks are the same under both, and under any launcher that
sets the variables of torchrun.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.api import PContext

from ..errors import STOPPING, UsageError
from .group import Group, Ranks
from .watch import CAUSE, GO_ON, SAID, Watch

TCPStore = dist.TCPStore  # type: ignore[attr-defined]  # it is public, and the package does not list it

_HERE = "127.0.0.1"
_POLL = 0.2  # seconds
_STOPPED = 75


def _started_by_launcher() -> bool:
    """Whether this process is one of those that a launcher started together, be it the only one."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def ranks(device: str) -> Iterator[Group]:
    """The group that this process belongs to, while it works. `device` as of --device; with several ranks no single GPU.

    Where there is a launcher, an error inside ends this process, and all others, here: watch.py.
    """
    if not _started_by_launcher():
        yield Group()
        return
    if ":" in device:
        raise UsageError(
            f"--device is {device} and several ranks compute, each on a GPU of its own: give --device cuda"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not on_gpu:
        raise UsageError("device 'cuda' is asked for and torch finds no CUDA GPU: give --device cpu")
    rank, size, hosted = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _store_is_hosted()
    store = _store(is_master=rank == 0 and not hosted)
    # With a connection of its own: the main thread may wait in the other for as long as it likes.
    watch = Watch(rank, size, _store(is_master=False), hosted)
    watch.begin()
    try:
        group = Ranks.join(on_gpu, PrefixStore("group", store))
        yield group
        group.barrier()  # others may still need this rank's store, or its word
    except BaseException as error:
        watch.fail(error)
    watch.end()
    group.leave()


def _store_is_hosted() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(is_master: bool) -> Store:
    """Of this start of the ranks: torchrun may start them again."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=is_master, wait_for_workers=False)
    return PrefixStore(f"apex4/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def launch(count: int, arguments: Sequence[str], device: str) -> int:
    """Run `apex4 ARGUMENTS` as `count` ranks on this host -> the exit code: that of the first that failed, or 0.

    Raises UsageError if there are fewer GPUs, or where `device` is cpu fewer cores.
    """
    if device == "cpu":
        cores = os.cpu_count() or 1
        if cores < count:
            raise UsageError(f"--gpus is {count} and this host has {cores} cores, one for each process: give fewer")
    elif (found := torch.cuda.device_count()) < count:
        raise UsageError(f"--gpus is {count} and torch finds {found} CUDA GPUs: give fewer, or --device cpu")
    store = TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say themselves what happened
    words = {rank: ("-m", "apex4_quant", *arguments) for rank in range(count)}
    environments = {rank: _environment(rank, count, store.port) for rank in range(count)}
    processes = start_processes("apex4", sys.executable, words, environments, DefaultLogsSpecs(log_dir=os.devnull))
    _forward_signals(processes)
    result = processes.wait(period=_POLL)
    assert result is not None
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    cause, said = f"apex4/0/{CAUSE}", f"apex4/0/{SAID}"
    if store.check([cause]):
        code, sentence, _ = json.loads(store.get(cause))
        if not store.check([said]):  # it was killed before it could
            _say(sentence)
        return int(code)
    for rank, code in codes.items():
        if code > 0:  # refused before the ranks met
            return code
        _say(f"rank {rank} was killed by {signal.Signals(-code).name}: {GO_ON}")
        return _STOPPED
    return 0


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    chosen = {name: os.environ.get(name, default) for name, default in _DEFAULTS.items()}
    return chosen | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": _HERE,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


_DEFAULTS = {"GLOO_SOCKET_IFNAME": "lo"}  # a host's name may lead to an address that is not there


def _forward_signals(processes: PContext) -> None:
    """The first SIGINT or SIGTERM lets the ranks stop after the layer in flight, the second ends them."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            _say(STOPPING)
        for pid in processes.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if asked else signal.SIGTERM)
        asked = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handle)


def _say(sentence: str) -> None:
    print(f"apex4: {sentence}", file=sys.stderr, flush=True)
