"""parity.py against a GPT-2 in PyTorch, written from the papers, with mistakes planted in it."""

import json
import math
import re

import numpy as np
import pytest
from conftest import REPO, call, hugging_face, random_params, run

import backprop
import gpt2
import parity
import utils
from checking import files, mistakes, names, precision, recording
from checking.random_model import random_case
from encoder import Encoder
from model_files.weights import leaves, nest

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: several threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- An independent GPT-2 -------------------------------------------------------------------------


def norm(x, gain, bias, wrong, layer):
    """Ba et al. 2016, equations 3 and 4."""
    eps = {"eps 1e-6": 1e-6, "no eps": 0, "eps 1e-3": 1e-3}.get(wrong, 1e-5)
    dims = {"mean over positions": (-2,), "mean over both": (-2, -1)}.get(wrong, (-1,))
    mean = x.mean(dims, keepdim=True)
    if wrong == "rms norm":
        mean = torch.zeros_like(mean)
    if wrong in ("float16 sums", "float16 mean"):
        mean = x.half().mean(dims, keepdim=True).float()
    variance = ((x - mean) ** 2).mean(dims, keepdim=True)
    if wrong == "n - 1":
        variance = x.var(-1, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + eps)
    if wrong == "eps outside":
        y = (x - mean) / (torch.sqrt(variance) + eps)
    y = y if wrong == "no gain" else y * gain
    if wrong == "no ln_f" and layer == "ln_f":
        return x
    return y if wrong == f"no bias in {layer}" else y + bias


def linear(x, layer, wrong, name):
    w, b = layer["w"], layer["b"]
    if wrong in (f"{name} transposed", "all transposed"):
        w = w.reshape(w.shape[1], w.shape[0]).T
    y = (x.half() @ w.half()).float() if wrong == "float16 sums" else x @ w
    return y if wrong in (f"no bias in {name}", "no biases") else y + b


def activation(x, wrong):
    """Hendrycks & Gimpel 2016: 0.5x(1 + tanh[sqrt(2/pi)(x + 0.044715x^3)])."""
    if wrong == "erf":
        return F.gelu(x)
    if wrong == "relu":
        return F.relu(x)
    if wrong == "sigmoid":
        return x * torch.sigmoid(1.702 * x)
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class ByHand(torch.autograd.Function):
    """y as it is, a function of the inputs; the gradients by the inputs are backward(dy)."""

    @staticmethod
    def forward(ctx, y, backward, *inputs):
        ctx.by_hand = backward
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None, None, *ctx.by_hand(dy)


def by_hand(y, backward, *inputs):
    return ByHand.apply(y.detach(), backward, *inputs)


def scores_by_hand(scores, q, k, wrong):
    d = q.shape[-1]
    scale = {"backward not scaled": 1, "backward scaled twice": 1 / d}.get(wrong, d**-0.5)

    def backward(dy):
        dq, dk = scale * dy @ k, scale * dy.mT @ q
        wrongs = {"backward q k swapped": (dk, dq), "backward k not turned": (dq, scale * dy @ q)}
        return wrongs.get(wrong, (dq, dk))

    return by_hand(scores, backward, q, k)


def attention_by_hand(raw, weights, v, wrong, note):
    """Dao et al. 2022, algorithm 4 (arXiv:2205.14135), where the weights are computed again."""
    p = weights.detach()
    if wrong == "backward softmax without mask":
        p = torch.softmax(raw.detach(), -1)
    if wrong == "backward exp without mask":
        later = torch.ones_like(raw, dtype=torch.bool).triu(1)
        sums = raw.detach().masked_fill(later, -math.inf).logsumexp(-1, keepdim=True)
        p = torch.exp(raw.detach() - sums)

    def softmax_backward(dy):
        row_sums = (p * dy).sum(-1, keepdim=True)
        return (p * dy if wrong == "backward without row sums" else p * (dy - row_sums),)

    def product_backward(dy):
        return dy @ v.mT, (p if wrong == "backward v not turned" else p.mT) @ dy

    weights = by_hand(weights, softmax_backward, raw)
    note("attn.weights", weights)
    return by_hand(weights @ v, product_backward, weights, v)


