"""Reads and writes LoRA adapters in peft's layout: small updates of some of a model's matrices.

    adapter_config.json         the base model's name, and the scale of the factors
    adapter_model.safetensors   two factors for each adapted matrix [n_in, n_out]:
        base_model.model.transformer.h.0.attn.c_attn.lora_A.weight    [r, n_in]
        base_model.model.transformer.h.0.attn.c_attn.lora_B.weight    [n_out, r]
    chat_template.jinja         the format of the conversations it has learned, if any

An adapted matrix is w + scale * (lora_B @ lora_A).T. The update has as many numbers as w, but only
its two thin factors are learned and stored (Hu et al. 2021, arXiv:2106.09685). Here an adapter is
a dict of factors, {"blocks.0.attn.c_attn.w": (lora_A, lora_B, scale), ...}.
"""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import regex

from model_files.tokenizer import CHAT_TEMPLATE_FILE
from model_files.weights import (
    hugging_face_name,
    leaves,
    nest,
    read_safetensors,
    tensor_shapes,
    to_float32,
    write_safetensors,
)
from plumbing.files import read_json, remove, write_whole

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # these can have adapters
SUPPORTED = {  # the values of peft's settings for which `merge` gives peft's result
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base
}
# These settings are read below, or make no difference after training. If any other setting is on
# (use_dora, modules_to_save, lora_bias, ...), our result would be wrong.
ALLOWED = {
    "alpha_pattern",
    "base_model_name_or_path",
    "lora_alpha",
    "r",
    "rank_pattern",
    "revision",
}
ALLOWED |= {"auto_mapping", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"}
ALLOWED |= {
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
}
ALLOWED |= {"qalora_group_size", "target_modules", "task_type", "use_rslora"}
MAX_PATTERNS = 1000  # the most patterns, and the most characters in each
KEY = re.compile(
    r"base_model\.model\.((?:transformer\.)?h\.([0-9]{1,9})\.([a-z]+\.c_[a-z]+))\.lora_[AB]\.weight"
)


def is_adapter(folder):
    return os.path.isfile(os.path.join(folder, CONFIG))


# --- Reading ------------------------------------------------------------------------------------


def read_config(folder):  # -> the settings in adapter_config.json
    """Raises ValueError, which names the setting, if peft's result would differ from ours."""
    path = os.path.join(folder, CONFIG)
    config = {"rank_pattern": {}, "alpha_pattern": {}} | read_json(path)
    for key, values in SUPPORTED.items():
        if config.get(key, values[0]) not in values:
            expected = f"only {values[0]!r} is"
            raise ValueError(f"{path}: {key} {config[key]!r} is not supported; {expected}")
    for key in sorted(config.keys() - SUPPORTED.keys() - ALLOWED):
        if config[key]:
            raise ValueError(f"{path}: {key} {config[key]!r} is not supported")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}; name the base model there")
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        config[pattern] = config[pattern] or {}
        if not isinstance(config[pattern], dict):
            raise ValueError(f"{path}: {pattern} is not an object")
        if max([len(config[pattern]), *map(len, config[pattern])]) > MAX_PATTERNS:
            raise ValueError(f"{path}: {pattern} is too long, more than {MAX_PATTERNS}")
        types = (int,) if key == "r" else (int, float)
        for number in (config.get(key), *config[pattern].values()):
            if type(number) not in types or not 0 < number < 2**24:
                raise ValueError(f"{path}: {key} is {number!r}, not a sensible number")
    return config


