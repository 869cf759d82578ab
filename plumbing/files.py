"""Reads files that cannot be trusted, and writes files that must not be left half-written.

A file may come from a stranger, so we open only ordinary files, and none that is larger than it
should be. A file that we write is either complete or absent, even if we are killed.
"""

import contextlib
import errno
import json
import math
import os
import re
import stat
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where we cannot lock a file against another process
    fcntl = None

MOST_BYTES = 2**24  # of a JSON or tokenizer file. GPT-2's have 1 MB, parsed JSON takes 25 x that


def check_file(path, n_most=MOST_BYTES):
    """Raises ValueError if path is not an ordinary file, or has more than n_most bytes.

    A pipe could make us wait forever, and a link may lead to a device that never ends.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not an ordinary file")
    if status.st_size > n_most:
        raise ValueError(f"{path}: {status.st_size} bytes, more than the {n_most} allowed")


def read_json(path, n_most=MOST_BYTES):  # -> dict
    """Returns the JSON object in a file of at most n_most bytes. Anything else is a ValueError."""
    check_file(path, n_most)
    return parse_json(Path(path).read_bytes(), path)


def parse_json(data, path):  # bytes -> dict
    """Returns the JSON object in data. Anything else is a ValueError, which names the path."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


@contextlib.contextmanager
def naming(path):
    """Puts the path before the message of a ValueError raised inside, if it isn't there yet."""
    try:
        yield
    except ValueError as error:  # also for text that is not UTF-8
        message = str(error)
        if not message.startswith(str(path)):
            message = f"{path}: {message}"
        raise ValueError(message) from None


def write_whole(path, text):
    """Writes a text file, which appears either complete or not at all."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


@contextlib.contextmanager
def replacing(path):
    """Yields another name to write to. In the end that file replaces `path`, in one step.

    By then it is on the disk. After an error, `path` is unchanged and the other file is deleted.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    remove(temporary)  # it could be a link, through which we would write elsewhere
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows flushes only files open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove_left_over(path):
    """Deletes half-written files of `replacing`, left by processes that were killed.

    If another machine is still writing such a file, its os.replace fails. That is an error, but
    leaves no damaged file.
    """
    if sys.platform == "win32":  # where os.kill would end the process
        return
    name = re.compile(re.escape(os.path.basename(path)) + r"\.([0-9]{1,9})\.tmp")
    folder = os.path.dirname(path) or "."
    for other, found in ((n, name.fullmatch(n)) for n in os.listdir(folder)):
        try:
            if found:
                os.kill(int(found[1]), 0)  # only asks whether the process exists
        except ProcessLookupError:
            remove(os.path.join(folder, other))
        except PermissionError:  # it exists, and belongs to somebody else
            pass


def remove(*paths):
    """Deletes the files, if they exist."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def open_locked(part, wait=True):
    """Opens `part` to append, and locks it until it is closed or we are killed.

    Raises BlockingIOError if another process has locked it and wait is false. Some clusters' file
    systems have no locks, so two processes can open the file at once there.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):
            check_file(part, math.inf)
        f = open(part, "ab+", opener=open_no_link)  # noqa: SIM115
        try:
            if fcntl:
                fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        with contextlib.suppress(FileNotFoundError):  # its owner renamed it while we waited
            if os.path.samestat(os.fstat(f.fileno()), os.stat(part)):
                return f
        f.close()


def close_before_renaming(file):
    """Closes a file on Windows, where an open file can be neither renamed nor deleted.

    Elsewhere the file stays open, because closing it would release the lock of open_locked.
    """
    if sys.platform == "win32":
        file.close()


def open_no_link(path, flags):
    """An opener for open() that rejects links, which could make us write somewhere else."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
