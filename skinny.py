"""x @ w for a few rows of x: the product that generation is made of, nearer to memory's speed.

To write one token for each of 8 texts, 8 rows are multiplied by every matrix of the model. That is
little arithmetic: the time should be that of reading the weights once. But OpenBLAS, which makes
NumPy's products, first rearranges ("packs") each matrix, as pays for hundreds of rows; so 2 rows of
GPT-2 124M take it three times as long as 1. Its AVX-512 kernels have a path that packs nothing, for
products of at most a million multiplications. Hence this file: cut w into slabs so small,

    x @ w  =  x[:, 0:32] @ w[0:32]  +  x[:, 32:64] @ w[32:64]  +  ...

and share them among threads of our own, for that path uses one. A slab of whole rows is contiguous
in memory, so nothing is copied, and weights mapped from a file stay there.

`wrap(params)` views the matrices as `Matrix`, whose `@` works like that; no function of gpt2.py
changes. Inside `with own_threads(n_rows):` OpenBLAS leaves all threads to us. On processors
without AVX-512 everything is a plain product: the kernels there pack less, and gain nothing here.
"""

import contextlib
import functools
import os
import threading
import time
from queue import SimpleQueue

import numpy as np
from numpy._core._multiarray_umath import __cpu_features__

MOST_ROWS_SUMMED, MOST_ROWS_SIDE_BY_SIDE = 16, 32  # of x; with more, packing pays
MIN_SIZE = 1 << 17  # a smaller matrix is not worth waking a thread

# --------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------


class Matrix(np.ndarray):
    """A 2-d array with fast products. These and its rows are plain arrays, its .T is a Matrix."""

    def __rmatmul__(self, x):  # [..., n_in] @ self, which is [n_in, n_out] -> [..., n_out]
        w, rows = self.view(np.ndarray), x.reshape(-1, x.shape[-1])
        return product(rows, w).reshape(*x.shape[:-1], w.shape[-1])

    def __matmul__(self, x):
        return self.view(np.ndarray) @ x

    def __getitem__(self, index):
        return self.view(np.ndarray)[index]


def wrap(params):
    """The same tree, every matrix in it a Matrix: views, nothing is copied. Done twice is once."""
    if isinstance(params, dict) and isinstance(params.get("wte"), Matrix):
        return params
    if isinstance(params, dict):
        return {name: wrap(value) for name, value in params.items()}
    if isinstance(params, list):
        return [wrap(value) for value in params]
    return params.view(Matrix) if params.ndim == 2 else params


def product(x, w):  # [rows, n_in], [n_in, n_out] -> [rows, n_out]
    """x @ w by whichever way is fastest; the same numbers up to float32's rounding."""
    by_rows, by_columns = w.flags.c_contiguous, w.flags.f_contiguous  # how it lies in memory
    plain = x.dtype != np.float32 or w.dtype != np.float32 or not (by_rows or by_columns)
    if plain or w.size < MIN_SIZE or len(x) == 0 or n_threads() == 1:
        return x @ w
    if by_rows and 1 < len(x) <= MOST_ROWS_SUMMED:
        return sum_of_slabs(x, w)
    if by_columns and 1 < len(x) <= MOST_ROWS_SIDE_BY_SIDE:
        return row_of_slabs(x, w)
    return split_columns(x, w) if n_users and (by_columns or len(x) > 1) else x @ w


def sum_of_slabs(x, w):  # slabs of w's rows, whose products add up
    (rows, n_in), n_out = x.shape, w.shape[1]
    height = max(1, min(1_000_000 // (rows * n_out), max(16, n_in // (12 * n_threads()))))
    n_slabs = n_in // height
    cut = height * n_slabs
    parts = x[:, :cut].reshape(rows, n_slabs, height).swapaxes(0, 1)
    slabs = w[:cut].reshape(n_slabs, height, n_out)
    y, *others = in_threads(lambda mine: (parts[mine] @ slabs[mine]).sum(0), n_slabs)
    for other in others:
        y += other
    if cut < n_in:
        y += x[:, cut:] @ w[cut:]
    return y


def row_of_slabs(x, w):  # slabs of w's columns, whose products stand side by side
    (rows, n_in), n_out = x.shape, w.shape[1]
    width = max(1, min(64, n_out, 800_000 // (rows * n_in)))
    n_slabs = n_out // width
    cut = width * n_slabs
    slabs = w.T[:cut].reshape(n_slabs, width, n_in).swapaxes(1, 2)
    y = np.empty((rows, n_out), np.float32)
    parts = y[:, :cut].reshape(rows, n_slabs, width).swapaxes(0, 1)
    in_threads(lambda mine: np.matmul(x, slabs[mine], out=parts[mine]), n_slabs)
    y[:, cut:] = x @ w[:, cut:]
    return y


def split_columns(x, w):  # each thread some of the columns, packed as usual
    y = np.empty((len(x), w.shape[1]), np.float32)
    in_threads(lambda mine: np.matmul(x, w[:, mine], out=y[:, mine]), w.shape[1])
    return y


# --------------------------------------------------------------------------------------------------
# Threads
# --------------------------------------------------------------------------------------------------


lock = threading.RLock()  # for what follows: callers may have threads of their own
n_users, restore = 0, []  # of own_threads; and [(OpenBLAS, the number of threads it had outside)]


def blas():
    """[(OpenBLAS as threadpoolctl controls it, its threads at first)]; [] where it has no use."""
    with lock:
        return find_blas()


@functools.cache
def find_blas():
    if not __cpu_features__.get("AVX512_SKX") or "OPENBLAS_CORETYPE" in os.environ:
        return []
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
    """[work(slice), ...]: 0 .. n cut into a slice for each thread, this one's first."""
    n_parts = max(1, min(n_threads(), n))
    lead = 0.08  # this thread takes a little more, for the others must wake first
    ends = [0, *(round(n * (i + lead) / (n_parts + lead)) for i in range(1, n_parts + 1))]
    slices = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
    results, done, asked, tasks = [UNSET] * n_parts, SimpleQueue(), 0, workers()
    try:
        for i in range(1, n_parts):
            task = i, work, slices[i], results, done
            asked = i  # from here to the end of put no signal is handled
            tasks.put(task)
        results[0] = work(slices[0])
        for _ in range(1, n_parts):
            done.get()
    except BaseException:  # Ctrl-C, say: nobody may go on writing into the caller's arrays
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
