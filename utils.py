"""Finds, downloads, loads and saves model folders.

    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare")
    save_model("models/copy", encoder, hparams, params)
    python utils.py merge models/adapter models/whole     # merges a LoRA adapter and its base

Two layouts can be loaded: OpenAI's (hparams.json and a TensorFlow checkpoint, which is converted
once) and Hugging Face's (config.json and model.safetensors). Only the second is written. A LoRA
adapter in peft's layout is merged into the model that it names. Pickles are never read, because
they can run programs. The code that reads and writes the files themselves is in model_files/.
"""

import contextlib
import errno
import filecmp
import json
import os
import re
import shutil
import sys
import tempfile
import typing
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from encoder import Encoder, get_encoder
from model_files.adapters import CONFIG, is_adapter, merge, read_adapter, read_config
from model_files.config import hugging_face_config, query_scales, read_hparams, sizes_file
from model_files.convert import (
    convert_checkpoint,
    converted_path,
    find_checkpoint,
    has_tensorflow,
    needs_tensorflow,
)
from model_files.download import SIZES, download
from model_files.hub import fetch_released, fetch_repository, is_repository
from model_files.tokenizer import CHAT_TEMPLATE_FILE, read_chat_template
from model_files.weights import (
    WEIGHTS,
    WEIGHTS_INDEX,
    hugging_face_name,
    named_tensors,
    nest,
    read_index,
    read_safetensors,
    scale_queries,
    tensor_shapes,
    to_float32,
    write_safetensors,
)
from plumbing.cli import did_you_mean
from plumbing.files import remove, write_whole

# GPT2LMHeadModel's prefix, and those of torch.compile and DistributedDataParallel before it.
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)*(transformer\.)?")
OPENAI = "openai:"  # a prefix of a released size, which asks for the TensorFlow checkpoint
OTHER_NAMES = {  # Hugging Face's names of the released sizes
    "gpt2": "124M",
    "gpt2-small": "124M",
    "gpt2-medium": "355M",
    "gpt2-large": "774M",
    "gpt2-xl": "1558M",
}
HUB_NAMES = ["distilbert/distilgpt2"]  # suggested for a name that is a part of it

# --- Finding and loading a model ----------------------------------------------------------------


class Model(typing.NamedTuple):
    """A tokenizer, its model's sizes, and the parameters: `encoder, hparams, params = model`."""

    encoder: Encoder
    hparams: dict
    params: dict


def load_encoder_hparams_and_params(model_size, models_dir="models"):
    """Returns a Model: the tokenizer, the sizes and the weights (read-only float32 arrays).

    `model_size` is a released size (downloaded if it is missing), a folder under `models_dir`, a
    path, or owner/name[@revision] of the Hugging Face Hub. An adapter is merged into the model that
    it names. Raises ValueError, OSError or ImportError, which say in one line what is wrong and
    where.
    """
    model_dir = find_model(model_size, models_dir)
    if is_adapter(model_dir):
        encoder, hparams, params, adapters = load_base_and_adapter(model_dir, models_dir)
        return Model(encoder, hparams, merge(params, adapters))
    hparams = read_hparams(model_dir)
    encoder = get_encoder("", model_dir)
    if encoder.n_vocab > hparams["n_vocab"]:  # such as a padding token without a row
        encoder.limit_ids(hparams["n_vocab"])
    params = load_params(model_dir, hparams)
    # Rows beyond the tokenizer's ids only pad the matrix to a rounder size, and must not be drawn.
    params["wte"] = params["wte"][: encoder.n_vocab]
    return Model(encoder, hparams | {"n_vocab": encoder.n_vocab}, params)


class MissingBase(ValueError):
    """Raised if an adapter's base is not where the adapter says."""


