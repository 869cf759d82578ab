"""Keeps the memory of NumPy's temporary arrays for the next ones.

The C library returns large blocks to the system as soon as they are freed. The next array of that
size then gets new pages, and the first access to each page is a fault: gelu of 256 x 3072 numbers
takes 3.6 ms that way, and 0.9 ms if its memory was kept.

On Linux a page has 4 KiB, and the processor remembers the addresses of a few thousand of them (in
its TLB). NumPy asks for pages of 2 MiB when it makes an array of 4 MiB or more, and later arrays in
the same place have them, too. So two such arrays are made and dropped here, which makes a training
step of backprop.py 2 % faster.
"""

import contextlib
import ctypes
import functools
import os

import numpy as np

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST_KEPT = 64 << 20  # bytes that stay free at the heap's end
LARGEST = 32 << 20  # bytes of the largest block in the heap


@functools.cache
def keep():
    """Asks glibc to keep up to 64 MiB for this process. Does nothing on other systems."""
    if any(name.startswith("MALLOC_") for name in os.environ):  # the user has chosen
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
        [np.empty(LARGEST - (1 << 20), np.uint8) for _ in range(2)]  # at once: 62 MiB
