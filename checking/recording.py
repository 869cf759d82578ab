"""Runs gpt2.py and backprop.py unchanged, and records every intermediate result under its name.

`altered` copies a module's functions so that they call each other through a dict of names. There
each of them can be wrapped, to record what it returns, or replaced, to see the effect of a mistake.
"""

import functools
import math
from types import FunctionType, ModuleType
from typing import NamedTuple

import numpy as np

import gpt2
from checking.precision import SHAKEN, cast, rounding
from model_files.weights import leaves

WATCHED = ("gelu", "softmax", "layer_norm", "linear", "mha", "ffn", "attention_weights")
# linear_backward gets the gradient of the first tensor, and returns the gradient of the second.
GIVEN_AND_MADE = {
    "attn.c_attn": ("attn.c_attn", "ln_1"),
    "attn.c_proj": ("resid_mid", "attn.out"),
    "mlp.c_fc": ("mlp.c_fc", "ln_2"),
    "mlp.c_proj": ("resid_post", "mlp.gelu"),
}


class Case(NamedTuple):
    """A model, a text, and the precision of the implementation that is compared with ours."""

    params: dict  # {precision: a tree of arrays}, for float64, dtype, and dtype shaken
    n_head: int
    tokens: np.ndarray  # [n_batch, n_seq + 1]
    backprop: ModuleType  # passed in, because packages may not import it
    dtype: str

    def sizes(self):
        """{"n_batch", "n_seq", "n_embd", "n_head", "d_head", "n_vocab", "n_ctx", "n_layer"}"""
        params = self.params["float64"]
        n_vocab, n_embd = params["wte"].shape
        return {
            "n_batch": len(self.tokens),
            "n_seq": self.tokens.shape[1] - 1,
            "n_embd": n_embd,
            "n_head": self.n_head,
            "d_head": n_embd // self.n_head,
            "n_vocab": n_vocab,
            "n_ctx": len(params["wpe"]),
            "n_layer": len(params["blocks"]),
            "n_inner": params["blocks"][0]["mlp"]["c_fc"]["w"].shape[1],
        }


