"""Publishes the files of a complete job: moves them to the output folder, and writes the manifest last."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from manyhands.data.token_format import MANIFEST
from manyhands.errors import DataError
from manyhands.prepare.gridded.store_files import ROOT_FILES
from manyhands.prepare.io.manifest import FORMAT
from manyhands.prepare.job.stages import StageResult, cached_bad_records
from manyhands.prepare.job.store_output import OutputFile, move_store, store_names, stored_files, write_root
from manyhands.prepare.plan.plan import Plan, StoreOutput
from manyhands.prepare.shuffle.reduce import lost_records
from manyhands.storage.atomic import sync, write_atomic
from manyhands.storage.files import join_path, move, names_in, remove
from manyhands.storage.location import is_local

BAD_RECORDS = "_bad_records.jsonl"

JOB = ".manyhands"


def publish(plan: Plan, folder: str, stages: list[StageResult], before: dict[str, Any] | None) -> dict[str, Any]:
    """Move the files to the output folder, and write the manifest last. Return the manifest.

    before: the manifest of an output in the folder that is replaced. If the process is killed, the next run continues.
    """
    last, end = stages[-1], plan.stages[-1].end
    layout = end.layout if isinstance(end, StoreOutput) else None
    if layout is not None:
        files = stored_files(layout, last)
    else:
        files = [OutputFile(r.file, r.bytes_out, r.records, str(r.sha256)) for r in last.results if r.file is not None]
    bad = b"".join(line for stage in stages for line in stage.bad_records)
    # The files of a store have no counts of records: a record may lie in many of them.
    _check_totals(stages, None if layout is not None else sum(file.records for file in files), bad.count(b"\n"))
    bad = b"".join(cached_bad_records(plan)) + bad
    _remove_old(folder, {file.name for file in files}, before)
    if layout is not None:
        move_store(layout, last, folder)
        write_root(layout, folder)
    else:
        _move_parts(last, folder)
    if is_local(folder):
        sync(Path(folder))  # the tasks have synced the files, but their names must become durable before the manifest
    if bad:
        write_atomic(join_path(folder, BAD_RECORDS), bad)
    manifest = {
        "format": FORMAT,
        "identity": plan.identity,
        "digest": _digest(files, bad),
        "records": last.records,
        "bad_records": bad.count(b"\n"),
        "files": [vars(file) for file in files],
    }
    absent = sum(result.absent_chunks for stage in stages for result in stage.results)
    if absent:
        manifest["absent_chunks"] = absent
    write_atomic(join_path(folder, MANIFEST), json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def own_names(plan: Plan) -> frozenset[str]:
    """Return the names that the output of a plan has in its folder, except names that begin with `part-`."""
    end = plan.stages[-1].end
    return frozenset(store_names(end.layout) if isinstance(end, StoreOutput) else ())


def _remove_old(folder: str, keep: set[str], before: dict[str, Any] | None) -> None:
    """Remove the files of an output that is replaced, and those that a killed job has published."""
    if before is not None:
        listed = [file["name"] for file in before["files"]]
        # While the manifest exists, these names are known to belong to an output, even if the job is killed.
        for name in sorted(listed, key=lambda name: not name.startswith((".z", "zarr.json"))):
            if not name.startswith("part-"):
                remove(join_path(folder, name))
        remove(join_path(folder, MANIFEST))
        if is_local(folder):
            sync(Path(folder))  # after a power loss, the old manifest must not exist next to new files
    for name in names_in(folder):
        # The root files of a killed job in another format would describe the new arrays wrongly.
        if ((name.startswith("part-") or name in ROOT_FILES) and name not in keep) or name == BAD_RECORDS:
            remove(join_path(folder, name))


def _move_parts(last: StageResult, folder: str) -> None:
    sources = {str(result.file): last.path_of(result) for result in last.results if result.file is not None}
    # List each folder once, because checking every file would take as long as moving it.
    folders = {last.folder, last.rewritten_folder} - {""}
    written = {join_path(place, name) for place in folders for name in names_in(place)}
    for name, source in sources.items():
        if source in written:
            with suppress(FileNotFoundError):  # another rank moves it at the same time
                move(source, join_path(folder, name))
    gone = sources.keys() - set(names_in(folder))
    if gone:
        raise DataError(
            "a file that was written is gone",
            where=sources[min(gone)],
            hint=f"remove {join_path(folder, JOB)}, and run again",
        )


def _check_totals(stages: list[StageResult], records: int | None, bad_records: int) -> None:
    """Compare the counts of the manifest with the counts of the tasks. Raises DataError if they differ.

    records: the number of records in the files, or None if it is unknown.
    """
    if records is not None and records != stages[-1].records:
        raise lost_records("the files of the last stage", stages[-1].records, records)
    found = sum(result.bad_records for stage in stages for result in stage.results)
    if bad_records != found:
        raise lost_records("the bad records of all stages", found, bad_records)


def _digest(files: list[OutputFile], bad: bytes) -> str:
    """Return the SHA-256 over the names and hashes of all output files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.bytes} {file.sha256}\n".encode())
    digest.update(hashlib.sha256(bad).digest() if bad else b"")
    return digest.hexdigest()
