"""Opens GPT-2 up: one HTML page that shows what the model did with a text.

    python explain.py "Alan Turing theorized that computers would one day become"

The forward pass is gpt2.py's own, run once, as it is, while `watch` notes every call of its
functions: what went in, what came out. From these calls `record` picks the arrays that tell the
story, `page_data` rounds them, `page` packs them into pages/explain.html, and that draws them in
any browser, without a network.

What the page calls the logit lens is nostalgebraist's "interpreting GPT: the logit lens" (2020):
the stream after each block, read as if it were the last.
"""

import base64
import inspect
import json
import os
import sys
from pathlib import Path

import numpy as np

import gpt2
from plumbing.cli import count
from plumbing.files import write_whole
from plumbing.pages import template
from serving.predictions import bytes_of, distributions, foreseen, likeliest

MAX_TOKENS = 256  # the maps grow with the square of the text
N_SHOWN = 257  # a position's likeliest tokens are sent one by one: all, of a byte model
N_LENS = 5  # tokens per layer and position in the logit lens


def watch(function, *args, **kwargs):
    """Runs function(*args, **kwargs) and returns its call: a tree of all calls into gpt2.py.

    A call is a dict: the `function`'s name, the `line` of gpt2.py that called it (None for the
    first), its `args` by name, what came `out`, and the `calls` that it made. Python reports all
    this through sys.setprofile, which profilers use.
    """
    stack = [{"calls": []}]

    def note(frame, event, value):
        if frame.f_globals is not vars(gpt2):
            return
        if event == "call":
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            call = {
                "function": frame.f_code.co_name,
                "line": frame.f_back.f_lineno if frame.f_back.f_globals is vars(gpt2) else None,
                "args": {name: frame.f_locals[name] for name in names},
                "calls": [],
            }
            stack[-1]["calls"].append(call)
            stack.append(call)
        elif event == "return":
            stack.pop()["out"] = value

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function(*args, **kwargs)
    finally:
        sys.setprofile(before)
    return stack[0]["calls"][0]


def record(inputs, params, n_head):
    """One run of gpt2.gpt2 -> a dict of what happened inside it. Arrays are float32.

    logits     [n_seq, n_vocab]
    attention  [n_layer, n_head, n_seq, n_seq]  how much of each key's value each query takes
    stream     [n_layer + 1, n_seq, n_embd]     what the first block was given, then after each
    mha, ffn   [n_layer, n_seq, n_embd]         what a block's two halves added to the stream
    final      [n_seq, n_embd]                  the stream's end after ln_f
    call       the tree of `watch`
    """
    call = watch(gpt2.gpt2, np.asarray(inputs), **params, n_head=n_head)
    [hidden_state] = call["calls"]
    *blocks, ln_f = hidden_state["calls"]
    mha, ffn = zip(*[(mha, ffn) for _, mha, _, ffn in (b["calls"] for b in blocks)], strict=True)
    weights = []
    for _, attention, _ in (half["calls"] for half in mha):
        q, k = attention["args"]["q"], attention["args"]["k"]
        weights.append(gpt2.attention_weights(q, k))
    return {
        "logits": call["out"],
        "attention": np.stack(weights),
        "stream": np.stack([block["args"]["x"] for block in blocks] + [blocks[-1]["out"]]),
        "mha": np.stack([half["out"] for half in mha]),
        "ffn": np.stack([half["out"] for half in ffn]),
        "final": ln_f["out"],
        "call": call,
    }


def lens(x, params):  # [n_seq, n_embd] -> [n_seq, n_vocab]
    """The logits that the model would give if x were its last block's output."""
    return gpt2.layer_norm(x, **params["ln_f"]) @ params["wte"].T


def page_data(inputs, recording, encoder, hparams, params):
    """What the page needs: a dict that `page` can write. Its arrays have the page's precision."""
    data = {"hparams": hparams, "ids": inputs}
    data |= predictions(inputs, recording["logits"])
    data |= read_lens(recording["stream"], params)
    data |= flow(inputs, recording, params)
    ids = {*inputs, *data["top_ids"].ravel().tolist(), *data["lens_ids"].ravel().tolist()}
    data["bytes"] = bytes_of(ids, encoder)
    data["call"] = outline(recording["call"], names_of(params))
    names = sorted(functions(recording["call"]))
    data["sources"] = {name: source(getattr(gpt2, name)) for name in names}
    return data


def predictions(inputs, logits):
    """How well each token was foreseen, and each position's logits, one by one for the likeliest.

    bits, rank [n_seq - 1]: of the second token, the third, ... given those before it.
    """
    scores, shown = foreseen(inputs[1:], logits[:-1]), distributions(logits, N_SHOWN)
    return {
        "bits": scores["bits"].astype(np.float32),
        "rank": scores["rank"].astype(np.uint32),
        "top_ids": shown["top_ids"].astype(np.uint32),
        "top_logits": shown["top_logits"],
        "tail_counts": shown["tail_counts"].astype(np.uint32),
        "tail_logits": shown["tail_logits"].astype(np.float32),
    }


