"""Faults at a chosen moment, for test_faults.py: the nth time that a process changes a folder.

Python tells of every file that it opens, renames or deletes, before it does so (sys.addaudithook).
What listens may raise an error in its place, or kill the process. Libraries that are not Python,
like the one that writes safetensors, are not seen: what they do happens between two such moments.
"""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

from plumbing import cli

ROOM = {"open", "os.mkdir"}  # what a full disk refuses
CHANGES = ROOM | {"os.rename", "os.remove", "os.rmdir", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FAULTS = {
    "killed": (CHANGES, None),
    "full": (ROOM, errno.ENOSPC),
    "read-only": (CHANGES, errno.EROFS),
}
os.fsync = lambda fd: None  # which only a power cut would notice, and takes most of the time
NOT_FIRED, SURVIVED, ENDED = 10, 11, 12  # exit codes


def arm(folder, fault, n):
    """The fault is there from the nth change of a folder on. -> a list that is filled by then."""
    kinds, code = FAULTS[fault]
    changes, fired = [], []

    def is_change(event, args):
        if event not in kinds or event == "open" and not args[2] & WRITING:
            return False
        path = args[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        if event in ("os.remove", "os.rmdir") and args[1] != -1:  # by shutil.rmtree, by name alone
            return True
        return os.path.abspath(os.fsdecode(path)).startswith(str(folder))

    def listen(event, args):
        if is_change(event, args):
            changes.append(event)
            if len(changes) > n:
                fired.append(event)
                if code is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(code, os.strerror(code), args[0])

    sys.addaudithook(listen)
    return fired


def at_every_change(folder, fault, work, before=None):
    """Yields after runs of `work` that met the fault at their first change, their second and so on.

    Each runs in a process of its own and finds `folder` as the folder `before` is, or missing. It
    may end with OSError in one line, which is printed, or as if nothing were; anything else, and
    AssertionError tells. Ends after the first run that met no fault.
    """
    n, code = 0, None
    while code != NOT_FIRED:
        shutil.rmtree(folder, ignore_errors=True)
        if before:
            shutil.copytree(before, folder)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            run(folder, fault, n, work)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (NOT_FIRED, SURVIVED, ENDED) or fault == "killed" and code == -9, (n, code)
        yield n
        n += 1


def run(folder, fault, n, work):
    """Never returns."""
    code = 1
    try:
        fired = arm(folder, fault, n)
        try:
            work()
            code = SURVIVED if fired else NOT_FIRED
        except OSError as error:
            print(cli.one_line(error), flush=True)
            code = ENDED if fired else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def files(folder):  # -> {path in the folder: bytes}, of all files, hidden ones too
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
