"""A server of S3's interface on this machine, and a network to it that can be cut."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BUCKET = "bucket"
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_MAX_ATTEMPTS": "1",  # of botocore; s3fs has attempts of its own
}
"""The environment variables that a client of the server needs besides AWS_ENDPOINT_URL."""


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def create_bucket(url: str) -> None:
    """Create the bucket, or raise OSError if there is no server. The bucket may exist."""
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=60).close()
    except urllib.error.HTTPError as error:
        if error.code != 409:
            raise


def server_command(host: str, port: int) -> list[str]:
    """Return the command of moto's server."""
    return [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", host, "-p", str(port)]


@contextmanager
def running() -> Iterator[str]:
    """Run moto's server in a process of its own, with an empty bucket. Yield its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(server_command("127.0.0.1", port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while True:
            with suppress(OSError):
                create_bucket(url)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("moto's server doesn't start")
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


class Network:
    """Forwards connections to a server, until it is `cut`, and again when it is `mended`. A context manager.

    delay: seconds that each 64 KiB take. After `freeze` connections stay open, but nothing gets through until `thaw`;
    `freeze` holds for connections that are open, and for new ones until `thaw` or `thaw_new`.
    """

    def __init__(self, url: str) -> None:
        self.delay = 0.0
        self._allowance, self.is_frozen = float("inf"), threading.Event()
        self._flows: list[threading.Event] = []
        self.thaw_new()
        host, port = url.removeprefix("http://").split(":")
        self._server = (host, int(port))
        self._port, self._is_cut = free_port(), True
        self._sockets: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._port}"

    def mended(self) -> None:
        """Connections go through."""
        self._is_cut = False
        listener = socket.create_server(("127.0.0.1", self._port))
        self._sockets = [listener]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Connections end, and no new one is taken."""
        self._is_cut = True
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def freeze(self, after_bytes: float = 0) -> None:
        """Let so many more bytes through, and then no more. `is_frozen` is set when the first byte is held back."""
        self._allowance = after_bytes
        self.is_frozen.clear()
        self._flows[-1].clear()

    def thaw_new(self) -> None:
        """Let everything through on new connections."""
        self._flows.append(threading.Event())
        self._flows[-1].set()

    def thaw(self) -> None:
        """Let everything through again."""
        for each in self._flows:
            each.set()

    def _pass(self, size: int, flows: threading.Event) -> None:
        time.sleep(self.delay)
        if not flows.is_set():
            self._allowance -= size
            if self._allowance < 0:
                self.is_frozen.set()
                flows.wait()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(*pair, self._flows[-1]), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, flows: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._pass(len(data), flows)
                target.sendall(data)
        for one in (source, target):
            one.close()

    def __enter__(self) -> Network:
        self.mended()
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        self.cut()