def make_case(params, n_head, tokens, backprop, dtype="float32"):
    """Raises ValueError if there are too many or too few tokens, or if an id does not exist."""
    tokens = np.atleast_2d(np.asarray(tokens))
    n_vocab, n_ctx = len(params["wte"]), len(params["wpe"])
    n_seq = tokens.shape[-1] - 1
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens: expected whole numbers [n_batch, n_seq + 1], got {tokens.shape}")
    if not 1 <= n_seq <= n_ctx:
        raise ValueError(
            f"{tokens.shape[1]} tokens: expected 2 to {n_ctx + 1}, "
            f"because n_ctx is {n_ctx} and the last one is only predicted"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < n_vocab:
        raise ValueError(f"tokens: ids must be from 0 to {n_vocab - 1}")
    return Case(casts(params, dtype), n_head, tokens.astype(np.int64), backprop, dtype)


def casts(params, dtype):  # -> {precision: tree}, Case's params
    rounded = cast(params, dtype)
    return {"float64": cast(params, "float64"), dtype: rounded, SHAKEN + dtype: rounded}


# --- Functions with changes -----------------------------------------------------------------------


def altered(module, changes):  # -> {name: what the module has under it}
    """Copies a module's functions, so that the copies call each other, and changes some of them.

    changes: {name: change}. change(function, names) returns the function's replacement, which may
        call `function`, the copy, and the other functions through `names`.
    """
    names = dict(vars(module))
    for name, f in vars(module).items():
        if isinstance(f, FunctionType) and f.__globals__ is vars(module):
            names[name] = FunctionType(f.__code__, names, name, f.__defaults__, f.__closure__)
            names[name].__kwdefaults__ = f.__kwdefaults__
    for name, change in changes.items():
        if name in names:
            names[name] = change(names[name], names)
    return names


def raw_scores(q, k):  # [..., n_q, d_head], [..., n_seq, d_head] -> [..., n_q, n_seq]
    """Returns the scores of gpt2.attention_weights before the mask.

    A single query counts as the last one, from which nothing is hidden. So each query is passed as
    the only one, and softmax, which comes after the mask, is left out.
    """
    names = altered(gpt2, {"softmax": lambda f, names: lambda x: x})
    return names["attention_weights"](q[..., None, :], k[..., None, :, :])[..., 0, :]


def names_of_layers(params):  # -> {id of a parameter: the layer it belongs to, "blocks.0.ln_1"}
    return {id(x): name.rpartition(".")[0] or name for name, x in leaves(params).items()}


def layer_of(layers, args):  # the layer whose parameters are among a function's arguments, or ""
    return next((layers[id(x)] for x in args if id(x) in layers), "")


def limited(mistake, layers, is_here=lambda: True):
    """Limits a mistake's change to the layers that it names, and to calls for which is_here()."""

    def change(function, names):
        changed = mistake.change(function, names)

        def chosen(*args, **kwargs):
            layer = layer_of(layers, (*args, *kwargs.values()))
            is_meant = is_here() and layer.endswith(mistake.layer)
            return (changed if is_meant else function)(*args, **kwargs)

        return chosen

    return change


def with_mistake(mistake, params):  # -> {name: function}
    """Returns gpt2.py's functions with a mistake, or none (None), and attention in one piece."""
    layers = names_of_layers(params)
    changes = {mistake.function: limited(mistake, layers)} if mistake else {}
    names = altered(gpt2, changes)
    names["raw_scores"] = raw_scores
    for name in ("mha", "transformer_block"):
        names[name] = functools.partial(names[name], attend=names["attention"])
    return names


# --- The forward pass -----------------------------------------------------------------------------


class Enough(Exception):
    """Raised once the tensor that was asked for has been computed."""


def forward(case, precision, mistake=None, block=None, until=None, params=None):
    """Runs one forward pass and returns {name: array}, in the order of computation.

    precision: float64, or case.dtype, to which every function's result is rounded.
    mistake, block: a mistake to make, in one block or (None) everywhere.
    until: the name of the last tensor that is needed.
    """
    params = case.params[precision] if params is None else params
    arrays = {}

    def note(name, x):
        arrays[name] = x
        if name == until:
            raise Enough

    try:
        logits = run_gpt2(case, params, rounding(precision), mistake, block, note)
        note_losses(case, logits, mistake, rounding(precision), note)
    except Enough:
        pass
    return arrays


def run_gpt2(case, params, rounded, mistake, block, note):  # -> logits, [n_batch, n_seq, n_vocab]
    layers = names_of_layers(params)
    at = {"block": -1}

    def is_here():
        return block is None or block == at["block"]

    def in_block(name):
        return f"blocks.{at['block']}.{name}"

    names = altered(gpt2, {})

    def embed(function):
        def noted(inputs, wte, wpe, blocks, ln_f, n_head):
            x = wte[inputs]
            note("wte", x)
            note("wpe", np.broadcast_to(wpe[: x.shape[-2]], x.shape))
            return function(inputs, wte, wpe, blocks, ln_f, n_head)

        return noted

    def scores(function):
        def noted(q, k):
            names["raw_scores"](q, k)
            return function(q, k)

        return noted

    def noted_scores(q, k):
        x = rounded(raw_scores(q, k))
        note(in_block("attn.scores"), x)
        return x

    names["raw_scores"] = noted_scores
    names["hidden_state"] = embed(names["hidden_state"])
    names["attention_weights"] = scores(names["attention_weights"])
    if mistake and mistake.function in names:
        change = limited(mistake, layers, is_here)
        names[mistake.function] = change(names[mistake.function], names)

    def round_all(function):
        return lambda *args, **kwargs: rounded(function(*args, **kwargs))

    names |= {name: round_all(names[name]) for name in WATCHED}
    names |= {
        "transformer_block": watch_block(names["transformer_block"], rounded, at, note),
        "layer_norm": watch_norm(names["layer_norm"], layers, note),
        "linear": watch_linear(names["linear"], layers, note),
        "gelu": watch_result(names["gelu"], lambda: in_block("mlp.gelu"), note),
        "softmax": watch_softmax(names["softmax"], rounded, in_block, note),
        "attention": watch_attention(names["attention"], in_block, note),
        "attention_weights": watch_result(
            names["attention_weights"], lambda: in_block("attn.weights"), note
        ),
    }
    blocks = [b | {"attend": names["attention"]} for b in params["blocks"]]
    inputs = case.tokens[:, :-1]
    logits = rounded(names["gpt2"](inputs, **params | {"blocks": blocks}, n_head=case.n_head))
    note("logits", logits)
    return logits


def watch_result(function, name, note):
    def noted(*args, **kwargs):
        y = function(*args, **kwargs)
        note(name(), y)
        return y

    return noted


def watch_block(function, rounded, at, note):
    def noted(x, **block):
        at["block"] += 1
        x = rounded(x)
        if at["block"] == 0:
            note("embed", x)
        x = rounded(function(x, **block))
        note(f"blocks.{at['block']}.resid_post", x)
        return x

    return noted


def watch_norm(function, layers, note):
    def noted(x, g, b, **options):
        layer = layers[id(g)]
        if layer.endswith("ln_2"):
            note(layer.replace("ln_2", "resid_mid"), x)
        y = function(x, g=g, b=b, **options)
        note(layer, y)
        return y

    return noted


def watch_linear(function, layers, note):
    def noted(x, w, b):
        layer = layers[id(w)]
        if layer.endswith("attn.c_proj"):
            note(layer.replace("c_proj", "out"), x)
        y = function(x, w=w, b=b)
        note(layer, y)
        return y

    return noted


def watch_softmax(function, rounded, in_block, note):
    def noted(x):
        x = rounded(x)
        note(in_block("attn.masked"), x)
        return function(x)

    return noted


def watch_attention(function, in_block, note):
    def noted(q, k, v):
        for name, x in (("q", q), ("k", k), ("v", v)):
            note(in_block(f"attn.{name}"), x)
        return function(q, k, v)

    return noted


def note_losses(case, logits, mistake, rounded, note):
    def losses(logits, tokens):  # [n_batch, n_seq, n_vocab], [n_batch, n_seq + 1] -> nats
        rows = logits.reshape(-1, logits.shape[-1])
        nats, _ = case.backprop.cross_entropy(rows, tokens[:, 1:].ravel())
        return nats.reshape(logits.shape[:-1])

    names = {"losses": losses, "loss": lambda nats: nats.mean()}
    if mistake and mistake.function in names:
        names[mistake.function] = mistake.change(names[mistake.function], names)
    nats = rounded(names["losses"](logits, case.tokens))
    note("losses", nats)
    note("loss", np.asarray(names["loss"](nats)))


# --- The backward pass ----------------------------------------------------------------------------


def backward(case, precision, mistake=None):
    """Returns backprop.py's gradient of the mean loss as {"grad.NAME": array}.

    NAME is a parameter, or an intermediate whose gradient is an argument of one of backprop.py's
    functions. The sequences are run one by one, so each recorded array belongs to one sequence.
    Attention is in one piece.
    """
    params = case.params[precision]
    parts = [backward_of_one(case, row[None], params, precision, mistake) for row in case.tokens]
    arrays = {}
    for name in parts[0]:
        each = [part[name] for part in parts]
        if is_parameter(name):
            arrays[name] = sum(each) / len(parts)
        else:
            arrays[name] = np.stack(each) / len(parts)
    return arrays


def is_parameter(name):  # "grad.blocks.0.ln_1.g" -> True, "grad.blocks.0.ln_1" -> False
    return name.endswith((".w", ".b", ".g", "grad.wte", "grad.wpe"))


def backward_of_one(case, tokens, params, precision, mistake):
    rounded = rounding(precision)
    layers = names_of_layers(params)
    n_seq = tokens.shape[1] - 1
    root = math.sqrt(case.sizes()["d_head"])
    arrays = {}
    at = {}

    def note(name, x):
        arrays[f"grad.{name}"] = np.array(x)  # a copy, since x may later be changed in place

    def note_in_attention(name, x):  # [n_head, 1, ...]: one sequence
        note(f"blocks.{at['block']}.attn.{name}", x[:, 0])

    def linear(function, names):
        def noted(dy, x, w, b):
            _, at["block"], layer = layers[id(w)].split(".", 2)  # "blocks", "0", "attn.c_attn"
            output_name, input_name = GIVEN_AND_MADE[layer]
            dx, gradients = function(dy, x, w, b)
            dx = rounded(dx)
            note(f"blocks.{at['block']}.{output_name}", dy)
            note(f"blocks.{at['block']}.{input_name}", dx)
            return dx, gradients

        return noted

    def softmax(function, names):
        """backprop.py divides dy by the square root of d_head before softmax_backward.

        gpt2.py's scores already include that division, so both gradients are multiplied back here.
        """

        def noted(dy, y):
            dy = rounded(dy)
            dx = rounded(function(dy, y))
            note_in_attention("weights", dy * root)
            note_in_attention("scores", dx * root)
            return dx

        return noted

    def attention(function, names):
        def noted(q, k, v):
            y, attention_backward = function(q, k, v)

            def noted_backward(dy):
                gradients = [rounded(x) for x in attention_backward(dy)]
                for name, x in zip("qkv", gradients, strict=True):
                    note_in_attention(name, x)
                return gradients

            return y, noted_backward

        return noted

    def in_one_piece(function, names):
        return names["attention_forward"]

    def embedding(function, names):
        def noted(ids, rows):
            note("embed", rows)
            return function(ids, rows)

        return noted

    def norm(function, names):
        def noted(dy, x, g, b, **options):
            if layers[id(g)] == "ln_f":
                note("ln_f", dy)
            dx, gradients = function(dy, x, g, b, **options)
            return rounded(dx), gradients

        return noted

    def loss(function, names):
        def noted(logits, targets):
            nats, d_logits = function(logits, targets)
            note("logits", rounded(d_logits) / n_seq)
            return nats, d_logits

        return noted

    def round_all(function, names):
        return lambda *args, **kwargs: rounded(function(*args, **kwargs))

    def compose(watch, name):
        def change(function, names):
            if mistake and mistake.function == name:
                function = mistake.change(function, names)
            return watch(function, names)

        return change

    watches = {
        "linear_backward": linear,
        "layer_norm_backward": norm,
        "softmax_backward": softmax,
        "gelu_backward": round_all,
        "attention_forward": attention,
        "attention_in_blocks_forward": in_one_piece,
        "sum_by_id": embedding,
        "cross_entropy": loss,
        **dict.fromkeys(WATCHED, round_all),
    }
    changes = {name: compose(watch, name) for name, watch in watches.items()}
    names = altered(case.backprop, changes)
    _, gradients = names["loss_and_gradients"](params, tokens, case.n_head)
    return arrays | {f"grad.{name}": rounded(x) for name, x in leaves(gradients).items()}


# --- The optimizer --------------------------------------------------------------------------------

ADAMW = {
    "learning_rate": 1e-3,
    "adam_b1": 0.9,
    "adam_b2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
}


def first_step(p, g, name, adam):  # a parameter, its gradient -> the parameter after the step
    """AdamW's first step, which has a closed form.

    Both moments start at zero. After one step and bias correction, the first is the gradient and
    the second is its square. Only matrices decay.
    """
    rate = adam["learning_rate"]
    decay = rate * adam["weight_decay"] * (p.ndim == 2)
    return p * (1 - decay) - rate * g / (abs(g) + adam["adam_eps"])


def step(case, precision, gradients, mistake=None):
    """{"grad.NAME": array} -> {"step.NAME": array}, the parameters after one step of AdamW."""
    update = mistake.change(first_step, {}) if mistake else first_step
    arrays = {}
    for name, p in leaves(case.params[precision]).items():
        y = update(p, gradients[f"grad.{name}"], name, ADAMW)
        arrays[f"step.{name}"] = rounding(precision)(y)
    return arrays


def n_terms(case):
    """Returns roughly how many numbers the longest sums of a pass add. Rounding depends on it."""
    sizes = case.sizes()
    return sizes["n_inner"] + sizes["n_batch"] * sizes["n_seq"]
