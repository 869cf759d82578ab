"""Files that cannot be trusted, and files that must not be left half-written.

A file may come from a stranger: we open only ordinary files, and read none that is larger than it
should be. What we write is complete or absent, whenever we are killed.
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
except ImportError:  # Windows: there we cannot lock a file against another process
    fcntl = None

MOST_BYTES = 2**24  # of a JSON or tokenizer file: GPT-2's have 1 MB. Parsed JSON takes 25 x that


def check_file(path, n_most=MOST_BYTES):
    """ValueError if path is not an ordinary file, or has more than n_most bytes.

    A pipe could make us wait forever, and a link may lead to a device that never ends.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not an ordinary file")
    if status.st_size > n_most:
        raise ValueError(f"{path}: {status.st_size} bytes, more than the {n_most} allowed")


def read_json(path, n_most=MOST_BYTES):  # -> dict
    """Return the JSON object in a file of at most n_most bytes; ValueError for anything else."""
    check_file(path, n_most)
    return parse_json(Path(path).read_bytes(), path)


def parse_json(data, path):  # bytes -> dict
    """Return the JSON object in data; ValueError, which names the path, for anything else."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


@contextlib.contextmanager
def naming(path):
    """Put the path before the message of a ValueError that is raised inside, unless it is there."""
    try:
        yield
    except ValueError as error:  # text that is not UTF-8 is one as well
        message = str(error)
        if not message.startswith(str(path)):
            message = f"{path}: {message}"
        raise ValueError(message) from None


def write_whole(path, text):
    """Write a text file that is seen either complete or not at all."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


@contextlib.contextmanager
def replacing(path):
    """Yields another name to write to. At the end that file replaces `path`, in one step.

    By then it is on the disk. After an error, `path` is as it was and the other file is deleted.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    remove(temporary)  # through a link of that name we would write elsewhere
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows flushes only a file that it may write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove_left_over(path):
    """Deletes what `replacing` left half-written where it was killed: the files of dead processes.

    If another machine is still writing one, its os.replace fails: an error, but no broken file.
    """
    if sys.platform == "win32":  # there os.kill would end the process
        return
    name = re.compile(re.escape(os.path.basename(path)) + r"\.([0-9]{1,9})\.tmp")
    folder = os.path.dirname(path) or "."
    for other, found in ((n, name.fullmatch(n)) for n in os.listdir(folder)):
        try:
            if found:
                os.kill(int(found[1]), 0)  # only asks whether there is such a process
        except ProcessLookupError:
            remove(os.path.join(folder, other))
        except PermissionError:  # there is, and it is somebody else's
            pass


def remove(*paths):
    """Deletes the files, if they exist."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def open_locked(part, wait=True):
    """`part`, opened to append, and ours alone until it is closed or we are killed.

    BlockingIOError if another process has it and wait is false. Some clusters' file systems have
    no locks: there, two processes can have the file at once.
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
        with contextlib.suppress(FileNotFoundError):  # renamed by its owner while we waited
            if os.path.samestat(os.fstat(f.fileno()), os.stat(part)):
                return f
        f.close()


def close_before_renaming(file):
    """Close it on Windows, where an open file can be neither renamed nor deleted.

    Elsewhere it stays open, because closing it would give up the lock of open_locked.
    """
    if sys.platform == "win32":
        file.close()


def open_no_link(path, flags):
    """For open(): refuses a link, which in a stranger's folder could make us write elsewhere."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
