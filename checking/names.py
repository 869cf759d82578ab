"""Knows every tensor's names here and elsewhere, its meaning, and the line that computes it.

Our tensors have these names, for example in block 0:

    params.NAME   a parameter, by its name in the checkpoint: params.blocks.0.attn.c_attn.w
    NAME          an intermediate of the forward pass, listed below: blocks.0.attn.q
    grad.NAME     the gradient of the mean loss with respect to a parameter or an intermediate
    step.NAME     a parameter after one step of AdamW
"""

import functools
import inspect
import re
from typing import NamedTuple

import gpt2
from model_files.weights import hugging_face_name, leaves
from plumbing.cli import did_you_mean


class Made(NamedTuple):
    """An intermediate of the forward pass: its axes, its meaning, and where it is computed."""

    name: str
    axes: str  # B n_batch, T n_seq, E n_embd, H n_head, D d_head, V n_vocab, I n_inner; 3E is 3 * E
    meaning: str
    maker: str  # the function of gpt2.py that computes it
    caller: str  # the function that calls the maker ...
    line: str  # ... in a line that contains this text
    others: tuple = ()  # its names in other implementations


EMBEDDINGS = [
    Made("wte", "B T E", "rows of wte: what each token is", "hidden_state", "hidden_state",
         "wte[inputs]", ("hook_embed",)),
    Made("wpe", "B T E", "rows of wpe: where each token stands", "hidden_state", "hidden_state",
         "wpe[", ("hook_pos_embed",)),
    Made("embed", "B T E", "the input of the first block", "hidden_state",
         "hidden_state", "wpe[", ("drop", "encoded", "embd", "blocks.0.hook_resid_pre")),
]  # fmt: skip
BLOCK = [
    Made("ln_1", "B T E", "the stream, normalised for attention", "layer_norm",
         "transformer_block", "**ln_1", ("ln1", "norm_1", "norm1")),
    Made("attn.c_attn", "B T 3E", "queries, keys and values side by side", "linear", "mha",
         "**c_attn", ("attn.qkv", "qkv")),
    Made("attn.q", "B H T D", "the heads' queries", "mha", "mha", "split(", ("attn.hook_q", "q")),
    Made("attn.k", "B H T D", "the heads' keys", "mha", "mha", "split(", ("attn.hook_k", "k")),
    Made("attn.v", "B H T D", "the heads' values", "mha", "mha", "split(", ("attn.hook_v", "v")),
    Made("attn.scores", "B H T T", "query times key / sqrt(d_head), before the mask",
         "attention_weights", "attention_weights", "scores =", ("preatt",)),
    Made("attn.masked", "B H T T", "the scores, with -inf for later positions",
         "attention_weights", "attention_weights", "scores +=", ("attn.hook_attn_scores",)),
    Made("attn.weights", "B H T T", "softmax of the scores", "softmax", "attention_weights",
         "softmax(", ("attn.hook_pattern", "att", "attn.probs", "attn.attn_dropout")),
    Made("attn.out", "B T HD", "weighted averages of the values, the heads side by side",
         "attention", "mha", "attend(", ("attn.hook_z", "atty", "attn.z")),
    Made("attn.c_proj", "B T E", "what attention adds to the stream", "linear", "mha", "**c_proj",
         ("attn", "attn.resid_dropout", "hook_attn_out", "attproj")),
    Made("resid_mid", "B T E", "the stream after attention", "transformer_block",
         "transformer_block", "mha(", ("hook_resid_mid", "residual2")),
    Made("ln_2", "B T E", "the stream, normalised for the ffn", "layer_norm", "transformer_block",
         "**ln_2", ("ln2", "norm_2", "norm2")),
    Made("mlp.c_fc", "B T I", "the ffn's hidden layer, before gelu", "linear", "ffn", "**c_fc",
         ("mlp.hook_pre", "fch")),
    Made("mlp.gelu", "B T I", "the ffn's hidden layer, after gelu", "gelu", "ffn", "gelu(",
         ("mlp.act", "mlp.hook_post", "fch_gelu")),
    Made("mlp.c_proj", "B T E", "what the ffn adds to the stream", "linear", "ffn", "**c_proj",
         ("mlp", "mlp.dropout", "hook_mlp_out", "fcproj")),
    Made("resid_post", "B T E", "the stream after the ffn", "transformer_block",
         "transformer_block", "ffn(", ("", "hook_resid_post", "residual3")),
]  # fmt: skip
HEAD = [
    Made("ln_f", "B T E", "the last stream, normalised", "layer_norm", "hidden_state", "**ln_f",
         ("lnf", "norm_f")),
    Made("logits", "B T V", "a score for every possible next token", "gpt2", "gpt2", "@ wte",
         ("lm_head",)),
    Made("losses", "B T", "-ln of the next token's probability, in nats", "cross_entropy", "", ""),
    Made("loss", "", "the mean of losses", "cross_entropy", "", "", ("mean_loss",)),
]  # fmt: skip
LLM_C_WEIGHTS = {  # llm.c stacks the blocks: [n_layer, ...]
    "ln1w": "ln_1.g", "ln1b": "ln_1.b", "qkvw": "attn.c_attn.w", "qkvb": "attn.c_attn.b",
    "attprojw": "attn.c_proj.w", "attprojb": "attn.c_proj.b", "ln2w": "ln_2.g", "ln2b": "ln_2.b",
    "fcw": "mlp.c_fc.w", "fcb": "mlp.c_fc.b", "fcprojw": "mlp.c_proj.w", "fcprojb": "mlp.c_proj.b",
}  # fmt: skip
LLM_C_STACKED = {
    "ln1": "ln_1", "qkv": "attn.c_attn", "preatt": "attn.scores", "att": "attn.weights",
    "atty": "attn.out", "attproj": "attn.c_proj", "residual2": "resid_mid", "ln2": "ln_2",
    "fch": "mlp.c_fc", "fch_gelu": "mlp.gelu", "fcproj": "mlp.c_proj", "residual3": "resid_post",
    **LLM_C_WEIGHTS,
}  # fmt: skip
# A term of a sum has the same gradient as the sum. (The mask is added to the scores.)
SAME_GRADIENT = {
    "wte": "embed",
    "wpe": "embed",
    "attn.masked": "attn.scores",
    "attn.c_proj": "resid_mid",
    "mlp.c_proj": "resid_post",
}
NOT_COMPARED = ("ln1_mean", "ln1_rstd", "ln2_mean", "ln2_rstd", "lnf_mean", "lnf_rstd", "probs")
GRADIENTS = ("grad.", "grads.", "gradients.", "d_")  # gradients begin so, or end with .grad
STEPS = ("step.", "after.", "updated.")


