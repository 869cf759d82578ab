"""Processes that share the work of a step, for small models, whose threads wait for each other.

Between NumPy's operations Python runs one thread at a time, and threads with short operations lose
a tenth of their time that way. A forked process has its own Python. It sees changes to arrays made
by `shared`, and writes its results to such arrays, so only short messages go through a pipe.
Forking is only safe on Linux, and in large models the operations are so long that no thread waits.
In these cases threads do the same, with the same bits.
"""

import contextlib
import functools
import mmap
import os
import signal
import sys

import numpy as np

from engine.threads import cut, in_threads, own_threads, parts, undivided

LARGEST = 16 << 20  # bytes of parameters; larger models use threads


def count(n_rows, n_bytes):
    """Returns how many processes should share the rows. n_bytes: of the parameters."""
    return parts(n_rows) if sys.platform == "linux" and n_bytes <= LARGEST else 1


def shared(x):
    """Returns a copy of an array that processes forked from now on can read and write."""
    y = np.frombuffer(mmap.mmap(-1, x.nbytes), x.dtype).reshape(x.shape)
    y[...] = x
    return y


def share_in_threads(work, rows, **options):
    """Returns [work(part of the rows, **options), ...], one part per thread, in order."""
    with own_threads(len(rows)):  # OpenBLAS's own threads handle a single row
        return in_threads(lambda mine: work(rows[mine], **options), len(rows))


@contextlib.contextmanager
def sharing(work, n, arrays):
    """Yields share(rows, **options), which does the same in n processes. With n = 1, in threads.

    If n is more than 1, work(rows, out, **options) returns something small, and arrays like
    `arrays` ({name: array}). It writes these into `out`, or makes them if `out` is None. The other
    processes have a copy of `work` and of everything it refers to, made now, and end with the
    `with` block. Their arrays are valid until the next call.
    """
    with contextlib.ExitStack() as stack:
        helpers = []
        for _ in range(1, n):
            helpers.append(stack.enter_context(fork(work, arrays, helpers)))

        def share(rows, **options):
            mine, *others = cut(len(rows), n)
            with own_threads(n), undivided():
                for helper, theirs in zip(helpers, others, strict=True):
                    ask(helper, rows[theirs], options)
                return [work(rows[mine], None, **options), *map(hear, helpers)]

        yield share if helpers else functools.partial(share_in_threads, work)


@contextlib.contextmanager
def fork(work, arrays, elder):  # yields a helper: its pipe, its arrays, its process id
    from multiprocessing import Pipe  # only here: the import takes a while

    (ours, theirs), room = Pipe(), {name: shared(x) for name, x in arrays.items()}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    pid = os.fork()
    if pid == 0:  # Ctrl-C stays blocked here, because the end of the pipe ends a helper
        try:
            for link in (ours, *(link for link, _, _ in elder)):
                link.close()
            serve(work, theirs, room)
        finally:
            os._exit(0)
    try:
        theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield ours, room, pid
    finally:
        with contextlib.suppress(OSError):  # it may be gone already
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        ours.close()


def serve(work, link, room):
    """Runs a helper until the other end of its pipe is closed."""
    with contextlib.suppress(EOFError, OSError), own_threads(2), undivided():
        while True:
            rows, options = link.recv()
            try:
                answer, _ = work(rows, room, **options)
            except Exception as error:  # raised again by the process that asked
                answer = error
            link.send(answer)


def ask(helper, rows, options):
    link, _, pid = helper
    with contextlib.suppress(OSError):  # if it is gone, `hear` raises the error
        link.send((rows, options))


def hear(helper):
    link, room, pid = helper
    try:
        answer = link.recv()
    except (EOFError, OSError):
        gone = f"process {pid}, which was doing a part of the work, has died"
        raise ChildProcessError(gone) from None
    if isinstance(answer, Exception):
        raise answer
    return answer, room
