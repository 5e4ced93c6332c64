"""Reports what happened to a run, from its directory.

It reports the cause of a failure as the launcher recorded it when the failure happened (see `launching/root_cause.py`).
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from manyhands.checkpoint.format import checkpoints_of, list_checkpoints, read_manifest
from manyhands.checkpoint.owner import refusal, run_in
from manyhands.errors import CheckpointError, ManyhandsError
from manyhands.formatting import format_seconds
from manyhands.listeners.run_directory import RunDirectory
from manyhands.members.processes import oom_kills
from manyhands.storage.run_lock import is_locked
from manyhands.storage.untrusted import last_bytes

_TAIL_LINES, _TAIL_BYTES = 8, 1 << 16

_OF_ROUNDS = ("round", "digest")
"""Events of runs with islands, of which there are too many to list."""

_DURING_STEPS = ("saved", "not saved", "amended", "skipped", *_OF_ROUNDS)
"""Events that don't say how a run ended."""

_QUIET_STEPS = 20
"""A run that has recorded nothing during the time of this many steps is assumed to have ended."""

_QUIET_SECONDS = 30.0

_FIRST_STEP_SECONDS = 1800.0
"""The limit until the first step.

It is longer, because the run first builds the model, reads data and compiles code.
"""


@dataclass(frozen=True)
class RunHistory:
    """The history of a run.

    outcome: "ended", "stopped", "failed", "killed", "running", or "perhaps running" (if the lock of the run directory
    can't be checked, because another host may hold it). summary: the outcome as a sentence. lines: (seconds since the
    epoch, text) of each event, in order. advice: what to do. tails: the last lines of the logs of failed workers, by
    file name.
    """

    outcome: str
    summary: str
    lines: tuple[tuple[float, str], ...]
    advice: str
    tails: dict[str, str]


