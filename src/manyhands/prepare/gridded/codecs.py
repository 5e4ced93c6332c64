"""The codecs with which zarr stores may be encoded. The library knows others that execute code, such as pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from manyhands.errors import DataError

_COMPRESSION = ("zstd", "blosc", "zlib", "gzip", "bz2", "lz4", "lzma")
_FILTERS = ("shuffle", "delta", "fixedscaleoffset", "quantize", "bitround", "vlen-utf8", "vlen-bytes")
_CHECKSUMS = ("crc32", "crc32c", "adler32", "fletcher32", "jenkins_lookup3")
_FORMAT_3 = ("bytes", "transpose", "sharding_indexed")

KNOWN_CODECS = frozenset((*_COMPRESSION, *_FILTERS, *_CHECKSUMS, *_FORMAT_3))


def check_codecs(metadata: bytes, where: str) -> None:
    """Raise DataError if the metadata of an array names a codec that is not known. Nothing is decoded.

    metadata: the content of `.zarray` (format 2) or `zarr.json` (format 3). where: its path, for the error.
    """
    for name in _names(json.loads(metadata)):
        if name not in KNOWN_CODECS:
            raise DataError(
                "a zarr store uses a codec that is not supported",
                where=where,
                expected=", ".join(sorted(KNOWN_CODECS)),
                got=repr(name)[:100],
                hint="write the store again with another codec",
            )


def _names(metadata: Any) -> Iterator[Any]:
    """Yield the name of each codec in the metadata of an array, also of those inside of shards."""
    if not isinstance(metadata, dict):
        return
    for each in (metadata.get("compressor"), *(metadata.get("filters") or ())):
        if each is not None:
            yield each.get("id") if isinstance(each, dict) else each
    for each in (*(metadata.get("codecs") or ()), *(metadata.get("index_codecs") or ())):
        name = each.get("name") if isinstance(each, dict) else each
        yield name.removeprefix("numcodecs.") if isinstance(name, str) else name
        if isinstance(each, dict):
            yield from _names(each.get("configuration"))
