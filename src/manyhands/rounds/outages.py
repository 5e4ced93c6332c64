"""Operations on a store that is slow, fails now and then, or is out of reach for a while: they wait, and try again.

An operation runs on a thread of its own, so that a request that never returns can be reported, interrupted and
repeated. Each attempt has a time limit that grows with its bytes, and doubles with each attempt that exceeds it, so a
link of any speed succeeds in the end. The time limits of the store's package apply below it. s3fs waits 5 s for a
connection and 15 s for each part of an answer, and repeats a request up to 25 times; `config_kwargs` of fsspec's
configuration changes this. It has no time limit for sending. gcsfs limits a request to 5 minutes in total.
"""

from __future__ import annotations

import errno
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from manyhands.errors import ConfigError, DataError, Interrupted
from manyhands.formatting import format_seconds
from manyhands.storage.location import Location, StoreError, hint_of

_T = TypeVar("_T")

_FIRST_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 0.5, 30.0
_REPORT_SECONDS = 10.0
"""A failure is reported after this time, and again each time the wait has doubled."""

_ANSWER_SECONDS, _SLOWEST_BYTES_PER_SECOND = 60.0, 256 << 10
"""The time limit of an attempt is this time, and what its bytes need at this speed."""

_POLL_SECONDS = 0.2

_DOUBTFUL_SECONDS, _DOUBTFUL_SECONDS_LATER = 60.0, 1800.0
"""How long an error is waited for that often, but not always, needs a person: expired credentials, a clock, a redirect.
The second time holds once the store has answered, because an outage, too, can keep credentials from being renewed."""

_FINAL_ERRNOS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EMSGSIZE, errno.EFBIG, errno.ENOSYS, errno.EOPNOTSUPP,
}  # fmt: skip
_DOUBTFUL_ERRNOS = {errno.EINVAL, getattr(errno, "EREMCHG", errno.EINVAL)}

_FINAL_STATUS = {401, 403, 404, 405, 410, 411, 414, 501, 507}
"""HTTP's numbers for answers that stay the same: no access, no bucket, not implemented, full."""

_PASSING_STATUS = {408, 409, 412, 425, 429}
"""HTTP's numbers below 500 for answers that the next attempt may not get."""

_CODES = {
    **dict.fromkeys(("NoSuchUpload", "RequestTimeout", "BadDigest", "IncompleteBody", "InvalidPart"), math.inf),
    **dict.fromkeys(("XAmzContentSHA256Mismatch", "SlowDown", "InternalError", "ServiceUnavailable"), math.inf),
    **dict.fromkeys(
        ("RequestTimeTooSkewed", "ExpiredToken", "TokenRefreshRequired", "RequestExpired"), _DOUBTFUL_SECONDS
    ),
    **dict.fromkeys(("InvalidBucketName", "PermanentRedirect", "QuotaExceeded", "XMinioStorageFull"), 0.0),
}
"""S3's names of errors whose number, such as 400 or 403, says too little."""

_FINAL_KINDS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError", "NoRegionError",
    "InvalidRegionError", "UnknownServiceError", "DefaultCredentialsError", "ClientAuthenticationError",
    "NotImplementedError", "ImportError", "ModuleNotFoundError",
}  # fmt: skip
_DOUBTFUL_KINDS = {"RefreshError", "ValueError", "TypeError", "AttributeError", "KeyError"}
"""Names of exceptions, because the packages that define them may not be installed."""


def seconds_worth_waiting(error: OSError) -> float:
    """Return for how long an operation that raised `error` may be repeated: 0 if it can't succeed without a person's
    help, one minute in doubt, and otherwise forever.

    An error of a store's package is recognised by S3's name of it, by the number of HTTP, by the kind of exception, and
    by its errno, in this order. s3fs raises Python's exceptions (PermissionError, FileNotFoundError, TimeoutError,
    OSError with an errno) from botocore's, and botocore's as they are if there was no answer.
    """
    chain = [each for each in _chain(error) if not isinstance(each, StoreError)]
    for decide in (_by_code, _by_status, _by_kind, _by_errno):
        for each in chain[:1] if decide is _by_kind else chain:  # causes say less of the kind
            found = decide(each)
            if found is not None:
                return found
    return math.inf


