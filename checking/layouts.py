"""The layouts of other implementations: which axes an array may have, and how to get ours."""

import math
from typing import NamedTuple

import numpy as np

from checking import names
from model_files.weights import leaves

AXES = {"B": "n_batch", "T": "n_seq", "E": "n_embd", "H": "n_head", "D": "d_head", "V": "n_vocab",
        "I": "n_inner"}  # fmt: skip
# Our layout comes first. Letters without a space between them are one axis.
LAYOUTS = {
    "B T E": ["B T E", "T B E", "BT E"],
    "B T 3E": ["B T 3E", "T B 3E", "BT 3E"],
    "B T I": ["B T I", "T B I", "BT I"],
    "B T HD": ["B T HD", "T B HD", "BT HD", "B H T D", "B T H D", "T B H D", "H B T D"],
    "B H T D": ["B H T D", "B T H D", "B T HD", "BT HD", "H B T D", "T B H D"],
    "B H T T": ["B H T T", "H B T T", "BH T T"],
    "B T V": ["B T V", "T B V", "BT V", "B V"],
    "B T": ["B T", "T B", "BT"],
    "": [""],
}
MOST_PADDING = 1024  # the most rows or columns of a vocabulary beyond n_vocab


class Entry(NamedTuple):
    """One of their tensors, with its name and ours. Its layout may be ambiguous."""

    theirs: str
    name: str
    arrays: list  # float64, brought into our layout, for every layout that theirs may be
    rows: slice  # the positions of ours that they are compared with

    def select(self, exact):
        return exact[:, self.rows] if self.rows != slice(None) else exact


def read_entries(arrays, case, source):
    """Turns {their name: array} into a list of Entry, in the order of our names.

    Raises ValueError for unknown names, and for shapes of no known layout.
    """
    params = tuple(shapes_of(case))
    n_layer = case.sizes()["n_layer"]
    entries, unknown = [], []
    for theirs, x in arrays.items():
        try:
            found = names.find_name(theirs, n_layer, params)
        except KeyError:
            unknown.append(names.suggest(theirs, n_layer, params))
            continue
        for name, i in found:
            part = x
            if i is not None:
                if x.ndim < 2 or len(x) != n_layer:
                    raise ValueError(
                        f"{source}: {theirs} is {shown(x.shape)}, "
                        f"expected [{n_layer}, ...], one row for each block"
                    )
                part = x[i]
            entries.append(arrange(theirs, name, part, case, source))
    if unknown:
        raise ValueError(
            f"{source}: unknown names (--names lists the accepted ones): {'; '.join(unknown)}"
        )
    order = {name: i for i, name in enumerate(names.all_names(case))}
    return sorted(entries, key=lambda entry: order[entry.name])


def shapes_of(case):  # -> {name of a parameter: its shape}
    return {name: x.shape for name, x in leaves(case.params["float64"]).items()}


def shown(shape):
    return f"[{', '.join(map(str, shape))}]"


def arrange(theirs, name, x, case, source):  # -> Entry
    kind, base = names.split_kind(name)
    params = shapes_of(case)
    if base in params and (kind or base not in ("wte", "wpe")):
        found, wanted = arrange_parameter(x, base, params[base]), [params[base]]
        rows = slice(None)
    else:
        axes = names.about(base).axes
        if base.endswith("attn.scores") and not kind and is_masked(x):
            name = name.replace("attn.scores", "attn.masked")
        sizes = case.sizes()
        if base == "wpe":  # the same for every sequence, so one may stand for all
            is_one = x.ndim == 3 and len(x) == 1
            if is_one or x.ndim == 2 and len(x) <= sizes["n_seq"] + 1:
                sizes["n_batch"] = 1
        found, wanted, rows = arrange_activation(x, axes, sizes)
        if base == "wpe":
            found = [np.broadcast_to(y, (len(case.tokens), *y.shape[1:])) for y in found]
    if not found:
        expected = " or ".join(shown(shape) for shape in wanted)
        raise ValueError(f"{source}: {theirs} is {shown(x.shape)}, expected {expected}")
    found = [np.asarray(y, np.float64) for y in found]
    found = [comparable(name, y) for y in found]
    return Entry(theirs, name, found, rows)


def is_masked(x):  # [..., T, T] -> whether it hides later positions
    if x.ndim < 2:
        return False
    later = np.triu(np.ones(x.shape[-2:], bool), 1)
    return bool(later.any() and (x[..., later] <= -1e3).all())