def run_history(run: RunDirectory) -> RunHistory:
    """Read the history of a run from its directory. Raises DataError if its metrics can't be read."""
    events, metrics = run.read_events(), run.read_metrics()
    steps = metrics[-1].step if metrics else 0
    median = sorted(each.step_seconds for each in metrics)[len(metrics) // 2] if metrics else 0.0
    outcome = _outcome(events, run, median)
    lines = [(float(event["seconds"]), text) for event in events if (text := _line(event))]
    failed = _since_last_start(events)
    summary = {
        "ended": f"it completed after {steps} steps",
        "stopped": f"it was stopped on request after {steps} steps",
        "failed": f"it failed after {steps} steps: {failed[-1].get('what') if failed else ''}",
        "killed": f"it ended without a report after {steps} steps: its launcher was killed, or the machine went down",
        "running": f"it is running, and has completed {steps} steps",
        "perhaps running": f"it may be running, and has completed {steps} steps",
    }[outcome]
    tails = {}
    for rank in [event["rank"] for event in failed[-1:] if event.get("rank", -1) >= 0]:
        log = run.log(rank)
        with suppress(OSError):
            end_of_log = last_bytes(log, _TAIL_BYTES).decode("utf-8", errors="replace").splitlines()
            tails[log.name] = "\n".join(end_of_log[-_TAIL_LINES:])
    if outcome in ("failed", "killed") and (kills := _oom_kills(events)):
        processes = "a process" if kills == 1 else f"{kills} processes"
        summary += f"; meanwhile the kernel of this host has killed {processes} because memory ran out"
    return RunHistory(outcome, summary, tuple(lines), _advice(run, outcome, failed), tails)


def _since_last_start(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the failures after the last start. The run has survived earlier failures."""
    last = max((index for index, event in enumerate(events) if event["event"] == "started"), default=-1)
    return [event for event in events[last + 1 :] if event["event"] == "failed"]


def _oom_kills(events: list[dict[str, Any]]) -> int:
    """Return how many processes the kernel has killed for lack of memory, from the last start to the last failure.

    If no failure was recorded, count until now. Return 0 if the count is unknown because the run was on another host,
    or because this host has been rebooted since.
    """
    started: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "started"), {})
    failed = _since_last_start(events)
    before, after = started.get("oom_kills"), failed[-1].get("oom_kills") if failed else oom_kills()
    if (
        type(before) is not int
        or type(after) is not int
        or (not failed and started.get("host") != socket.gethostname())
    ):
        return 0
    return max(0, after - before)


def _outcome(events: list[dict[str, Any]], run: RunDirectory, median: float) -> str:
    owned = is_locked(run.path)
    if owned:
        return "running"
    last = next((event for event in reversed(events) if event["event"] not in _DURING_STEPS), None)
    if last is not None and last["event"] in ("ended", "stopped"):
        return str(last["event"])
    if last is not None and last["event"] == "failed" and last.get("restart") is None:
        return "failed"
    if owned is False:
        return "killed"
    written = max(
        (path.stat().st_mtime for path in (run.metrics, run.path / "events.jsonl") if path.exists()), default=0
    )
    quiet = time.time() - written
    allowed = max(_QUIET_SECONDS, _QUIET_STEPS * median) if median else _FIRST_STEP_SECONDS
    return "perhaps running" if quiet < allowed else "killed"


def _line(event: dict[str, Any]) -> str:
    kind = event["event"]
    if kind in _OF_ROUNDS:
        return ""
    if kind == "started":
        source = {"snapshot": " from a snapshot in memory", "checkpoint": " from a checkpoint"}.get(
            str(event.get("source")), ""
        )
        again = f", {event['repeats']} steps repeated" if event.get("repeats") else ""
        plural = "" if event.get("workers") == 1 else "s"
        workers = f"{event.get('workers')} worker{plural}, {event.get('sharding')}"
        after = f" after step {event['step']}" if event.get("step") else ""
        return f"started{after}{source}: {workers}{again}"
    if kind == "started over":
        earlier = event.get("earlier")
        return f"started over: {f'the record before is in {earlier}' if earlier else 'there was no record before'}"
    if kind == "amended":
        return f"amended: from step {event.get('step')} on, {event.get('key')} = {event.get('value')}"
    if kind == "patience changed":
        return f"the patience of {event.get('set')} changed: {event.get('after')}; before: {event.get('before')}"
    if kind == "skipped":
        return f"step {event.get('step')} was skipped"
    if kind == "failed":
        where = f" ({event['where']})" if event.get("where") else ""
        then = "" if event.get("restart") is None else f"; restarted ({event['restart']})"
        return f"failed: {event.get('what')}{where}{then}"
    if kind == "hosts changed":
        return "a host joined, left or seemed lost: restarted with the hosts that were present"
    if kind == "saved":
        return f"checkpoint of step {event.get('step')} published"
    if kind == "not saved":
        return f"a checkpoint could not be written: {event.get('why')} ({event.get('where')})"
    if kind == "ended":
        return f"ended after step {event.get('step')}, digest {event.get('digest')}"
    why = f": {event['why']}" if event.get("why") else ""
    return f"{kind}" + (f" after step {event['step']}" if "step" in event else "") + why


def _advice(run: RunDirectory, outcome: str, failed: list[dict[str, Any]]) -> str:
    if outcome == "ended":
        return "nothing to do"
    if outcome in ("running", "perhaps running"):
        return "wait for the run to end, or stop it (Ctrl-C, or SIGTERM to its launcher)"
    try:
        place = checkpoints_of(run.path)
        refused = refusal(place, run_in(run.path))
        if refused is not None:
            return f"{refused.what} ({refused.where}): {refused.got}; {refused.hint}"
        checkpoints = list_checkpoints(place)
    except ManyhandsError as error:
        return f"its checkpoints can't be listed from here: {error}"
    while checkpoints:
        step, path = checkpoints.pop()
        try:
            read_manifest(path)
        except CheckpointError as error:
            return f"the last checkpoint is damaged ({error.what}): remove {path}, and run doctor again"
        again = f"the same command with --run-dir {run.path} continues after step {step}"
        return f"{failed[-1]['hint']}; then {again}" if failed and failed[-1].get("hint") else again
    return f"there is no checkpoint: the same command with --run-dir {run.path} starts from the beginning"


def when(seconds: float) -> str:
    """Return a point in time as text, in local time."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def took(lines: tuple[tuple[float, str], ...], index: int) -> str:
    """Return the time since the previous line as text, or "" for the first line."""
    return "" if index == 0 else f"+{format_seconds(max(0.0, lines[index][0] - lines[index - 1][0]))}"
