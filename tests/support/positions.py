"""The samples of a run in the default order, by position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import manyhands as mh
from manyhands.data.epochs import Epochs
from manyhands.data.sample_order import RandomOrder


def sample_indices(seed: int, size: int, positions: Sequence[int]) -> NDArray[np.int64]:
    """The indices of the samples at these positions of the run, for data of `size` samples."""
    return np.array(RandomOrder(size, seed).at(positions), dtype=np.int64)


def micro_batch_positions(step: int, micro_batch: int, batch: mh.Batch) -> range:
    """The positions of a micro-batch's samples in the run."""
    return Epochs(1, batch, "join").positions(step, micro_batch)