def attend(x, attn, n_head, wrong, note):
    """Vaswani et al. 2017, equation 1, for each head."""
    n_batch, n_seq, n_embd = x.shape
    d = n_embd // n_head
    qkv = linear(x, attn["c_attn"], wrong, "attn.c_attn")
    note("attn.c_attn", qkv)
    if wrong == "q k v within heads":
        q, k, v = qkv.view(n_batch, n_seq, n_head, 3 * d).split(d, dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    else:
        q, k, v = qkv.split(n_embd, dim=-1)
        if wrong == "heads without transpose":
            q, k, v = (t.reshape(n_batch, n_head, n_seq, d) for t in (q, k, v))
        elif wrong == "d_head first":
            q, k, v = (t.view(n_batch, n_seq, d, n_head).permute(0, 3, 1, 2) for t in (q, k, v))
        else:
            q, k, v = (t.view(n_batch, n_seq, n_head, d).transpose(1, 2) for t in (q, k, v))
    swaps = {"q k swapped": (k, q, v), "k v swapped": (q, v, k), "q v swapped": (v, k, q)}
    q, k, v = swaps.get(wrong, (q, k, v))
    for name, t in (("q", q), ("k", k), ("v", v)):
        note(f"attn.{name}", t)
    scale = {"no scale": 1.0, "scaled twice": 1 / d, "scaled by n_embd": n_embd**-0.5}
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale.get(wrong, d**-0.5)
    if wrong.startswith("backward"):
        scores = scores_by_hand(scores, q, k, wrong)
    note("attn.scores", scores)
    raw = scores
    shift = {"mask sees the next": 2, "mask hides its own": 0, "mask hides its own, -1e9": 0}
    later = torch.ones(n_seq, n_seq, dtype=torch.bool).triu(shift.get(wrong, 1))
    if wrong == "mask upside down":
        later = ~later & ~torch.eye(n_seq, dtype=torch.bool)
    low = {"mask -1e4": -1e4, "mask hides its own, -1e9": -1e9, "softmax over heads": -1e9}
    if wrong not in ("no mask", "mask after softmax", "mask by product"):
        scores = scores.masked_fill(later, low.get(wrong, -math.inf))
    if wrong == "mask by product":
        scores = scores * ~later
    note("attn.masked", scores)
    axis = {"softmax over queries": 2, "softmax over heads": 1}.get(wrong, 3)
    weights = torch.softmax(scores, axis)
    if wrong == "mask after softmax":
        weights = weights * ~later
    note("attn.weights", weights)
    y = weights @ v
    if wrong.startswith("backward"):
        y = attention_by_hand(raw, weights, v, wrong, note)
    if wrong == "joined without transpose":
        y = y.reshape(n_batch, n_seq, n_embd)
    else:
        y = y.transpose(1, 2).reshape(n_batch, n_seq, n_embd)
    note("attn.out", y)
    y = linear(y, attn["c_proj"], wrong, "attn.c_proj")
    note("attn.c_proj", y)
    return y


def feed_forward(x, mlp, wrong, note):
    x = linear(x, mlp["c_fc"], wrong, "mlp.c_fc")
    note("mlp.c_fc", x)
    x = activation(x, wrong)
    note("mlp.gelu", x)
    x = linear(x, mlp["c_proj"], wrong, "mlp.c_proj")
    note("mlp.c_proj", x)
    return x


def model(params, n_head, ids, wrong, note):  # -> logits
    """Radford et al. 2019, section 2.3."""
    places = torch.arange(ids.shape[1])
    if wrong == "positions from 1":
        places = places + 1
    x = params["wte"][ids]
    note("wte", x)
    if wrong != "no positions":
        note("wpe", params["wpe"][places].expand(x.shape))
        x = x + params["wpe"][places]
    if wrong == "dropout":
        x = F.dropout(x, 0.1)
    note("embed", x)
    for i, block in enumerate(params["blocks"]):

        def noted(name, t, i=i):
            note(f"blocks.{i}.{name}", t)

        wrong_here = wrong.removeprefix("in block 1: ") if i == 1 else wrong
        x = run_block(x, block, n_head, wrong_here, noted)
    x = norm(x, params["ln_f"]["g"], params["ln_f"]["b"], wrong, "ln_f")
    note("ln_f", x)
    head = params["wte"].T
    if wrong == "head transposed":
        head = params["wte"].reshape(head.shape)
    if wrong == "another head":
        head = torch.randn_like(head) * 0.3
    if wrong == "head detached":
        head = head.detach()
    logits = x @ head
    note("logits", logits)
    return logits


def run_block(x, block, n_head, wrong, note):
    def first(x):
        x = norm(x, block["ln_1"]["g"], block["ln_1"]["b"], wrong, "ln_1")
        note("ln_1", x)
        return x

    def second(x):
        x = norm(x, block["ln_2"]["g"], block["ln_2"]["b"], wrong, "ln_2")
        note("ln_2", x)
        return x

    if wrong == "post-norm":
        x = first(x + attend(x, block["attn"], n_head, wrong, note))
        x = second(x + feed_forward(x, block["mlp"], wrong, note))
        note("resid_post", x)
        return x
    y = attend(first(x), block["attn"], n_head, wrong, note)
    middle = y if wrong == "no residual" else x + y
    note("resid_mid", middle)
    before = x if wrong == "side by side" else middle
    x = middle + feed_forward(second(before), block["mlp"], wrong, note)
    note("resid_post", x)
    return x


def loss_of(logits, ids, wrong, note):
    """Minus the mean of the logarithms of the next tokens' probabilities."""
    targets = ids[:, :-1] if wrong == "targets not shifted" else ids[:, 1:]
    if wrong == "padded vocabulary":
        logits = F.pad(logits, (0, 64 - logits.shape[-1] % 64))
    nats = -torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    if wrong == "bits":
        nats = nats / math.log(2)
    note("losses", nats)
    loss = {"loss is a sum": nats.sum(), "mean over the wrong axis": nats.mean(0).sum()}
    return loss.get(wrong, nats.mean())


def optimizer_of(params, wrong):
    matrices = [p for p in params.values() if p.ndim == 2]
    vectors = [p for p in params.values() if p.ndim == 1]
    decay = 0.1 if wrong == "decay of biases" else 0.0
    groups = [
        {"params": matrices, "weight_decay": 0.0 if wrong == "no decay" else 0.1},
        {"params": vectors, "weight_decay": decay},
    ]
    kind = torch.optim.Adam if wrong == "decay in the gradient" else torch.optim.AdamW
    return kind(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


def uncorrected_step(params):
    """Kingma & Ba 2015, algorithm 1, without lines 9 and 10."""
    for p in params.values():
        m = 0.1 * p.grad
        v = 0.05 * p.grad**2
        p.data *= 1 - 1e-4 * (p.ndim == 2)
        p.data -= 1e-3 * m / (v.sqrt() + 1e-8)


GRADIENTS = {"logits", "ln_f", "resid_post", "mlp.gelu", "mlp.c_fc", "ln_2", "resid_mid", "embed"}
GRADIENTS |= {f"attn.{name}" for name in ("out", "v", "weights", "scores", "q", "k", "c_attn")}
GRADIENTS |= {"ln_1", "mlp.c_proj", "attn.c_proj", "attn.masked"}  # the last three: of a sum's part


def theirs(case, wrong="", dtype=torch.float32, only_forward=False):  # -> {name: array}
    """Everything that it computes."""
    params, n_head, tokens = case
    arrays, kept = {}, {}

    def note(name, t):
        arrays[name] = t.detach().float().numpy().copy()
        if t.requires_grad:
            t.retain_grad()
            kept[name] = t

    flat = {n: torch.tensor(x).to(dtype).requires_grad_() for n, x in leaves(params).items()}
    tree = nest(flat)
    ids = torch.tensor(tokens)
    logits = model(tree, n_head, ids[:, :-1], wrong, note)
    loss = loss_of(logits, ids, wrong, note)
    note("loss", loss)
    if only_forward:
        return arrays
    if wrong == "gradients not averaged":
        loss = loss * tokens[:, 1:].size
    loss.backward()
    for name in GRADIENTS & {re.sub(r"blocks\.\d+\.", "", name) for name in kept}:
        for full, t in kept.items():
            if full.endswith(name) and t.grad is not None:
                note(f"grad.{full}", t.grad)
    for name, p in flat.items():
        if p.grad is not None:
            note(f"grad.{name}", p.grad)
    if dtype == torch.float16:  # Adam's eps is 0 there: its parameters are float32 in practice
        return arrays
    if wrong == "no bias correction":
        uncorrected_step(flat)
    else:
        optimizer_of(flat, wrong).step()
    for name, p in flat.items():
        note(f"step.{name}", p)
    return arrays


def fresh(rng, **sizes):  # -> params, n_head, tokens
    spec = {"n_layer": 2, "n_head": 3, "n_embd": 24, "n_vocab": 50, "n_ctx": 12, "n_seq": 9}
    spec |= sizes
    text = ",".join(f"{name}={n}" for name, n in spec.items())
    return random_case(text, int(rng.integers(2**32)))[:3]


def verdict_of(arrays, case, **options):
    params, n_head, tokens = case
    return parity.compare(arrays, params, n_head, tokens, **options)


def agree(arrays, case, **options):
    verdict = verdict_of(arrays, case, **options)
    assert verdict.first is None, parity.describe(verdict)
    return verdict


# --- A correct implementation passes --------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_implementation_passes(rng, dtype):
    case = fresh(rng)
    arrays = theirs(case, dtype=getattr(torch, dtype))
    verdict = agree(arrays, case, dtype=dtype)
    assert len(verdict.differences) == len(arrays) > 60


def test_a_backward_pass_by_hand_that_is_right_passes(rng):
    case = fresh(rng)
    agree(theirs(case, "backward"), case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_correct_implementations_of_many_shapes_pass(rng, dtype):
    for _ in range(40):
        n_head = int(rng.integers(1, 6))
        n_seq = int(rng.integers(1, 70))
        case = fresh(
            rng,
            n_head=n_head,
            n_embd=n_head * int(rng.integers(-(-8 // n_head), 20)),
            n_layer=int(rng.integers(1, 4)),
            n_vocab=int(rng.integers(2, 300)),
            n_seq=n_seq,
            n_ctx=n_seq + int(rng.integers(0, 5)),
            n_batch=int(rng.integers(1, 4)),
        )
        agree(theirs(case, dtype=getattr(torch, dtype)), case, dtype=dtype)


# --- Each mistake is named ------------------------------------------------------------------------

PLANTED = {  # what is done wrong: (the first tensor that differs, words of the cause)
    "erf": ("blocks.0.mlp.gelu", "exact GELU, with erf"),
    "relu": ("blocks.0.mlp.gelu", "ReLU"),
    "sigmoid": ("blocks.0.mlp.gelu", "1.702"),
    "eps 1e-6": ("blocks.0.ln_1", "eps is 1e-06"),
    "no eps": ("blocks.0.ln_1", "has no eps"),
    "eps 1e-3": ("blocks.0.ln_1", "eps is 0.001"),
    "eps outside": ("blocks.0.ln_1", "added to the deviation"),
    "n - 1": ("blocks.0.ln_1", "n - 1"),
    "rms norm": ("blocks.0.ln_1", "RMSNorm"),
    "mean over positions": ("blocks.0.ln_1", "mean is over the wrong axis"),
    "mean over both": ("blocks.0.ln_1", "positions and n_embd together"),
    "no gain": ("blocks.0.ln_1", "gain of layer_norm is missing"),
    "no ln_f": ("ln_f", "ln_f is missing"),
    "attn.c_attn transposed": ("blocks.0.attn.c_attn", "weight of attn.c_attn is transposed"),
    "attn.c_proj transposed": ("blocks.0.attn.c_proj", "weight of attn.c_proj is transposed"),
    "mlp.c_fc transposed": ("blocks.0.mlp.c_fc", "weight of mlp.c_fc is transposed"),
    "mlp.c_proj transposed": ("blocks.0.mlp.c_proj", "weight of mlp.c_proj is transposed"),
    "all transposed": ("blocks.0.attn.c_attn", "weight of every linear layer is transposed"),
    "no bias in attn.c_attn": ("blocks.0.attn.c_attn", "bias of attn.c_attn is missing"),
    "no bias in mlp.c_proj": ("blocks.0.mlp.c_proj", "bias of mlp.c_proj is missing"),
    "no bias in ln_2": ("blocks.0.ln_2", "bias of ln_2 is missing"),
    "no biases": ("blocks.0.attn.c_attn", "bias of every linear layer is missing"),
    "q k v within heads": ("blocks.0.attn.q", "[n_head, 3, d_head]"),
    "heads without transpose": ("blocks.0.attn.q", "heads are split in the wrong order"),
    "d_head first": ("blocks.0.attn.q", "as [d_head, n_head]"),
    "joined without transpose": ("blocks.0.attn.out", "heads are joined in the wrong order"),
    "q k swapped": ("blocks.0.attn.q", "queries and keys are swapped"),
    "k v swapped": ("blocks.0.attn.k", "keys and values are swapped"),
    "q v swapped": ("blocks.0.attn.q", "queries and values are swapped"),
    "no scale": ("blocks.0.attn.scores", "not scaled"),
    "scaled twice": ("blocks.0.attn.scores", "scaled twice"),
    "scaled by n_embd": ("blocks.0.attn.scores", "root of n_embd"),
    "no mask": ("blocks.0.attn.masked", "no mask"),
    "mask sees the next": ("blocks.0.attn.masked", "also sees the next token"),
    "mask hides its own, -1e9": ("blocks.0.attn.masked", "does not see its own token"),
    "mask by product": ("blocks.0.attn.masked", "multiplies the scores by 0"),
    "mask after softmax": ("blocks.0.attn.masked", "mask comes after the softmax"),
    "softmax over queries": ("blocks.0.attn.weights", "over queries"),
    "softmax over heads": ("blocks.0.attn.weights", "over heads"),
    "positions from 1": ("wpe", "counted from 1"),
    "no positions": ("embed", "positions are missing"),
    "post-norm": ("blocks.0.ln_1", "post-norm"),
    "no residual": ("blocks.0.resid_mid", "attention's result replaces the stream"),
    "side by side": ("blocks.0.ln_2", "read the same stream"),
    "head transposed": ("logits", "head is transposed"),
    "padded vocabulary": ("losses", "padded vocabulary"),
    "targets not shifted": ("losses", "targets are not shifted"),
    "bits": ("losses", "in bits"),
    "loss is a sum": ("loss", "loss is a sum"),
    "mean over the wrong axis": ("loss", "mean over the wrong axis"),
    "head detached": ("grad.wte", "lacks the head's share"),
    "gradients not averaged": ("grad.logits", "gradients are not averaged"),
    "backward not scaled": ("grad.blocks.1.attn.q", "queries and keys are not scaled"),
    "backward scaled twice": ("grad.blocks.1.attn.q", "queries and keys are scaled twice"),
    "backward q k swapped": ("grad.blocks.1.attn.q", "gradients of queries and keys are swapped"),
    "backward k not turned": ("grad.blocks.1.attn.k", "keys lacks a transposition"),
    "backward v not turned": ("grad.blocks.1.attn.v", "values lacks a transposition"),
    "backward without row sums": ("grad.blocks.1.attn.scores", "lacks the term that its sum"),
    "backward softmax without mask": ("grad.blocks.1.attn.v", "mask is forgotten in the backward"),
    "backward exp without mask": ("grad.blocks.1.attn.v", "from the sums of the forward pass"),
    "no bias correction": ("step.wte", "lacks the bias correction"),
    "decay of biases": ("step.blocks.0.attn.c_attn.b", "applied to biases"),
    "no decay": ("step.wte", "no weight decay"),
    "decay in the gradient": ("step.wte", "added to the gradient"),
}


@pytest.mark.parametrize("wrong", PLANTED)
def test_a_planted_mistake_is_named(rng, wrong):
    case = fresh(rng)
    name, words = PLANTED[wrong]
    only_forward = not name.startswith(("grad.", "step."))
    verdict = verdict_of(theirs(case, wrong, only_forward=only_forward), case)
    assert verdict.first is not None
    report = parity.describe(verdict)
    assert (verdict.first.entry.name, words in report) == (name, True), report
    assert not verdict.cause.is_close


@pytest.mark.slow
@pytest.mark.parametrize("wrong", PLANTED)
def test_a_planted_mistake_is_named_for_many_shapes(rng, wrong):
    for _ in range(8):
        # Sizes all differ: where two are the same, an axis can be taken for another.
        n_head = int(rng.integers(3, 6))
        n_seq = int(rng.integers(13, 20))
        n_embd = n_head * int(rng.integers(6, 12))
        case = fresh(rng, n_ctx=n_seq + 2, n_head=n_head, n_embd=n_embd, n_seq=n_seq, n_batch=2)
        verdict = verdict_of(theirs(case, wrong), case)
        name, words = PLANTED[wrong]
        report = parity.describe(verdict)
        assert (verdict.first.entry.name, words in report) == (name, True), report


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [("logits", "erf"), ("logits", "rms norm"), ("logits", "positions from 1")]
    + [("loss", "no scale"), ("loss", "post-norm"), ("loss", "no mask")]
    + [("gradients", "erf"), ("gradients", "post-norm"), ("gradients", "eps 1e-3")],
)
def test_a_few_tensors_are_enough_to_name_it(rng, kind, wrong):
    """Only the logits, only the loss, or only the parameters' gradients, found by slopes."""
    case = fresh(rng)
    arrays = theirs(case, wrong)
    if kind == "gradients":
        arrays = {f"grad.{name}": arrays[f"grad.{name}"] for name in leaves(case[0])}
    else:
        arrays = {kind: arrays[kind]}
    verdict = verdict_of(arrays, case)
    assert PLANTED[wrong][1] in parity.describe(verdict), parity.describe(verdict)


@pytest.mark.parametrize("wrong", ["padded vocabulary", "targets not shifted"])
def test_a_wrong_loss_is_seen_in_the_gradients(rng, wrong):
    case = fresh(rng)
    arrays = {n: x for n, x in theirs(case, wrong).items() if n.startswith("grad.blocks")}
    arrays = {n: x for n, x in arrays.items() if n.endswith((".w", ".b", ".g"))}
    assert PLANTED[wrong][1] in parity.describe(verdict_of(arrays, case))


def test_a_mistake_in_one_block_is_placed_there(rng):
    case = fresh(rng)
    verdict = verdict_of(theirs(case, "in block 1: erf"), case)
    assert verdict.first.entry.name == "blocks.1.mlp.gelu"
    assert "with erf, where GPT-2 has the tanh form (only in block 1)" in verdict.cause.text


def test_a_mask_of_1e4_is_named_where_the_scores_reach_it(rng):
    params, n_head, tokens = fresh(rng)
    arrays = {n: np.array(x) for n, x in leaves(params).items()}
    for i in range(2):
        arrays[f"blocks.{i}.attn.c_attn.w"] *= 200  # scores of some ten thousands
    case = nest(arrays), n_head, tokens
    found = theirs(case, "mask -1e4")
    for kept in (list(found), ["blocks.0.attn.weights", "blocks.0.attn.out"]):
        verdict = verdict_of({name: found[name] for name in kept}, case)
        assert "mask is -1e4" in parity.describe(verdict), parity.describe(verdict)


def test_sums_in_float16_are_named(rng):
    case = fresh(rng)
    for wrong in ("float16 sums", "float16 mean"):
        verdict = verdict_of(theirs(case, wrong), case)
        assert (verdict.first.entry.name, verdict.cause.text) == (
            "blocks.0.ln_1", "sums or results in float16")  # fmt: skip


def test_dropout_is_named(rng):
    case = fresh(rng, n_embd=48)
    torch.manual_seed(int(rng.integers(2**31)))
    verdict = verdict_of(theirs(case, "dropout"), case)
    assert verdict.first.entry.name == "embed" and "dropout is on" in verdict.cause.text


def test_an_untied_head_is_named_where_there_are_enough_tokens(rng):
    case = fresh(rng, n_seq=20, n_ctx=20)
    verdict = verdict_of(theirs(case, "another head"), case)
    assert verdict.first.entry.name == "logits" and "a matrix other than wte" in verdict.cause.text


def test_two_mistakes_are_not_taken_for_one(rng):
    case = fresh(rng)
    arrays = {"logits": theirs(case, "erf")["logits"] * 1.2}
    verdict = verdict_of(arrays, case)
    assert verdict.cause is None or verdict.cause.is_close


def test_noise_is_no_known_mistake(rng):
    case = fresh(rng)
    arrays = theirs(case)
    x = arrays["blocks.1.attn.out"]
    arrays["blocks.1.attn.out"] = x + 0.1 * rng.standard_normal(x.shape)
    verdict = verdict_of(arrays, case)
    assert (verdict.first.entry.name, verdict.cause) == ("blocks.1.attn.out", None)
    assert "none of the common mistakes" in parity.describe(verdict)


def test_a_single_wrong_number_is_found(rng):
    case = fresh(rng)
    arrays = theirs(case)
    arrays["blocks.0.mlp.c_fc"][1, 4, 7] += 1e-3
    verdict = verdict_of(arrays, case)
    assert verdict.first.entry.name == "blocks.0.mlp.c_fc"
    assert verdict.first.theirs.place == (1, 4, 7)


# --- Layouts and names ----------------------------------------------------------------------------


def test_layouts_of_others_are_understood(rng):
    params, n_head, tokens = case = fresh(rng, n_batch=1)
    arrays = theirs(case)
    heads = {n: x for n, x in arrays.items() if n.endswith(("attn.q", "attn.k", "attn.v"))}
    for change in (
        lambda x: x[0],  # [n_head, n_seq, d_head]
        lambda x: x.transpose(0, 2, 1, 3),
        lambda x: x[0].transpose(1, 0, 2),
        lambda x: x.transpose(0, 2, 1, 3).reshape(1, x.shape[2], -1),
        lambda x: x[0].transpose(1, 0, 2).reshape(x.shape[2], -1),
    ):
        agree({n: change(x) for n, x in heads.items()}, case)
    agree({n: x[0] for n, x in arrays.items() if x.ndim == 3 and x.shape[0] == 1}, case)
    agree({n: x.T for n, x in arrays.items() if n.endswith(".w")}, case)
    agree({n: x[None] for n, x in arrays.items() if n.endswith((".w", ".b"))}, case)
    agree({"logits": arrays["logits"][:, -1]}, case)
    agree({"logits": np.pad(arrays["logits"], ((0, 0), (0, 0), (0, 14)))}, case)
    agree({"grad.wte": np.pad(arrays["grad.wte"], ((0, 14), (0, 0)))}, case)


def test_a_batch_may_be_the_second_axis_or_joined(rng):
    case = fresh(rng, n_batch=3)
    arrays = {n: x for n, x in theirs(case).items() if x.ndim == 3}
    agree({n: x.swapaxes(0, 1) for n, x in arrays.items()}, case)
    agree({n: x.reshape(-1, x.shape[-1]) for n, x in arrays.items()}, case)


def test_one_position_more_is_cut_off(rng):
    """Others often run the whole text, and its last token too."""
    params, n_head, tokens = case = fresh(rng, n_seq=8)
    longer = np.concatenate([tokens, tokens[:, :1]], 1)
    arrays = theirs((params, n_head, longer))
    kept = ("logits", "blocks.1.attn.q", "blocks.0.attn.weights", "blocks.1.mlp.gelu")
    agree({name: arrays[name] for name in kept}, case)


def test_scores_are_taken_before_the_mask_and_after_it(rng):
    case = fresh(rng)
    arrays = theirs(case)
    raw = arrays["blocks.0.attn.scores"]
    later = np.triu(np.ones(raw.shape[-2:], bool), 1)
    for hidden in (-math.inf, -1e9, -1e10, np.finfo(np.float32).min, -65504, 0):
        agree({"blocks.0.attn.scores": np.where(later, hidden, raw)}, case)
    agree({"blocks.0.attn.scores": raw}, case)


HUGGING_FACE = {
    "embed": "transformer.drop", "blocks.0.ln_1": "transformer.h.0.ln_1",
    "blocks.0.attn.c_proj": "transformer.h.0.attn", "blocks.1.mlp.gelu": "transformer.h.1.mlp.act",
    "blocks.1.resid_post": "transformer.h.1", "ln_f": "transformer.ln_f", "logits": "lm_head",
    "grad.wte": "transformer.wte.weight.grad", "grad.blocks.0.ln_1.g": "h.0.ln_1.weight.grad",
    "step.blocks.1.mlp.c_fc.w": "step.transformer.h.1.mlp.c_fc.weight",
}  # fmt: skip
TRANSFORMER_LENS = {
    "wte": "hook_embed", "blocks.0.attn.q": "blocks.0.attn.hook_q",
    "blocks.1.attn.weights": "blocks.1.attn.hook_pattern",
    "blocks.1.resid_mid": "blocks.1.hook_resid_mid", "embed": "blocks.0.hook_resid_pre",
    "blocks.0.attn.out": "blocks.0.attn.hook_z",
}  # fmt: skip


@pytest.mark.parametrize("others", [HUGGING_FACE, TRANSFORMER_LENS])
def test_names_of_others_are_understood(rng, others):
    case = fresh(rng)
    arrays = theirs(case)
    verdict = agree({name: arrays[ours] for ours, name in others.items()}, case)
    assert {d.entry.name: d.entry.theirs for d in verdict.differences} == others


def test_gradients_inside_attention_are_taken_in_others_layouts_and_names(rng):
    params, n_head, tokens = case = fresh(rng, n_batch=1)
    arrays = {n: x for n, x in theirs(case).items() if n.startswith("grad.blocks")}
    inner = {n: x for n, x in arrays.items() if n.endswith((".q", ".k", ".v"))}
    agree({n: x.transpose(0, 2, 1, 3) for n, x in inner.items()}, case)
    agree({n: x.transpose(0, 2, 1, 3).reshape(1, x.shape[2], -1) for n, x in inner.items()}, case)

    def stacked(name):
        return np.stack([arrays[f"grad.blocks.{i}.{name}"] for i in range(2)])

    weights = stacked("attn.weights")
    others = {
        "dpreatt": stacked("attn.scores"),
        "datt": np.tril(weights),  # llm.c leaves the hidden ones at 0
        "dattproj": stacked("resid_mid"),
        "dfcproj": stacked("resid_post"),
        "blocks.1.attn.hook_q.grad": arrays["grad.blocks.1.attn.q"],
        "grads.h.0.attn.probs": arrays["grad.blocks.0.attn.weights"],
        "blocks.0.attn.hook_attn_scores.grad": arrays["grad.blocks.0.attn.scores"],
    }
    assert len(agree(others, case).differences) == 4 * 2 + 3
    assert np.abs(np.triu(weights, 1)).max() > 0
    weights[0, 0, 1, 4, 2] *= 1.01
    verdict = verdict_of(others | {"datt": weights}, case)
    assert verdict.first.entry.name == "grad.blocks.0.attn.weights"
    verdict = verdict_of({"dpreatt": stacked("attn.scores") / math.sqrt(8)}, case)
    assert "before they are divided by the square root" in verdict.cause.text


def test_llm_c_stacks_its_blocks(rng):
    case = fresh(rng)
    arrays = theirs(case)

    def stacked(pattern):
        return np.stack([arrays[pattern.format(i)] for i in range(2)])

    llm_c = {
        "encoded": arrays["embed"],
        "ln1": stacked("blocks.{}.ln_1"),
        "qkv": stacked("blocks.{}.attn.c_attn"),
        "att": stacked("blocks.{}.attn.weights"),
        "atty": stacked("blocks.{}.attn.out"),
        "fch_gelu": stacked("blocks.{}.mlp.gelu"),
        "residual3": stacked("blocks.{}.resid_post"),
        "dqkvw": stacked("grad.blocks.{}.attn.c_attn.w").swapaxes(1, 2),
        "dwte": arrays["grad.wte"],
        "dlnfw": arrays["grad.ln_f.g"],
        "lnf_mean": np.zeros((2, 9)),  # known, and not compared
    }
    assert len(agree(llm_c, case).differences) == 3 + 7 * 2
    llm_c["fch_gelu"] = np.stack([theirs(case, "erf")[f"blocks.{i}.mlp.gelu"] for i in range(2)])
    assert verdict_of(llm_c, case).first.entry.name == "blocks.0.mlp.gelu"


def test_every_name_of_ours_is_in_the_table_and_accepted(rng):
    params, n_head, tokens = case = fresh(rng)
    arrays, made = parity.reference(params, n_head, tokens)
    table = names.table()
    for name in names.all_names(made):
        kind, base = names.split_kind(name)
        is_parameter = base in leaves(params)
        assert is_parameter or re.sub(r"\.\d+\.", ".{i}.", base) in table, name
        assert names.find_name(name, 2, tuple(leaves(params))) == [(name, None)]
        line = names.source(name, backprop)
        text = (REPO / line.file).read_text("utf-8").splitlines()[line.line - 1]
        assert line.text in text and '"""' not in text, name
    assert set(arrays) - {n for n in arrays if n.startswith("float64.")} == {
        "tokens", *names.all_names(made)}  # fmt: skip
    agree({n: x for n, x in arrays.items() if not n.startswith("float64.")}, case)


@pytest.mark.parametrize(
    ("name", "function", "line"),
    [
        ("blocks.1.mlp.gelu", "gelu", "x = gelu(linear(x, **c_fc))"),
        ("blocks.0.ln_1", "layer_norm", "layer_norm(x, **ln_1)"),
        ("blocks.0.attn.scores", "attention_weights", "@ k.swapaxes(-1, -2)"),
        ("embed", "hidden_state", "x = x + wpe["),
        ("logits", "gpt2", "@ wte.T"),
    ],
)
def test_the_line_that_makes_a_tensor_is_named(name, function, line):
    found = names.source(name, backprop)
    assert (found.function, found.file) == (function, "gpt2.py") and line in found.text


# --- What is recorded -----------------------------------------------------------------------------


def test_what_is_recorded_is_what_gpt2_computes(rng):
    params, n_head, tokens = fresh(rng)
    arrays, _ = parity.reference(params, n_head, tokens)
    np.testing.assert_array_equal(
        arrays["logits"], gpt2.gpt2(tokens[:, :-1], **params, n_head=n_head)
    )
    loss, gradients = backprop.loss_and_gradients(params, tokens, n_head)
    np.testing.assert_allclose(arrays["loss"], loss, rtol=1e-6)
    for name, x in leaves(gradients).items():
        np.testing.assert_allclose(arrays[f"grad.{name}"], x, rtol=1e-4, atol=1e-6)
    assert arrays["float64.grad.wte"].dtype == arrays["float64.logits"].dtype == np.float64
    assert np.abs(arrays["float64.logits"] - arrays["logits"]).max() > 0


@pytest.mark.parametrize("n_seq", [9, 70])  # backprop.py takes 64 queries at a time
def test_every_gradient_is_autograds_in_float64(rng, n_seq):
    params, n_head, tokens = case = fresh(rng, n_seq=n_seq, n_ctx=n_seq)
    wanted = {n: x for n, x in theirs(case, dtype=torch.float64).items() if n.startswith("grad.")}
    arrays, made = parity.reference(params, n_head, tokens)
    found = [name for name in names.all_names(made) if name.startswith("grad.")]
    assert len(found) == 4 + 2 * (13 + 12) + 3 and set(found) <= set(wanted)
    for name in found:
        np.testing.assert_allclose(
            arrays[f"float64.{name}"], wanted[name], rtol=1e-5, atol=1e-9, err_msg=name
        )


def test_params_are_not_changed(rng):
    params, n_head, tokens = case = fresh(rng)
    before = {name: x.copy() for name, x in leaves(params).items()}
    verdict_of(theirs(case, "post-norm"), case)
    for name, x in leaves(params).items():
        np.testing.assert_array_equal(x, before[name])


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_rounding_is_pytorchs(rng, kind):
    x = (rng.standard_normal(1000) * 10.0 ** rng.integers(-6, 5, 1000)).astype(np.float32)
    x[:3] = np.inf, -np.inf, 0
    wanted = torch.tensor(x).to(getattr(torch, kind)).float().numpy()
    np.testing.assert_array_equal(precision.rounding(kind)(x), wanted)


def test_every_mistake_changes_something(rng):
    """Otherwise it could never be found. -1e4 needs large scores, which another test has."""
    params, n_head, tokens = fresh(rng)
    case = recording.make_case(params, n_head, tokens, backprop)
    right = recording.forward(case, "float64")["loss"]
    for mistake in mistakes.FORWARD:
        with np.errstate(all="ignore"):
            wrong = recording.forward(case, "float64", mistake)["loss"]
        assert wrong != right or "-1e4" in mistake.cause, mistake


# --- PyTorch --------------------------------------------------------------------------------------


def test_record_collects_transformers_tensors(rng):
    params, n_head, tokens = fresh(rng)
    n_vocab, n_embd = params["wte"].shape
    hparams = {"n_vocab": n_vocab, "n_ctx": len(params["wpe"]), "n_embd": n_embd}
    hparams |= {"n_head": n_head, "n_layer": 2}
    model = hugging_face(params, hparams)

    def loss(output, targets):
        return F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())

    arrays = parity.record(model, tokens, loss)
    verdict = parity.compare(arrays, params, n_head)
    assert verdict.first is None, parity.describe(verdict)
    found = {d.entry.name for d in verdict.differences}
    assert {"blocks.1.attn.c_attn", "blocks.0.resid_mid", "blocks.1.attn.out", "logits"} <= found
    gradients = [name for name in found if name.startswith("grad.")]
    assert "loss" in found and len(gradients) == 3 + 2 * 8 + 28  # 28 of parameters
    assert {"grad.blocks.0.attn.out", "grad.blocks.1.resid_mid", "grad.embed"} <= set(gradients)
    model.transformer.h[1].mlp.act = torch.nn.GELU()
    verdict = parity.compare(parity.record(model, tokens, loss), params, n_head)
    assert verdict.first.entry.name == "blocks.1.mlp.gelu" and "erf" in verdict.cause.text


def test_record_takes_names_and_functions(rng):
    class Tiny(torch.nn.Module):
        def __init__(self, params):
            super().__init__()
            self.table = torch.nn.Embedding.from_pretrained(torch.tensor(params["wte"]))

        def forward(self, ids):
            return self.table(ids) @ self.table.weight.T

    params, n_head, tokens = fresh(rng)
    arrays = parity.record(Tiny(params), tokens, names_of_theirs={"table": "wte"})
    verdict = parity.compare(arrays, params, n_head)
    assert verdict.first.entry.name == "logits"
    assert [d.entry.name for d in verdict.differences] == ["wte", "logits"]

    def function(ids):
        return {"blocks.0.ln_1": torch.zeros(*ids.shape, params["wte"].shape[1])}

    arrays = parity.record(function, tokens)
    assert parity.compare(arrays, params, n_head).first.entry.name == "blocks.0.ln_1"


def test_the_guides_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    pytest.importorskip("transformers", reason="transformers is not installed")
    guide = (REPO / "docs" / "guide.md").read_text("utf-8")
    code = guide.split("```python\nimport parity\n")[1].split("```")[0]
    scope = {"parity": parity}
    exec(code, scope)
    assert scope["verdict"].first is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a random byte-level model."""
    hparams = {"n_vocab": 257, "n_ctx": 48, "n_embd": 16, "n_head": 2, "n_layer": 2}
    path = tmp_path_factory.mktemp("models") / "tiny"
    utils.save_model(path, Encoder([]), hparams, random_params(np.random.default_rng(7), hparams))
    return path


def test_check_runs_transformers(folder):
    pytest.importorskip("transformers", reason="transformers is not installed")
    text = "It was the best of times"
    code, out, err = call("parity.py", "check", f"hf:{folder}", "--text", text)
    assert (code, err) == (0, ""), out + err
    assert "agree with gpt2.py in float32" in out
    code, out, _ = call("parity.py", "check", f"hf:{folder}", "--text", text, "--json")
    found = {row["name"] for row in json.loads(out)["tensors"]}
    assert {"blocks.1.attn.weights", "grad.wte", "step.wpe", "blocks.0.mlp.gelu", "loss"} <= found
    assert "grad.blocks.0.attn.weights" in found


# --- A student's functions ------------------------------------------------------------------------

STUDENT = """
import math
import re
import torch

def gelu(x):
    return {gelu}

def layer_norm(x, g, b):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased={unbiased})
    return (x - mean) / torch.sqrt(variance + 1e-5) * g + b

def linear(x, w, b):
    return x @ w + b

def attention(q, k, v):
    scores = q @ k.transpose(-1, -2) / {scale}
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=bool).triu({diagonal})
    return torch.softmax(scores.masked_fill(later, -math.inf), -1) @ v

def run_softmax(in_features, dim):
    return torch.softmax(in_features, {dim})

def run_linear(d_in, d_out, weights, in_features):
    return in_features @ weights.T

def run_scaled_dot_product_attention(Q, K, V, mask):
    scores = Q @ K.transpose(-1, -2) / math.sqrt(Q.shape[-1])
    return torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ V
"""
RIGHT = {
    "gelu": "torch.nn.functional.gelu(x, approximate='tanh')",
    "unbiased": "False",
    "scale": "math.sqrt(q.shape[-1])",
    "diagonal": "1",
    "dim": "dim",
}
STUDENTS_MISTAKES = {
    "gelu": ("torch.nn.functional.gelu(x)", "gelu", "with erf"),
    "unbiased": ("True", "layer_norm", "n - 1"),
    "scale": ("1", "attention", "not scaled"),
    "diagonal": ("2", "attention", "also sees the next token"),
    "dim": ("-2", "run_softmax", "wrong axis"),
}


def student(tmp_path, **changes):
    path = tmp_path / "student.py"
    path.write_text(STUDENT.format(**RIGHT | changes))
    return path


def test_a_students_functions_agree(tmp_path):
    code, out, err = call("parity.py", "check", student(tmp_path))
    assert (code, err) == (0, ""), out + err
    assert out.count(": agrees") == 7 and "7 of 7 functions agree" in out


@pytest.mark.parametrize("part", STUDENTS_MISTAKES)
def test_a_students_mistake_is_named(tmp_path, part):
    value, name, words = STUDENTS_MISTAKES[part]
    code, out, _ = call("parity.py", "check", student(tmp_path, **{part: value}), "--json")
    found = json.loads(out)
    wrong = [row for row in found["functions"] if not row["agrees"]]
    assert code == 1 and [row["name"] for row in wrong] == [name]
    assert words in wrong[0]["cause"], out


def test_gpt2s_own_functions_agree_and_errors_are_told(tmp_path):
    module = tmp_path / "own.py"
    module.write_text("from gpt2 import *\n")
    code, out, _ = call("parity.py", "check", module)
    assert code == 0 and "10 of 10 functions agree" in out
    module.write_text("def gelu(x):\n    return x[:, :1]\ndef softmax(x):\n    return 1 / 0\n")
    code, out, _ = call("parity.py", "check", module)
    assert code == 1 and "gelu: returns [2, 1, 24], expected [2, 7, 24]" in out
    assert "softmax: raises ZeroDivisionError" in out


# --- The command line -----------------------------------------------------------------------------

SMALL = "n_layer=1,n_head=2,n_embd=8,n_vocab=20,n_ctx=8,n_seq=6"


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_export_and_compare(tmp_path, ending):
    out = tmp_path / f"reference.{ending}"
    code, printed, err = call("parity.py", "export", "--random", SMALL, "--out", out)
    assert (code, err) == (0, "") and str(out) in printed
    code, printed, _ = call("parity.py", "compare", out, "--random", SMALL)
    assert code == 0 and "agree with gpt2.py" in printed
    code, printed, _ = call("parity.py", "compare", out, "--random", SMALL, "--seed", "1", "--json")
    found = json.loads(printed)
    assert code == 1 and found["agree"] is False and found["first"]["name"] == "params.wte"
    arrays = files.read_arrays(out)
    arrays["blocks.0.mlp.gelu"] = arrays["blocks.0.mlp.c_fc"]
    files.write_arrays(out, arrays, {})
    code, printed, _ = call("parity.py", "compare", out, "--random", SMALL, "--json")
    found = json.loads(printed)
    assert code == 1 and found["first"]["name"] == "blocks.0.mlp.gelu"
    assert found["first"]["function"] == "gelu" and found["first"]["file"] == "gpt2.py"
    assert found["cause"]["text"].startswith("no activation") and found["cause"]["reproduces"]


def test_the_file_is_read_by_safetensors_and_by_numpy(tmp_path):
    from safetensors import safe_open

    for name in ("reference.safetensors", "reference.npz"):
        call("parity.py", "export", "--random", SMALL, "--out", tmp_path / name)
    plain = np.load(tmp_path / "reference.npz", allow_pickle=False)
    with safe_open(tmp_path / "reference.safetensors", "np") as file:
        about = file.metadata()
        for name in file.keys():  # noqa: SIM118
            np.testing.assert_array_equal(file.get_tensor(name), plain[name])
    assert about == json.loads(str(plain["metadata"]))
    assert about["blocks.N.attn.q"] == "[n_batch, n_head, n_seq, d_head] the heads' queries"
    assert json.loads(about["adamw"])["weight_decay"] == 0.1
    assert json.loads(about["sizes"])["n_vocab"] == 20
    assert plain["float64.logits"].dtype == np.float64 and plain["logits"].dtype == np.float32


def test_export_of_a_model_folder_in_parts(tmp_path, folder):
    out = tmp_path / "forward.npz"
    args = ("--model_size", folder, "--text", "A short text", "--out", out, "--parts", "forward")
    assert call("parity.py", "export", *args)[0] == 0
    arrays = np.load(out)
    assert arrays["logits"].shape == (1, 11, 257)
    assert not [n for n in arrays if n.startswith(("grad.", "step.", "params."))]
    code, printed, _ = call(
        "parity.py", "compare", out, "--model_size", folder, "--text", "Another text"
    )
    assert code == 0, printed  # the file's tokens are the text


def refused(*args):
    code, out, err = call("parity.py", *args)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


@pytest.fixture
def file(tmp_path):
    def write(**arrays):
        path = tmp_path / "theirs.npz"
        np.savez(path, **{name.replace("_0_", ".0."): x for name, x in arrays.items()})
        return path

    return write


def test_bad_input_is_one_clear_line(tmp_path, file):
    zeros = np.zeros((2, 6, 8), np.float32)
    random = ("--random", SMALL)
    err = refused("compare", file(blocks_0_ln1x=zeros, logit=zeros), *random)
    assert "blocks.0.ln1x: did you mean blocks.0.ln1" in err and "logits" in err
    err = refused("compare", file(ln_f=zeros[:, :, :7]), *random)
    assert "ln_f is [2, 6, 7], expected [2, 6, 8]" in err
    for shape in ((), (3,), (0, 8), (2, 6, 8, 1)):
        for name in ("wpe", "ln_f", "logits", "blocks_0_attn.scores", "params.wte", "ln1"):
            message = refused("compare", file(**{name: np.ones(shape)}), *random)
            assert "expected" in message, (name, shape)
    zeros[1, 2, 3] = np.nan
    err = refused("compare", file(ln_f=zeros, embed=zeros), *random)
    assert "embed is the first tensor with NaN" in err and "[1, 2, 3]" in err
    assert "no such file" in refused("compare", tmp_path / "none.npz", *random).lower()
    assert "ends in" in refused("compare", tmp_path / "theirs.txt", *random)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"not a zip file")
    assert "not an .npz file" in refused("compare", broken, *random)
    np.savez(broken, logits=np.array(["a"]))
    assert "expected numbers" in refused("compare", broken, *random)
    np.savez(broken, lnf_mean=np.zeros(3))
    assert "no tensor to compare" in refused("compare", broken, *random)
    assert "did you mean compare" in refused("compar", "x.npz")
    assert "compare needs a file" in refused("compare")
    assert "float32, bfloat16, float16" in refused("compare", broken, "--dtype", "float8")
    assert "NAME=NUMBER" in refused("export", "--random", "n_layers=2")
    assert "multiple of n_head" in refused("export", "--random", "n_head=3,n_embd=8")
    assert "no folder" in refused("export", *random, "--out", tmp_path / "x" / "y.npz")
    assert "--parts all" in refused("export", *random, "--parts", "all")
    assert "no such file" in refused("check", tmp_path / "nobody.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert "none of these functions" in refused("check", tmp_path / "empty.py")


def test_a_nan_of_a_known_mistake_is_explained(rng):
    case = fresh(rng)
    arrays = theirs(case, "mask hides its own")
    arrays = {n: x for n, x in arrays.items() if n.endswith(("attn.weights", "attn.out"))}
    with pytest.raises(ValueError, match=r"blocks.0.attn.weights is the first .* its own token"):
        verdict_of(arrays, case)


def test_tokens_that_the_model_cannot_read_are_refused(rng):
    params, n_head, tokens = fresh(rng)
    arrays = {"logits": np.zeros((2, 9, 50))}
    for wrong, words in (
        (tokens[:, :1], "expected 2 to 13"),
        (np.tile(tokens, 2), "20 tokens"),
        (tokens + 50, "ids must be from 0 to 49"),
        (tokens * 1.0, "whole numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            parity.compare(arrays, params, n_head, wrong)
    with pytest.raises(ValueError, match="no tokens"):
        parity.compare(arrays, params, n_head)


def test_names_lists_what_is_accepted():
    code, out, _ = call("parity.py", "compare", "--names")
    assert code == 0
    for word in ("blocks.{i}.attn.scores", "h.{i}.attn.c_attn", "fch_gelu", "hook_resid_mid"):
        assert word in out


@pytest.mark.slow
def test_a_process_answers_with_its_exit_code(tmp_path):
    out = tmp_path / "reference.npz"
    assert run("parity.py", "export", "--random", SMALL, "--out", out)[0] == 0
    assert run("parity.py", "compare", out, "--random", SMALL)[0] == 0
    assert run("parity.py", "compare", out, "--random", SMALL, "--seed", "1")[0] == 1
    assert run("parity.py", "compare", out, "--random", "n_head=0")[0] == 2
