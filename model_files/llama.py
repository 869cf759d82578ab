"""Reads Llama folders in Hugging Face's layout for llama_pico.py: sizes, tensors, and tokenizer.

Models that llama_pico.py does not support raise ValueError.
"""

import itertools
import os

from model_files.weights import (
    WEIGHTS,
    WEIGHTS_INDEX,
    nest,
    read_index,
    read_safetensors,
    to_float32,
)
from plumbing.files import read_json

SUPPORTED = {  # config.json's settings that change the arithmetic, and the supported values
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


def read_llama(folder):
    """Returns (params, hparams), the arguments of llama_pico.llama, in read-only float32.

    Raises ValueError for a model that is damaged, or not a plain Llama.
    """
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    for key, values in SUPPORTED.items():
        value = config.get(key, values[0])
        if value not in values:
            raise ValueError(f"{path}: {key} {value!r} is not supported, only {values[0]!r}")
    n_head = read_size(config, "num_attention_heads", path)
    sizes = {
        "n_vocab": read_size(config, "vocab_size", path),
        "n_embd": read_size(config, "hidden_size", path),
        "n_inner": read_size(config, "intermediate_size", path),
        "n_layer": read_size(config, "num_hidden_layers", path),
        "n_head": n_head,
        "n_kv_head": read_size(config, "num_key_value_heads", path, n_head),
    }
    sizes["d_head"] = read_size(config, "head_dim", path, sizes["n_embd"] // n_head)
    if n_head % sizes["n_kv_head"]:
        raise ValueError(f"{path}: num_attention_heads is not a multiple of num_key_value_heads")
    if sizes["d_head"] % 2:
        raise ValueError(f"{path}: head_dim is {sizes['d_head']}; rotary positions need pairs")
    hparams = {
        "d_head": sizes["d_head"],
        "theta": read_theta(config, path),
        "eps": read_positive(config, "rms_norm_eps", path, 1e-6),
    }
    return read_params(folder, sizes, config.get("tie_word_embeddings", False)), hparams


def read_size(config, key, path, default=None):
    size = config.get(key)
    if size is None:
        size = default
    if type(size) is not int or not 0 < size <= 2**24:
        raise ValueError(f"{path}: {key} is {size!r}, not a sensible number")
    return size


def read_positive(config, key, path, default):
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise ValueError(f"{path}: {key} is {value!r}, not a sensible number")
    return float(value)


def read_theta(config, path):
    """Returns the base of the rotary frequencies. Raises ValueError if these are scaled."""
    for key in ("rope_parameters", "rope_scaling"):  # the second is the name before transformers 5
        settings = config.get(key)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: {key} is not a JSON object")
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{path}: scaled rotary positions ({kind!r}) are not supported")
        if settings.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"{path}: partial_rotary_factor is not supported, only 1")
        config = config | settings
    return read_positive(config, "rope_theta", path, 10000.0)


def tensor_shapes(sizes):
    """Yields every parameter's (key in the checkpoint, shape), except lm_head's."""
    n_embd, n_inner = sizes["n_embd"], sizes["n_inner"]
    n_q = sizes["n_head"] * sizes["d_head"]
    n_kv = sizes["n_kv_head"] * sizes["d_head"]
    yield "model.embed_tokens.weight", (sizes["n_vocab"], n_embd)
    for i in range(sizes["n_layer"]):
        block = f"model.layers.{i}"
        yield f"{block}.input_layernorm.weight", (n_embd,)
        yield f"{block}.self_attn.q_proj.weight", (n_q, n_embd)
        yield f"{block}.self_attn.k_proj.weight", (n_kv, n_embd)
        yield f"{block}.self_attn.v_proj.weight", (n_kv, n_embd)
        yield f"{block}.self_attn.o_proj.weight", (n_embd, n_q)
        yield f"{block}.post_attention_layernorm.weight", (n_embd,)
        yield f"{block}.mlp.gate_proj.weight", (n_inner, n_embd)
        yield f"{block}.mlp.up_proj.weight", (n_inner, n_embd)
        yield f"{block}.mlp.down_proj.weight", (n_embd, n_inner)
    yield "model.norm.weight", (n_embd,)


def read_params(folder, sizes, tied):
    """Returns {"embed_tokens", "blocks": [{"self_attn": {"q_proj": array}, ...}], "norm", ...}."""
    path = os.path.join(folder, WEIGHTS)
    if os.path.exists(path):
        tensors = read_safetensors(path)
    else:
        path = os.path.join(folder, WEIGHTS_INDEX)
        tensors = {}
        for shard in read_index(path):
            tensors |= read_safetensors(os.path.join(folder, shard))
    shapes = dict(tensor_shapes(sizes))
    if not tied:
        shapes["lm_head.weight"] = (sizes["n_vocab"], sizes["n_embd"])
    arrays = {}
    for key, shape in shapes.items():
        if key not in tensors:
            raise ValueError(f"{path}: {key} is missing")
        dtype, stored_shape, data = tensors[key]
        if stored_shape != shape:
            raise ValueError(f"{path}: {key} is {stored_shape}, but config.json asks for {shape}")
        name = key.removeprefix("model.").removesuffix(".weight").replace("layers.", "blocks.", 1)
        arrays[name] = to_float32(dtype, data, f"{path}: {key}").reshape(shape)
    for key in tensors.keys() - shapes.keys():
        # Old files hold the rotary frequencies, and some hold a copy of a tied head.
        if not key.endswith("rotary_emb.inv_freq") and not (tied and key == "lm_head.weight"):
            raise ValueError(f"{path}: {key} is not a tensor of a plain Llama")
    if tied:
        arrays["lm_head"] = arrays["embed_tokens"]
    return nest(arrays)


def text_or_ids(folder):
    """Returns (encode, decode). decode stops at the end of the text.

    The `tokenizers` package does both. Without it, or without a tokenizer.json, the text is a list
    of ids, separated by spaces.
    """
    ends = read_json(os.path.join(folder, "config.json")).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]  # a number, a list of them, or null

    def until_end(ids):
        return list(itertools.takewhile(lambda token: token not in ends, ids))

    path = os.path.join(folder, "tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        Tokenizer = None
    if Tokenizer is None or not os.path.exists(path):
        return read_ids, lambda ids: " ".join(map(str, until_end(ids)))
    read_json(path)  # raises ValueError for a damaged file
    tokenizer = Tokenizer.from_file(path)
    return lambda text: tokenizer.encode(text).ids, lambda ids: tokenizer.decode(until_end(ids))


def read_ids(text):  # "5 12 7" -> [5, 12, 7]
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise ValueError(
            "text needs the model's tokenizer.json and `pip install tokenizers`; "
            "without them, type token ids, such as 5 12 7"
        ) from None


def check_ids(ids, n_vocab, n_tokens_to_generate):  # -> ids
    """Raises ValueError for an empty prompt, an id that is not a token, or a negative number."""
    if not ids:
        raise ValueError("the prompt has no tokens, but the model needs at least one to start from")
    if min(ids) < 0 or max(ids) >= n_vocab:
        raise ValueError(f"token ids must be from 0 to {n_vocab - 1}")
    if n_tokens_to_generate < 0:
        raise ValueError(f"n_tokens_to_generate must be 0 or more, not {n_tokens_to_generate}")
    return ids
