"""Model folders: find, download, load and save them.

    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare")
    save_model("models/mine", encoder, hparams, params)

Two layouts load: OpenAI's (hparams.json and a TensorFlow checkpoint, which is converted once) and
Hugging Face's (config.json and model.safetensors). Only the second is written. Weights are memory
maps wherever the file holds float32, so that loading costs no time and no second copy. Nothing
here unpickles, and no length, shape or name found in a file is believed before it is checked.
"""

import base64
import contextlib
import errno
import filecmp
import hashlib
import importlib.util
import json
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from encoder import get_encoder
from files import (
    MOST_BYTES,
    check_file,
    open_locked,
    open_no_link,
    read_json,
    remove,
    replacing,
    write_whole,
)

SIZES = ("124M", "355M", "774M", "1558M")
RELEASED = "https://openaipublic.blob.core.windows.net/gpt-2/models"
TEXT_FILES = ("encoder.json", "vocab.bpe", "hparams.json")
CKPT_FILES = tuple(f"model.ckpt.{end}" for end in ("meta", "index", "data-00000-of-00001"))
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HUGGING_FACE_SIZES = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
OUR_ARITHMETIC = {  # the values of Hugging Face's settings that mean what gpt2.py computes
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
ATTEMPTS = 5  # without a new byte between them
PATIENCE = 30  # seconds a server may stay silent
BACKOFF = 0.25  # seconds before the first retry; doubled for every further one

# --- Finding and loading a model ----------------------------------------------------------------


def load_encoder_hparams_and_params(model_size, models_dir="models"):
    """The tokenizer, the sizes and the weights (read-only float32 arrays) of one model.

    `model_size` is a released size (downloaded when missing), a folder under `models_dir`, or a
    path. ValueError, OSError or ImportError say in one line what is wrong with it and where.
    """
    model_dir = find_model(model_size, models_dir)
    hparams = read_hparams(model_dir)
    encoder = get_encoder("", model_dir)
    check_vocabulary(encoder, hparams, model_dir)
    params = load_params(model_dir, hparams)
    # Rows beyond the tokenizer's ids only pad the matrix to a rounder size: they must not be drawn.
    params["wte"] = params["wte"][: encoder.n_vocab]
    return encoder, hparams | {"n_vocab": encoder.n_vocab}, params


def find_model(model_size, models_dir="models", only_tokenizer=False):  # -> an absolute path
    """The folder `model_size` means; a released size is downloaded if any of its files is missing.

    The project's own `models` stands in for a default `models_dir` that is not in this directory.
    """
    if models_dir == "models" and not os.path.isdir(models_dir):
        models_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")
    if model_size in SIZES:
        download(model_size, models_dir, only_tokenizer)
    for folder in (os.path.join(models_dir, model_size), model_size):
        if model_size and os.path.isdir(folder):
            return os.path.abspath(folder)
    names = os.listdir(models_dir) if os.path.isdir(models_dir) else []
    here = sorted(n for n in names if sizes_file(os.path.join(models_dir, n)) and n not in SIZES)
    raise ValueError(
        f"no model {model_size!r}: choose one of {', '.join([*here, *SIZES])}, or a folder's path"
    )


def sizes_file(model_dir):
    """The path of a folder's config.json (Hugging Face's) or hparams.json (OpenAI's), or None."""
    paths = [os.path.join(model_dir, name) for name in ("config.json", "hparams.json")]
    return next(filter(os.path.isfile, paths), None)


def read_hparams(model_dir):
    """The sizes {n_vocab, n_ctx, n_embd, n_head, n_layer}, whichever layout they are written in.

    ValueError for sizes no model has, and for variants of GPT-2 that we would compute wrongly.
    """
    path = sizes_file(model_dir)
    if path is None:
        raise FileNotFoundError(f"{model_dir}: no model, neither config.json nor hparams.json")
    config = read_json(path)
    hugging_face = path.endswith("config.json")
    hparams = {}
    for ours, theirs in HUGGING_FACE_SIZES.items():
        key = theirs if hugging_face else ours
        size = hparams[ours] = config.get(key)
        if type(size) is not int or not 0 < size <= 2**24:
            raise ValueError(f"{path}: {key} is {size!r}, not a sensible number")
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(f"{path}: n_embd {hparams['n_embd']} is no multiple of n_head")
    if hugging_face:
        n_inner = {"n_inner": (None, 4 * hparams["n_embd"])}
        for key, same in (OUR_ARITHMETIC | n_inner).items():
            if config.get(key, same[0]) not in same:
                raise ValueError(f"{path}: {key} {config[key]!r} is not supported, {same[0]!r} is")
    return hparams


def check_vocabulary(encoder, hparams, model_dir):
    """ValueError if the tokenizer makes ids that the weights have no row for."""
    if encoder.n_vocab > hparams["n_vocab"]:
        raise ValueError(
            f"{model_dir}: the tokenizer has {encoder.n_vocab} ids, the model {hparams['n_vocab']}"
        )


def tensor_shapes(hparams):
    """Every parameter's (name, shape). A name is its way through the tree: blocks.0.ln_1.g."""
    n_embd = hparams["n_embd"]
    yield "wte", (hparams["n_vocab"], n_embd)
    yield "wpe", (hparams["n_ctx"], n_embd)
    for i in range(hparams["n_layer"]):
        for layer, n_in, n_out in (
            ("attn.c_attn", n_embd, 3 * n_embd),
            ("attn.c_proj", n_embd, n_embd),
            ("mlp.c_fc", n_embd, 4 * n_embd),
            ("mlp.c_proj", 4 * n_embd, n_embd),
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


def load_params(model_dir, hparams):
    """The parameters of a model folder as a tree, params["blocks"][0]["attn"]["c_attn"]["w"] ...

    Every array is float32, C-contiguous and read-only; ValueError if any disagrees with `hparams`.
    """
    tensors, source = read_weights(model_dir)
    arrays = {}
    for name, shape in tensor_shapes(hparams):
        key = hugging_face_name(name)
        if key not in tensors:
            raise ValueError(f"{source}: {key} is missing")
        dtype, found, data = tensors.pop(key)
        if found != shape:
            raise ValueError(f"{source}: {key} is {found}, where its sizes ask for {shape}")
        arrays[name] = to_float32(dtype, data, f"{source}: {key}").reshape(shape)
    for key, (_, shape, _) in tensors.items():  # a mask is harmless, a thirteenth layer is not
        head = key == "lm_head.weight" and shape != arrays["wte"].shape
        if head or (key.startswith("h.") and not key.endswith((".attn.bias", ".attn.masked_bias"))):
            raise ValueError(f"{source}: {key} {shape} has no place in a model of its sizes")
    return nest(arrays)


def nest(arrays):
    """{"blocks.0.ln_1.g": array, ...} -> {"blocks": [{"ln_1": {"g": array}}], ...}"""
    params = {}
    for name, array in arrays.items():
        *way, last = name.split(".")
        node = params
        for step in way:
            node = node.setdefault(step, {})
        node[last] = array
    params["blocks"] = list(params["blocks"].values())
    return params


def read_weights(model_dir):
    """({Hugging Face's key: (dtype, shape, bytes)}, the path to name in complaints)."""
    path = os.path.join(model_dir, "model.safetensors")
    index = path + ".index.json"
    checkpoint = os.path.join(model_dir, "model.ckpt")
    if os.path.isfile(path):
        tensors = read_safetensors(path)
    elif os.path.isfile(index):
        shards = read_json(index).get("weight_map")
        shards = [*shards.values()] if isinstance(shards, dict) else [""]
        if any(not isinstance(s, str) or s != os.path.basename(s) or not s for s in shards):
            raise ValueError(f"{index}: weight_map should name files of this folder")
        tensors, path = {}, index
        for shard in sorted(set(shards)):
            tensors |= read_safetensors(os.path.join(model_dir, shard))
    elif os.path.isfile(checkpoint + ".index"):
        tensors, path = convert_checkpoint(model_dir, path), checkpoint
    else:
        raise FileNotFoundError(
            f"{model_dir}: no weights, neither model.safetensors nor model.ckpt"
        )
    return {key.removeprefix("transformer."): entry for key, entry in tensors.items()}, path


# --- safetensors --------------------------------------------------------------------------------
# 8 bytes n, n bytes of JSON {key: {dtype, shape, data_offsets}}, then the numbers; see
# https://github.com/huggingface/safetensors, whose NumPy reader copies where this one maps.


def read_safetensors(path):
    """{key: (dtype, shape, read-only uint8 view of the mapped file)}; ValueError if it lies."""
    from safetensors import SafetensorError, safe_open

    check_file(path, math.inf)
    try:
        with open(path, "rb") as f:
            n_header = int.from_bytes(f.read(8), "little")
            if n_header > MOST_BYTES:
                raise ValueError(f"{path}: a header of {n_header} bytes, more than any model needs")
            with safe_open(path, "np"):  # which checks it
                pass
            header = json.loads(f.read(n_header))
            data = np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except SafetensorError as error:
        raise ValueError(f"{path}: cut short or corrupt ({error})") from None
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if not isinstance(entry, dict):  # the library takes a list of the same values, too
            raise ValueError(f"{path}: {key} is no JSON object")
        start, stop = (8 + n_header + offset for offset in entry["data_offsets"])
        tensors[key] = entry["dtype"], tuple(entry["shape"]), data[start:stop]
    return tensors


def to_float32(dtype, data, source):
    """Bytes as a flat, read-only float32 array: a view of float32, a copy of the 16-bit formats."""
    if dtype == "F32":
        array = np.require(data.view("<f4"), requirements="A")  # a copy only if badly aligned
    elif dtype == "F16":
        array = data.view("<f2").astype(np.float32)
    elif dtype == "BF16":  # the upper half of a float32
        array = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        raise ValueError(f"{source} is {dtype}, not F32, F16 or BF16")
    array.flags.writeable = False
    return array


def write_safetensors(path, tensors):
    """Write {key: C-contiguous float32 or float16 array}: a complete file, or none."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
            os.chmod(temporary, 0o644)  # the library lets nobody else read it
    except SafetensorError as error:  # it tells a full disk by its text alone
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code)) from None


# --- OpenAI's TensorFlow checkpoint -------------------------------------------------------------


def quiet_tensorflow():
    """Keep it from greeting at length; to be called before it is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def convert_checkpoint(model_dir, path):
    """The tensors of a TensorFlow checkpoint, as read_safetensors gives them; written to `path`.

    By another process, since TensorFlow's reader aborts on some damaged files; ValueError if that
    fails. A folder that cannot be written still loads, with a notice: TensorFlow is needed again.
    """
    checkpoint = os.path.join(model_dir, "model.ckpt")
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"{checkpoint}: reading it, once, needs tensorflow: "
            "pip install -r requirements.txt, with Python 3.13 or older"
        )
    if sys.stderr.isatty():
        print(f"notice: converting {checkpoint}, which is needed once ...", file=sys.stderr)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "convert.py")
    with tempfile.TemporaryDirectory() as folder:
        spare = os.path.join(folder, "model.safetensors")
        command = [sys.executable, script, model_dir, path, spare]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        *_, said = done.stderr.decode(errors="replace").strip().split("\n")
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            said = f"{checkpoint}: damaged, or too large: TensorFlow's reader died of {name}"
        if done.returncode != 0:
            raise ValueError(said.removeprefix("error: "))
        if said.startswith("notice: ") and sys.stderr.isatty():
            print(said, file=sys.stderr)
        return read_safetensors(path if os.path.isfile(path) else spare)  # a map outlives its name