def load_base_and_adapter(model_dir, models_dir="models", base=None):
    """Loads an adapter and its base. Returns encoder, hparams, params and read_adapter's dict.

    base: the base's name or folder, if it is not the one that the adapter names.
    """
    config = read_config(model_dir)
    path = os.path.join(model_dir, CONFIG)
    revision = config.get("revision") if base is None else None
    base = base or config["base_model_name_or_path"]
    try:
        base_dir = find_model(f"{base}@{revision}" if revision else base, models_dir)
    except ValueError as error:
        raise MissingBase(f"{path}: its base is missing: {error}") from None
    try:
        check_base(base_dir)
    except ValueError as error:
        raise ValueError(f"{path}: its base {error}") from None
    encoder, hparams, params = load_encoder_hparams_and_params(base_dir, models_dir)
    chat_template = read_chat_template(model_dir, {})
    if chat_template:  # the adapter has learned conversations
        encoder = encoder.with_chat_template(chat_template)
    return encoder, hparams, params, read_adapter(model_dir, config, hparams)


def check_base(model_dir):
    """Raises ValueError if an adapter of this model would have another effect here than in peft."""
    if is_adapter(model_dir):
        raise ValueError(f"{model_dir} is also an adapter; make it a model with utils.py merge")
    if any(scale != 1 for scale in query_scales(model_dir, read_hparams(model_dir))):
        raise ValueError(
            f"{model_dir} scales its attention differently, which adapters do not support"
        )


def find_model(model_size, models_dir="models", only_tokenizer=False):  # -> an absolute path
    """Returns the folder of `model_size`. Downloads a released size if a file is missing.

    A released size is OpenAI's checkpoint if TensorFlow is installed, otherwise the same weights
    from the Hub. openai:124M is always the checkpoint. Hugging Face's names of the released sizes
    also work, unless a folder has such a name. owner/name is downloaded from the Hub, unless a
    folder has that path. If the current directory has no folder `models`, the default, the
    project's own is used.
    """
    if models_dir == "models" and not os.path.isdir(models_dir):
        models_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")
    folders = os.path.join(models_dir, model_size), model_size
    if not any(map(os.path.isdir, folders)):
        model_size = OTHER_NAMES.get(model_size, model_size)
    if model_size.removeprefix(OPENAI) in SIZES:
        return find_released(model_size, models_dir, only_tokenizer)
    for folder in folders:
        if model_size and os.path.isdir(folder):
            return os.path.abspath(folder)
    if is_repository(model_size):
        return fetch_repository(model_size, only_tokenizer)
    if os.path.basename(model_size) != model_size:
        raise ValueError(f"no folder at {model_size}; give a model's folder, or its name")
    names = os.listdir(models_dir) if os.path.isdir(models_dir) else []
    paths = {name: os.path.join(models_dir, name) for name in names if name not in SIZES}
    local = sorted(name for name, path in paths.items() if sizes_file(path) or is_adapter(path))
    names = [*local, *SIZES]
    hint = did_you_mean(model_size, names) or did_you_mean(model_size, [*OTHER_NAMES, *HUB_NAMES])
    choice = f"choose one of {', '.join(names)}, or a folder's path"
    raise ValueError(f"no model {model_size!r}{hint or ':'} {choice}")


def find_released(model_size, models_dir, only_tokenizer):  # -> an absolute path
    """Returns the folder of a released size, such as 124M, or OpenAI's checkpoint, openai:124M.

    A tokenizer and converted weights are read without TensorFlow.
    """
    size = model_size.removeprefix(OPENAI)
    folder = os.path.join(models_dir, size)
    if only_tokenizer or has_safetensors(folder) or has_tensorflow():
        download(size, models_dir, only_tokenizer)
        return os.path.abspath(folder)
    if size != model_size:
        raise ImportError(
            f"{needs_tensorflow(model_size)}; or use {size}, the same weights from the Hub"
        )
    return fetch_released(size)