def arrange_parameter(x, name, shape):
    """Accepts our shape, its transpose, leading axes of size 1, and rows of padding."""
    while x.ndim > len(shape) and x.shape[0] == 1:
        x = x[0]
    n_rows = shape[0]
    found = []
    for y in (x, x.T) if x.ndim == 2 else (x,):
        is_padded = name == "wte" and y.ndim == 2 and 0 < len(y) - n_rows < MOST_PADDING
        y = y[:n_rows] if is_padded else y
        if y.shape == shape:
            found.append(y)
    return found


def arrange_activation(x, axes, sizes):  # -> [array], [shapes that were expected], rows of T
    found, wanted, rows = [], [], slice(None)
    for layout in LAYOUTS[axes]:
        for theirs in (layout, without_batch(layout)) if sizes["n_batch"] == 1 else (layout,):
            shape = [axis_size(axis, sizes) for axis in theirs.split()]
            if shape not in wanted:
                wanted.append(shape)
            y = fit(x, theirs.split(), sizes)
            if y is None:
                continue
            single = dict(sizes)
            if axes == "B T V" and "T" not in layout:
                single["n_seq"] = 1
                rows = slice(-1, None)
            found.append(reorder(y, theirs, axes, single))
    return found, wanted[:4], rows


def without_batch(layout):  # "B T E" -> "T E", "BT E" -> "T E"
    return " ".join(axis.replace("B", "") for axis in layout.split() if axis != "B")


def axis_size(axis, sizes):  # "BT" -> n_batch * n_seq
    if axis == "3E":
        return 3 * sizes["n_embd"]
    return math.prod(sizes[AXES[letter]] for letter in axis)


def fit(x, axes, sizes):
    """Returns x, without an extra position or columns of padding, or None if the axes don't fit."""
    while x.ndim > len(axes) and x.shape[0] == 1:
        x = x[0]
    if x.ndim == 1 and len(axes) == 0 and x.size == 1:
        x = x[0]
    if x.ndim != len(axes):
        return None
    cut = []
    for axis, n in zip(axes, x.shape, strict=True):
        size = axis_size(axis, sizes)
        extra = 1 if axis == "T" else MOST_PADDING if axis == "V" else 0
        if not size <= n <= size + extra:
            return None
        cut.append(slice(size))
    positions = {n for axis, n in zip(axes, x.shape, strict=True) if axis == "T"}
    return x[tuple(cut)] if len(positions) < 2 else None


def reorder(x, theirs, ours, sizes):
    """Turns one layout into another: splits it into single axes, reorders and joins them."""
    letters = [letter for axis in theirs.split() for letter in split_axis(axis)]
    target = [letter for axis in ours.split() for letter in split_axis(axis)]
    x = x.reshape([axis_size(letter, sizes) for letter in letters])
    missing = [letter for letter in target if letter not in letters]
    for letter in missing:  # a batch of one, or the last position
        x = x[None]
        letters.insert(0, letter)
    places, free = [], list(enumerate(letters))
    for letter in target:
        place = next(pair for pair in free if pair[1] == letter)
        free.remove(place)
        places.append(place[0])
    x = x.transpose(places)
    shape = [axis_size(axis, sizes) for axis in ours.split()]
    return x.reshape(shape)


def split_axis(axis):  # "BT" -> ["B", "T"], "3E" -> ["3E"]
    return [axis] if axis == "3E" else list(axis)


def fill_hidden(entry, exact):
    """Takes our scores for later positions if theirs are 0, which means they weren't computed."""
    arrays = []
    for x in entry.arrays:
        later = np.triu(np.ones(x.shape[-2:], bool), 1)
        empty = (x[..., later] == 0).all()
        arrays.append(np.where(later, exact, x) if empty else x)
    return entry._replace(arrays=arrays)


def comparable(name, x):  # a tensor in our layout -> the same, without numbers that may differ
    """The gradient of a hidden weight is not used, so some implementations don't compute it."""
    if name.endswith("attn.masked"):
        return hide(x)
    is_gradient = name.startswith("grad.") and name.endswith("attn.weights")
    return np.tril(x) if is_gradient else x


def hide(scores):
    """Any number far below every score hides a position just as -inf does."""
    return np.where(scores < -3e4, -np.inf, scores)


def closest(entry, measure):  # -> the smallest distance over all layouts
    return min(map(measure, entry.arrays), key=lambda found: (found.rms, found.largest))
