"""Round files: their bytes depend on their contents only, and damaged or foreign files are refused by name."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from manyhands.errors import CheckpointError, InvariantError
from manyhands.rounds.codec import decode, encode
from manyhands.rounds.file_compression import compress, decompress
from manyhands.rounds.layout import RoundIdentity, RoundLayout
from manyhands.rounds.round_file import RoundFile, RoundFileWriter
from manyhands.storage.atomic import remove_temporary_files
from support.full_disk import run_on_small_disk
from support.processes import started

PARAMS = [("embed.weight", 1000), ("layers.0.bias", 3), ("häd", 257), ("none", 0)]
BUFFERS = [
    ("flags", torch.bool, (3,)),
    ("batches", torch.int64, ()),
    ("mean", torch.float32, (2, 3)),
    ("half", torch.bfloat16, (5,)),
    ("eight", torch.float8_e4m3fn, (3,)),
    ("empty", torch.float64, (0, 4)),
]
IDENTITY = RoundIdentity("a1b2c3", 12, 3)


def layout(bits: int = 4, kind: Any = "delta") -> RoundLayout:
    return RoundLayout(PARAMS, BUFFERS, bits, kind)


def random_bytes(tensor: Tensor, seed: int) -> Tensor:
    """A tensor like this one with random bits."""
    generator = torch.Generator().manual_seed(seed)
    highest = 2 if tensor.dtype == torch.bool else 120
    raw = torch.randint(0, highest, (tensor.numel() * tensor.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(tensor.dtype).view(tensor.shape)


def fill(writer: RoundFileWriter, bits: int) -> dict[str, Tensor]:
    """Fill all tensors of a writer. Return them by their names in the file."""
    found = {}
    for number, (name, numel) in enumerate(PARAMS):
        values = random_bytes(torch.empty(numel), number)
        if bits == 32:
            writer.values(name).copy_(values)
            found[f"delta/{name}"] = values
        else:
            encode(values, bits, writer.codes(name), writer.scales(name))
            found |= {f"codes/{name}": writer.codes(name).clone(), f"scales/{name}": writer.scales(name).clone()}
    for number, (name, dtype, shape) in enumerate(BUFFERS):
        found[f"buffers/{name}"] = random_bytes(torch.empty(shape, dtype=dtype), 100 + number)
        writer.buffer(name).copy_(found[f"buffers/{name}"])
    return found


def write(path: Path, bits: int = 4) -> dict[str, Tensor]:
    with RoundFileWriter(path, layout(bits), IDENTITY) as writer:
        found = fill(writer, bits)
        writer.publish()
    return found


def same(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.flatten().view(torch.uint8).tolist() if tensor.numel() else [] for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and bits[0] == bits[1]


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_files_are_read_as_written_also_by_the_safetensors_library(tmp_path: Path, bits: int) -> None:
    written = write(tmp_path / "file", bits)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    file = RoundFile(tmp_path / "file", layout(bits), IDENTITY)
    library = load_file(tmp_path / "file")
    assert set(library) == set(written)
    getters = {"codes": file.codes, "scales": file.scales, "delta": file.values, "buffers": file.buffer}
    for key, tensor in written.items():
        kind, _, name = key.partition("/")
        assert same(getters[kind](name), tensor), key
        assert same(library[key], tensor), key
        assert getters[kind](name).data_ptr() % tensor.itemsize == 0
    raw = (tmp_path / "file").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert start % 64 == 0
    assert len(raw) == layout(bits).file_bytes(IDENTITY)
    assert hashlib.sha256(raw[start:]).hexdigest() == file.sha256
    with pytest.raises(InvariantError, match="no such tensor"):
        file.buffer("unknown")


def test_the_bytes_depend_on_the_contents_only(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    with RoundFileWriter(tmp_path / "three", layout(), IDENTITY) as writer:
        threads = [threading.Thread(target=fill, args=(writer, 4)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.publish()
    raw = (tmp_path / "one").read_bytes()
    assert (tmp_path / "two").read_bytes() == raw
    assert (tmp_path / "three").read_bytes() == raw
    # A part of the format, as the digests of the codec are: never record it again.
    assert hashlib.sha256(raw).hexdigest()[:16] == "ab07c96ca0a4714b"


def test_weights_are_distinguished_from_deltas(tmp_path: Path) -> None:
    with RoundFileWriter(tmp_path / "file", layout(32, "weights"), IDENTITY) as writer:
        writer.values("häd").fill_(2)
        writer.publish()
    assert RoundFile(tmp_path / "file", layout(32, "weights"), IDENTITY).values("häd").tolist() == [2] * 257
    with pytest.raises(CheckpointError, match="another list of tensors"):
        RoundFile(tmp_path / "file", layout(32), IDENTITY)
    for wrong in (lambda: layout(4, "weights"), lambda: layout(3), lambda: RoundLayout([("a", 1), ("a", 2)], [], 4)):
        with pytest.raises(InvariantError):
            wrong()


def test_a_changed_tensor_of_a_reader_does_not_change_the_file(tmp_path: Path) -> None:
    write(tmp_path / "file")
    raw = (tmp_path / "file").read_bytes()
    RoundFile(tmp_path / "file", layout(), IDENTITY).codes("embed.weight").fill_(0)
    gc.collect()
    assert (tmp_path / "file").read_bytes() == raw


def test_the_first_file_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "file")
    before = (tmp_path / "file").stat()
    write(tmp_path / "file")
    assert (tmp_path / "file").stat().st_ino == before.st_ino
    assert len(list(tmp_path.iterdir())) == 1


def test_an_abandoned_writer_leaves_nothing(tmp_path: Path) -> None:
    with RoundFileWriter(tmp_path / "file", layout(), IDENTITY) as writer:
        fill(writer, 4)
    assert not list(tmp_path.iterdir())
    writer = RoundFileWriter(tmp_path / "file", layout(), IDENTITY)
    assert len(list(tmp_path.iterdir())) == 1
    codes = writer.codes("embed.weight")
    del writer
    gc.collect()
    codes.fill_(1)  # the memory is still there
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        RoundFileWriter(tmp_path / "missing" / "file", layout(), IDENTITY)


def test_a_published_file_can_not_be_changed_or_published_again(tmp_path: Path) -> None:
    with RoundFileWriter(tmp_path / "file", layout(), IDENTITY) as writer:
        writer.publish()
        with pytest.raises(InvariantError, match="published"):
            writer.codes("embed.weight")
        with pytest.raises(InvariantError, match="published"):
            writer.publish()


FULL_DISK = """
import sys
from pathlib import Path
import test_round_file as tests
large = tests.RoundLayout([("weight", 3 << 20)], [], 32)
try:
    with tests.RoundFileWriter(Path(sys.argv[1], "file"), large, tests.IDENTITY) as writer:
        writer.values("weight").fill_(1)