# --- Saving -------------------------------------------------------------------------------------


def save_model(model_dir, encoder, hparams, params, dtype="float32"):
    """Write a folder that GPT2LMHeadModel.from_pretrained and GPT2TokenizerFast open, too.

    `params` may be JAX arrays; `dtype` float32 or float16. All is written beside its place first,
    then renamed, the weights last: every file is whole, whatever happens (a full disk, Ctrl-C).
    """
    check_vocabulary(encoder, hparams, model_dir)
    tensors = named_tensors(params, hparams, dtype)
    check_target(model_dir)
    stage = None
    try:
        os.makedirs(model_dir, exist_ok=True)
        stage = tempfile.mkdtemp(prefix=".saving-", dir=model_dir)
        encoder.save(stage)
        config = json.dumps(hugging_face_config(encoder, hparams, dtype), indent=2) + "\n"
        write_whole(Path(stage, "config.json"), config)
        write_safetensors(os.path.join(stage, "model.safetensors"), tensors)
        *others, weights = sorted(os.listdir(stage), key=lambda name: name == "model.safetensors")
        if filecmp.cmpfiles(stage, model_dir, others, shallow=False)[0] != others:
            remove(os.path.join(model_dir, weights))  # they go with another tokenizer, other sizes
        for name in (*others, weights):
            os.replace(os.path.join(stage, name), os.path.join(model_dir, name))
    except OSError as error:
        raise OSError(error.errno, f"cannot write {model_dir}: {error.strerror}") from error
    finally:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(model_dir)  # works only if it is empty: if nothing came of it


