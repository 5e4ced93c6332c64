"""Forward passes between two steps, which do not affect the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from manyhands.comm.group import Group
from manyhands.engine.step.buffers import Buffers
from manyhands.engine.step.call_seeds import CallSeeds
from manyhands.engine.units.unsharding import Unsharder
from manyhands.models.attributes import AttributeGuard
from manyhands.models.bf16_products import bf16_products_in_fp32
from manyhands.models.compiling import CompiledModules
from manyhands.models.modes import evaluation_mode, silent_in_evaluation
from manyhands.numerics.arithmetic import preserved_arithmetic
from manyhands.numerics.seeds import preserved_generators


class EvaluationMode:
    """The evaluation mode of an engine.

    In both kinds of block, all modules are in evaluation mode, and torch records no gradients. At the end of the block,
    the modes of the modules, their attributes, the buffers, the global generators and torch's global modes are as
    before.
    is_active: True inside such a block. failed: the exception that a block raised. After this exception the engine
    can't be used, whatever the number of workers, because peers may have missed a collective call.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        buffers: Buffers,
        attributes: AttributeGuard,
        unsharder: Unsharder,
        call_seeds: CallSeeds,
        compiled: CompiledModules,
    ) -> None:
        self._model, self._group, self._buffers, self._attributes = model, group, buffers, attributes
        self._unsharder, self._call_seeds, self._compiled = unsharder, call_seeds, compiled
        self._has_bf16 = any(param.dtype == torch.bfloat16 for param in model.parameters())
        self._silent = silent_in_evaluation(model)
        self._modules: list[nn.Module] = []
        self._put_back: Callable[[], bool] | None = None  # restores the attributes; None if forward changes none
        self.is_active = False
        self.failed: BaseException | None = None

    @contextmanager
    def free(self) -> Iterator[None]:
        """Context in which workers may call the model different numbers of times, or not at all. Collective."""
        # The unsharder is outermost, because its end waits for all workers.
        with self._failing_peers(), self._unsharder.evaluating(), self._untouched(self._has_bf16):
            yield

    @contextmanager
    def rounds(self) -> Iterator[None]:
        """Context for calls of `round`. Collective."""
        # torch compiles nothing under the dispatch mode that bf16 products need.
        with self._failing_peers(), self._untouched(self._has_bf16 and not self._compiled.names) as put_back:
            self._put_back = put_back
            self._modules = list(self._model.modules())  # walking the model takes as long as a small layer
            yield

    @contextmanager
    def round(self, tag: str, seed: int | None) -> Iterator[None]:
        """Context in which each worker computes at most one micro-batch. Collective.

        The micro-batch starts with the same buffers, attributes and modes of modules as every other micro-batch, and
        with generators that are seeded with `seed`. So it doesn't matter which worker computes it. seed: None if this
        worker has no micro-batch in this round.
        """
        self._unsharder.begin(tag, computes=seed is not None, backward=False)
        if seed is None:
            yield
        else:
            # The previous micro-batch may have left some modules in training mode.
            if any(module.training for module in self._modules):
                self._model.eval()
            with preserved_arithmetic(), self._call_seeds.micro_batch(seed, self._silent), self._compiled.computing():
                yield
            if self._put_back is not None and not self._put_back():
                self._put_back = None  # comparing attributes takes longer than a small forward pass
            self._attributes.restore()
            self._buffers.abort()
        self._unsharder.end_evaluation()

    @contextmanager
    def _untouched(self, bf16: bool) -> Iterator[Callable[[], bool]]:
        with (
            preserved_generators(),
            preserved_arithmetic(),
            self._buffers.preserved(),
            self._attributes.preserved() as put_back,
            evaluation_mode(self._model),
            bf16_products_in_fp32(bf16),
            torch.no_grad(),
        ):
            yield put_back

    @contextmanager
    def _failing_peers(self) -> Iterator[None]:
        self.is_active = True
        try:
            yield
        except BaseException as error:
            self.failed = error
            self._group.fail(error)  # peers may be waiting for this worker at the end of the block
            self._unsharder.abort()
            raise
        finally:
            self.is_active = False
