"""A second OpenBLAS, for products of a few rows on processors with AVX-512.

OpenBLAS has kernels for each family of processors and chooses among them once, while it loads. Its
AVX-512 kernels are the best for one row and for long prompts, but for 2 to 64 rows Haswell's are up
to 1.6 times faster, on the same processor. One library cannot have both. So where the PyPI package
scipy-openblas64 is installed (NumPy's own wheels are built with it), its library is loaded beside
NumPy's, and told to choose Haswell's.

It has threads of its own. Between products they do not sleep, because waking a thread can take
longer than a small product. But two libraries' waiting threads slow each other down: so these give
up soon, and NumPy's library is held to one thread meanwhile, see threads.py. Without the package
everything works the same, and takes longer.
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
    """A function (x, w, y) that writes x @ w into y, for few rows of x; None if NumPy's is best."""
    with threads.lock:
        return find_few_rows()


@functools.cache
def most_rows():
    """Up to how many rows of x few_rows is faster: all on Zen 4, whose AVX-512 is 2 x 256 bits."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        cpu = dict(re.findall(r"(vendor_id|cpu family)\s*: (\S+)", f.read()))
        if cpu == {"vendor_id": "AuthenticAMD", "cpu family": "25"}:
            return sys.maxsize
    return MOST_ROWS


@functools.cache
def find_few_rows():
    if not has_avx512() or "OPENBLAS_CORETYPE" in os.environ:  # or the user has chosen
        return None
    found = importlib.util.find_spec("scipy_openblas64")  # an import would load it unconfigured
    for path in Path(found.origin).parent.glob("lib/libscipy_openblas64_.*") if found else ():
        try:
            return sgemm(load(path))
        except (OSError, AttributeError):  # a damaged file, or a build that names things otherwise
            return None
    return None


def load(path):
    """Loads the library. It reads the environment only then, so we set it back afterwards."""
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
    """The BLAS functions, as few_rows describes it: float32, and each row of x and y contiguous.

    A thread that does a share of some work does not share its products once more.
    """
    gemm, gemv = library.scipy_cblas_sgemm64_, library.scipy_cblas_sgemv64_
    set_threads = library.scipy_openblas_set_num_threads64_
    size, pointer, scalar, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_int
    matrix = pointer, size
    gemm.restype = gemv.restype = None
    gemm.argtypes = [*[flag] * 3, *[size] * 3, scalar, *matrix, *matrix, scalar, *matrix]
    gemv.argtypes = [*[flag] * 2, *[size] * 2, scalar, *matrix, *matrix, scalar, *matrix]

    def multiply(x, w, y):  # [rows, n_in], [n_in, n_out], [rows, n_out]
        by_rows = w.strides[0] > 4  # else by columns, as is a single one: its sum loses less
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
    """Adds rows of zeros: Haswell's kernels are fastest with 8 rows at a time. One row stays so."""
    padded = np.zeros((1 if len(x) == 1 else -(-len(x) // 8) * 8, x.shape[1]), x.dtype)
    padded[: len(x)] = x
    return padded
