"""Threads for products: how many OpenBLAS uses, and our own threads, which share the work.

NumPy may use another library. MKL, which conda's NumPy uses, is treated the same way. The threads
of Apple's Accelerate can't be counted or limited.

Inside `with own_threads(n_rows):` OpenBLAS stays on the calling thread, and `in_threads(work, n)`
cuts the work into one slice per thread of ours. With `in_step` these can wait for each other.
Ctrl-C, a caller's own threads, and a fork while no other thread is computing are all safe. A fork
while one is computing may never return, because OpenBLAS stops its threads before a fork, even
those that are in a product. Fork before such threads start, or let multiprocessing "spawn".
"""

import contextlib
import functools
import os
import threading
import time
from itertools import pairwise
from queue import SimpleQueue

lock = threading.RLock()  # guards the variables below, because callers may have threads
n_users, restore = 0, []  # users of own_threads; [(library, how many threads it had before)]
stepping = threading.Lock()  # held while threads wait for each other
this_thread = threading.local()  # .busy: is this thread doing a share of some work?


def blas():
    """[(library, as threadpoolctl controls it, its initial number of threads)], perhaps empty."""
    with lock:
        return find_blas()


@functools.cache
def find_blas():
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().select(user_api="blas").lib_controllers
    return [(lib, lib.num_threads) for lib in found]


def n_threads():
    """As many as OpenBLAS had at first, so that OMP_NUM_THREADS and similar variables are obeyed.

    Accelerate doesn't tell, so there it is what these variables say, or all cores.
    """
    counts = [n for _, n in blas()]
    if counts:
        return max(counts)
    for name in ("VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS"):
        asked = os.environ.get(name, "")
        if asked.isdecimal() and int(asked) > 0:
            return int(asked)
    return usable_cores()


def usable_cores():
    """How many cores this process may use. In a container this is often not all of them."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit(counts):
    for lib, n in counts:
        lib.set_num_threads(n)
        if lib.internal_api == "openblas":
            lib.clear_controlling_thread(force=True)  # another thread may set the limit next


@contextlib.contextmanager
def own_threads(n_rows):
    """Keeps OpenBLAS on the calling thread, because its idle threads spin and would slow ours.

    This holds for the whole process until the last user leaves. For a single row nothing changes,
    because OpenBLAS is faster than we are at dividing such products (GEMV) among threads.
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


@contextlib.contextmanager
def undivided():
    """Keeps all work of this thread on this thread, because others do their parts elsewhere."""
    before = getattr(this_thread, "busy", False)
    this_thread.busy = True
    try:
        yield
    finally:
        this_thread.busy = before


def parts(n):
    """How many threads share n things. One if this thread is already doing a share of some work."""
    return 1 if getattr(this_thread, "busy", False) else max(1, min(n_threads(), n))


def cut(n, n_parts):
    """Cuts 0 .. n into slices, the first a little longer, because the other threads must wake."""
    lead = 0.08
    ends = [0, *(round(n * (i + lead) / (n_parts + lead)) for i in range(1, n_parts + 1))]
    return [slice(*pair) for pair in pairwise(ends)]


def in_threads(work, n):
    """Returns [work(slice), ...], with 0 .. n cut into one slice per thread, this one first."""
    return share(work, cut(n, parts(n)))


def in_step(work, n, n_parts):
    """Returns [work(number, slice, meet), ...], with 0 .. n cut evenly for n_parts threads.

    meet() returns once all of them have called it. n_parts: at most parts(n). Only one call runs at
    a time, because two calls could each hold threads that the other waits for.
    """
    ends = [round(n * i / n_parts) for i in range(n_parts + 1)]
    barrier = threading.Barrier(n_parts)

    def take_part(span):
        try:
            return work(ends.index(span.start), span, barrier.wait)
        except BaseException:
            barrier.abort()  # so that the others do not wait for this thread
            raise

    with stepping if n_parts > 1 else contextlib.nullcontext():
        return share(take_part, [slice(*pair) for pair in pairwise(ends)], barrier.abort)


def share(work, slices, give_up=lambda: None):
    """Returns [work(slice), ...], the first done here, the others by workers.

    Calls give_up() if this thread fails.
    """
    if len(slices) == 1:
        return [work(slices[0])]
    results, done, asked, tasks = [UNSET] * len(slices), SimpleQueue(), 0, workers()
    try:
        for i in range(1, len(slices)):
            task = i, work, slices[i], results, done
            asked = i  # from here to the end of put no signal is handled
            tasks.put(task)
        this_thread.busy = True
        results[0] = work(slices[0])
        for _ in range(1, len(slices)):
            done.get()
    except BaseException as error:  # such as Ctrl-C; wait until no worker writes any more
        give_up()
        while any(result is UNSET for result in results[1 : asked + 1]):
            time.sleep(0.001)
        results[0] = error
    finally:
        this_thread.busy = False
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the cause comes first, before the errors that follow from it
    return results


UNSET = object()


def workers():
    """Returns the queue of the worker threads, and starts them the first time."""
    with lock:
        return start_workers()


@functools.cache
def start_workers():
    tasks = SimpleQueue()
    for _ in range(1, n_threads()):
        threading.Thread(target=serve, args=(tasks,), daemon=True).start()
    return tasks


def serve(tasks):
    """Runs a worker. A SimpleQueue wakes it several times faster than concurrent.futures does."""
    this_thread.busy = True
    while True:
        do(*tasks.get())  # nothing here keeps the arguments, which may be large arrays, alive


def do(i, work, span, results, done):
    try:
        results[i] = work(span)
    except BaseException as error:  # raised again by whoever waits for the result
        results[i] = error
    done.put(i)


def after_fork():
    """Starts afresh: threads don't survive a fork, and a lock that one held would stay locked."""
    global lock, stepping, n_users
    lock, stepping = threading.RLock(), threading.Lock()
    start_workers.cache_clear()
    if n_users:
        n_users = 0
        limit(restore)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)