def all_names(case):
    """Returns our names, in the order in which the tensors are computed."""
    n_layer = case.sizes()["n_layer"]
    blocks = [f"blocks.{i}.{made.name}" for i in range(n_layer) for made in BLOCK]
    params = list(leaves(case.params["float64"]))
    forward = [made.name for made in EMBEDDINGS] + blocks + [made.name for made in HEAD]
    return [
        *(f"params.{name}" for name in params),
        *forward,
        *(f"grad.{name}" for name in gradient_order(params, n_layer)),
        *(f"step.{name}" for name in params),
    ]


def gradient_order(params, n_layer):
    """Returns parameters and intermediates, from the loss back to the embeddings."""
    order = ["logits", "ln_f", "ln_f.g", "ln_f.b"]
    within = [
        "resid_post", "mlp.c_proj.", "mlp.gelu", "mlp.c_fc", "mlp.c_fc.", "ln_2", "ln_2.",
        "resid_mid", "attn.c_proj.", "attn.out", "attn.v", "attn.weights", "attn.scores", "attn.q",
        "attn.k", "attn.c_attn", "attn.c_attn.", "ln_1", "ln_1.",
    ]  # fmt: skip
    for i in reversed(range(n_layer)):
        for part in within:
            name = f"blocks.{i}.{part}"
            order += [p for p in params if p.startswith(name)] if name.endswith(".") else [name]
    return [*order, "embed", "wpe", "wte"]


def about(name):  # an intermediate's name, with a block's number or without -> its row in the table
    short = re.sub(r"^blocks\.\d+\.", "", name)
    return next(made for made in [*EMBEDDINGS, *BLOCK, *HEAD] if made.name == short)


# --- Others' names --------------------------------------------------------------------------------


