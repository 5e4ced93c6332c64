"""A group of one worker: every operation is the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manyhands.comm.group import AllToAll, Contribution, Group
from manyhands.errors import NO_POSITION, Position
from manyhands.members.reports import StatusFile, end_work, record_failure
from manyhands.offload.allocator import Allocator


class _OwnPiece(AllToAll):
    """This worker's own piece, or none if it contributes nothing."""

    def __init__(self, piece: Tensor | None) -> None:
        self._pieces = [] if piece is None else [piece]

    @property
    def is_complete(self) -> bool:
        return True

    def pieces(self) -> list[Tensor]:
        return self._pieces

    def release(self) -> None:
        pass

    def wait_reusable(self) -> None:
        pass


class LocalGroup(Group):
    """A group of one worker. status_file: the file that shows the worker's status to its launcher, or None."""

    kind = "local"
    shares_memory = False
    pieces_are_views = True

    def __init__(self, device: torch.device, status_file: StatusFile | None = None) -> None:
        super().__init__(0, 1, device)
        self._status_file = status_file
        self._position, self._has_failed = NO_POSITION, False

    def empty_replicated(self, numel: int, dtype: torch.dtype, allocator: Allocator | None = None) -> Tensor:
        return (allocator or Allocator(self.device)).empty(numel, dtype)

    def empty_contribution(self, numel: int, dtype: torch.dtype) -> Contribution:
        return Contribution(torch.zeros(numel, dtype=dtype, device=self.device))

    def all_to_all(
        self, contribution: Contribution, start: int, shard_numel: int, contributors: Sequence[int], tag: str
    ) -> AllToAll:
        self.recorder.add(tag, 0, 0.0)
        return _OwnPiece(contribution.local[start : start + shard_numel] if contributors else None)

    def all_gather(self, full: Tensor, tag: str) -> Callable[[], None]:
        self.recorder.add(tag, 0, 0.0)
        return lambda: None

    def all_gather_small(self, small: Tensor, tag: str) -> list[Tensor]:
        self.recorder.add(tag, 0, 0.0)
        return [small.clone()]

    def fail(self, error: BaseException) -> None:
        self._has_failed = True
        record_failure(error)

    def status(self, activity: str, step: int | None = None, micro_batch: int | None = None) -> None:
        if self._status_file is not None:
            self._position = Position(activity, step, micro_batch)
            self._status_file.record_position(self._position)

    def close(self) -> None:
        if self._status_file is not None:
            self._status_file.close(self._position if self._has_failed else NO_POSITION)
            self._status_file = None
            end_work()
