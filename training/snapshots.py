"""Small copies of a run's parameters, for explain.py's page about how the model learned.

    models/mine/snapshots/00000145.safetensors      the parameters after 145 steps, in float16

They stand on a logarithmic scale of steps, because a model changes most at the beginning. No JAX.
"""

import os
import re
from pathlib import Path

import numpy as np

from model_files.weights import (
    hugging_face_name,
    named_tensors,
    nest,
    read_safetensors,
    tensor_shapes,
    to_float32,
    write_safetensors,
)
from plumbing.files import remove

NAME = re.compile(r"(\d{8,})\.safetensors")
OURS = re.compile(NAME.pattern + r"(\.\d+\.tmp)?")  # or half-written
MOST = float(np.finfo(np.float16).max)


def snapshot_steps(n_steps, n):
    """At most n of the steps from 0 to n_steps, with both, on a logarithmic scale.

    >>> snapshot_steps(2000, 8)
    [0, 1, 4, 14, 48, 166, 576, 2000]
    """
    n = min(n, n_steps + 1)
    steps = [0, 1][: n - 1]
    while len(steps) < n:
        last = max(1, steps[-1])
        ratio = (n_steps / last) ** (1 / (n - len(steps)))
        steps.append(max(steps[-1] + 1, round(last * ratio)))
    return steps


def write_snapshot(out, hparams, params, n_done):
    """Write a complete file or none. Raises OSError, which names the file."""
    path = Path(out, "snapshots", f"{n_done:08d}.safetensors")
    tensors = named_tensors(params, hparams, "float32")
    halves = {key: np.clip(x, -MOST, MOST).astype(np.float16) for key, x in tensors.items()}
    try:
        os.makedirs(path.parent, exist_ok=True)
        write_safetensors(path, halves)  # no metadata: the library would write it in random order
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None


def find_snapshots(out):  # a run's folder -> {step: path}, in the order of the steps
    folder = Path(out, "snapshots")
    names = os.listdir(folder) if folder.is_dir() else []
    found = {int(match[1]): folder / match[0] for match in map(NAME.fullmatch, names) if match}
    return dict(sorted(found.items()))


def read_snapshot(path, hparams):  # -> the parameters, a tree of float32
    """Raises ValueError if the file is damaged, or if its shapes are not those of hparams."""
    tensors, arrays = read_safetensors(path), {}
    for name, shape in tensor_shapes(hparams):
        dtype, found, data = tensors.get("transformer." + hugging_face_name(name), ("", None, b""))
        if found != shape:
            raise ValueError(f"{path}: {name} is {found}, but the run's model has {shape}")
        arrays[name] = to_float32(dtype, data, f"{path}: {name}").reshape(shape)
    return nest(arrays)


def delete_snapshots(out, n_done):
    """Delete those after more than n_done steps, and half-written ones. None for all."""
    for path in Path(out, "snapshots").glob("*"):
        match = OURS.fullmatch(path.name)
        if match and (n_done is None or match[2] or int(match[1]) > n_done):
            remove(path)
