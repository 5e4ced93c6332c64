"""Connects this worker to its group, as the launcher's environment variables specify."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from datetime import timedelta

import torch
from torch.distributed import HashStore, PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from manyhands.comm.distributed import DistributedGroup
from manyhands.comm.group import Group
from manyhands.comm.hierarchical import HierarchicalGroup, workers_by_host
from manyhands.comm.local import LocalGroup
from manyhands.comm.process_arena import ProcessArena
from manyhands.comm.shared_memory import SharedMemoryGroup
from manyhands.errors import ConfigError
from manyhands.members.exit_hooks import ExitHooks, end_process
from manyhands.members.membership import JOIN_SECONDS, Membership
from manyhands.members.reports import StatusFile, begin_work, end_work, forget_failure
from manyhands.surroundings import environment_rank_and_size


def connect(
    kind: str = "auto",
    *,
    device: str = "cpu",
    stall_seconds: float = 600.0,
    max_hosts: int = 0,
) -> Group:
    """Connect this process to the other workers of its launcher and return the group. Collective.

    kind: "auto", "shared-memory", "distributed" or "hierarchical" (see Strategy.transport).
    stall_seconds: how long a worker may keep its peers waiting before they report that it has stalled.
    max_hosts: the largest number of hosts for which gradients are first added inside each host.

    A worker that does not raise a peer's failure within the grace period, for example because it hangs, is killed.
    Raises ConfigError, WorkerError.
    """
    forget_failure()
    begin_work()
    rank, size = environment_rank_and_size()
    torch_device = _gpu() if device == "cuda" else torch.device(device)
    if size <= 1 and kind != "distributed":
        return LocalGroup(torch_device, StatusFile.for_parent(stall_seconds))
    if not sys.platform.startswith("linux"):
        raise ConfigError(
            "more than one worker requires Linux", got=sys.platform, hint="on other systems, use one worker"
        )
    store = _numbered_store(rank, size)
    arena = ProcessArena()
    requested = f"transport {kind} on {device}"
    membership = Membership(
        store, rank, size, arena, stall_seconds=stall_seconds, abandon=end_process, requested=requested
    )
    ExitHooks(membership)
    membership.at_close.append(end_work)
    try:
        by_host = workers_by_host(membership.hosts) if device == "cpu" else None
        if kind == "auto":
            for_several_hosts = "hierarchical" if by_host is not None and len(by_host) <= max_hosts else "distributed"
            kind = "shared-memory" if membership.one_host and device == "cpu" else for_several_hosts
        if kind == "hierarchical":
            return _hierarchical(membership, store, arena, by_host, max_hosts)
        if kind == "distributed":
            nccl = device == "cuda" and not _gpus_are_shared()
            return DistributedGroup(membership, PrefixStore("group", store), torch_device, nccl=nccl)
        if not membership.one_host or device != "cpu":
            raise ConfigError(
                "these workers cannot share memory",
                expected="CPU workers on one host",
                got=f"{device} workers on {', '.join(membership.hosts)}",
                hint="use transport = 'distributed'",
            )
        return SharedMemoryGroup(membership, arena)
    except BaseException as error:
        membership.fail(error)  # do this before leaving, because peers would otherwise report that this worker has left
        membership.close()
        raise


def _hierarchical(
    membership: Membership, store: Store, arena: ProcessArena, by_host: list[list[int]] | None, max_hosts: int
) -> Group:
    if by_host is None or len(by_host) > max_hosts:
        raise ConfigError(
            "these workers cannot be grouped by host",
            expected=f"2 to {max_hosts} hosts (virtual_workers), each with the same number (2 or more) of CPU workers",
            got=f"workers on {', '.join(membership.hosts)}",
            hint="use transport = 'auto', which chooses a suitable transport",
        )
    mine = next(workers for workers in by_host if membership.rank in workers)
    position = mine.index(membership.rank)
    intra_host = SharedMemoryGroup(membership, arena, workers=mine)
    peers = [workers[position] for workers in by_host]
    inter_host = DistributedGroup(
        membership, PrefixStore(f"position/{position}", store), intra_host.device, channel=1, workers=peers
    )
    return HierarchicalGroup(intra_host, inter_host, by_host)


def _gpu() -> torch.device:
    """Return this worker's GPU. If there are more workers than GPUs, several workers share one. Raises ConfigError."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "the recipe requires a GPU, but torch finds none on this host",
            expected="device = 'cpu'",
            got="device = 'cuda'",
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _gpus_are_shared() -> bool:
    """Return True if workers of this host share a GPU. NCCL requires one GPU per worker; Gloo does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()


def _numbered_store(rank: int, size: int) -> Store:
    """Connect to the launcher's store, with a key prefix for this connection. Raises ConfigError.

    A process may connect several times (one engine after another). The prefix keeps a connection from seeing the keys
    of an earlier one. It contains the number of restarts if the store is the launcher's, which lasts longer than the
    workers. Otherwise the store ends with worker 0, and the number is left out: each launcher counts only the failures
    of its own workers, so the launchers of several hosts may have different numbers.
    """
    if "MASTER_ADDR" not in os.environ:
        if size == 1:
            return HashStore()
        raise ConfigError(
            "WORLD_SIZE is set, but MASTER_ADDR is not", hint="start the workers with `manyhands run` or torchrun"
        )
    server = _listen_on_one_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if rank == 0 else None
    store: Store = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=JOIN_SECONDS)))[0]
    del server  # from here on, torch's store keeps the server alive
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if of_launcher else "0"
    number = store.add(f"manyhands/{restart}/connections/{rank}", 1)
    return PrefixStore(f"manyhands/{restart}/{number}", store)


def _listen_on_one_address(host: str, port: int) -> TCPStore | None:
    """Serve the store on `host` alone, if that is an address of this host. torch would listen on all addresses.

    Returns None if the launcher or this process serves the store already. Also returns None if `host` is a name,
    because other hosts may resolve it to another address.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (ValueError, OSError):  # a name, an address that is forwarded to this host, or a port that is in use
        return None  # torch uses the server of this process, or listens itself and reports a port in use
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=JOIN_SECONDS),
        multi_tenant=True,  # the store that torch creates for rank 0 shares this server
        master_listen_fd=listener.detach(),
    )
