"""Engine: the engine as users hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

from manyhands.checkpoint.format import Manifest, folder_name
from manyhands.checkpoint.initial import load_initial
from manyhands.checkpoint.load import load_checkpoint
from manyhands.checkpoint.save import Saving, begin_checkpoint
from manyhands.checkpoint.snapshot import SnapshotMemory, load_snapshot
from manyhands.comm.connect import connect
from manyhands.comm.group import Group
from manyhands.config import Recipe, Strategy, Weights
from manyhands.data.loader import LoadedBatch, MicroBatchLoader
from manyhands.engine.engine import StepEngine
from manyhands.engine.sharding import SHARDED, sharding_named
from manyhands.engine.step.metrics import StepMetrics
from manyhands.errors import CheckpointError, Interrupted, InvariantError
from manyhands.storage.location import Location, location_of


class StepBatch(NamedTuple):
    """One step's data on this worker: its micro-batches, read when the step wants them."""

    step: int
    stream: Iterator[LoadedBatch]


class Engine(StepEngine):
    """Trains a recipe's model, one step at a time, together with the other workers of this program's launcher.

        engine = Engine(recipe, Strategy(sharding="zero2"))
        for batch in engine.batches(steps=100):
            metrics = engine.step(batch)
        engine.close()

    Making one, `step`, `evaluating`, `save`, `load`, `digest`, `full_state_dict` and `close` are collective. A group is
    given only to run workers as threads (tests); otherwise it comes from the launcher's environment.
    resumes: a checkpoint will be loaded before the first step, so of the recipe's initial weights only frozen
    parameters are read, which it lacks. weights_read_bytes: what this worker has read of the recipe's initial weights.
    Raises ConfigError, DataError.
    """

    def __init__(
        self,
        recipe: Recipe,
        strategy: Strategy | None = None,
        group: Group | None = None,
        *,
        resumes: bool = False,
    ) -> None:
        strategy = strategy or Strategy()
        self._awaits_checkpoint = resumes
        self._loader: MicroBatchLoader | None = None
        self._saving: Saving | None = None
        # Each host would have all of what the sharding shards over all: only if it's asked for.
        whole_on_hosts = strategy.transport != "auto" or sharding_named(strategy.sharding).param is not SHARDED
        own = group or connect(
            strategy.transport,
            device=recipe.device,
            stall_seconds=strategy.stall_seconds,
            most_hosts=recipe.batch.virtual_workers if whole_on_hosts else 0,
        )
        try:
            self._loader = MicroBatchLoader(recipe, strategy.loader_workers)
            super().__init__(recipe, strategy, own)
            self.weights_read_bytes = self._load_initial(recipe.initial_weights, resumes)
        except BaseException as error:
            own.fail(error)
            own.close()
            raise

    def _load_initial(self, weights: Weights | None, resumes: bool) -> int:
        try:
            return 0 if weights is None else load_initial(self, weights, resumes=resumes)
        except BaseException:
            self.allocator.close()
            raise

    def batches(self, steps: int | None = None) -> Iterator[StepBatch]:
        """The data of the steps from here on: until `steps` have been made altogether, or forever."""
        stream: Iterator[LoadedBatch] | None = None
        expected = -1
        while steps is None or self.step_index < steps:
            if stream is None or self.step_index != expected:  # a checkpoint was loaded meanwhile
                stream = self._stream(self.step_index, steps)
            expected = self.step_index + 1
            yield StepBatch(self.step_index, stream)

    def _stream(self, first: int, steps: int | None) -> Iterator[LoadedBatch]:
        if self._loader is None:
            raise InvariantError("the engine was closed")
        numbers = count(first) if steps is None else range(first, steps)
        return self._loader.stream((step, micro_batch) for step in numbers for micro_batch in self.my_micro_batches)

    def step(self, batch: StepBatch, *, digest: bool = False) -> StepMetrics:
        """Make the next step. Collective. See `run_step` for what is raised."""
        self._refuse_without_checkpoint()

        def load(micro_batch: int) -> Any:
            loaded = next(batch.stream, None)
            if loaded is None or (loaded.step, loaded.micro_batch) != (self.step_index, micro_batch):
                raise InvariantError(
                    "the engine was given another step's batch",
                    expected=f"step {self.step_index}, micro-batch {micro_batch}",
                    got="none left" if loaded is None else f"step {loaded.step}, micro-batch {loaded.micro_batch}",
                    hint="give each batch of batches() to step() once, in order",
                )
            return loaded.batch

        return self.run_step(load, digest=digest)

    def save(
        self,
        folder: str | Location,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        published: Callable[[Location], None] | None = None,
    ) -> Location:
        """Write a checkpoint below `folder`, which may be an address (s3://bucket/folder), and return where it is.
        Collective.

        keep, keep_every: leave the last `keep` there, and those of every `keep_every`-th step (default: all).
        published: called on worker 0, in the thread that writes, as soon as it's there (not, if it was there before).
        Raises CheckpointError, alike on all workers; the engine may go on then.
        """
        self.begin_save(folder, keep=keep, keep_every=keep_every, published=published)
        self.finish_save()
        return location_of(folder) / folder_name(self.step_index)

    def begin_save(
        self,
        folder: str | Location,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        published: Callable[[Location], None] | None = None,
    ) -> None:
        """As `save`, but steps may go on while it's written: what the state is now is copied. Collective.

        Waits for the one before, as `finish_save` does.
        """
        self.check_usable()
        self._refuse_without_checkpoint()
        self.finish_save()
        try:
            self._saving = begin_checkpoint(
                self, location_of(folder), keep=keep, keep_every=keep_every, published=published
            )
        except CheckpointError:
            raise  # on all workers
        except BaseException as error:
            self.group.fail(error)
            raise

    def finish_save(self) -> Location | None:
        """Wait until what `begin_save` began is published, and return its path (None: nothing was). Collective.

        Raises CheckpointError, alike on all workers.
        """
        saving, self._saving = self._saving, None
        return None if saving is None else saving.wait()

    @property
    def is_saving(self) -> bool:
        """Whether this worker still writes, or waits to publish, what `begin_save` began."""
        return self._saving is not None and not self._saving.is_done

    def load(self, checkpoint: str | Location, *, accept_new_numerics: bool = False) -> Manifest:
        """Go on from a checkpoint, whatever number of workers and sharding it was saved with. Collective.

        Raises CheckpointError, NumericsError.
        """
        place = location_of(checkpoint)
        return self._restored(lambda: load_checkpoint(self, place, accept_new_numerics=accept_new_numerics))

    def load_snapshot(self, memory: SnapshotMemory) -> Manifest:
        """Go on from the last snapshot in that memory. Collective."""
        return self._restored(lambda: load_snapshot(self, memory))

    def _restored(self, load: Callable[[], Manifest]) -> Manifest:
        try:
            manifest = load()
        except BaseException as error:  # perhaps on this worker alone (a damaged file)
            self.group.fail(error)
            raise
        self._awaits_checkpoint = False
        return manifest

    def _refuse_without_checkpoint(self) -> None:
        if self._awaits_checkpoint:
            raise InvariantError("the engine was made to load a checkpoint first (resumes=True), and hasn't")

    def close(self) -> None:
        """Finish a checkpoint that was begun, leave the group and end loader processes. Collective, unless a worker
        failed. Raises CheckpointError."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None
        try:
            self.finish_save()
        finally:
            super().close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, Interrupted):  # that one, all workers raise together
            self.group.fail(error)
            if self._saving is not None:
                self._saving.abandon()
                self._saving = None
        self.close()
