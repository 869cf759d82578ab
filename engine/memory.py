"""Keeps the memory of NumPy's temporary arrays for the next ones.

The C library gives large blocks back to the system as soon as they are freed. The next array of
that size then stands on fresh pages, and the first touch of each is a fault: gelu of 256 x 3072
numbers takes 3.6 ms that way, and 0.9 ms if its memory was kept.

On Linux a page has 4 KiB, and the processor remembers where some thousands of them are (its TLB).
NumPy asks for pages of 2 MiB where it makes an array of 4 MiB or more, and what stands there later
also has them. So two such arrays are made and dropped here: a training step of backprop.py takes
2 % less time.
"""

import contextlib
import ctypes
import functools
import os

import numpy as np

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST_KEPT, LARGEST = 64 << 20, 32 << 20  # bytes: free at the heap's end, and that it grows by


@functools.cache
def keep():
    """Asks glibc, for this process, to keep up to 64 MiB. Other systems are left as they are."""
    if any(name.startswith("MALLOC_") for name in os.environ):  # the user has chosen
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
        [np.empty(LARGEST - (1 << 20), np.uint8) for _ in range(2)]  # at once: 62 MiB
