"""Runs the step hooks of the recipe's optimizers around the update, once per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from manyhands.engine.units.unsharding import Unsharder
from manyhands.models.admission import ParamGuard
from manyhands.numerics.counters import derive
from manyhands.numerics.seeds import preserved_generators, seed_generators
from manyhands.optim.fronts import have_step_hooks, note_step, run_post_hooks, run_pre_hooks


class StepHooks:
    """The step hooks of some optimizers. The hooks can read the full parameters, but must not change them.

    guard: checks the parameters. seed: the run's seed, from which the hooks' random numbers come.
    """

    def __init__(
        self, fronts: Sequence[torch.optim.Optimizer], unsharder: Unsharder, guard: ParamGuard, seed: int
    ) -> None:
        self._fronts, self._unsharder, self._guard, self._seed = fronts, unsharder, guard, seed

    @property
    def exist(self) -> bool:
        """Return True if any hook is registered on this worker."""
        return have_step_hooks(self._fronts)

    def before(self, batch_index: int) -> None:
        """Call the hooks that run before the update of this step. Collective. Raises ConfigError."""
        self._run(run_pre_hooks, batch_index)

    def after(self, batch_index: int, *, called: bool) -> None:
        """Call the hooks that run after the update of this step. Collective if they are called. Raises ConfigError.

        called: True if any worker has hooks. If no worker has hooks, only record that a step was made, because
        schedules would warn otherwise.
        """
        if called:
            self._run(run_post_hooks, batch_index)
        for front in self._fronts:
            note_step(front)

    def _run(self, run: Callable[[Sequence[torch.optim.Optimizer]], None], batch_index: int) -> None:
        with self._unsharder.unsharded(), preserved_generators():
            seed_generators(derive(self._seed, "hooks", batch_index))
            run(self._fronts)
            self._guard.after_backward()  # a change of a parameter would be lost, or differ between workers