@functools.cache
def known_names(n_layer, params):  # -> {another implementation's name: ours}
    """params: a tuple of the parameters' names, as `leaves` returns them."""
    known = {}
    for made in [*EMBEDDINGS, *HEAD]:
        known |= dict.fromkeys((made.name, *made.others), made.name)
    for i in range(n_layer):
        for made in BLOCK:
            ours = f"blocks.{i}.{made.name}"
            for other in (made.name, *made.others):
                for prefix in (f"blocks.{i}", f"h.{i}"):
                    known[f"{prefix}.{other}".removesuffix(".")] = ours
    known["blocks.0.hook_resid_pre"] = "embed"
    return known | weight_names(params)


def weight_names(params):  # -> {another implementation's name of a parameter: "params.NAME"}
    known = {}
    for name in params:
        theirs = hugging_face_name(name)
        for other in (theirs, theirs.replace("h.", "blocks.", 1), f"params.{name}"):
            known[other] = f"params.{name}"
        if name not in ("wte", "wpe"):
            known[name] = f"params.{name}"
    return known | {
        "lm_head.weight": "params.wte",
        "lnfw": "params.ln_f.g",
        "lnfb": "params.ln_f.b",
    }


def find_name(name, n_layer, params):
    """Returns a list of (our name, the row of their array that it stands for, or None for all).

    The list is empty for tensors that are known but not compared. Raises KeyError for an unknown
    name.
    """
    kind, base = split_kind(name)
    base = re.sub(r"^(_orig_mod\.|module\.|model\.|transformer\.)+", "", base)
    if base in NOT_COMPARED:
        return []
    if base in LLM_C_STACKED:
        is_weight = base in LLM_C_WEIGHTS
        kind = kind or ("params." if is_weight else "")
        part = LLM_C_STACKED[base]
        part = SAME_GRADIENT.get(part, part) if kind == "grad." else part
        return [(f"{kind}blocks.{i}.{part}", i) for i in range(n_layer)]
    if kind in ("grad.", "step.") and base in ("wte", "wpe"):
        return [(kind + base, None)]  # the parameter, not the rows that a text uses
    ours = known_names(n_layer, params)[base]
    if kind == "grad.":
        ours = gradient_name(ours)
    if kind and ours.startswith("params."):
        ours = ours.removeprefix("params.")
    elif (
        kind in ("step.", "params.")
        and ours not in params
        or kind == "grad."
        and f"grad.{ours}" not in {f"grad.{x}" for x in gradient_order(params, n_layer)}
    ):
        raise KeyError(name)
    return [(kind + ours, None)]


def gradient_name(name):  # "blocks.0.mlp.c_proj" -> "blocks.0.resid_post"
    block, part = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups("")
    return block + SAME_GRADIENT.get(part, part)


def split_kind(name):  # "transformer.wte.weight.grad" -> ("grad.", "transformer.wte.weight")
    if name.endswith(".grad"):
        return "grad.", name.removesuffix(".grad")
    for kind, prefixes in (("grad.", GRADIENTS), ("step.", STEPS), ("params.", ("params.",))):
        for prefix in prefixes:
            if name.startswith(prefix):
                return kind, name.removeprefix(prefix)
    if name.startswith("d") and name[1:] in {*LLM_C_STACKED, "wte", "wpe", "lnfw", "lnfb"}:
        return "grad.", name[1:]
    return "", name


def suggest(name, n_layer, params):  # -> "blocks.0.ln1x: did you mean blocks.0.ln_1?"
    kind, base = split_kind(name)
    base = base.removeprefix("transformer.")
    names = [*known_names(n_layer, params), *LLM_C_STACKED]
    alike = did_you_mean(base, [other for other in names if other], kind)
    return f"{name}{alike}"