def read_adapter(folder, config, hparams):  # -> {"blocks.0.attn.c_attn.w": (A, B, scale), ...}
    """Reads the adapters of a model of these sizes, as read-only float32. config: read_config's.

    Only matrices with factors in the file are adapted. A name in target_modules without factors has
    no effect, as in peft. Raises ValueError if the adapter is incomplete, or belongs to another
    model.
    """
    path = os.path.join(folder, WEIGHTS)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{folder}: {WEIGHTS} is missing (adapter_model.bin, a pickle, is never read)"
        )
    tensors, adapters = read_safetensors(path), {}
    shapes = dict(tensor_shapes(hparams))
    for key in tensors:
        found = KEY.fullmatch(key)
        if not found or found[3] not in LAYERS:
            raise ValueError(f"{path}: {key} is not a part of {', '.join(LAYERS)}")
        name = f"blocks.{int(found[2])}.{found[3]}.w"
        if name not in shapes:
            raise ValueError(f"{path}: {key}: the base has only {hparams['n_layer']} blocks")
        adapters[name] = read_factors(tensors, found[1], shapes[name], config, path)
    if not adapters:
        raise ValueError(f"{path} contains no adapters")
    return adapters


def read_factors(tensors, module, shape, config, path):  # -> lora_A, lora_B, scale
    """Reads the factors of one matrix of that shape. module: peft's name for its layer."""
    rank = int(find_pattern(config["rank_pattern"], module, config["r"], path))
    alpha = find_pattern(config["alpha_pattern"], module, config["lora_alpha"], path)
    n_in, n_out = shape
    factors = []
    for letter, expected in ("A", (rank, n_in)), ("B", (n_out, rank)):
        key = f"base_model.model.{module}.lora_{letter}.weight"
        if key not in tensors:
            raise ValueError(f"{path}: {key} is missing")
        dtype, shape, data = tensors[key]
        if shape != expected:
            raise ValueError(f"{path}: {key} is {shape}, but rank and base ask for {expected}")
        factors.append(to_float32(dtype, data, f"{path}: {key}").reshape(expected))
    lora_A, lora_B = factors
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return lora_A, lora_B, scale


def find_pattern(patterns, module, default, path):
    """Returns the value whose key, a regular expression, matches the end of the name, as in peft.

    A stranger's expression can run practically forever, such as (.|.)*! on a name of 30 letters.
    """
    try:
        matching = (p for p in patterns if regex.match(rf"(.*\.)?({p})$", module, timeout=0.1))
        return patterns.get(next(matching, None), default)
    except (regex.error, RecursionError, TimeoutError) as error:
        raise ValueError(f"{path}: {CONFIG} has an invalid pattern: {error}") from None


def merge(params, adapters):  # -> a tree, which shares the arrays that are not adapted
    """Returns the parameters with w + scale * (lora_B @ lora_A).T for every adapted matrix."""
    arrays = leaves(params)
    for name, (lora_A, lora_B, scale) in adapters.items():
        update = (np.float32(scale) * lora_A.T) @ lora_B.T
        arrays[name] = update + arrays[name]
        arrays[name].flags.writeable = False
    return nest(arrays)


# --- Writing ------------------------------------------------------------------------------------


def peft_config(base, rank, alpha, targets):
    """Returns the settings of one of our adapters, with which peft gives the same result."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted(targets),
        "fan_in_fan_out": True,  # GPT-2's matrices are [n_in, n_out]
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def write_adapter(folder, config, adapters, dtype="float32", chat_template=None):
    """Writes a folder that peft can also open. Each file is complete, and the weights come last.

    dtype: float32 or float16.
    chat_template: the Jinja template of the conversations it has learned.
    """
    tensors = {}
    for name, (lora_A, lora_B, _) in adapters.items():
        module = "transformer." + hugging_face_name(name).removesuffix(".weight")
        for letter, factor in ("A", lora_A), ("B", lora_B):
            key = f"base_model.model.{module}.lora_{letter}.weight"
            tensors[key] = np.asarray(factor).astype(dtype, order="C", copy=False)
    config_file = Path(folder, CONFIG)
    path = Path(folder, WEIGHTS)
    text = json.dumps(config, indent=2) + "\n"
    try:
        os.makedirs(folder, exist_ok=True)
        if not config_file.is_file() or config_file.read_text("utf-8") != text:
            remove(path)  # old weights belong to another rank or base
        write_whole(config_file, text)
        template_file = Path(folder, CHAT_TEMPLATE_FILE)
        if chat_template:
            write_whole(template_file, chat_template)
        else:
            remove(template_file)
        write_safetensors(path, tensors)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {folder}: {error.strerror}") from error