def has_safetensors(folder):
    """Returns whether a model's folder has weights that can be read without TensorFlow."""
    names = "config.json", WEIGHTS, WEIGHTS_INDEX
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def check_vocabulary(encoder, hparams, model_dir):
    """Raises ValueError if the tokenizer has ids for which the weights have no rows."""
    if encoder.n_vocab > hparams["n_vocab"]:
        raise ValueError(
            f"{model_dir}: the tokenizer has {encoder.n_vocab} ids, but the model has only "
            f"{hparams['n_vocab']}"
        )


def load_params(model_dir, hparams):
    """Loads the parameters of a folder as a tree, params["blocks"][0]["attn"]["c_attn"]["w"] ...

    Every array is float32, C-contiguous and read-only. Raises ValueError if one is missing, or does
    not have the shape that `hparams` ask for.
    """
    tensors, source = read_weights(model_dir)
    # safetensors' save_model stores only one of two tied weights.
    if "wte.weight" not in tensors and "lm_head.weight" in tensors:
        tensors["wte.weight"] = tensors.pop("lm_head.weight")
    arrays = {}
    for name, shape in tensor_shapes(hparams):
        key = hugging_face_name(name)
        if key not in tensors:
            raise ValueError(f"{source}: {key} is missing")
        dtype, found, data = tensors.pop(key)
        if found != shape:
            raise ValueError(f"{source}: {key} is {found}, but its sizes ask for {shape}")
        arrays[name] = to_float32(dtype, data, f"{source}: {key}").reshape(shape)
    # Of the remaining tensors, a mask or a copy of wte is harmless, but a thirteenth layer is not.
    for key, (dtype, shape, data) in tensors.items():
        if key == "lm_head.weight" and shape == arrays["wte"].shape:
            check_head(to_float32(dtype, data, f"{source}: {key}"), arrays["wte"], source)
        elif key == "lm_head.weight" or (
            key.startswith("h.") and not key.endswith((".attn.bias", ".attn.masked_bias"))
        ):
            raise ValueError(f"{source}: {key} {shape} does not belong in a model of its sizes")
    for i, scale in enumerate(query_scales(model_dir, hparams)):
        for name in (f"blocks.{i}.attn.c_attn.w", f"blocks.{i}.attn.c_attn.b"):
            if scale != 1:
                arrays[name] = scale_queries(arrays[name], scale)
    return nest(arrays)


def check_head(head, wte, source):  # [n_vocab * n_embd], [n_vocab, n_embd]
    """Raises ValueError if the head's values differ from wte's, which gpt2.py would use instead."""
    if not np.array_equal(head, wte.ravel(), equal_nan=True):
        raise ValueError(
            f"{source}: lm_head.weight differs from wte.weight, but an untied head is not supported"
        )


def read_weights(model_dir):
    """Returns {Hugging Face's key: (dtype, shape, bytes)}, and the path for error messages."""
    path = os.path.join(model_dir, WEIGHTS)
    index = os.path.join(model_dir, WEIGHTS_INDEX)
    checkpoint = find_checkpoint(model_dir)
    converted = converted_path(checkpoint)
    if os.path.isfile(path):
        tensors = read_safetensors(path)
    elif os.path.isfile(index):
        tensors, path = {}, index
        for shard in read_index(index):
            tensors |= read_safetensors(os.path.join(model_dir, shard))
    elif os.path.isfile(checkpoint + ".index") and os.path.isfile(converted):
        tensors, path = read_safetensors(converted), converted
    elif os.path.isfile(checkpoint + ".index"):
        tensors, path = convert_checkpoint(checkpoint, converted), checkpoint
    else:
        raise FileNotFoundError(
            f"{model_dir}: no weights, neither model.safetensors nor model.ckpt"
        )
    plain = {}
    for key, entry in tensors.items():
        name = WRAPPERS.sub("", key)
        if name in plain:
            raise ValueError(f"{path} contains {name} twice, the second time as {key}")
        plain[name] = entry
    return plain, path


# --- Saving -------------------------------------------------------------------------------------


