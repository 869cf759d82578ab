"""Processes that share a step's work. Small models need them: their threads wait for each other.

Python runs one thread at a time between NumPy's operations, and threads whose operations are short
lose a tenth of their time by that. A process that is forked from this one has a Python of its own.
It sees what happens to arrays made by `shared`, and its results are also written to such arrays;
only some words go through a pipe. Elsewhere than on Linux forking is not safe, and the products of
large models are so long that nobody waits: threads do the same there, with the same bits.
"""

import contextlib
import functools
import mmap
import os
import signal
import sys

import numpy as np

from engine.threads import cut, in_threads, own_threads, parts, undivided

LARGEST = 16 << 20  # bytes of the parameters: larger models are left to threads


def count(n_rows, n_bytes):
    """Into how many processes rows are best shared out, for so many bytes of parameters."""
    return parts(n_rows) if sys.platform == "linux" and n_bytes <= LARGEST else 1


def shared(x):
    """A copy of an array; processes forked from now on see what is written to it, and may write."""
    y = np.frombuffer(mmap.mmap(-1, x.nbytes), x.dtype).reshape(x.shape)
    y[...] = x
    return y


def share_in_threads(work, rows, **options):
    """[work(part of the rows, **options), ...], a part for each thread, in the rows' order."""
    with own_threads(len(rows)):  # a single row is left to OpenBLAS's own threads
        return in_threads(lambda mine: work(rows[mine], **options), len(rows))


@contextlib.contextmanager
def sharing(work, n, arrays):
    """Gives share(rows, **options): the same by n processes, this one included. n = 1: by threads.

    Where n is more than 1, work(rows, out, **options) writes arrays like these ({name: array}) into
    `out`, or makes them if that is None, and returns something small, and them. The other processes
    know it and what it holds as they are now, and end with the `with`. Their arrays are good until
    the next call.
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
def fork(work, arrays, elder):  # gives a helper: pipe, room for its arrays, process
    from multiprocessing import Pipe  # only here: the import takes a while

    (ours, theirs), room = Pipe(), {name: shared(x) for name, x in arrays.items()}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    pid = os.fork()
    if pid == 0:  # here Ctrl-C stays blocked: the end of the pipe is what ends a helper
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
    """A helper's life: it ends when nobody is left at the pipe's other end."""
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
    with contextlib.suppress(OSError):  # if it is gone, `hear` says so
        link.send((rows, options))


def hear(helper):
    link, room, pid = helper
    try:
        answer = link.recv()
    except (EOFError, OSError):
        gone = f"process {pid}, which had a part of the work, is gone"
        raise ChildProcessError(gone) from None
    if isinstance(answer, Exception):
        raise answer
    return answer, room
