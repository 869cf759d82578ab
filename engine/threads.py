"""Threads for products: OpenBLAS's count of them, and some of our own to share work among.

Inside `with own_threads(n_rows):` OpenBLAS stays on the calling thread, and `in_threads(work, n)`
cuts the work into a slice for each of ours. Ctrl-C, forks and a caller's own threads do no harm.
"""

import contextlib
import functools
import os
import threading
import time
from queue import SimpleQueue

lock = threading.RLock()  # for what follows: callers may have threads of their own
n_users, restore = 0, []  # of own_threads; and [(OpenBLAS, the number of threads it had outside)]
here = threading.local()  # .busy where a thread is doing a share of some work already


def blas():
    """[(OpenBLAS as threadpoolctl controls it, its threads at first)]; [] where there is none."""
    with lock:
        return find_blas()


@functools.cache
def find_blas():
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().select(internal_api="openblas").lib_controllers
    return [(lib, lib.num_threads) for lib in found]


def n_threads():
    """As many as OpenBLAS had at first, so that OMP_NUM_THREADS and its like are obeyed."""
    return max((n for _, n in blas()), default=1)


def limit(counts):
    for lib, n in counts:
        lib.set_num_threads(n)
        lib.clear_controlling_thread(force=True)  # the next to set it may be another thread


@contextlib.contextmanager
def own_threads(n_rows):
    """Inside, OpenBLAS stays on the calling thread: its idle threads spin, and ours would wait.

    That holds for the whole process until the last user leaves. Not for a single row, a product of
    which (GEMV) OpenBLAS splits among its threads faster.
    """
    global n_users, restore
    if n_rows == 1:
        yield
        return
    entered = False
    try:
        with lock:
            if n_users == 0:
                restore = [(lib, lib.num_threads) for lib, _ in blas()]
            n_users, entered = n_users + 1, True
            limit([(lib, 1) for lib, _ in restore])
        yield
    finally:
        with lock:
            n_users -= entered
            if n_users == 0:
                limit(restore)


def in_threads(work, n):
    """[work(slice), ...]: 0 .. n cut into a slice for each thread, this one's first.

    Work that is itself a thread's share is not shared again.
    """
    if n_threads() == 1 or n <= 1 or getattr(here, "busy", False):
        return [work(slice(0, n))]
    n_parts = min(n_threads(), n)
    lead = 0.08  # this thread takes a little more, for the others must wake first
    ends = [0, *(round(n * (i + lead) / (n_parts + lead)) for i in range(1, n_parts + 1))]
    slices = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
    results, done, asked, tasks = [UNSET] * n_parts, SimpleQueue(), 0, workers()
    try:
        for i in range(1, n_parts):
            task = i, work, slices[i], results, done
            asked = i  # from here to the end of put no signal is handled
            tasks.put(task)
        here.busy = True
        results[0] = work(slices[0])
        here.busy = False
        for _ in range(1, n_parts):
            done.get()
    except BaseException:  # Ctrl-C, say: nobody may go on writing into the caller's arrays
        here.busy = False
        while any(result is UNSET for result in results[1 : asked + 1]):
            time.sleep(0.001)
        raise
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


UNSET = object()


def workers():
    """The queue that the worker threads take from; they start with its first use."""
    with lock:
        return start_workers()


@functools.cache
def start_workers():
    tasks = SimpleQueue()
    for _ in range(1, n_threads()):
        threading.Thread(target=serve, args=(tasks,), daemon=True).start()
    return tasks


def serve(tasks):
    """A worker's life. A SimpleQueue wakes it several times faster than concurrent.futures does."""
    here.busy = True
    while True:
        do(*tasks.get())  # which forgets its arguments: they may hold large arrays


def do(i, work, mine, results, done):
    try:
        results[i] = work(mine)
    except BaseException as error:  # raised again by whoever waits for the result
        results[i] = error
    done.put(i)


def after_fork():
    """Threads do not survive a fork; a lock that another thread held would never be released."""
    global lock, n_users
    lock = threading.RLock()
    start_workers.cache_clear()
    if n_users:
        n_users = 0
        limit(restore)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)
