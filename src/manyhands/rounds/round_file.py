"""Round files: what an island publishes once per round, written and read through memory maps.

The bytes of a round file are a pure function of its contents, so all clusters that compute an island write the same
file. It is a safetensors file (see `layout`). A reader trusts nothing: the header must equal, byte for byte, the one
that the reader's own layout and identity give, except for the digest, and the digest must be that of the data.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.errors import CheckpointError, InvariantError
from manyhands.rounds.layout import RoundIdentity, RoundLayout
from manyhands.storage.atomic import publish_file, sync, temporary_path
from manyhands.storage.tensor_file import once_each
from manyhands.storage.untrusted import open_inside

_FIELDS = {
    "format": "format",
    "fingerprint": "recipe fingerprint",
    "round": "round",
    "island": "island",
    "bits": "number of bits per value",
}
"""The metadata that must be equal, by the names in errors. The first difference is reported."""

_HINTS = {
    "format": "use the same version of Manyhands on all clusters",
    "round": "the file was renamed or copied: remove it, and start the cluster of the island again",
    "island": "the file was renamed or copied: remove it, and start the cluster of the island again",
}

_OTHER_RECIPE = "train the same recipe on all clusters, and share the folder with no other run"

_PARTS = ("dtype", "shape", "data_offsets")

_SHOWN = 200  # the maximum length of a stranger's text in an error


class _Mapped:
    """The tensors of a mapped file. They share its memory, and keep it mapped."""

    def __init__(self, layout: RoundLayout, data_start: int) -> None:
        self._layout, self._data_start = layout, data_start
        self._map: mmap.mmap | None = None

    def codes(self, name: str) -> Tensor:
        """Return the codes of a parameter, uint8 [codes_bytes(numel, bits)]."""
        return self._tensor(f"codes/{name}")

    def scales(self, name: str) -> Tensor:
        """Return the scales of a parameter, bf16 [num_blocks(numel)]."""
        return self._tensor(f"scales/{name}")

    def values(self, name: str) -> Tensor:
        """Return the values of a parameter in a file with 32 bits, fp32 [numel]."""
        return self._tensor(f"{self._layout.kind}/{name}")

    def buffer(self, name: str) -> Tensor:
        """Return a buffer, in its own dtype and shape."""
        return self._tensor(f"buffers/{name}")

    def _tensor(self, key: str) -> Tensor:
        if key not in self._layout.places:
            raise InvariantError("the layout of the round file has no such tensor", got=key)
        if self._map is None:
            raise InvariantError("the round file is published, so its tensors can't be changed any more", got=key)
        entry, start = self._layout.places[key]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = entry.nbytes // entry.dtype.itemsize
        flat = torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=self._data_start + start)
        return flat.view(entry.shape)


class RoundFileWriter(_Mapped):
    """Writes a round file. A context manager, which discards what has not been published.

    `codes`, `scales`, `values` and `buffer` return tensors to fill. They are zero at first. Several threads may fill
    them. The data is in a temporary file next to `path`. If the process is killed, this file is left, and
    `storage.atomic.remove_temporary_files` deletes it.

    Raises OSError, for example if the disk is full.
    """

    def __init__(self, path: Path, layout: RoundLayout, identity: RoundIdentity) -> None:
        header = layout.header(identity)
        super().__init__(layout, len(header))
        self._path, self._identity, self._temporary = path, identity, temporary_path(path)
        self._discard = weakref.finalize(self, _remove, self._temporary, os.getpid())
        size = len(header) + layout.data_bytes
        try:
            fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.posix_fallocate(fd, 0, size)  # on a full disk, writing to the map would kill the process
                self._map = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        except BaseException:
            self._discard()
            raise

    def publish(self) -> None:
        """Complete the file, sync it, and give it its name. The tensors must not be changed any more.

        If `path` exists, that file is kept: all writers write the same bytes. Raises OSError.
        """
        if self._map is None:
            raise InvariantError("the round file is published already", where=str(self._path))
        self._map[: self._data_start] = self._layout.header(self._identity, _digest(self._map, self._data_start))
        self._map.flush()
        sync(self._temporary)
        publish_file(self._temporary, self._path, first_wins=True)
        self._map = None
        self._discard()

    def __enter__(self) -> RoundFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._map = None
        self._discard()


def _remove(path: Path, pid: int) -> None:
    """Delete a temporary file, unless this process is a fork of the one that created it."""
    if os.getpid() == pid:
        with suppress(OSError):
            path.unlink()


def _digest(mapped: mmap.mmap, start: int) -> str:
    """Return the SHA-256 of all bytes from `start` on."""
    with memoryview(mapped) as everything, everything[start:] as data:
        return hashlib.sha256(data).hexdigest()


def open_published(path: Path) -> io.BufferedReader:
    """Open a file of the shared folder. Raises CheckpointError, also for anything other than a regular file."""
    try:
        return open_inside(path.parent, path.name)
    except OSError as error:
        raise _unreadable(path, error) from error


def _map_published(path: Path) -> mmap.mmap | None:
    """Map a file of the shared folder; None if it is empty. Raises CheckpointError."""
    with open_published(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            # torch warns about tensors of memory that can't be written. So the memory is private instead.
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else None
        except OSError as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        "a round file is missing or can't be read",
        where=str(path),
        got=error,
        hint="check that the folder is mounted, and that this user may read it",
    )


class RoundFile(_Mapped):
    """Reads a round file. The tensors are views of the file. If they are changed, the file does not change.

    verify: if False, the digest is not checked, because this has been done for this file before. Raises CheckpointError
    for a file that is missing, damaged, or not the one with this layout and identity.
    """

    def __init__(self, path: Path, layout: RoundLayout, identity: RoundIdentity, *, verify: bool = True) -> None:
        expected = layout.header(identity)
        super().__init__(layout, len(expected))
        self._path, self._identity = path, identity
        mapped = _map_published(path)
        if mapped is None:
            raise self._damaged(f"{layout.file_bytes(identity)} bytes", "an empty file")
        found = mapped[: len(expected)]
        at = expected.index(b'"sha256":"') + len(b'"sha256":"')
        self.sha256 = found[at : at + 64].decode("ascii", "replace")
        if found != layout.header(identity, self.sha256):
            raise self._other_header(mapped)
        if len(mapped) != layout.file_bytes(identity):
            raise self._damaged(f"{layout.file_bytes(identity)} bytes", f"{len(mapped)} bytes")
        if verify and (digest := _digest(mapped, len(expected))) != self.sha256:
            raise self._damaged(f"data with the SHA-256 {self.sha256}", digest)
        self._map = mapped

    def _other_header(self, mapped: mmap.mmap) -> CheckpointError:
        """Return the error for a header that is not the expected one."""
        expected = self._layout.header(self._identity)
        length, limit = int.from_bytes(mapped[:8], "little"), max(1 << 20, 4 * len(expected))
        if length > min(limit, len(mapped) - 8):
            return self._damaged(
                f"{self._layout.file_bytes(self._identity)} bytes, {len(expected) - 8} of them in the header",
                f"{len(mapped)} bytes, and a header of {length} bytes",
            )
        try:
            header = json.loads(mapped[8 : 8 + length], object_pairs_hook=once_each)
            metadata = header.pop("__metadata__", {})
            entries = {name: tuple(fields[part] for part in _PARTS) for name, fields in header.items()}
            found = {field: metadata.get(field) for field in _FIELDS}
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
            return self._damaged("the header of a safetensors file", _shown(error))
        for field, wanted in self._layout.metadata(self._identity).items():
            if field in _FIELDS and found[field] != wanted:
                return self._other(_FIELDS[field], wanted, _shown(found[field]), _HINTS.get(field, _OTHER_RECIPE))
        own = json.loads(expected[8:])
        del own["__metadata__"]
        for name in [*own, *entries]:
            wanted_entry = tuple(own[name][part] for part in _PARTS) if name in own else "no such tensor"
            entry = entries.get(name, "no such tensor")
            if entry != wanted_entry:
                return self._other(
                    "list of tensors", f"{name}: {wanted_entry}", _shown(f"{name}: {entry}"), _OTHER_RECIPE
                )
        return self._damaged("a header as Manyhands writes it", "the same tensors and metadata in another form")

    def _other(self, what: str, expected: str, got: str, hint: str) -> CheckpointError:
        return CheckpointError(
            f"the round file has another {what}", where=str(self._path), expected=expected, got=got, hint=hint
        )

    def _damaged(self, expected: str, got: str) -> CheckpointError:
        return CheckpointError(
            "the round file is damaged",
            where=str(self._path),
            expected=expected,
            got=got,
            hint=f"remove the file, and start the cluster of island {self._identity.island} again",
        )


def _shown(value: Any) -> str:
    """Return a stranger's text for an error: escaped, and not long."""
    text = str(value).encode("unicode_escape").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