def flow(inputs, recording, params):
    """What the page draws of attention and of the stream.

    attention: the rows of each head's triangle, one after the other. vectors, scales (see compress)
    [2 + 2 * n_layer + 1, n_seq, n_embd]: what was added to the stream by wte, by wpe, and by each
    block's two halves, then what ln_f made of it. length: of the stream, and of what was added.
    """
    past = np.tril_indices(len(inputs))
    added = [params["wte"][inputs], params["wpe"][: len(inputs)]]
    for pair in zip(recording["mha"], recording["ffn"], strict=True):
        added += pair
    vectors, scales = compress(np.stack([*added, recording["final"]]))
    names = ("stream", "mha", "ffn")
    return {
        "attention": unit(recording["attention"][:, :, *past]),
        "length": {name: np.linalg.norm(recording[name], axis=-1) for name in names},
        "vectors": vectors.astype(np.int8),
        "scales": scales,
    }


def read_lens(stream, params):  # of [n_layer + 1, n_seq, n_embd]
    """The five likeliest ids and their probabilities, if each layer were the last."""
    ids, probs = [], []
    for x in stream:  # one by one: logits are large
        logits = lens(x, params)
        ids.append(likeliest(logits, N_LENS))
        exact = gpt2.softmax(logits.astype(np.float64))
        probs.append(np.take_along_axis(exact, ids[-1], -1))
    return {"lens_ids": np.stack(ids).astype(np.uint32), "lens_probs": unit(np.stack(probs))}


def unit(x):  # numbers from 0 to 1 -> whole ones from 0 to 65535
    return np.rint(x * 65535).astype(np.uint16)


def compress(vectors):  # [..., n_embd] -> [..., n_embd] from -127 to 127, [...]
    """Whole numbers q, and each vector's scale: a number of it is scale * q * |q| / 127**2.

    The square makes the steps between small numbers small.
    """
    scales = np.abs(vectors).max(-1)
    parts = vectors / np.where(scales == 0, 1, scales)[..., None]
    return np.rint(127 * np.sign(parts) * np.sqrt(np.abs(parts))), scales


def pack(array):
    """An array in a form JSON can hold: its dtype, shape, and little-endian bytes in base64."""
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    text = base64.b64encode(data).decode()
    return {"dtype": array.dtype.name, "shape": list(data.shape), "base64": text}


def names_of(params):  # -> {id of a parameter's array: "blocks.0.attn.c_attn.w"}
    names = {}

    def walk(node, way):
        items = enumerate(node) if isinstance(node, list) else node.items()
        for key, child in items:
            if isinstance(child, np.ndarray):
                names[id(child)] = f"{way}{key}"
            elif isinstance(child, dict | list):  # not a block's own attend
                walk(child, f"{way}{key}.")

    walk(params, "")
    return names


def outline(call, names):
    """A call without its numbers: of an array, only the shape is kept, and a parameter's name."""
    arrays = {name: a for name, a in call["args"].items() if isinstance(a, np.ndarray)}
    return {
        "function": call["function"],
        "line": call["line"],
        "args": [[names.get(id(a), name), list(a.shape)] for name, a in arrays.items()],
        "out": list(call["out"].shape),
        "calls": [outline(inner, names) for inner in call["calls"]],
    }


def functions(call):  # -> the names of all that were called
    return {call["function"]}.union(*map(functions, call["calls"]))


def source(function):  # -> the lines of a function as they are in the file, and the first's number
    lines, first = inspect.getsourcelines(function)
    return {"first": first, "lines": "".join(lines)}


def page(data):  # a dict -> the text of the HTML file
    """The template with the data in it. No `<` in the data can end the element that holds it."""
    text = json.dumps(data, separators=(",", ":"), default=pack).replace("<", "\\u003c")
    return template("explain.html").replace("{{data}}", text)


def explain(inputs, encoder, hparams, params, model, is_served=False):  # -> the page's text
    """ValueError for too many tokens, or none, and for logits that are not finite.

    is_served: the page may ask its server for predictions with heads switched off.
    """
    n_most = min(MAX_TOKENS, hparams["n_ctx"])
    if not 0 < len(inputs) <= n_most:
        raise ValueError(f"{len(inputs)} tokens, but a page needs 1 and shows {n_most} at most")
    recording = record(inputs, params, hparams["n_head"])
    if not np.isfinite(recording["logits"]).all():
        raise ValueError(f"{model}: with its weights the logits are not finite")
    data = page_data(inputs, recording, encoder, hparams, params)
    return page(data | {"model": model} | ({"is_served": True} if is_served else {}))


def main(
    text: str,
    model_size: str = "124M",
    models_dir: str = "models",
    out: str = "explain.html",
):
    """Write an HTML page that shows what GPT-2 did with a text. Open it in any browser.

    Args:
        text: what the model reads, at most 256 tokens.
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. What is not here yet is downloaded once.
        models_dir: the folder that holds the models.
        out: the file to write.
    """
    from utils import load_encoder_hparams_and_params

    path = Path(os.path.realpath(out))  # where --out is a link, what it points to is written
    if not path.parent.is_dir() or path.exists() and not path.is_file():  # before any download
        odd = "is a folder" if path.is_dir() else "is not an ordinary file"
        what = odd if path.exists() else f"there is no folder {path.parent}"
        raise ValueError(f"--out {out}: {what}; expected a file's name, such as explain.html")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encoder.encode_prompt(text, hparams["n_ctx"])
    model = os.path.basename(os.path.abspath(model_size))
    text = explain(inputs, encoder, hparams, params, model)
    try:
        write_whole(path, text)
    except OSError as error:  # which would name a temporary file
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    size = path.stat().st_size / 1e6
    print(f"{path}: {count(len(inputs), 'token')}, {size:.1f} MB. Open it in a browser.")


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