except OSError as error:
    print(error)
print(list(Path(sys.argv[1]).iterdir()))
"""


def test_a_full_disk_raises_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "disk")]
    done = run_on_small_disk(tmp_path / "disk", command, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[Errno 28] No space left on device\n[]\n"


KILLED = """
import sys
from pathlib import Path
import test_round_file as tests
writer = tests.RoundFileWriter(Path(sys.argv[1]), tests.layout(), tests.IDENTITY)
tests.fill(writer, 4)
print("filled", flush=True)
sys.stdin.read()
"""


def test_a_killed_writer_leaves_no_file_but_a_temporary_one(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", KILLED, str(tmp_path / "file")]
    with started(command, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "filled\n"
        process.kill()
        process.wait()
    assert not (tmp_path / "file").exists()
    assert len(list(tmp_path.iterdir())) == 1
    remove_temporary_files(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_fork_does_not_remove_the_file_of_its_parent(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
import test_round_file as tests
writer = tests.RoundFileWriter(Path(sys.argv[1]), tests.layout(), tests.IDENTITY)
if (child := os.fork()) == 0:
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
writer.publish()
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], env=environment, check=True, timeout=120)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A function that changes the header of a file, and nothing else."""

    def changed(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        text = json.dumps(change(header) or header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return changed


def metadata(**fields: Any) -> Callable[[bytes], bytes]:
    return with_header(lambda header: header["__metadata__"].update(fields))


def swapped_offsets(header: dict[str, Any]) -> None:
    one, other = header["scales/häd"], header["scales/layers.0.bias"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def flipped(raw: bytes, at: int) -> bytes:
    changed = bytearray(raw)
    changed[at] ^= 1
    return bytes(changed)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "is damaged(?s:.)*an empty file"),
    "a few bytes": (lambda raw: raw[:5], "is damaged(?s:.)*5 bytes"),
    "cut in the header": (lambda raw: raw[:300], "is damaged(?s:.)*expected: [0-9]+ bytes(?s:.)*got: 300 bytes"),
    "cut by one byte": (lambda raw: raw[:-1], "is damaged(?s:.)*bytes(?s:.)*got: [0-9]+ bytes"),
    "header only": (lambda raw: raw[: 8 + int.from_bytes(raw[:8], "little")], "is damaged(?s:.)*bytes"),
    "longer": (lambda raw: raw + b"\0", "is damaged(?s:.)*bytes"),
    "last bit": (lambda raw: flipped(raw, -1), "is damaged(?s:.)*SHA-256"),
    "first bit": (lambda raw: flipped(raw, 8 + int.from_bytes(raw[:8], "little")), "is damaged(?s:.)*SHA-256"),
    "digest": (metadata(sha256="0" * 64), "is damaged(?s:.)*SHA-256"),
    "digest that is no digest": (metadata(sha256='"' * 64), "is damaged(?s:.)*in another form"),
    "zeros": (lambda raw: bytes(len(raw)), "is damaged(?s:.)*header of a safetensors file"),
    "text": (lambda raw: b"<html>no such file</html>" * 100, "is damaged(?s:.)*header of [0-9]+ bytes"),
    "long header": (lambda raw: (1 << 60).to_bytes(8, "little") + raw[8:], "is damaged(?s:.)*header of [0-9]+ bytes"),
    "long header of a large file": (
        lambda raw: (2 << 20).to_bytes(8, "little") + raw[8:] + b" " * (3 << 20),
        "is damaged(?s:.)*header of 2097152 bytes",
    ),
    "nested": (lambda raw: (400).to_bytes(8, "little") + b"[" * 400 + raw, "is damaged(?s:.)*header of a saf"),
    "no metadata": (with_header(lambda header: header.pop("__metadata__") and None), "another format(?s:.)*got: None"),
    "metadata of another kind": (with_header(lambda header: header | {"__metadata__": 1}), "is damaged"),
    "entries of another kind": (with_header(lambda header: header | {"codes/häd": 1}), "is damaged"),
    "another key in the metadata": (metadata(more="1"), "is damaged(?s:.)*in another form"),
    "format": (metadata(format="2"), "another format(?s:.)*expected: 1(?s:.)*got: 2(?s:.)*same version"),
    "fingerprint": (metadata(fingerprint="f\x1b[2J"), r"another recipe fingerprint(?s:.)*a1b2c3(?s:.)*got: f\\x1b"),
    "long fingerprint": (metadata(fingerprint="f" * 10**5), r"another recipe fingerprint(?s:.)*got: f{200}\.\.\.\n"),
    "round": (metadata(round="13"), "another round(?s:.)*12(?s:.)*13(?s:.)*renamed or copied"),
    "island": (metadata(island="2"), "another island(?s:.)*3(?s:.)*2(?s:.)*renamed or copied"),
    "bits": (metadata(bits="2"), "another number of bits per value(?s:.)*4(?s:.)*2"),
    "tensor missing": (with_header(lambda header: header.pop("scales/häd") and None), "another list of tensors"),
    "tensor added": (
        with_header(lambda header: header | {"more": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        "another list of tensors(?s:.)*more: no such tensor",
    ),
    "dtype": (with_header(lambda header: header["buffers/mean"].update(dtype="I32")), "another list(?s:.)*I32"),
    "shape": (with_header(lambda header: header["buffers/mean"].update(shape=[3, 2])), r"another list(?s:.)*\[3, 2\]"),
    "swapped offsets": (with_header(swapped_offsets), "another list of tensors(?s:.)*scales/layers.0.bias"),
    "huge offsets": (
        with_header(lambda header: header["codes/häd"].update(data_offsets=[0, 10**30])),
        "another list of tensors(?s:.)*codes/h",
    ),
    "order": (with_header(lambda header: dict(sorted(header.items()))), "is damaged(?s:.)*in another form"),
    "spaces": (lambda raw: raw.replace(b'{"__meta', b'{ "__met', 1), "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "file")
    change, message = DAMAGES[name]
    raw = (tmp_path / "file").read_bytes()
    assert change(raw) != raw
    (tmp_path / "file").write_bytes(change(raw))
    with pytest.raises(CheckpointError, match=message) as caught:
        RoundFile(tmp_path / "file", layout(), IDENTITY)
    assert caught.value.where == str(tmp_path / "file")
    assert caught.value.hint
    if "SHA-256" in message and name != "digest":
        RoundFile(tmp_path / "file", layout(), IDENTITY, verify=False)
    else:
        with pytest.raises(CheckpointError):
            RoundFile(tmp_path / "file", layout(), IDENTITY, verify=name == "digest")


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_a_file_with_other_bits_is_refused(tmp_path: Path, bits: int) -> None:
    write(tmp_path / "file", bits)
    with pytest.raises(CheckpointError, match="another number of bits"):
        RoundFile(tmp_path / "file", layout(4), IDENTITY)


def test_only_regular_files_of_the_folder_are_opened(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    write(tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    for name in ("missing", "link", "fifo", "folder"):
        with pytest.raises(CheckpointError, match="missing or can't be read"):
            RoundFile(folder / name, layout(), IDENTITY)
        with pytest.raises(CheckpointError, match="missing or can't be read"):
            decompress(folder / name, tmp_path / "to", 10)
    assert not (tmp_path / "to").exists()


def test_compressed_files_are_restored(tmp_path: Path) -> None:
    write(tmp_path / "file")
    compress(tmp_path / "file", tmp_path / "file.zst")
    size = layout().file_bytes(IDENTITY)
    decompress(tmp_path / "file.zst", tmp_path / "again", size)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    raw = (tmp_path / "file.zst").read_bytes()
    bomb = pa.Codec("zstd").compress(bytes(1 << 30), asbytes=True)
    for wrong in (b"", raw[:-1], raw[: len(raw) // 2], flipped(raw, 0), raw + b"junk", raw + raw, bomb):
        (tmp_path / "wrong.zst").write_bytes(wrong)
        with pytest.raises(CheckpointError, match="the compressed round file is damaged") as caught:
            decompress(tmp_path / "wrong.zst", tmp_path / "refused", size)
        assert caught.value.where == str(tmp_path / "wrong.zst")
        assert not (tmp_path / "refused").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "file", "file.zst", "wrong.zst"]


def test_values_of_normal_size_are_smaller_when_compressed(tmp_path: Path) -> None:
    numel = 6 << 20  # more than one piece
    normal = RoundLayout([("weight", numel)], [], 4)
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    with RoundFileWriter(tmp_path / "file", normal, IDENTITY) as writer:
        encode(values, 4, writer.codes("weight"), writer.scales("weight"))
        writer.publish()
    compress(tmp_path / "file", tmp_path / "file.zst")
    assert (tmp_path / "file.zst").stat().st_size < 0.85 * (tmp_path / "file").stat().st_size
    decompress(tmp_path / "file.zst", tmp_path / "again", normal.file_bytes(IDENTITY))
    file = RoundFile(tmp_path / "again", normal, IDENTITY)
    found = decode(file.codes("weight"), file.scales("weight"), 4, numel)
    assert float((found - values).norm() / values.norm()) < 0.15
