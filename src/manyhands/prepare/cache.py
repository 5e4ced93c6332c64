"""Records that are kept between jobs: written once, read again without computing or parsing."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from itertools import count
from pathlib import Path

from manyhands.prepare.options import Options
from manyhands.prepare.output import read_manifest, write_output
from manyhands.prepare.plan import Arranged, Cached, Kept, Node, Output, Step, make_plan
from manyhands.prepare.storage import join
from manyhands.prepare.writing import CHUNKS

_numbers = count()


def with_caches(node: Node, options: Options) -> Node:
    """The same node, with files of records in place of what is cached; what isn't there yet is computed now."""
    if isinstance(node, Step):
        return Step(with_caches(node.parent, options), node.operation)
    if isinstance(node, Arranged):
        parents = tuple(with_caches(parent, options) for parent in node.parents)
        return Arranged(parents, node.arrangements, node.reducer)
    if not isinstance(node, Cached):
        return node
    plan = make_plan(with_caches(node.parent, options), Output(CHUNKS, None))
    write_output(plan, node.folder, options.alone() if _is_temporary(node.folder) else options, overwrite=True)
    manifest = read_manifest(node.folder) or {}
    return Kept(
        tuple(join(node.folder, file["name"]) for file in manifest["files"]),
        plan.identity,
        plan.stages[-1].partition_bytes,
    )


def _root() -> Path:
    return Path(tempfile.gettempdir()) / f"manyhands-{os.getuid()}"


def _is_temporary(folder: str) -> bool:
    """No other process knows of it."""
    return Path(folder).parent == _root()


def temporary_folder() -> str:
    """A folder for a cache: removed when this process ends, or if it is killed by the next one that wants one."""
    root = _root()
    for path in root.glob("cache-*"):
        pid = path.name.split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
    folder = root / f"cache-{os.getpid()}-{next(_numbers)}"
    folder.mkdir(parents=True)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)
