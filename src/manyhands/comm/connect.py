"""Connects this worker to its group, as its launcher's environment specifies."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from manyhands.comm.distributed import DistributedGroup
from manyhands.comm.group import Group
from manyhands.comm.hierarchical import HierarchicalGroup, places
from manyhands.comm.local import LocalGroup
from manyhands.comm.shared_memory import SharedMemoryGroup
from manyhands.errors import ConfigError
from manyhands.members.exit_hooks import ExitHooks, end_process
from manyhands.members.membership import JOIN_SECONDS, Membership
from manyhands.members.reports import StatusFile, forget_failure
from manyhands.offload.scratch import ProcessArena
from manyhands.surroundings import environment_rank_and_size


def connect(
    kind: str = "auto",
    *,
    device: str = "cpu",
    stall_seconds: float = 600.0,
    most_hosts: int = 0,
) -> Group:
    """The group of this process's launcher. Collective. A worker that doesn't come round to raising another one's
    failure (it hangs, say) is ended.

    kind: "auto", "shared-memory", "distributed" or "hierarchical" (see the strategy). most_hosts: on up to so many
    hosts
    workers may add gradients among themselves first. Raises ConfigError, WorkerError.
    """
    forget_failure()
    rank, size = environment_rank_and_size()
    where = _gpu() if device == "cuda" else torch.device(device)
    if size <= 1 and kind != "distributed":
        return LocalGroup(where, StatusFile.for_parent(stall_seconds))
    if not sys.platform.startswith("linux"):
        raise ConfigError("several workers need Linux", got=sys.platform, hint="elsewhere, one worker works")
    store = _numbered_store(rank, size)
    arena = ProcessArena()
    requested = f"group {kind} on {device}"
    membership = Membership(
        store, rank, size, arena, stall_seconds=stall_seconds, abandon=end_process, requested=requested
    )
    ExitHooks(membership)
    try:
        by_host = places(membership.hosts) if device == "cpu" else None
        if kind == "auto":
            several = "hierarchical" if by_host is not None and len(by_host) <= most_hosts else "distributed"
            kind = "shared-memory" if membership.one_host and device == "cpu" else several
        if kind == "hierarchical":
            return _hierarchical(membership, store, arena, by_host, most_hosts)
        if kind == "distributed":
            gloo = device != "cuda" or _gpus_are_shared()
            return DistributedGroup.begin(membership, store, where, "gloo" if gloo else "cpu:gloo,cuda:nccl")
        if not membership.one_host or device != "cpu":
            raise ConfigError(
                "the workers can't share memory",
                expected="CPU workers on one host",
                got=f"{device} workers",
                hint="use transport = 'distributed'",
            )
        return SharedMemoryGroup(membership, arena)
    except BaseException as error:
        membership.fail(error)
        membership.close()
        raise


def _hierarchical(
    membership: Membership, store: Store, arena: ProcessArena, by_host: list[list[int]] | None, most_hosts: int
) -> Group:
    if by_host is None or len(by_host) > most_hosts:
        raise ConfigError(
            "the workers can't be grouped by host",
            expected=f"2 to {most_hosts} hosts (virtual_workers), with equally many CPU workers each, at least 2",
            got=f"workers on {', '.join(membership.hosts)}",
            hint="use transport = 'auto', which chooses what fits",
        )
    mine = next(workers for workers in by_host if membership.rank in workers)
    place = mine.index(membership.rank)
    intra_host = SharedMemoryGroup(membership, arena, workers=mine)
    alike = [workers[place] for workers in by_host]
    inter_host = DistributedGroup.begin(
        membership, PrefixStore(f"place/{place}", store), intra_host.device, "gloo", 1, alike
    )
    return HierarchicalGroup(intra_host, inter_host, by_host)


def _gpu() -> torch.device:
    """This worker's; several have one where there are more workers than GPUs."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "the recipe asks for a GPU, and torch sees none here", expected="device = 'cpu'", got="'cuda'"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _gpus_are_shared() -> bool:
    """NCCL wants a GPU for every worker; Gloo takes what is on a GPU through the host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()


def _numbered_store(rank: int, size: int) -> Store:
    """The launcher's store, under a name of its own for each time that this process connects."""
    if "MASTER_ADDR" not in os.environ:
        if size == 1:
            return HashStore()
        raise ConfigError(
            "WORLD_SIZE is set, but MASTER_ADDR is not", hint="start the workers with manyhands run or torchrun"
        )
    store: Store = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=JOIN_SECONDS)))[0]
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    number = store.add(f"manyhands/{restart}/connections/{rank}", 1)
    return PrefixStore(f"manyhands/{restart}/{number}", store)
