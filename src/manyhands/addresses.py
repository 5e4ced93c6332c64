"""Addresses such as s3://bucket/folder: whether something is one, and the fsspec file system behind it."""

from __future__ import annotations

from typing import Any

from manyhands.errors import ConfigError


def is_local(path: str) -> bool:
    """A path of this machine's file system, not an address such as s3://bucket/key."""
    return "://" not in path


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it. Raises ConfigError for one that it can't have."""
    try:
        import fsspec

        system, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"the address can't be used: {error}",
            where=path,
            hint="install fsspec's package for it: s3fs for s3://, gcsfs for gs://, adlfs for abfs://, ...",
        ) from error
    return system, inner
