"""PartReader: reads one part of a stream, sample by sample, in passes, from any state that the data can restore."""

from __future__ import annotations

import copy
import hashlib
import json
import operator
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data._utils import worker as torch_worker

from manyhands.data.permutation import Permutation
from manyhands.errors import DataError, ManyhandsError
from manyhands.numerics.counters import derive
from manyhands.numerics.seeds import seed_generators
from manyhands.numerics.values import plain_values
from manyhands.streams import Stream, has_shards

MARK_SAMPLES = 64
"""The number of samples between two marks, and so about how many samples a resumed run reads again from each part."""

_KEPT_MARKS = 16

_MAX_STATE_CHARACTERS = 1 << 20
"""A longer state of the data is not kept, because the manifest of a checkpoint has those of all parts."""

_MAX_INNER = 100
"""A longer list in an attribute of the data is not searched for data sets."""


class Mark(NamedTuple):
    """A position in a part, from which reading can continue.

    run_pass: the pass, counted from 0.
    place: the number of samples of this pass that lie before the position.
    taken: the number of samples of all passes together that lie before the position.
    state: the state of the data at the position, as JSON; None if the data have no state.
    sample: the hash of the sample at the position. It shows whether the data restore their state exactly.
    """

    run_pass: int
    place: int
    taken: int
    state: str | None = None
    sample: str = ""


BEGINNING = Mark(0, 0, 0)


class StreamError(DataError):
    """A part of a stream can't be read. The error names the sample."""


