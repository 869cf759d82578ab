"""Opens GPT-2 up: one HTML page that shows what the model did with a text.

    python explain.py "Alan Turing theorized that computers would one day become"

Nothing is computed a second time for the page. `watch` lets gpt2.py run as it is and notes every
call of its functions: what went in, what came out. From these calls `record` picks the arrays that
tell the story, `page_data` rounds and packs them, and explain_page.html, which holds the drawing,
shows them in any browser, without a network.

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
from encoder import BYTE_OF_CHAR, write_whole

TEMPLATE = Path(__file__).with_name("explain_page.html")
MAX_TOKENS = 256  # the maps grow with the square of the text
N_SHOWN = 257  # a position's likeliest tokens are sent one by one (all, of a byte model) ...
N_GROUPS = 64  # ... and the rest in groups, enough for the sum under any temperature
N_LENS = 5  # tokens per layer and position in the logit lens


def watch(function, *args, **kwargs):
    """Runs function(*args, **kwargs) and returns its call: a tree of all calls into gpt2.py.

    A call is a dict: the `function`'s name, the `line` of gpt2.py that called it (None for the
    first), its `args` by name, what came `out`, and the `calls` that it made. Python itself tells:
    sys.setprofile is what its profilers are made of.
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
    identity = np.eye(len(inputs), dtype=np.float32)  # as values, each key's row gives its weight
    weights = []
    for _, attention, _ in (half["calls"] for half in mha):
        q, k = attention["args"]["q"], attention["args"]["k"]
        weights.append(gpt2.attention(q, k, identity))
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
    """What the page needs, as JSON can hold it: a dict with packed arrays, see `pack`.

    Probabilities and attention are rounded to 1/65535, vectors to about a hundredth.
    """
    n_seq, logits = len(inputs), recording["logits"]
    probs = probabilities(logits)
    shown = likeliest(logits, N_SHOWN)
    following = np.asarray(inputs[1:], int)[:, None]
    likelier = logits[:-1] > np.take_along_axis(logits[:-1], following, -1)
    tail_counts, tail_logits = group(np.sort(logits)[:, ::-1][:, N_SHOWN:])
    lens_ids, lens_probs = read_lens(recording["stream"], params)
    past = np.tril_indices(n_seq)
    added = [params["wte"][inputs], params["wpe"][:n_seq]]  # to nothing yet, to the stream, ...
    added += [
        half for pair in zip(recording["mha"], recording["ffn"], strict=True) for half in pair
    ]
    vectors, scales = compress(np.stack([*added, recording["final"]]))
    piece_of_id = {id: piece for piece, id in encoder.vocab.items()}
    ids = {*inputs, *shown.ravel().tolist(), *lens_ids.ravel().tolist()}
    return {
        "hparams": hparams,
        "ids": inputs,
        "bytes": {id: bytes(BYTE_OF_CHAR[c] for c in piece_of_id[id]).hex() for id in ids},
        "given": pack(np.take_along_axis(probs[:-1], following, -1)[:, 0], "float32"),
        "rank": pack(1 + likelier.sum(-1), "uint32"),
        "top_ids": pack(shown, "uint32"),
        "top_logits": pack(np.take_along_axis(logits, shown, -1), "float32"),
        "tail_counts": pack(tail_counts, "uint32"),
        "tail_logits": pack(tail_logits, "float32"),
        "attention": pack(unit(recording["attention"][:, :, *past]), "uint16"),
        "lens_ids": pack(lens_ids, "uint32"),
        "lens_probs": pack(unit(lens_probs), "uint16"),
        "length": {
            name: pack(np.linalg.norm(recording[name], axis=-1), "float32")
            for name in ("stream", "mha", "ffn")
        },
        "vectors": pack(vectors, "int8"),
        "scales": pack(scales, "float32"),
        "call": outline(recording["call"], names_of(params)),
        "sources": {name: source(getattr(gpt2, name)) for name in functions(recording["call"])},
    }


def probabilities(logits):  # [..., n_vocab] -> [..., n_vocab], float64: many small numbers
    return gpt2.softmax(logits.astype(np.float64))


def likeliest(logits, n):  # [n_seq, n_vocab] -> [n_seq, n], all where there are fewer
    """The ids of the n greatest logits, best first, the lower id first among equals."""
    n = min(n, logits.shape[-1])
    ids = np.sort(np.argpartition(-logits, n - 1)[:, :n])
    order = np.argsort(-np.take_along_axis(logits, ids, -1), kind="stable")
    return np.take_along_axis(ids, order, -1)


