"""Stores of rounds for tests, and a process that uses one.

    python -m support.rounds publish ADDRESS ROUND ISLAND PATH
    python -m support.rounds share ADDRESS CLUSTER COUNT FIXED

The second one takes and releases leases until it reads a line, and prints the islands that it holds as JSON. FIXED: a
JSON list of islands, or null.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from manyhands.rounds.leases import Leases
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


BEAT, LOST_AFTER, SETTLE = 0.1, 2.0, 0.05
"""Seconds; short, but long enough for a busy machine."""


def share(leases: Leases) -> set[int]:
    """Take and release what should be taken and released now. Return what is held."""
    for island in leases.held() - leases.wanted():
        leases.release(island)
    for island in sorted(leases.wanted() - leases.held()):
        leases.take(island)
    return leases.held()


def main() -> None:
    if sys.argv[1] == "publish":
        address, round, island, path = sys.argv[2:]
        opened(address).publish(int(round), int(island), Path(path))
        return
    address, cluster, count, fixed = sys.argv[2:]
    ended, store = threading.Event(), opened(address, count=int(count))
    threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
    times = {"beat": BEAT, "lost_after": LOST_AFTER, "settle": SETTLE}
    with Leases(store, cluster, int(count), fixed=json.loads(fixed), **times) as leases:
        before = None
        while not ended.wait(BEAT / 2):
            held = share(leases)
            if held != before:
                sys.stdout.write(f"{json.dumps(sorted(held))}\n")
                sys.stdout.flush()
                before = held


if __name__ == "__main__":
    main()
