"""The outer step of islands: publish an island's round, add the rounds of all islands, and take in the result.

A parameter starts with a block of 1,024 elements, and so does every shard. The codec's blocks of 256 elements divide
these. So each worker encodes and decodes the elements that it holds, whatever the sharding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from manyhands.checkpoint.extra_state import modules_with_state
from manyhands.engine.units.unit import Unit
from manyhands.engine.update.companions import OUTER, PUBLISHED, RESIDUAL, VELOCITY
from manyhands.engine.update.updater import Part
from manyhands.errors import ConfigError, NumericsError
from manyhands.islands import Averaging, Islands, Nesterov, Round
from manyhands.numerics.digest import block_norms
from manyhands.rounds.codec import NotFiniteError, codes_bytes, decode_add, encode, num_blocks
from manyhands.rounds.layout import RoundIdentity, RoundLayout
from manyhands.rounds.round_file import RoundFile, RoundFileWriter
from manyhands.shard_layout import BLOCK, Range
from manyhands.training.engine import Engine

CHUNK = 256 * BLOCK
"""The number of elements that are encoded or decoded at a time, so that they stay in a core's cache."""


class OuterStep:
    """The outer steps of an engine. All methods are collective.

    Raises ConfigError for a model with state that islands can't synchronize. fingerprint: the recipe's, which every
    file of a round has. buffers: the model's buffers, as all islands share them.
    """

    def __init__(self, engine: Engine, islands: Islands, fingerprint: str) -> None:
        refuse_unsupported(engine)
        self._engine, self._islands, self._fingerprint = engine, islands, fingerprint
        self.buffers = {name: buffer.clone() for name, buffer in engine.buffers.named().items()}

    def begin(self) -> None:
        """Make the engine's weights the weights that all islands share, before the first round."""
        for unit, within in self._held():
            for part in self._engine.updater.parts(unit, within):
                part.companions[OUTER].copy_(part.master)

    def identity(self, number: int, island: int) -> RoundIdentity:
        """Return the identity of a file."""
        return RoundIdentity(fingerprint=self._fingerprint, round=number, island=island)

    def layout(self, of: Round) -> RoundLayout:
        """Return the layout of a round's files.

        They hold weights if the round is averaged without a codec, and otherwise changes of weights.
        """
        is_mean_of_weights = self._islands.bits == 32 and isinstance(of.outer, Averaging)
        buffers = [(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in self.buffers.items()]
        return RoundLayout(
            params=self._engine.trained,
            buffers=buffers,
            bits=self._islands.bits,
            kind="weights" if is_mean_of_weights else "delta",
        )

    def publish(self, of: Round, path: Path) -> None:
        """Write the file of the engine's island for a round. Only worker 0 writes. Raises NumericsError."""
        engine, layout = self._engine, self.layout(of)
        group = engine.group
        writer = RoundFileWriter(path, layout, self.identity(of.number, engine.island)) if group.rank == 0 else None
        for unit in engine.units:
            mine = torch.cat(
                [self._encoded(part, layout, of) for part in engine.updater.parts(unit, unit.shard)]
                or [torch.empty(0, dtype=torch.uint8)]
            )
            sizes = [self._encoded_bytes(unit, rank, layout) for rank in range(group.size)]
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: len(mine)] = mine
            received = group.all_gather_small(padded, f"round {of.number} / {unit.name} / delta") if max(sizes) else []
            if writer is not None:
                for rank, encoded in enumerate(received):
                    self._place(encoded, unit, rank, writer, layout)
        if writer is not None:
            for name, buffer in engine.buffers.named().items():
                writer.buffer(name).copy_(buffer)
            writer.publish()
        for unit, within in self._held():
            for part in engine.updater.parts(unit, within):
                if PUBLISHED in part.companions:
                    part.companions[PUBLISHED].copy_(part.master)

    def _encoded(self, part: Part, layout: RoundLayout, of: Round) -> Tensor:
        """Return what this worker publishes of a part, as bytes: codes and then scales, or values."""
        if layout.kind == "weights":
            weights = part.master.cpu()
            self._check_finite(weights, part, 0, of)
            return _as_bytes(weights)
        encoded = []
        for start in range(0, part.master.numel(), CHUNK):
            chunk = slice(start, start + CHUNK)
            delta = torch.sub(part.companions[OUTER][chunk], part.master[chunk]).cpu()
            if layout.bits == 32:
                self._check_finite(delta, part, start, of)
                encoded.append(_as_bytes(delta))
                continue
            codes = torch.empty(codes_bytes(delta.numel(), layout.bits), dtype=torch.uint8)
            scales = torch.empty(num_blocks(delta.numel()), dtype=torch.bfloat16)
            residual = part.companions.get(RESIDUAL)
            mine = None if residual is None else residual[chunk].cpu()
            try:
                encode(delta, layout.bits, codes, scales, mine)
            except NotFiniteError as error:
                raise self._not_finite(part, start + error.index, of) from error
            if residual is not None and mine is not None and mine is not residual[chunk]:
                residual[chunk].copy_(mine)
            encoded += [codes, _as_bytes(scales)]
        return torch.cat(encoded)

    def _check_finite(self, values: Tensor, part: Part, start: int, of: Round) -> None:
        wrong = torch.nonzero(~values.isfinite())
        if len(wrong):
            raise self._not_finite(part, start + int(wrong[0]), of)

    def _not_finite(self, part: Part, index: int, of: Round) -> NumericsError:
        """Return the error for an element of a part that can't be published."""
        return NumericsError(
            f"the change of {part.name!r} in a round is not finite, or too large",
            where=f"island {self._engine.island}, round {of.number} (steps {of.start + 1} to {of.end}), "
            f"element {part.start + index}",
            hint="lower the learning rate, or set clip_norm",
        )

    def _encoded_bytes(self, unit: Unit, rank: int, layout: RoundLayout) -> int:
        pieces = unit.layout.pieces(unit.layout.shard(rank))
        return sum(_bytes_of(piece.in_unit.numel, layout) for piece in pieces)

    def _place(self, encoded: Tensor, unit: Unit, rank: int, writer: RoundFileWriter, layout: RoundLayout) -> None:
        """Write what a worker encoded of a unit to its places in the file."""
        at = 0

        def take(num_bytes: int) -> Tensor:
            nonlocal at
            at += num_bytes
            return encoded[at - num_bytes : at]

        for piece in unit.layout.pieces(unit.layout.shard(rank)):
            name, within = piece.slot.name, piece.in_param
            if layout.bits == 32:
                _as_bytes(writer.values(name)[within.start : within.end]).copy_(take(4 * within.numel))
                continue
            for start in range(within.start, within.end, CHUNK):
                numel = min(CHUNK, within.end - start)
                size, first = codes_bytes(numel, layout.bits), codes_bytes(start, layout.bits)
                writer.codes(name)[first : first + size].copy_(take(size))
                count, block = num_blocks(numel), num_blocks(start)
                _as_bytes(writer.scales(name)[block : block + count]).copy_(take(2 * count))

    def collect(self, of: Round, files: Sequence[RoundFile]) -> float | None:
        """Make the outer step that follows from the files of all islands, in the order of the islands.

        Return how much the islands agree: |mean of the changes|^2 / mean of |change|^2, which is 1 if all changes are
        equal, and 1 / islands if they are unrelated; None if there was no change.
        """
        engine, layout = self._engine, self.layout(of)
        norms: list[list[Tensor]] = [[] for _ in range(len(files) + 1)]
        for unit, within in self._held():
            of_unit = [torch.zeros(unit.shard.numel // BLOCK) for _ in norms]
            for part in engine.updater.parts(unit, within):
                for start in range(0, part.master.numel(), CHUNK):
                    changes = self._outer_step(of, part, start, files, layout)
                    first = part.in_unit.start + start
                    blocks = Range(first, first + -(-changes.shape[1] // BLOCK) * BLOCK)
                    _store_norms(changes, blocks, unit.shard, of_unit)
            for each, found in zip(norms, of_unit, strict=True):
                each.append(found)
        tag = f"round {of.number} / agreement / control"
        squares = [float(engine.updater.in_block_order(mine, tag).double().square().sum()) for mine in norms]
        for name in self.buffers:
            merged = engine.buffers.merged(name, [file.buffer(name) for file in files])
            self.buffers[name] = merged.to(self.buffers[name].device)
        return len(files) * squares[0] / sum(squares[1:]) if any(squares[1:]) else None

    def _outer_step(self, of: Round, part: Part, start: int, files: Sequence[RoundFile], layout: RoundLayout) -> Tensor:
        """Make the outer step for a chunk of a part. Return the mean change and each island's, [1 + islands, numel].

        Every product and every sum is an operation of its own, because fused operations round differently, and torch
        uses them for some elements only.
        """
        chunk = slice(start, start + CHUNK)
        outer = part.companions[OUTER][chunk]
        before, numel, first = outer.cpu(), outer.numel(), part.start + start
        changes = torch.zeros(1 + len(files), numel)
        mean = changes[0]
        for file, change in zip(files, changes[1:], strict=True):
            if layout.bits == 32:
                change.copy_(file.values(part.name)[first : first + numel])
            else:
                decode_add(change, file.codes(part.name), file.scales(part.name), layout.bits, first)
        mean.copy_(changes[1])
        for change in changes[2:]:
            mean.add_(change)
        mean.div_(len(files))
        if layout.kind == "weights":
            result = mean.clone()
            torch.sub(before, changes, out=changes)
        else:
            result = before.clone()
            if isinstance(of.outer, Nesterov):
                velocity = part.companions[VELOCITY][chunk]
                now = velocity.cpu().mul_(of.outer.momentum).add_(mean)
                velocity.copy_(now)
                result.sub_(now.mul(of.outer.momentum).add_(mean).mul_(of.outer.lr))
            else:
                result.sub_(mean)
        outer.copy_(result)
        return changes

    def take_in(self) -> None:
        """Make the engine's island begin with the weights that all islands share.

        With a delay, the island keeps the change that it has made since it published its weights.
        """
        engine, delayed = self._engine, self._islands.delay > 0

        def change(master: Tensor, companions: object) -> None:
            outer, published = companions[OUTER], companions.get(PUBLISHED)  # type: ignore[index, attr-defined]
            if delayed:
                master.add_(torch.sub(outer, published))
            else:
                master.copy_(outer)

        with engine.changing():
            engine.updater.change_weights(change, f"step {engine.step_index} / outer weights")
            for name, buffer in engine.buffers.named().items():
                buffer.copy_(self.buffers[name])
            if self._islands.inner_state == "reset":
                for piece, _ in engine.updater.slices:
                    engine.optimizer.load_state_of(piece, {})
        engine.weights_changed()

    @contextmanager
    def shared(self, step: int) -> Iterator[None]:
        """Context in which the engine has the weights and buffers that all islands share, after `step` steps.

        Validations and checkpoints are of these.
        """
        own = self._engine.step_index
        self.exchange(step)
        yield
        self.exchange(own)

    def exchange(self, step: int) -> None:
        """Exchange the island's weights and buffers with those that all islands share. Set the step.

        A second call restores both, bit for bit. A checkpoint that was saved in `shared` holds the exchanged state, so
        loading it must be followed by one call.
        """
        engine = self._engine
        with engine.changing():
            engine.updater.exchange_with(OUTER, f"step {engine.step_index}")
            for name, buffer in engine.buffers.named().items():
                mine = buffer.clone()
                buffer.copy_(self.buffers[name])
                self.buffers[name] = mine
            engine.step_index = step
        engine.weights_changed()

    def _held(self) -> Iterator[tuple[Unit, Range]]:
        for unit in self._engine.units:
            yield unit, unit.held


def refuse_unsupported(engine: Engine) -> None:
    """Raise ConfigError if the islands could not synchronize all state of the model."""
    if names := [name for name, _ in modules_with_state(engine.model)]:
        raise ConfigError(
            "islands don't support modules with a state of their own (get_extra_state)",
            expected="a model whose state is in parameters and buffers",
            got=", ".join(names[:5]),
        )


def _bytes_of(numel: int, layout: RoundLayout) -> int:
    """Return the number of bytes of an encoded part."""
    return 4 * numel if layout.bits == 32 else codes_bytes(numel, layout.bits) + 2 * num_blocks(numel)


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _store_norms(changes: Tensor, blocks: Range, shard: Range, found: Sequence[Tensor]) -> None:
    """Store the norms of the changes' blocks that are in this worker's shard."""
    mine = blocks.overlap(shard)
    if not mine.numel:
        return
    padded = changes
    if changes.shape[1] < blocks.numel:  # the last block of a parameter is incomplete
        padded = torch.zeros(len(changes), blocks.numel)
        padded[:, : changes.shape[1]] = changes
    for each, out in zip(padded, found, strict=True):
        norms = block_norms(each[mine.start - blocks.start : mine.end - blocks.start])
        out[(mine.start - shard.start) // BLOCK : (mine.end - shard.start) // BLOCK] = norms