class PartReader:
    """Reads the samples of one part in order. Going back is possible, too, but may take as long as reading anew.

    A sample is a function of (part, pass, index): the global random generators are seeded before it is read. With
    `stream.shuffle`, samples are read in blocks, and each block is permuted.

    run_pass: the pass of the next sample. index: the number of samples of this pass before it. taken: the number of
    samples of all passes together before it.
    """

    def __init__(self, stream: Stream, part: int, parts: int, seed: int) -> None:
        self._stream, self._part, self._parts, self._seed = stream, part, parts, seed
        self._has_shards = has_shards(stream.data)
        self._acts_as_worker = parts > 1 and stream.is_divided_by_its_data
        self._length = None if stream.lengths is None else stream.lengths[part]
        self._block_size = stream.shuffle or 1
        self._marks: deque[Mark] = deque(maxlen=_KEPT_MARKS)
        self._base, self._new_marks = BEGINNING, [BEGINNING]
        self._restores_exactly = True  # until shown otherwise
        self.run_pass = self.index = self.taken = 0
        self._close()

    def restore(self, base: Mark) -> None:
        """Forget all marks, and go back to `base` at most."""
        self._marks.clear()
        self._base, self._new_marks = base, [base]
        self._close()
        self.run_pass, self.index, self.taken = base[:3]

    def new_marks(self) -> list[Mark]:
        """Return the marks made since the last call."""
        marks, self._new_marks = self._new_marks, []
        return marks

    def seek(self, run_pass: int, index: int) -> None:
        """Move to a sample of a pass. Raises StreamError if the pass ends before it."""
        if run_pass != self.run_pass or index < self.index:
            known = [mark for mark in (self._base, *self._marks) if mark.run_pass == run_pass and mark.place <= index]
            self._start(max(known, key=lambda mark: mark.place, default=Mark(run_pass, 0, 0)))
        self._pass_over(index)

    def seek_taken(self, taken: int) -> None:
        """Move to the sample before which `taken` samples are read, in all passes together."""
        if taken < self.taken:
            known = [mark for mark in (BEGINNING, self._base, *self._marks) if mark.taken <= taken]
            self._start(max(known, key=lambda mark: mark.taken))
        while self.taken < taken:
            self.take_or_repeat()

    def has_next(self) -> bool:
        """Return True if the current pass has a next sample."""
        if self._iterator is None and self.index:  # after `restore`, or after the data have raised
            index = self.index
            self._start(self._last_mark())
            self._pass_over(index)
        if not self._block and not self._is_at_end:
            self._fill()
        return bool(self._block)

    def take(self) -> Any:
        """Return the next sample of the current pass. Raises StreamError if there is none."""
        if not self.has_next():
            raise self._ended_before(self.index + 1)
        item = self._block.popleft()
        self.index, self.taken = self.index + 1, self.taken + 1
        if self.index == self._length and self.has_next():
            raise StreamError(
                "a part of the stream has more samples than its length",
                where=f"part {self._part}, pass {self.run_pass}",
                expected=f"{self._length} samples (stream.lengths)",
                got="more",
            )
        return item

    def take_or_repeat(self) -> Any:
        """Return the next sample. At the end of the pass, begin the next pass."""
        if not self.has_next():
            if self.index < (self._length or 1):
                raise self._ended_before(self._length or 1)
            self._start(Mark(self.run_pass + 1, 0, self.taken))
            self._add_mark(Mark(self.run_pass, 0, self.taken))
            return self.take_or_repeat()
        return self.take()

    def first_hashes(self, count: int) -> list[str]:
        """Return the hashes of the first samples, at most `count`. For a reader that is used for nothing else."""
        return [_hash_of(self.take()) for _ in range(count) if self.has_next()]

    def _pass_over(self, index: int) -> None:
        while self.index < index:
            self.take()

    def _ended_before(self, index: int) -> StreamError:
        hint = "every iteration over the data must give the same samples; stream.lengths, if set, must be right"
        if not self.index and not self.run_pass and not self._length:
            hint = 'a part without samples can\'t repeat: use at_end="together", or give each part samples'
        return StreamError(
            "a part of the stream has too few samples",
            where=f"part {self._part}, pass {self.run_pass}",
            expected=f"at least {self._length or index}",
            got=self.index,
            hint=hint,
        )

    def _start(self, mark: Mark) -> None:
        """Continue at a mark. Without an exact state, read its pass from the beginning."""
        self._close()
        self.run_pass, self.index, self.taken = mark[:3]
        if mark.state is not None and self._restores_exactly:
            with suppress(Exception):  # the data can't load their state, or fail at this moment
                self._open(mark.state)
                if self._fill(hashes=True) == mark.sample:
                    return
                self._restores_exactly = False
            self._close()
        self.index, self.taken = 0, mark.taken - mark.place
        self._pass_over(mark.place)

    def _close(self) -> None:
        self._data: Any = None
        self._iterator: Any = None
        self._block: deque[Any] = deque()
        self._is_at_end = False
        self._next_mark = 0  # the index from which on the next mark is due

    def _open(self, state: str | None = None) -> None:
        """Begin to iterate over the part: from the beginning of the pass, or from a state."""
        self._next_mark = self._last_mark().place + MARK_SAMPLES
        with self._as_worker():
            self._data = self._fresh_data()
            if hasattr(self._data, "set_epoch"):
                self._data.set_epoch(self.run_pass)
            if state is not None and hasattr(self._data, "load_state_dict"):
                self._data.load_state_dict(json.loads(state))
            self._iterator = iter(self._data)
            if state is not None and not hasattr(self._data, "load_state_dict"):
                self._iterator.load_state_dict(json.loads(state))

    def _fresh_data(self) -> Any:
        """Return an object whose state belongs to one iteration over the part."""
        data = self._stream.data
        if isinstance(data, (list, tuple)):
            return _own(data[self._part], {})
        if self._has_shards:
            return data.shard(num_shards=self._parts, index=self._part)
        return _own(data(self._part, self._parts) if self._stream.is_function else data, {})

    @contextmanager
    def _as_worker(self) -> Iterator[None]:
        """Let torch's `get_worker_info()` return the part in this block, or None if the parts are objects of their own.

        Otherwise it would return the loader process, and the samples would depend on the number of these processes.
        """
        before, info = torch_worker._worker_info, None
        if self._acts_as_worker:
            seed, data = derive(self._seed, "stream worker", self._part), self._stream.data
            info = torch_worker.WorkerInfo(id=self._part, num_workers=self._parts, seed=seed, dataset=data)
        torch_worker._worker_info = info
        try:
            yield
        finally:
            torch_worker._worker_info = before

    def _fill(self, *, hashes: bool = False) -> str:
        """Read the next block. Add a mark of its beginning if the last mark is not recent.

        hashes: return the hash of the block's first sample, before the block is shuffled.
        """
        if self._iterator is None:
            try:
                self._open()
            except Exception as error:
                self._close()
                raise self._raised(error, self.index) from error
        is_due = self.index >= self._next_mark
        try:
            state = _state_of(self._data, self._iterator) if is_due else None
            block = self._read_block()
        except BaseException:
            self._close()  # a generator ends when it raises an error, which must not look like the end of the part
            raise
        first = _hash_of(block[0]) if block and (hashes or state is not None) else ""
        if is_due and block:
            self._add_mark(Mark(self.run_pass, self.index, self.taken, state, first))
            self._next_mark = self.index + MARK_SAMPLES
        if self._stream.shuffle is not None and len(block) > 1:
            seed = derive(self._seed, "stream order", self._part, self.run_pass, self.index)
            block = [block[place] for place in Permutation(len(block), seed).take(np.arange(len(block))).tolist()]
        self._block.extend(block)
        return first

    def _read_block(self) -> list[Any]:
        block: list[Any] = []
        with self._as_worker():
            while len(block) < self._block_size:
                seed_generators(derive(self._seed, "stream", self._part, self.run_pass, self.index + len(block)))
                try:
                    block.append(next(self._iterator))
                except StopIteration:
                    self._is_at_end = True
                    break
                except Exception as error:
                    raise self._raised(error, self.index + len(block)) from error
        return block

    def _raised(self, error: Exception, index: int) -> StreamError:
        where, text = f"part {self._part}, pass {self.run_pass}, sample {index}", str(error)
        if isinstance(error, ManyhandsError):
            where, text = f"{where}: {error.where}", error.what
        return StreamError(
            f"recipe.data raised {type(error).__name__}: {text}",
            where=where,
            hint="to reproduce the error, iterate over the data yourself; the traceback is above or below this message",
        )

    def _last_mark(self) -> Mark:
        """Return the last mark of this pass that is not after the next sample."""
        known = [mark for mark in (self._base, *self._marks) if mark.run_pass == self.run_pass]
        before = [mark for mark in known if mark.place <= self.index]
        return max(before, key=lambda mark: mark.place, default=Mark(self.run_pass, 0, self.taken - self.index))

    def _add_mark(self, mark: Mark) -> None:
        if mark not in self._marks:
            self._marks.append(mark)
            self._new_marks.append(mark)


