"""Reads and writes tensors in files that C, Rust and Python can read: safetensors and .npz."""

import json
import math
import os
import zipfile

import numpy as np

from checking import names
from checking.recording import ADAMW
from model_files.weights import read_safetensors, to_float32, write_safetensors
from plumbing.files import check_file, replacing

TYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U16": "<u2",
         "U8": "u1", "I8": "i1", "U32": "<u4", "U64": "<u8"}  # fmt: skip
ENDINGS = (".safetensors", ".npz")


def check_ending(path):
    if not str(path).endswith(ENDINGS):
        raise ValueError(f"{path}: expected a name that ends in .safetensors or .npz")


def read_arrays(path):  # -> {name: array}
    """Raises ValueError for a file that is neither .npz nor safetensors, or is damaged."""
    check_ending(path)
    if str(path).endswith(".npz"):
        check_file(path, math.inf)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
            raise ValueError(f"{path}: not an .npz file of plain arrays ({error})") from None
    else:
        arrays = {}
        for name, (dtype, shape, data) in read_safetensors(path).items():
            if dtype in TYPES:
                x = np.frombuffer(data.tobytes(), TYPES[dtype])
            else:
                x = to_float32(dtype, data, f"{path}: {name}")
            arrays[name] = x.reshape(shape)
    return check_numbers(arrays, path)


def check_numbers(arrays, source):
    """Leaves out our own metadata. Raises ValueError for arrays of anything but numbers."""
    arrays = {name: x for name, x in arrays.items() if name != "metadata"}
    arrays = {name: x for name, x in arrays.items() if not name.startswith("float64.")}
    for name, x in arrays.items():
        if x.dtype.kind not in "fiu":
            raise ValueError(f"{source}: {name} is {x.dtype}, expected numbers")
    return arrays


def metadata(case, about):
    """Returns {subject: text} on the model, the optimizer, and each tensor's axes and meaning."""
    sizes = {"B": "n_batch", "T": "n_seq", "E": "n_embd", "H": "n_head", "D": "d_head"}
    sizes |= {"V": "n_vocab", "I": "4 * n_embd", "3E": "3 * n_embd", "HD": "n_embd"}
    found = {
        "format": "sixtyGPT's reference activations, version 1",
        "model": about,
        "sizes": json.dumps(case.sizes()),
        "adamw": json.dumps(ADAMW),
        "float64.NAME": "the same tensor as NAME, computed in float64",
        "tokens": "[n_batch, n_seq + 1] ids. The last is not an input, the first not a target",
        "params.NAME": "a parameter. Matrices are [n_in, n_out]",
        "grad.NAME": "the gradient of the mean loss, with the axes of NAME",
        "step.NAME": "a parameter after one step of AdamW from zero moments; only matrices decay",
    }  # fmt: skip
    for made in [*names.EMBEDDINGS, *names.BLOCK, *names.HEAD]:
        name = f"blocks.N.{made.name}" if made in names.BLOCK else made.name
        axes = ", ".join(sizes[axis] for axis in made.axes.split())
        found[name] = f"[{axes}] {made.meaning}"
    return found


def write_arrays(path, arrays, about):  # {name: array}, {subject: text}
    """Writes a complete file or none, in the format that its name's ending says."""
    check_ending(path)
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{path}: there is no folder {folder}")
    arrays = {name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in arrays.items()}
    if str(path).endswith(".npz"):
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, metadata=np.array(json.dumps(about)))
    else:
        write_safetensors(path, arrays, about)
