"""Estimates how large rounding errors can be, and whether a tensor differs by more."""

import math
from typing import NamedTuple

import numpy as np

from model_files.weights import leaves, nest

# The largest relative error of rounding a number.
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
DTYPES = tuple(UNITS)


def round_bfloat16(x):  # float32 -> float32 with 8 significant bits, ties to even
    bits = np.asarray(x, np.float32).view(np.uint32)
    upper = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    y = (upper & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(x), y, x)


def round_float16(x):
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


SHAKEN = "shaken "  # a prefix of a dtype: results also change at random, by as much as rounding


def rounding(precision):
    """Returns a function that rounds an array to a precision. The result has a type of NumPy's."""
    dtype = precision.removeprefix(SHAKEN)
    rounded = {"bfloat16": round_bfloat16, "float16": round_float16}.get(dtype, lambda x: x)
    if dtype == precision:
        return rounded
    rng = np.random.default_rng(0)

    def shaken(x):
        noise = rng.uniform(-1, 1, x.shape) * (2 * UNITS[dtype])
        return rounded(x * (1 + noise.astype(x.dtype)))

    return shaken


def cast(params, precision):  # a tree of arrays -> the same, in another precision
    kind = np.float64 if precision == "float64" else np.float32
    rounded = rounding(precision.removeprefix(SHAKEN))
    arrays = {name: rounded(np.asarray(x, kind)) for name, x in leaves(params).items()}
    return nest(arrays)


class Twin(NamedTuple):
    """A tensor in float64, and computed twice with rounding to the compared precision."""

    exact: np.ndarray
    rounded: np.ndarray  # as gpt2.py computes it
    shaken: np.ndarray  # as another implementation might compute it (see SHAKEN)


class Distance(NamedTuple):
    """How far a tensor is from the exact one."""

    rms: float  # the root mean square of the differences
    largest: float
    place: tuple  # the index of the largest difference

    def within(self, allowed):
        return bool(self.rms <= allowed.rms and self.largest <= allowed.largest)


def differences(x, exact, slack=0):  # -> |x - exact|, 0 where both are NaN or the same infinity
    with np.errstate(invalid="ignore", over="ignore"):
        d = np.abs(np.asarray(x, np.float64) - exact)
    d = np.where(np.isnan(d), np.inf, d)
    same = (x == exact) | (np.isnan(x) & np.isnan(exact))
    return np.maximum(np.where(same, 0, d) - slack, 0)


def distance(x, exact, slack=0):
    """slack: an error of each number that is not counted, an array or 0."""
    if np.shape(x) != np.shape(exact):
        return Distance(math.inf, math.inf, ())
    d = differences(x, exact, slack)
    if d.size == 0:
        return Distance(0.0, 0.0, ())
    place = np.unravel_index(d.argmax(), d.shape)
    rms = math.sqrt(np.square(d).mean()) if np.isfinite(d).all() else math.inf
    return Distance(rms, float(d[place]), tuple(map(int, place)))


def allowed(twin, dtype, n_terms):
    """Returns the distance that rounding explains, for any order of the sums.

    Our own rounded results show how errors grow on the way to this tensor. Another implementation's
    errors differ, but have the same size. On top of that comes the error of a sum of n_terms
    numbers, added one by one in float32 (which is also where 16-bit numbers are added up).
    """
    finite = np.isfinite(twin.exact)
    exact = np.abs(twin.exact[finite])
    both = [distance(x[finite], twin.exact[finite]) for x in (twin.rounded, twin.shaken)]
    ours = Distance(max(d.rms for d in both), max(d.largest for d in both), ())
    unit = 2 * UNITS[dtype] + math.sqrt(n_terms) * UNITS["float32"]
    rms = math.sqrt(np.square(exact).mean()) if exact.size else 0.0
    largest = float(exact.max(initial=0))
    return Distance(6 * ours.rms + unit * rms, 8 * ours.largest + 2 * unit * largest, ())