def _own(data: Any, copies: dict[int, Any]) -> Any:
    """Return a copy of the data, and of the data with a state inside of them, for one iteration over a part.

    A state that is loaded, or that an iteration changes, must not show in another part, nor in the next pass. All other
    objects are shared, since they may be large. copies: those made so far, by the ids of the originals.
    """
    if has_shards(data):
        return data.shard(num_shards=1, index=0)  # copy.copy of Hugging Face's returns an object with the same state
    if isinstance(data, np.ndarray) or hasattr(data, "__next__"):
        return data
    if id(data) in copies:
        return copies[id(data)]
    try:
        own = copy.copy(data)
    except Exception:  # objects of libraries that can't be copied, such as an open file
        return data
    copies[id(data)] = own
    if own is not data and type(data).__module__ != "builtins":
        for name, value in list(getattr(own, "__dict__", {}).items()):
            if (inner := _own_inner(value, copies)) is not value:
                own.__dict__[name] = inner
    return own


def _own_inner(value: Any, copies: dict[int, Any]) -> Any:
    if type(value) in (list, tuple) and len(value) <= _MAX_INNER:
        found = [_own_inner(each, copies) for each in value]
        return value if all(map(operator.is_, found, value)) else type(value)(found)
    if type(value) is dict and len(value) <= _MAX_INNER:
        found = [_own_inner(each, copies) for each in value.values()]
        return value if all(map(operator.is_, found, value.values())) else dict(zip(value, found, strict=True))
    has_state = hasattr(value, "__iter__") and hasattr(value, "load_state_dict") and not isinstance(value, type)
    return _own(value, copies) if has_state else value


def _state_of(data: Any, iterator: Any) -> str | None:
    """Return the state of the data as JSON, or None if they have none from which they continue exactly."""
    holder = next((each for each in (data, iterator) if hasattr(each, "state_dict")), None)
    if holder is None or not hasattr(holder, "load_state_dict") or _forgets_samples(data):
        return None
    try:
        state = json.dumps(holder.state_dict())
    except Exception:  # a state with tensors, for example. Without a state, the samples are the same.
        return None
    return state if len(state) <= _MAX_STATE_CHARACTERS else None


def _forgets_samples(data: Any) -> bool:
    """Return True for a data set of Hugging Face with a shuffle buffer, whose state does not include the buffer."""
    pending = [getattr(data, "_ex_iterable", None)]
    while pending:
        each = pending.pop()
        if type(each).__name__ == "BufferShuffledExamplesIterable":
            return True
        inner = [getattr(each, "ex_iterable", None), *(getattr(each, "ex_iterables", None) or ())]
        pending += [one for one in inner if one is not None]
    return False


def _hash_of(sample: Any) -> str:
    return hashlib.sha256(repr(plain_values("sample", sample)).encode()).hexdigest()[:16]
