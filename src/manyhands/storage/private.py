"""Folders and files that only this user can write, from which pickles may be read.

Unpickling executes code that the writer of the file chose. So pickles in a folder that several users share are read
only if the file belongs to the user of this process, and nobody else may write to it. Files are checked after they are
opened, so that they can't be replaced between the check and the reading. Stores (s3://...) have no owners: whoever may
write to the bucket is trusted.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from manyhands.errors import ConfigError, DataError
from manyhands.storage.files import open_to_read
from manyhands.storage.location import is_local

_OTHERS_WRITE = 0o022


def make_private_folder(path: Path) -> Path:
    """Create the folder with mode 0700 if it is missing, and return it.

    Raises ConfigError if others could replace its files: if it has another owner or is a link, or if others may write
    to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & _OTHERS_WRITE:
        raise ConfigError(
            "the folder for temporary files is not yours alone",
            where=str(path),
            expected=f"a folder of user {os.getuid()} to which nobody else may write",
            got=f"{stat.filemode(found.st_mode)}, of user {found.st_uid}",
            hint="remove it, or `chmod 700` it if it is yours; or use a folder of your own (TMPDIR for the system's "
            "temporary folder)",
        )
    return path


def open_private(path: str) -> IO[bytes]:
    """Open a file that holds pickles. The file may be in a store.

    Raises OSError, and DataError if another user wrote the file or may write to it, or if it is not a regular file.
    """
    if not is_local(path):
        return open_to_read(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK, a FIFO would block
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & _OTHERS_WRITE:
        os.close(fd)
        raise DataError(
            "a file that may hold code is not yours alone",
            where=path,
            expected=f"a file of user {os.getuid()} to which nobody else may write",
            got=f"{stat.filemode(found.st_mode)}, of user {found.st_uid}",
            hint="remove the file or its folder, and run again; run all processes of a job as one user",
        )
    return os.fdopen(fd, "rb")