def group(logits):  # [n_seq, n], descending -> [n_groups], [n_seq, n_groups]
    """(how many tokens each group has, the logit that each of them might have as well).

    The bounds grow like powers, so that likely tokens are in small groups. Every group keeps its
    sum of exp(logit), exactly, and under other temperatures nearly.
    """
    n = logits.shape[-1]
    bounds = np.unique(np.geomspace(N_SHOWN, N_SHOWN + n, N_GROUPS + 1).round().astype(int))
    starts, counts = bounds[:-1] - N_SHOWN, np.diff(bounds)
    if n == 0:
        return counts, logits
    largest = logits[:, :1].astype(np.float64)
    with np.errstate(divide="ignore"):  # what is too unlikely for float64 has no chance: -inf
        means = np.log(np.add.reduceat(np.exp(logits - largest), starts, -1) / counts)
    return counts, largest + means


def read_lens(stream, params):  # [n_layer + 1, n_seq, n_embd] -> two of [n_layer + 1, n_seq, 5]
    """The likeliest ids and their probabilities, as every layer would have it."""
    ids, probs = [], []
    for x in stream:  # one by one: logits are large
        logits = lens(x, params)
        ids.append(likeliest(logits, N_LENS))
        probs.append(np.take_along_axis(probabilities(logits), ids[-1], -1))
    return np.stack(ids), np.stack(probs)


def unit(x):  # numbers from 0 to 1 -> whole ones from 0 to 65535
    return np.rint(x * 65535)


def compress(vectors):  # [..., n_embd] -> [..., n_embd] from -127 to 127, [...]
    """Signed square roots, in 127ths of each vector's largest: fine for small numbers too.

    A number is scale * q * |q| / 127**2.
    """
    scales = np.abs(vectors).max(-1)
    parts = vectors / np.where(scales == 0, 1, scales)[..., None]
    return np.rint(127 * np.sign(parts) * np.sqrt(np.abs(parts))), scales


def pack(array, dtype):
    """An array as JSON can hold it: its shape, dtype, and little-endian bytes in base64."""
    data = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
    text = base64.b64encode(data).decode()
    return {"dtype": dtype, "shape": list(data.shape), "base64": text}


def names_of(params):  # -> {id of a parameter's array: "blocks.0.attn.c_attn.w"}
    names = {}

    def walk(node, way):
        items = enumerate(node) if isinstance(node, list) else node.items()
        for key, child in items:
            if isinstance(child, np.ndarray):
                names[id(child)] = f"{way}{key}"
            else:
                walk(child, f"{way}{key}.")

    walk(params, "")
    return names


def outline(call, names):
    """A call without its numbers: what is left of an array is its shape, and a parameter's name."""
    arrays = {name: a for name, a in call["args"].items() if isinstance(a, np.ndarray)}
    inside = [] if call["function"] == "attention" else call["calls"]  # it may halve itself often
    return {
        "function": call["function"],
        "line": call["line"],
        "args": [[names.get(id(a), name), list(a.shape)] for name, a in arrays.items()],
        "out": list(call["out"].shape),
        "calls": [outline(inner, names) for inner in inside],
    }


def functions(call):  # -> the names of all that were called
    return {call["function"]}.union(*map(functions, call["calls"]))


def source(function):  # -> the lines of a function as they are in the file, and the first's number
    lines, first = inspect.getsourcelines(function)
    return {"first": first, "lines": "".join(lines)}


def page(data):  # a dict -> the text of the HTML file
    """The template with the data in it. No `<` of a text can end the element that holds it."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text("utf-8").replace("{{data}}", text)


def main(
    text: str,
    model_size: str = "124M",
    models_dir: str = "models",
    out: str = "explain.html",
):
    """Write an HTML page that shows what GPT-2 did with a text. Open it in any browser.

    Args:
        text: what the model reads, at most 256 tokens.
        model_size: 124M, 355M, 774M or 1558M (downloaded once), a folder in models_dir, or a path.
        models_dir: the folder that holds the models.
        out: the page's file.
    """
    from utils import load_encoder_hparams_and_params

    path = Path(os.path.abspath(out))
    if path.is_dir() or not path.parent.is_dir():  # before any download
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"--out {out}: {what}; expected a file's name, such as explain.html")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encoder.encode(text)
    if not inputs and encoder.endoftext is not None:
        inputs = [encoder.endoftext]
    gpt2.check_length(len(inputs), 0, hparams["n_ctx"])
    if len(inputs) > MAX_TOKENS:
        raise ValueError(f"{len(inputs)} tokens, but a page shows {MAX_TOKENS} at most")
    recording = record(inputs, params, hparams["n_head"])
    data = {"model": os.path.basename(os.path.abspath(model_size))} | page_data(
        inputs, recording, encoder, hparams, params
    )
    write_whole(path, page(data))
    size = path.stat().st_size / 1e6
    print(f"{path}: {len(inputs)} tokens, {size:.1f} MB. Open it in a browser.")


if __name__ == "__main__":
    from utils import run_cli

    run_cli(main)