def http_status(error: BaseException) -> int | None:
    """Return the number of the HTTP answer that caused an error, or None: 404, for example."""
    return next((status for each in _chain(error) if (status := _status_of(each)) is not None), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> dict[str, Any]:
    found = getattr(error, "response", None)
    return found if isinstance(found, dict) else {}


def _status_of(error: BaseException) -> int | None:
    found = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")  # botocore
    for name in ("code", "status_code", "status"):  # gcsfs, azure and aiohttp
        found = getattr(error, name, None) if found is None else found
    text = str(found)
    return int(text) if text.isdecimal() and 100 <= int(text) < 600 else None


def _by_code(error: BaseException) -> float | None:
    return _CODES.get(str(_answer(error).get("Error", {}).get("Code")))


def _by_status(error: BaseException) -> float | None:
    status = _status_of(error)
    if status is None or status < 300:
        return None
    if status in _FINAL_STATUS:
        return 0.0
    return math.inf if status in _PASSING_STATUS or status >= 500 else _DOUBTFUL_SECONDS


def _by_kind(error: BaseException) -> float | None:
    kind = type(error).__name__
    if kind in _FINAL_KINDS or isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # gcsfs: 403
        return 0.0
    if isinstance(error, FileNotFoundError) and error.errno is None:  # the bucket
        return 0.0
    is_certificate = kind == "SSLError" and "certificate" in str(error).lower()
    is_credential = "Credential" in kind or "Token" in kind
    return _DOUBTFUL_SECONDS if kind in _DOUBTFUL_KINDS or is_certificate or is_credential else None


def _by_errno(error: BaseException) -> float | None:
    number = error.errno if isinstance(error, OSError) else None
    return 0.0 if number in _FINAL_ERRNOS else _DOUBTFUL_SECONDS if number in _DOUBTFUL_ERRNOS else None


class Outages:
    """Repeats operations on the store at `where` until they succeed. Several threads may use it at a time.

    report: takes a line for people; only the operation that has waited longest reports. patience: seconds after which
    an operation that keeps failing gives up. stopped: returns True when waiting must end, because the run is stopped.
    """

    def __init__(
        self,
        where: Location,
        report: Callable[[str], None],
        *,
        patience: float = math.inf,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._where, self._report, self._patience, self._stopped = where, report, patience, stopped
        self._random = random.Random()  # never Python's global generator, whose state belongs to the run
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._has_answered = False

    def steady(self, what: str, call: Callable[[], _T], size: int = 0) -> _T:
        """Return the result of `call`, which is repeated while it raises an OSError that may go away.

        what: the operation, for people: "list round 3". size: the number of bytes that it transfers. An attempt that
        exceeds its time limit is abandoned, but may go on in the background, so `call` must tolerate to run twice.

        Raises FileNotFoundError as `call` does, ConfigError if the store can't be used, DataError if patience ends, and
        Interrupted.
        """
        waiting = _Waiting(what)
        limit, pause = _ANSWER_SECONDS + size / _SLOWEST_BYTES_PER_SECOND, _FIRST_PAUSE_SECONDS
        try:
            while True:
                try:
                    result = self._attempt(call, limit, waiting)
                except FileNotFoundError:
                    self._answered(waiting)
                    raise
                except OSError as error:
                    self._failed(waiting, error)
                    limit *= 2 if isinstance(error, _NoAnswer) else 1
                    self._wait(pause * self._random.uniform(0.5, 1.0), waiting)
                    pause = min(2 * pause, _MOST_PAUSE_SECONDS)
                else:
                    self._answered(waiting)
                    return result
        finally:
            with self._lock:
                if waiting in self._waiting:
                    self._waiting.remove(waiting)

    def _attempt(self, call: Callable[[], _T], limit: float, waiting: _Waiting) -> _T:
        """Run `call` on a thread, and return its result. Raises what it raises, and _NoAnswer after `limit` seconds."""
        done, results, errors = threading.Event(), list[_T](), list[BaseException]()

        def work() -> None:
            try:
                results.append(call())
            except BaseException as error:
                errors.append(error)
            done.set()

        began = time.monotonic()
        threading.Thread(target=work, name="store", daemon=True).start()
        while not done.wait(_POLL_SECONDS):
            self._check_stopped(waiting)
            elapsed = time.monotonic() - began
            if elapsed > limit:
                raise _NoAnswer(errno.ETIMEDOUT, f"there was no answer in {format_seconds(elapsed)}")
            if elapsed > limit - _ANSWER_SECONDS + _REPORT_SECONDS:
                self._note(waiting, "there is no answer yet", began)
        if errors:
            raise errors[0]
        return results[0]

    def _failed(self, waiting: _Waiting, error: OSError) -> None:
        self._note(waiting, str(error), time.monotonic())
        lasted = time.monotonic() - waiting.since
        worth = seconds_worth_waiting(error)
        if worth == _DOUBTFUL_SECONDS and self._has_answered:
            worth = _DOUBTFUL_SECONDS_LATER
        if lasted >= worth:
            raise ConfigError(
                f"the islands' store can't be used: {error.strerror or error}",
                where=str(self._where),
                got=f"while it should {waiting.what}",
                hint=_hint(error),
            ) from error
        if lasted >= self._patience:
            raise DataError(
                "the islands' store does not answer",
                where=str(self._where),
                expected=f"to {waiting.what} within {format_seconds(self._patience)}",
                got=error,
                hint=hint_of(error, "check that the store can be reached from here, and start the run again"),
            ) from error

    def _note(self, waiting: _Waiting, problem: str, since: float) -> None:
        """Remember since when an operation waits, and report this now and then."""
        with self._lock:
            if waiting not in self._waiting:
                waiting.since = since
                self._waiting.append(waiting)
            lasted = time.monotonic() - waiting.since
            if self._waiting[0] is not waiting or lasted < waiting.next_report:
                return
            while waiting.next_report <= lasted:
                waiting.next_report *= 2
            waiting.was_reported = True
        self._report(
            f"the islands' store {self._where} fails to {waiting.what}, for {format_seconds(lasted)} now: {problem}; "
            "trying again"
        )

    def _answered(self, waiting: _Waiting) -> None:
        self._has_answered = True
        if waiting.was_reported:
            self._report(f"the islands' store answers again after {format_seconds(time.monotonic() - waiting.since)}")

    def _wait(self, seconds: float, waiting: _Waiting) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._check_stopped(waiting)
            time.sleep(min(left, _POLL_SECONDS))
        self._check_stopped(waiting)

    def _check_stopped(self, waiting: _Waiting) -> None:
        if self._stopped():
            raise Interrupted(
                "the run was stopped while it waited for the islands' store",
                where=str(self._where),
                got=f"it did not {waiting.what}",
                hint="start the run again, and it continues",
            )


class _Waiting:
    """An operation that fails or gets no answer. since: from time.monotonic. next_report: seconds after `since`."""

    def __init__(self, what: str) -> None:
        self.what, self.since, self.next_report, self.was_reported = what, math.inf, _REPORT_SECONDS, False


class _NoAnswer(OSError):
    """An attempt exceeded its time limit."""


def _hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and start the run again: it continues"
    return hint_of(error, "correct the address or its permissions, and start the run again: it continues")
