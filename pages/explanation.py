"""Makes explain.py's page: rounds and packs its data, and puts them into the HTML template."""

import base64
import inspect
import json

import numpy as np

import gpt2
from pages.predictions import bytes_of, distributions, likeliest, surprise
from pages.recording import lens, record
from pages.templates import template

TITLES = b"<title>What GPT-2 did</title>", b"<title>How a GPT-2 learned</title>"  # of every page

MAX_TOKENS = 256  # the maps grow with the square of the text's length
N_SHOWN = 257  # how many likely tokens are listed for each position: all of a byte model's
N_LENS = 5  # tokens per layer and position in the logit lens


def explain(inputs, encoder, hparams, params, model, is_served=False):  # -> the page's text
    """Runs the model on inputs, [n_seq] ids, and returns a page that shows what happened in it.

    model: the model's name.
    is_served: whether the page can ask its server for predictions with heads switched off.

    Raises ValueError if there are too many tokens or none, or if the logits are not finite.
    """
    n_max = min(MAX_TOKENS, hparams["n_ctx"])
    if not 0 < len(inputs) <= n_max:
        raise ValueError(f"{len(inputs)} tokens, but a page needs 1 and shows at most {n_max}")
    recording = record(inputs, params, hparams["n_head"])
    if not np.isfinite(recording["logits"]).all():
        raise ValueError(f"{model}: the logits are not finite, so the weights must be damaged")
    data = page_data(inputs, recording, encoder, hparams, params) | {"model": model}
    if is_served:
        data["is_served"] = True
    return page(data)


def page_data(inputs, recording, encoder, hparams, params):
    """Returns the page's data, a dict of rounded arrays that `page` can write."""
    data = {"hparams": hparams, "ids": inputs}
    data |= round_predictions(inputs, recording["logits"])
    data |= read_lens(recording["stream"], params)
    data |= flow(inputs, recording, params)
    ids = {*inputs, *data["top_ids"].ravel().tolist(), *data["lens_ids"].ravel().tolist()}
    data["bytes"] = bytes_of(ids, encoder)
    data["call"] = outline(recording["call"], names_of(params))
    names = sorted(functions(recording["call"]))
    data["sources"] = {name: source(getattr(gpt2, name)) for name in names}
    return data


def round_predictions(inputs, logits):
    """Returns how surprising each token was, and what the model predicted at each position.

    bits, rank [n_seq - 1]: of the second token, the third, ... given the tokens before it.
    """
    scores, shown = surprise(inputs[1:], logits[:-1]), distributions(logits, N_SHOWN)
    return {
        "bits": scores["bits"].astype(np.float32),
        "rank": scores["rank"].astype(np.uint32),
        "top_ids": shown["top_ids"].astype(np.uint32),
        "top_logits": shown["top_logits"],
        "tail_counts": shown["tail_counts"].astype(np.uint32),
        "tail_logits": shown["tail_logits"].astype(np.float32),
    }


def flow(inputs, recording, params):
    """Returns the page's data about attention and the stream.

    attention: the rows of each head's triangle, one after the other.
    vectors, scales: what wte, wpe and each block's two halves added to the stream, and the output
        of ln_f, [2 + 2 * n_layer + 1, n_seq, n_embd]; see compress.
    length: the lengths of the stream, and of the vectors added to it.
    """
    past = np.tril_indices(len(inputs))
    added = [params["wte"][inputs], params["wpe"][: len(inputs)]]
    for mha, ffn in zip(recording["mha"], recording["ffn"], strict=True):
        added += [mha, ffn]
    vectors, scales = compress(np.stack([*added, recording["final"]]))
    names = ("stream", "mha", "ffn")
    return {
        "attention": unit(recording["attention"][:, :, *past]),
        "length": {name: np.linalg.norm(recording[name], axis=-1) for name in names},
        "vectors": vectors.astype(np.int8),
        "scales": scales,
    }


def read_lens(stream, params):  # of [n_layer + 1, n_seq, n_embd]
    """Returns the likeliest ids and their probabilities, as if each layer were the last."""
    ids, probs = [], []
    for x in stream:  # one by one, because logits are large
        logits = lens(x, params)
        ids.append(likeliest(logits, N_LENS))
        exact = gpt2.softmax(logits.astype(np.float64))
        probs.append(np.take_along_axis(exact, ids[-1], -1))
    return {"lens_ids": np.stack(ids).astype(np.uint32), "lens_probs": unit(np.stack(probs))}


def unit(x):  # numbers from 0 to 1 -> integers from 0 to 65535
    return np.rint(x * 65535).astype(np.uint16)


def compress(vectors):  # [..., n_embd] -> [..., n_embd] from -127 to 127, [...]
    """Returns integers q and each vector's scale. Its numbers are scale * q * |q| / 127**2.

    The square makes the steps between small numbers small.
    """
    scales = np.abs(vectors).max(-1)
    parts = vectors / np.where(scales == 0, 1, scales)[..., None]
    return np.rint(127 * np.sign(parts) * np.sqrt(np.abs(parts))), scales


def pack(array):
    """Returns an array in a form for JSON: its dtype, shape, and little-endian bytes in base64."""
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    text = base64.b64encode(data).decode()
    return {"dtype": array.dtype.name, "shape": list(data.shape), "base64": text}


def names_of(params):  # -> {id of a parameter's array: "blocks.0.attn.c_attn.w"}
    names = {}

    def walk(node, prefix):
        items = enumerate(node) if isinstance(node, list) else node.items()
        for key, child in items:
            if isinstance(child, np.ndarray):
                names[id(child)] = f"{prefix}{key}"
            elif isinstance(child, dict | list):  # but not a block's attend
                walk(child, f"{prefix}{key}.")

    walk(params, "")
    return names


def outline(call, names):
    """Returns a call without its numbers, only the shapes of arrays and the names of parameters."""
    arrays = {name: a for name, a in call["args"].items() if isinstance(a, np.ndarray)}
    return {
        "function": call["function"],
        "line": call["line"],
        "args": [[names.get(id(a), name), list(a.shape)] for name, a in arrays.items()],
        "out": list(call["out"].shape),
        "calls": [outline(inner, names) for inner in call["calls"]],
    }


def functions(call):  # -> the names of all functions that were called
    return {call["function"]}.union(*map(functions, call["calls"]))


def source(function):  # -> a function's lines in the file, and the number of the first line
    lines, first = inspect.getsourcelines(function)
    return {"first": first, "lines": "".join(lines)}


def page(data, name="explain.html"):  # a dict, a template -> the text of the HTML file
    """Puts the data into the template. No `<` in the data can end the element that holds it."""
    text = json.dumps(data, separators=(",", ":"), default=pack).replace("<", "\\u003c")
    return template(name).replace("{{data}}", text)


def is_page(path):
    """Returns whether a file is one of explain.py's pages, or empty."""
    with open(path, "rb") as file:
        beginning = file.read(2000)
    return not beginning or any(title in beginning for title in TITLES)
