"""Clusters of runs with islands, as forks of one process that has imported what they need, so that they start at once.

`serve` reads requests, one JSON object a line, and answers each with the process id of a new cluster. A cluster is a
session of its own: with more than one worker it also has the processes that `manyhands.launch` starts.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import manyhands as mh
from manyhands.cli.main import _error_to_show
from support import island_runs, s3

STEPS = 32


def slow_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The loss, after $STEP_SECONDS. Without a pause, a run would end before something can happen to it."""
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    return island_runs.loss(model, batch)


def train(spec: dict[str, Any]) -> str:
    """Train what `spec` describes, and return the digest. SIGUSR1 prints the stacks of all threads.

    spec: islands, options (of `mh.train`), strategy, and muon (True to train with Muon and bf16).
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    changes: dict[str, Any] = {"loss": slow_loss}
    if spec.get("muon"):
        changes |= {"optimizer": island_runs.muon_and_adamw, "precision": "bf16"}
    recipe = island_runs.recipe(mh.Islands(**spec["islands"]), **changes)
    strategy = mh.Strategy(**spec.get("strategy", {}))
    return mh.train(recipe, steps=STEPS, strategy=strategy, show=True, **spec["options"]).digest


def digest_of(spec: dict[str, Any]) -> str:
    """Train as one cluster, with as many workers as `spec` says, and return the digest."""
    digest: str = train(spec) if spec["workers"] == 1 else mh.launch(train, spec, workers=spec["workers"])[0]
    return digest


def _run(spec: dict[str, Any]) -> int:
    """Train as one cluster, write its digest to the file `result`, and return the exit code."""
    os.setsid()
    with open(spec["output"], "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(spec["environment"])
    faulthandler.enable()
    try:
        digest = digest_of(spec)
    except (mh.Interrupted, KeyboardInterrupt) as error:  # the latter while it starts, as the command line does
        sys.stderr.write(f"{error}\n")
        return 130
    except mh.ManyhandsError as error:
        shown = _error_to_show(error)  # as the command line, without the traceback of a worker that refused something
        sys.stderr.write(f"{type(shown).__name__}: {shown}\n")
        return 1
    Path(spec["result"]).write_text(digest)
    return 0


def serve() -> None:
    """Start clusters as requested on stdin, until it is closed. Says on stdout which have started and ended."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    pending = b""
    while True:
        if select.select([requests], [], [], 0.02)[0]:
            data = requests.read(1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if not pid:
                    requests.close()
                    sys.exit(_run(json.loads(line)))
                _say("started", pid, 0)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            _say("ended", pid, os.waitstatus_to_exitcode(status))


def _say(what: str, pid: int, code: int) -> None:
    os.write(1, f"{what} {pid} {code}\n".encode())


class Forks:
    """Starts clusters as forks of one process, see `serve`."""

    def __init__(self, step_seconds: float) -> None:
        environment = {**os.environ, **s3.VARIABLES, "STEP_SECONDS": str(step_seconds)}
        command = [sys.executable, "-m", "support.island_clusters"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, bufsize=0)
        self._codes: dict[int, int] = {}
        self._lock, self._started = threading.Condition(), list[int]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            what, pid, code = line.split()
            with self._lock:
                if what == b"started":
                    self._started.append(int(pid))
                else:
                    self._codes[int(pid)] = int(code)
                self._lock.notify_all()

    def start(self, spec: dict[str, Any]) -> int:
        """Start a cluster, and return its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(spec).encode() + b"\n")
        with self._lock:
            if not self._lock.wait_for(lambda: bool(self._started), 60):
                raise RuntimeError("no cluster starts")
            return self._started.pop()

    def code(self, pid: int) -> int | None:
        """Return the exit code of a cluster, or None if it is running."""
        with self._lock:
            return self._codes.get(pid)

    def close(self) -> None:
        """End the process from which clusters are forked."""
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    from support import island_clusters  # under its own name, which workers import

    island_clusters.serve()