def save_model(model_dir, encoder, hparams, params, dtype="float32"):
    """Writes a folder that GPT2LMHeadModel.from_pretrained and GPT2TokenizerFast can also open.

    `params` can be JAX arrays, and `dtype` is float32 or float16. Every file is written under
    another name and then renamed, the weights last. So each file is complete even if the disk is
    full, or after Ctrl-C.
    """
    check_vocabulary(encoder, hparams, model_dir)
    tensors = named_tensors(params, hparams, dtype)
    check_target(model_dir)
    was_there = os.path.isdir(model_dir)
    stage = None
    try:
        os.makedirs(model_dir, exist_ok=True)
        stage = tempfile.mkdtemp(prefix=".saving-", dir=model_dir)
        encoder.save(stage)
        config = json.dumps(hugging_face_config(encoder, hparams, dtype), indent=2) + "\n"
        write_whole(Path(stage, "config.json"), config)
        write_safetensors(os.path.join(stage, WEIGHTS), tensors)
        others = [name for name in os.listdir(stage) if name != WEIGHTS]
        equal, _, _ = filecmp.cmpfiles(stage, model_dir, others, shallow=False)
        if equal != others:
            remove(os.path.join(model_dir, WEIGHTS))  # old weights do not fit the new files
        for name in (*others, WEIGHTS):
            os.replace(os.path.join(stage, name), os.path.join(model_dir, name))
    except OSError as error:
        raise OSError(error.errno, f"cannot write {model_dir}: {error.strerror}") from error
    finally:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)
        if not was_there:
            with contextlib.suppress(OSError):
                os.rmdir(model_dir)  # works only if it is empty, which means after a failure


def target_dir(out, models_dir="models"):  # the --out flag -> the folder to write
    """A plain name is a folder in models_dir, as in --model_size. With a slash it is a path."""
    is_name = os.path.basename(out) == out and out not in ("", ".", "..")
    return os.path.join(models_dir, out) if is_name else out


def check_target(model_dir, for_adapter=False):
    """Raises ValueError or OSError if save_model cannot write, or other files contradict it."""
    others = ("config.json",) if for_adapter else (CONFIG, CHAT_TEMPLATE_FILE)
    stale = ("added_tokens.json", "special_tokens_map.json", "generation_config.json")
    for name in ("hparams.json", "encoder.json", *stale, *others):
        if os.path.exists(os.path.join(model_dir, name)):
            raise ValueError(
                f"{model_dir} has {name}, which belongs to another model; save to another folder"
            )
    paths = (Path(model_dir), *Path(model_dir).absolute().parents)
    existing = next(path for path in paths if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PermissionError(
            errno.EACCES, f"cannot write {model_dir}: {existing} is not a writable folder"
        )


# --- The command line ---------------------------------------------------------------------------


def main(
    command: str,
    adapter: str,
    out: str,
    models_dir: str = "models",
    saved_dtype: str = "float32",
):
    """Merge an adapter into its model: `python utils.py merge models/adapter models/whole`.

    Args:
        command: merge.
        adapter: a folder in models_dir, or a path, with a LoRA adapter in peft's layout.
        out: the new folder, a name in models_dir or a path. It will be a model like any other,
            which needs no base.
        models_dir: the folder that holds the models.
        saved_dtype: the precision of the weights on disk, float32 or float16.
    """
    if command != "merge":
        raise ValueError(f"no command {command!r}; the only one is merge")
    out = target_dir(out, models_dir)
    if os.path.isdir(out) and os.listdir(out):
        raise ValueError(f"{out} is not empty; name a new folder")
    model_dir = find_model(adapter, models_dir)
    if not is_adapter(model_dir):
        raise ValueError(f"{model_dir} has no {CONFIG}, so there is nothing to merge")
    encoder, hparams, params = load_encoder_hparams_and_params(model_dir, models_dir)
    save_model(out, encoder, hparams, params, saved_dtype)
    print(f"the merged model is in {out}")


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
