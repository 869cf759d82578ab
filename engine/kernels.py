"""A second OpenBLAS, for products of a few rows on processors with AVX-512.

OpenBLAS has kernels for each family of processors and chooses among them once, while it loads. Its
AVX-512 kernels are the best for one row and for long prompts, but for 2 to 64 rows Haswell's are up
to 1.6 times faster, on the same processor. One library cannot have both. So where the PyPI package
scipy-openblas64 is installed (NumPy's own wheels are built with it), its library is loaded beside
NumPy's, and told to choose Haswell's.

It has its own threads. Between products they spin instead of sleeping, because waking a thread can
take longer than a small product. But the spinning threads of two libraries slow each other down. So
these stop spinning soon, and NumPy's library is limited to one thread meanwhile (see threads.py).
Without the package everything works the same, only slower.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import sys
from pathlib import Path

import numpy as np

from engine import threads

AVX512 = {"SkylakeX", "Cooperlake", "SapphireRapids"}  # OpenBLAS's names for AVX-512 kernels
MOST_ROWS = 64  # of x; with more rows AVX-512 is faster, if it is truly 512 bits wide


def has_avx512():
    """Does NumPy's OpenBLAS use its AVX-512 kernels?"""
    return any(getattr(lib, "architecture", "") in AVX512 for lib, _ in threads.blas())


def few_rows():
    """Returns a function (x, w, y) that writes x @ w into y, or None if NumPy's own is best."""
    with threads.lock:
        return find_few_rows()


@functools.cache
def most_rows():
    """The most rows for which few_rows is faster. On Zen 4 (AVX-512 of 2 x 256 bits) any number."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        cpu = dict(re.findall(r"(vendor_id|cpu family)\s*: (\S+)", f.read()))
        if cpu == {"vendor_id": "AuthenticAMD", "cpu family": "25"}:
            return sys.maxsize
    return MOST_ROWS


@functools.cache
def find_few_rows():
    if not has_avx512() or "OPENBLAS_CORETYPE" in os.environ:  # then the user has chosen
        return None
    found = importlib.util.find_spec("scipy_openblas64")  # an import would load it unconfigured
    for path in Path(found.origin).parent.glob("lib/libscipy_openblas64_.*") if found else ():
        try:
            return sgemm(load(path))
        except (OSError, AttributeError):  # a damaged file, or a build with other names
            return None
    return None


def load(path):
    """Loads the library. It reads the environment only now, so we restore it afterwards."""
    choices = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": str(threads.n_threads())}
    choices["OPENBLAS_THREAD_TIMEOUT"] = "20"  # 2^20 cycles, a third of a millisecond
    before = {name: os.environ.get(name) for name in choices}
    os.environ.update(choices)
    try:
        return ctypes.CDLL(str(path))
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def sgemm(library):
    """Returns few_rows' function. It takes float32, and each row of x and y must be contiguous.

    A thread that is doing a share of some work doesn't divide its products again.
    """
    gemm, gemv = library.scipy_cblas_sgemm64_, library.scipy_cblas_sgemv64_
    set_threads = library.scipy_openblas_set_num_threads64_
    size, pointer, scalar, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_int
    matrix = pointer, size
    gemm.restype = gemv.restype = None
    gemm.argtypes = [*[flag] * 3, *[size] * 3, scalar, *matrix, *matrix, scalar, *matrix]
    gemv.argtypes = [*[flag] * 2, *[size] * 2, scalar, *matrix, *matrix, scalar, *matrix]

    def multiply(x, w, y):  # [rows, n_in], [n_in, n_out], [rows, n_out]
        by_rows = w.strides[0] > 4  # otherwise by columns, also for one column, which rounds less
        x_at, w_at, y_at = (a.ctypes.data for a in (x, w, y))
        (rows, n_in), n_out = x.shape, w.shape[1]
        w_step = w.strides[0] // 4 if by_rows else n_in
        set_threads(threads.parts(sys.maxsize))
        if rows == 1 and by_rows:
            gemv(101, 112, n_in, n_out, 1.0, w_at, w_step, x_at, 1, 0.0, y_at, 1)
        elif rows == 1:
            gemv(101, 111, n_out, n_in, 1.0, w_at, w_step, x_at, 1, 0.0, y_at, 1)
        else:
            x_step, y_step = x.strides[0] // 4, y.strides[0] // 4
            order = 101, 111, 111 if by_rows else 112, rows, n_out, n_in
            gemm(*order, 1.0, x_at, x_step, w_at, w_step, 0.0, y_at, y_step)

    return multiply


def pad(x):  # [rows, n_in] -> [rows rounded up to a multiple of 8, n_in]
    """Adds rows of zeros, because Haswell's kernels do 8 rows at a time. One row stays one row."""
    padded = np.zeros((1 if len(x) == 1 else -(-len(x) // 8) * 8, x.shape[1]), x.dtype)
    padded[: len(x)] = x
    return padded