def table():  # -> lines for people
    """Lists every accepted name: ours, the axes, and the names in other implementations."""
    lines = ["name                     axes         also accepted as"]
    for made in [*EMBEDDINGS, *BLOCK, *HEAD]:
        name, others = made.name, list(made.others)
        if made in BLOCK:
            stacked = [other for other in others if other in LLM_C_STACKED]
            alone = [other for other in (name, *others) if other not in LLM_C_STACKED]
            others = [f"h.{{i}}.{other}".rstrip(".") for other in alone] + stacked
            name = f"blocks.{{i}}.{name}"
        lines.append(f"{name:24} {made.axes:12} {', '.join(others)}".rstrip())
        lines.append(f"{'':24} {made.meaning}")
    lines += [
        "",
        "B n_batch, T n_seq, E n_embd, H n_head, D d_head = E / H, I n_inner = 4 E, V n_vocab.",
        "A batch of one may omit B. B and T may be swapped or merged, and so may H and T, H and D.",
        "An extra position in T and columns of V beyond n_vocab are ignored. Logits may be only",
        "those of the last position.",
        "",
        "params.NAME   a parameter: wte, wpe, blocks.{i}.attn.c_attn.w, .b, blocks.{i}.ln_1.g ...",
        "              also h.{i}.attn.c_attn.weight, lm_head.weight, and llm.c's qkvw, ln1b ...",
        "grad.NAME     the gradient of the mean loss in a parameter or an intermediate;",
        "              also NAME.grad, grads.NAME, llm.c's dqkvw, datt ... Some are the same:",
        "              attn.masked and attn.scores, attn.c_proj and resid_mid, mlp.c_proj and",
        "              resid_post.",
        "step.NAME     a parameter after one step of AdamW. Matrices may be [n_in, n_out] or",
        "              [n_out, n_in]. llm.c's names stand for the arrays of all blocks, stacked.",
        "tokens        the ids, [n_batch, n_seq + 1]. If a file has them, --text is ignored.",
        "The prefixes transformer., model., module. and _orig_mod. are ignored.",
    ]  # fmt: skip
    return "\n".join(lines)


# --- Lines of the source --------------------------------------------------------------------------


class Source(NamedTuple):
    """The line of a file that computes a tensor, and the function that it calls to do so."""

    function: str
    file: str
    line: int
    text: str


def source(name, backprop):
    """Returns the line of gpt2.py (or backprop.py) that computes the tensor of this name."""
    kind, base = split_kind(name)
    if kind == "grad.":
        return find_line(backprop, *gradient_line(base))
    if kind:
        maker = "adamw" if kind == "step." else "gpt2"
        module = backprop if kind == "step." else gpt2
        return find_line(module, maker, maker, "def ")
    made = about(base)
    if made.maker == "cross_entropy":
        return find_line(backprop, made.maker, made.maker, "nats =")
    return find_line(gpt2, made.maker, made.caller, made.line)


# {the end of a name: (the function of backprop.py that computes its gradient, the caller of that
# function, a part of the caller's line)}
GRADIENT_LINES = {
    "logits": ("cross_entropy", "cross_entropy", "targets] -= 1"),
    "wte": ("gpt2_forward", "gpt2_forward", "d_wte[ids] +="),
    "wpe": ("gpt2_forward", "gpt2_forward", "d_wpe["),
    "ln_f": ("gpt2_forward", "gpt2_forward", "d_logits @ wte"),
    "embed": ("transformer_block_forward", "transformer_block_forward", "dx += d"),
    "resid_post": ("transformer_block_forward", "transformer_block_forward", "dx += d"),
    "resid_mid": ("transformer_block_forward", "transformer_block_forward", "d += dy"),
    "mlp.c_fc": ("gelu_backward", "ffn_forward", "gelu_backward("),
    "attn.v": ("attention_forward", "attention_forward", "@ dy"),
    "attn.weights": ("attention_forward", "attention_forward", "d_scores ="),
    "attn.scores": ("softmax_backward", "attention_forward", "d_scores ="),
    "attn.q": ("attention_forward", "attention_forward", "d_scores @ k"),
    "attn.k": ("attention_forward", "attention_forward", "d_scores @ k"),
    "attn.c_attn": ("mha_forward", "mha_forward", "d = np.concat"),
    ".ln_1.": ("layer_norm_backward", "layer_norm_backward", "return"),
    ".ln_2.": ("layer_norm_backward", "layer_norm_backward", "return"),
    "ln_f.": ("layer_norm_backward", "layer_norm_backward", "return"),
}


def gradient_line(name):  # -> the maker of this gradient, its caller, a part of the caller's line
    for part, line in GRADIENT_LINES.items():
        if name.endswith(part) or part.endswith(".") and part in name:
            return line
    return "linear_backward", "linear_backward", "return"


def find_line(module, maker, caller, text):
    """Returns the last line of `caller` that contains `text`, or the first line if none does.

    The last, because a docstring may also contain the text.
    """
    function = inspect.unwrap(getattr(module, caller))
    lines, first = inspect.getsourcelines(function)
    place = max((i for i, line in enumerate(lines) if text in line), default=0)
    file = inspect.getsourcefile(function).replace("\\", "/").rpartition("/")[2]
    return Source(maker, file, first + place, lines[place].split("  #")[0].strip())
