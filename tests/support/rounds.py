"""Stores of rounds for tests, and a process that uses one.

python -m support.rounds publish ADDRESS ROUND ISLAND PATH
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from manyhands.rounds.store import RoundStore
from manyhands.storage.location import location_of
from support.s3 import VARIABLES

FACTS = {"seed": "1", "islands.bits": "4"}


def opened(address: str | Path, report: Callable[[str], None] = lambda text: None, count: int = 4) -> RoundStore:
    """Return a store of rounds of one recipe. It gives up after some minutes, so that a test can't hang."""
    store = RoundStore(location_of(str(address)), report, patience=200)
    store.open("f" * 16, FACTS, count)
    return store


@contextmanager
def s3_variables(url: str) -> Iterator[None]:
    """Configure s3fs for a server in this process, and in processes that it starts."""
    import s3fs

    before = dict(os.environ)
    os.environ.update(VARIABLES | {"AWS_ENDPOINT_URL": url})
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()


def main() -> None:
    address, round, island, path = sys.argv[2:]
    opened(address).publish(int(round), int(island), Path(path))


if __name__ == "__main__":
    main()
