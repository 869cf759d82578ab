"""A second OpenBLAS, for products of a few rows on processors with AVX-512.

OpenBLAS has kernels for each family of processors and chooses among them once, while it loads. Its
AVX-512 kernels are the best for one row and for long prompts, but for 2 to 64 rows Haswell's are up
to 1.6 times faster, on the same processor. One library cannot have both. So where the PyPI package
scipy-openblas64 is installed (NumPy's own wheels are built with it), its library is loaded beside
NumPy's, and told to choose Haswell's.

It has a single thread: ours share the work, and two pools of threads would only spin against each
other. Without the package everything works the same, and takes longer.
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
    return any(lib.architecture in AVX512 for lib, _ in threads.blas())


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
    choices = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1"}
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
    """The BLAS function, as few_rows describes it: float32, and each row of x and y contiguous."""
    function, size, pointer = library.scipy_cblas_sgemm64_, ctypes.c_int64, ctypes.c_void_p
    scalar, flag = ctypes.c_float, ctypes.c_int
    function.restype = None
    function.argtypes = [
        *[flag] * 3, *[size] * 3, scalar, pointer, size, pointer, size, scalar, pointer, size
    ]  # fmt: skip

    def multiply(x, w, y):  # [rows, n_in], [n_in, n_out], [rows, n_out]
        by_rows = w.strides[1] == w.itemsize
        function(
            101, 111, 111 if by_rows else 112, len(x), w.shape[1], w.shape[0],
            1.0, x.ctypes.data, x.strides[0] // 4, w.ctypes.data, max(w.strides) // 4,
            0.0, y.ctypes.data, y.strides[0] // 4,
        )  # fmt: skip

    return multiply


def pad(x):  # [rows, n_in] -> [rows rounded up to a multiple of 4, n_in]
    """Adds rows of zeros. They cost nothing, since Haswell's kernels take 4 rows at a time."""
    padded = np.zeros((-(-len(x) // 4) * 4, x.shape[1]), x.dtype)
    padded[: len(x)] = x
    return padded
