"""A model's tensors: their names and shapes, their tree, and their safetensors files.

If a file holds float32, the weights are memory maps, so loading takes no time and makes no second
copy. Every length, shape and name in a file is checked before it is used.
"""

import errno
import json
import math
import mmap
import os
import re
import sys

import numpy as np

from plumbing.files import MOST_BYTES, check_file, read_json, replacing

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # if there are several files, called shards

# --- Names and shapes ---------------------------------------------------------------------------


def tensor_shapes(hparams):
    """Yields every parameter's (name, shape). A name is the path in the tree: blocks.0.ln_1.g."""
    n_embd = hparams["n_embd"]
    n_inner = hparams.get("n_inner", 4 * n_embd)
    yield "wte", (hparams["n_vocab"], n_embd)
    yield "wpe", (hparams["n_ctx"], n_embd)
    for i in range(hparams["n_layer"]):
        for layer, n_in, n_out in (
            ("attn.c_attn", n_embd, 3 * n_embd),
            ("attn.c_proj", n_embd, n_embd),
            ("mlp.c_fc", n_embd, n_inner),
            ("mlp.c_proj", n_inner, n_embd),
        ):
            yield f"blocks.{i}.{layer}.w", (n_in, n_out)
            yield f"blocks.{i}.{layer}.b", (n_out,)
        for norm in ("ln_1", "ln_2"):
            yield f"blocks.{i}.{norm}.g", (n_embd,)
            yield f"blocks.{i}.{norm}.b", (n_embd,)
    yield "ln_f.g", (n_embd,)
    yield "ln_f.b", (n_embd,)


def hugging_face_name(name):  # "blocks.0.ln_1.g" -> "h.0.ln_1.weight", "wte" -> "wte.weight"
    *way, last = name.replace("blocks.", "h.").split(".")
    endings = {"w": ["weight"], "g": ["weight"], "b": ["bias"]}
    return ".".join(way + endings.get(last, [last, "weight"]))


def tensorflow_name(name):  # "blocks.0.ln_1.g" -> "model/h0/ln_1/g", "wte" -> "model/wte"
    return "model/" + name.replace("blocks.", "h").replace(".", "/")


def nest(arrays):
    """Turns {"blocks.0.ln_1.g": array, ...} into {"blocks": [{"ln_1": {"g": array}}], ...}."""
    params = {}
    for name, array in arrays.items():
        *way, last = name.split(".")
        node = params
        for step in way:
            node = node.setdefault(step, {})
        node[last] = array
    params["blocks"] = list(params["blocks"].values())
    return params


def leaves(node, way=""):  # the reverse of nest
    """Turns {"blocks": [{"ln_1": {"g": array}}], ...} into {"blocks.0.ln_1.g": array, ...}."""
    if not isinstance(node, (dict, list)):
        return {way: node}
    steps = node.items() if isinstance(node, dict) else enumerate(node)
    arrays = {}
    for step, child in steps:
        arrays |= leaves(child, f"{way}.{step}" if way else step)
    return arrays


def leaf(params, name):  # (params, "blocks.0.ln_1.g") -> params["blocks"][0]["ln_1"]["g"]
    try:
        for step in name.split("."):
            params = params[int(step) if isinstance(params, (list, tuple)) else step]
        return params
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"params: {name} is missing") from None


def named_tensors(params, hparams, dtype):
    """Returns {Hugging Face's key: array of `dtype`}.

    Raises ValueError if params do not have the shapes that hparams ask for.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be float32 or float16, not {dtype!r}")
    n_blocks = len(leaf(params, "blocks"))
    if n_blocks != hparams["n_layer"]:
        raise ValueError(f"params: {n_blocks} blocks, but n_layer is {hparams['n_layer']}")
    tensors = {}
    for name, shape in tensor_shapes(hparams):
        array = np.asarray(leaf(params, name))
        if array.shape != shape:
            raise ValueError(f"params: {name} is {array.shape}, but hparams ask for {shape}")
        with np.errstate(over="ignore"):
            stored = array.astype(dtype, order="C", copy=False)
        if dtype == "float16" and np.isinf(stored).any():
            raise ValueError(f"{name} has numbers that are too large for float16; save as float32")
        tensors["transformer." + hugging_face_name(name)] = stored
    return tensors


# --- safetensors --------------------------------------------------------------------------------
# A file holds a length n in 8 bytes, n bytes of JSON {key: {dtype, shape, data_offsets}}, and the
# numbers. See https://github.com/huggingface/safetensors. Its NumPy reader copies the numbers; ours
# maps them.


def read_safetensors(path):
    """Returns {key: (dtype, shape, read-only uint8 view of the mapped file)}.

    Raises ValueError if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path, math.inf)
    try:
        with open(path, "rb") as f:
            n_header = int.from_bytes(f.read(8), "little")
            if n_header > MOST_BYTES:
                raise ValueError(f"{path}: the header claims {n_header} bytes, so it is damaged")
            with safe_open(path, "np"):  # opening the file checks it
                pass
            header = json.loads(f.read(n_header))
            data = map_or_read(f)
    except SafetensorError as error:
        raise ValueError(f"{path} is incomplete or damaged ({error})") from None
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if not isinstance(entry, dict):  # the library also accepts a list of the same values
            raise ValueError(f"{path}: {key} is not a JSON object")
        start, stop = (8 + n_header + offset for offset in entry["data_offsets"])
        tensors[key] = entry["dtype"], tuple(entry["shape"]), data[start:stop]
    return tensors


def map_or_read(file):  # -> its bytes, read-only uint8
    """Maps an open file or, on Windows, reads it, because a mapped file can't be replaced there."""
    if sys.platform == "win32":
        file.seek(0)
        return np.frombuffer(file.read(), np.uint8)
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def read_index(path):  # -> the names of the shards, each once
    """Raises ValueError for a name that is not that of a file in the index's folder."""
    weight_map = read_json(path).get("weight_map")
    shards = [*weight_map.values()] if isinstance(weight_map, dict) else [""]
    if any(not isinstance(s, str) or s != os.path.basename(s) or not s for s in shards):
        raise ValueError(f"{path}: weight_map must name files in this folder")
    return sorted(set(shards))


def to_float32(dtype, data, source):
    """Returns bytes as a flat, read-only float32 array: a view, or a copy of 16-bit formats."""
    if dtype == "F32":
        array = np.require(data.view("<f4"), requirements="A")  # a copy only if badly aligned
    elif dtype == "F16":
        array = data.view("<f2").astype(np.float32)
    elif dtype == "BF16":  # the upper half of a float32
        array = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        raise ValueError(f"{source} is {dtype}; only F32, F16 and BF16 are supported")
    array.flags.writeable = False
    return array


def scale_queries(c_attn, scale):  # [..., 3 * n_embd] -> the same, read-only
    """Returns a copy of c_attn's weight or bias, with its first third, the queries', multiplied."""
    scaled = c_attn.copy()
    scaled[..., : scaled.shape[-1] // 3] *= scale
    scaled.flags.writeable = False
    return scaled


def write_safetensors(path, tensors, metadata=None):
    """Writes {key: C-contiguous array}, as a complete file or none. metadata: {key: text}."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata or {"format": "pt"})
            os.chmod(temporary, 0o644)  # the library lets only the owner read it
    except SafetensorError as error:  # only its text says that the disk is full
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code)) from None