def check_target(model_dir):
    """ValueError or OSError where save_model cannot write, or other files would contradict it."""
    for name in ("hparams.json", "encoder.json", "tokenizer.json"):
        if os.path.exists(os.path.join(model_dir, name)):
            raise ValueError(f"{model_dir}: has {name}, of another model; save to another folder")
    there = next(p for p in (Path(model_dir), *Path(model_dir).absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PermissionError(
            errno.EACCES, f"cannot write {model_dir}: {there} is not a folder we may write to"
        )


def named_tensors(params, hparams, dtype):
    """{Hugging Face's key: array of `dtype`}; ValueError if `params` is not what hparams says."""
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype: expected float32 or float16, got {dtype!r}")
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
            raise ValueError(f"{name} holds numbers too large for float16; save as float32")
        tensors["transformer." + hugging_face_name(name)] = stored
    return tensors


def leaf(params, name):  # (params, "blocks.0.ln_1.g") -> params["blocks"][0]["ln_1"]["g"]
    try:
        for step in name.split("."):
            params = params[int(step) if isinstance(params, (list, tuple)) else step]
        return params
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"params: no {name}") from None


def hugging_face_config(encoder, hparams, dtype):
    """What transformers must know to compute what gpt2.py computes."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: same[0] for key, same in OUR_ARITHMETIC.items()},
        **{key: hparams[ours] for ours, key in HUGGING_FACE_SIZES.items()},
        "n_inner": None,
        "bos_token_id": encoder.endoftext,
        "eos_token_id": encoder.endoftext,
        "torch_dtype": dtype,
    }


# --- Downloading --------------------------------------------------------------------------------


def download(model_size, models_dir="models", only_tokenizer=False):
    """Fetch those files of a released model that its folder lacks (124M: 0.5 GB, tokenizer 1.5 MB).

    SIXTYGPT_DOWNLOAD_URL may name another server that holds {model_size}/{file}.
    """
    if model_size not in SIZES:
        raise ValueError(f"no released model {model_size!r}: choose one of {', '.join(SIZES)}")
    folder = os.path.join(models_dir, model_size)
    have = os.listdir(folder) if os.path.isdir(folder) else []
    if "config.json" in have:  # somebody put Hugging Face's there
        return
    names = [*TEXT_FILES, "checkpoint", *CKPT_FILES]
    if only_tokenizer or "model.safetensors" in have:
        names = TEXT_FILES
    server = os.environ.get("SIXTYGPT_DOWNLOAD_URL", RELEASED).rstrip("/")
    try:
        for name in names:
            url = f"{server}/{model_size}/{name}"
            download_file(url, os.path.join(folder, name), SHA256.get(name))
    except ConnectionError as error:
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # if it is empty
        which = "--tokenizer" if only_tokenizer else "--model_size"
        raise ConnectionError(f"{error}; {which} shakespeare needs no network") from None


def download_shakespeare():  # -> its path
    """Fetch tiny Shakespeare (1.1 MB) to data/shakespeare.txt, unless it is there."""
    path = os.path.join("data", "shakespeare.txt")
    download_file(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    return path


def download_file(url, path, sha256=None):
    """Fetch `url` to `path`, if it is not there; ConnectionError says what failed.

    The bytes gather in `path.part`, which survives a kill and is resumed by the next call. It is
    locked: of two processes, one fetches and the other waits. `path` is complete or absent.
    """
    if os.path.exists(path):
        return
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open_locked(path + ".part") as f:
            gather(url, f, path, sha256)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def gather(url, f, path, sha256):
    """Try until `f`, which is `path.part`, is complete and right, then give it its name."""
    from requests import RequestException

    part, note = path + ".part", path + ".part.json"
    most = failures = 0
    while not os.path.exists(path):  # it does, if another process was faster
        try:
            verify(f, fetch(url, f, note), sha256)
            os.fsync(f.fileno())
            os.replace(part, path)  # first: without its note, a part that is whole is worth nothing
            remove(note)
            return
        except (RequestException, ConnectionError, ValueError) as error:  # ValueError: of redirects
            size = f.seek(0, os.SEEK_END)
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            words, may_help = reason(error)
            if failures == ATTEMPTS or not may_help:
                if size == 0:
                    remove(part, note)
                raise ConnectionError(f"cannot download {url}: {words}") from None
            time.sleep(BACKOFF * 2 ** (failures - 1))
    remove(part, note)


def fetch(url, f, note):
    """Append to `f` what it lacks of `url`, by one request; return the whole's Content-MD5 or None.

    The file `note` says which version of the remote file the bytes in `f` belong to. If that
    has changed since, or the server cannot resume, `f` starts over.
    """
    import requests

    known, n_have = read_note(note), f.seek(0, os.SEEK_END)
    if n_have and n_have == known["length"]:
        return known["md5"]  # we were stopped after the last byte and before the renaming
    headers = {"Accept-Encoding": "identity"}  # Content-Length shall count the file's own bytes
    if known["version"] and 0 < n_have < (known["length"] or 0):
        headers |= {"Range": f"bytes={n_have}-", "If-Range": known["version"]}
    with requests.get(url, headers=headers, stream=True, timeout=(10, PATIENCE)) as response:
        sent = response.headers
        version = sent.get("ETag") or sent.get("Last-Modified") or ""
        packed = sent.get("Content-Encoding", "identity") != "identity"  # though we asked for none
        if response.status_code == 200:
            f.truncate(0)
            n_have, length = 0, "" if packed else sent.get("Content-Length", "")
            known = {
                "version": "" if version.startswith("W/") else version,  # weak: cannot be resumed
                "length": int(length) if length.isdecimal() else None,
                "md5": sent.get("Content-MD5"),
            }
            with open(note, "w", opener=open_no_link) as g:
                json.dump(known, g)
            ends = "Content-Length" in sent or "Transfer-Encoding" in sent
            if not (ends or known["md5"]):  # what breaks off could not be told from the whole
                raise ConnectionError("the server does not say how much there is")
        elif response.status_code in (206, 416):
            rest = f"bytes {n_have}-{(known['length'] or 0) - 1}/{known['length']}"
            same = sent.get("Content-Range") == rest and version in ("", known["version"])
            if packed or not same:
                f.truncate(0)
                raise ConnectionError("the server could not resume the download")
        else:
            response.raise_for_status()
            raise ConnectionError(f"the server answered {response.status_code}")
        copy_body(response, f, os.path.basename(url), n_have, known["length"])
    return known["md5"]


def copy_body(response, f, name, n_have, length):
    """Append a response's body to `f`; ConnectionError if that does not make `length` bytes."""
    from tqdm import tqdm

    with tqdm(
        desc=name, total=length, initial=n_have, unit="B", unit_scale=True, disable=None
    ) as bar:  # disable=None: no bar where stderr is no terminal
        for chunk in response.iter_content(2**14):  # a broken line costs at most one chunk
            f.write(chunk)
            bar.update(len(chunk))
    size = f.seek(0, os.SEEK_END)
    if size == 0:
        raise ConnectionError("the server sent nothing")
    if length not in (None, size):
        raise ConnectionError("the connection broke off")


def read_note(note):  # -> {"version": str, "length": int or None, "md5": str or None}
    """What a note says of the file in its `.part`; nothing, where there is none or a broken one."""
    known = {"version": "", "length": None, "md5": None}
    kinds = {"version": str, "length": int | None, "md5": str | None}
    with contextlib.suppress(OSError, ValueError):
        found = read_json(note)
        if all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
            known = {key: found.get(key) for key in kinds}
    return known


def verify(f, md5, sha256):  # md5: base64, as in a Content-MD5 header; sha256: hexadecimal
    """Empty `f` and raise ConnectionError if its bytes do not have these checksums."""
    f.seek(0)
    wrong = md5 and base64.b64encode(hashlib.file_digest(f, "md5").digest()).decode() != md5
    f.seek(0)
    if wrong or (sha256 and hashlib.file_digest(f, "sha256").hexdigest() != sha256):
        f.truncate(0)
        raise ConnectionError("what arrived does not match its checksum")


def reason(error):
    """(A few words instead of urllib3's several lines, whether another try may help.)"""
    from requests import Timeout

    response = getattr(error, "response", None)
    if response is not None:
        code = response.status_code
        return f"the server answered {code} {response.reason}", code >= 500 or code in (408, 429)
    if isinstance(error, ValueError):  # a malformed address, or header
        return str(error), False
    if isinstance(error, Timeout):
        return "the server did not answer in time", True
    if isinstance(error, ConnectionError):  # Python's, which only this file raises here
        return str(error), True
    return f"no connection, or one that broke off ({type(error).__name__})", True
