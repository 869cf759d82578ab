"""Records the forward pass: runs gpt2.py's own functions once, and keeps what each returned."""

import sys

import numpy as np

import gpt2


def watch(function, *args, **kwargs):
    """Runs function(*args, **kwargs) and returns its call, a tree of calls into gpt2.py.

    A call is a dict with the `function`'s name, the `line` of gpt2.py that called it (None for the
    first), its `args` by name, its return value `out`, and the `calls` that it made. Python reports
    all of these through sys.setprofile, which profilers use.
    """
    stack = [{"calls": []}]

    def on_event(frame, event, value):
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

    profiler = sys.getprofile()
    sys.setprofile(on_event)
    try:
        function(*args, **kwargs)
    finally:
        sys.setprofile(profiler)
    return stack[0]["calls"][0]


def record(inputs, params, n_head):
    """Runs gpt2.gpt2 once and returns a dict of what happened inside it. Arrays are float32.

    logits     [n_seq, n_vocab]
    attention  [n_layer, n_head, n_seq, n_seq]  the weight of each key's value in each query's mean
    stream     [n_layer + 1, n_seq, n_embd]     the input of the first block, each block's output
    mha, ffn   [n_layer, n_seq, n_embd]         what a block's two halves added to the stream
    final      [n_seq, n_embd]                  the last block's output after ln_f
    call       the tree of calls that `watch` returned
    """
    call = watch(gpt2.gpt2, np.asarray(inputs), **params, n_head=n_head)
    [hidden_state] = call["calls"]
    *blocks, ln_f = hidden_state["calls"]
    weights, mha_calls, ffn_calls = [], [], []
    for block in blocks:
        _, mha, _, ffn = block["calls"]
        _, attention, _ = mha["calls"]
        weights.append(gpt2.attention_weights(attention["args"]["q"], attention["args"]["k"]))
        mha_calls.append(mha)
        ffn_calls.append(ffn)
    return {
        "logits": call["out"],
        "attention": np.stack(weights),
        "stream": np.stack([block["args"]["x"] for block in blocks] + [blocks[-1]["out"]]),
        "mha": np.stack([mha["out"] for mha in mha_calls]),
        "ffn": np.stack([ffn["out"] for ffn in ffn_calls]),
        "final": ln_f["out"],
        "call": call,
    }


def lens(x, params):  # [n_seq, n_embd] -> [n_seq, n_vocab]
    """Returns the logits that the model would give if x were its last block's output."""
    return gpt2.layer_norm(x, **params["ln_f"]) @ params["wte"].T
