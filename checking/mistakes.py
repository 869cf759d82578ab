"""Common mistakes, each a small change of one function of gpt2.py, backprop.py or recording.py.

A change is called with the correct function and the names of its module, and returns the function
with the mistake. So the arithmetic stays where it is, and a tensor can be recomputed with the
mistake, to see whether the result is what somebody else got.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import gpt2
from checking.recording import raw_scores


class Mistake(NamedTuple):
    """A mistake in words, and how to make it."""

    cause: str
    function: str  # the function that it changes
    change: Callable  # (function, names) -> function
    layer: str = ""  # the mistake is made only in layers whose names end with this


def same(function):
    """Makes a change from a function -> function that doesn't need the other names."""
    return lambda f, names: function(f)


# --- gelu -----------------------------------------------------------------------------------------

erf = np.vectorize(math.erf, otypes=[np.float64])


def exact_gelu(x):
    return (x * (0.5 + 0.5 * erf(x / math.sqrt(2)))).astype(x.dtype)


def logistic(x):
    return 0.5 + 0.5 * np.tanh(x / 2)


GELU = [
    Mistake("the exact GELU, with erf, where GPT-2 has the tanh form", "gelu",
            same(lambda f: exact_gelu)),
    Mistake("the GELU of a logistic function, x * sigmoid(1.702 x), where GPT-2 has the tanh form",
            "gelu", same(lambda f: lambda x: x * logistic(1.702 * x))),
    Mistake("ReLU instead of GELU", "gelu", same(lambda f: lambda x: np.maximum(x, 0))),
    Mistake("SiLU instead of GELU", "gelu", same(lambda f: lambda x: x * logistic(x))),
    Mistake("no activation between the ffn's two matrices", "gelu", same(lambda f: lambda x: x)),
    Mistake("GELU without its term 0.044715 x^3", "gelu",
            same(lambda f: lambda x: x * (0.5 + 0.5 * np.tanh(math.sqrt(2 / math.pi) * x)))),
]  # fmt: skip

# --- layer_norm -----------------------------------------------------------------------------------


def with_eps(eps):
    return same(lambda f: lambda x, g, b: f(x, g, b, eps))


def unbiased(f):
    """A variance with n - 1 instead of n gives the same norm with a smaller gain and eps."""

    def norm(x, g, b, eps=1e-5):
        share = 1 - 1 / x.shape[-1]
        return f(x, math.sqrt(share) * g, b, eps * share)

    return norm


def eps_outside(f):
    def norm(x, g, b, eps=1e-5):
        deviation = x.std(-1, keepdims=True)
        return f(x, 1, 0, 0) * (deviation / (deviation + eps)) * g + b

    return norm


def root_mean_square(f):
    """x and -x side by side have the mean 0, so only their squares count."""

    def norm(x, g, b, eps=1e-5):
        both = np.concatenate([x, -x], -1)
        return f(both, 1, 0, eps)[..., : x.shape[-1]] * g + b

    return norm


def over_positions(f):
    def norm(x, g, b, eps=1e-5):
        return f(x.swapaxes(-1, -2), 1, 0, eps).swapaxes(-1, -2) * g + b

    return norm


def over_the_whole_sequence(f):
    def norm(x, g, b, eps=1e-5):
        flat = x.reshape(*x.shape[:-2], -1)
        return f(flat, 1, 0, eps).reshape(x.shape) * g + b

    return norm


NORMS = {"layer_norm": "", "ln_1": "ln_1", "ln_2": "ln_2", "ln_f": "ln_f"}
LAYER_NORM = [
    *(Mistake(f"layer_norm's eps is {eps:g}, where GPT-2 has 1e-5", "layer_norm",
              with_eps(eps))
      for eps in (1e-6, 1e-3, 1e-4)),
    Mistake("layer_norm has no eps, or one as small as 1e-12, where GPT-2 has 1e-5", "layer_norm",
            with_eps(1e-12)),
    Mistake("layer_norm's eps is added to the deviation; add it to the variance",
            "layer_norm", same(eps_outside)),
    Mistake("layer_norm's variance is divided by n - 1, where GPT-2 divides by n", "layer_norm",
            same(unbiased)),
    Mistake("layer_norm's mean is over the wrong axis: over positions, not over n_embd",
            "layer_norm", same(over_positions)),
    Mistake("layer_norm's mean is over positions and n_embd together, not over n_embd alone",
            "layer_norm", same(over_the_whole_sequence)),
    Mistake("RMSNorm instead of layer_norm; subtract the mean", "layer_norm",
            same(root_mean_square)),
    *(Mistake(f"the gain of {name} is missing", "layer_norm",
              same(lambda f: lambda x, g, b: f(x, 1, b)), layer)
      for name, layer in NORMS.items()),
    *(Mistake(f"the bias of {name} is missing", "layer_norm",
              same(lambda f: lambda x, g, b: f(x, g, 0)), layer)
      for name, layer in NORMS.items()),
    *(Mistake(f"{name} is missing", "layer_norm", same(lambda f: lambda x, g, b: x), layer)
      for name, layer in (("ln_f", "ln_f"), ("ln_1", "ln_1"), ("ln_2", "ln_2"))),
]  # fmt: skip

# --- linear ---------------------------------------------------------------------------------------

LAYERS = {
    "every linear layer": "",
    "attn.c_attn": "attn.c_attn",
    "attn.c_proj": "attn.c_proj",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
}


def reread(w):  # [n_in, n_out] -> the same numbers, read as if they were stored as [n_out, n_in]
    return w.reshape(w.shape[::-1]).T


LINEAR = [
    *(Mistake(f"the weight of {name} is transposed: GPT-2 stores [n_in, n_out]", "linear",
              same(lambda f: lambda x, w, b: f(x, reread(w), b)), layer)
      for name, layer in LAYERS.items()),
    *(Mistake(f"the bias of {name} is missing", "linear",
              same(lambda f: lambda x, w, b: f(x, w, 0)), layer)
      for name, layer in LAYERS.items()),
    *(Mistake(f"the bias of {name} is added twice", "linear",
              same(lambda f: lambda x, w, b: f(x, w, 2 * b)), layer)
      for name, layer in LAYERS.items()),
]  # fmt: skip

# --- attention ------------------------------------------------------------------------------------


def scaled(factor):  # of (n_embd, d_head)
    """Multiplies the queries, and so the scores, by a factor."""

    def change(f, names):
        def weights(q, k):
            n_embd = q.shape[-3] * q.shape[-1] if q.ndim > 2 else q.shape[-1]
            return f(q * factor(n_embd, q.shape[-1]), k)

        return weights

    return change


def masked(hides, hidden=-math.inf):
    """Sets scores to `hidden` wherever hides(query's position, key's position) is true."""

    def change(f, names):
        def weights(q, k):
            scores = names["raw_scores"](q, k)
            position = np.arange(k.shape[-2])
            hide = hides(position[:, None], position)
            scores = np.where(hide, hidden, scores).astype(scores.dtype)
            return names["softmax"](scores)

        return weights

    return change


def mask_after_softmax(f, names):
    def weights(q, k):
        return np.tril(names["softmax"](names["raw_scores"](q, k)))

    return weights


def mask_by_product(f, names):
    """Scores times 0 are 0, not -inf, so later positions still count."""

    def weights(q, k):
        return names["softmax"](np.tril(names["raw_scores"](q, k)))

    return weights


def mask_by_sum(amount):
    def change(f, names):
        def weights(q, k):
            scores = names["raw_scores"](q, k)
            return names["softmax"](scores + amount * np.triu(np.ones_like(scores), 1))

        return weights

    return change


def softmax_over(axis, finite=False):
    def change(f, names):
        def softmax(x):
            x = np.maximum(x, -1e9) if finite else x
            return f(x.swapaxes(axis, -1)).swapaxes(axis, -1)

        return softmax

    return change


def later(query, key):
    return key > query


ATTENTION = [
    Mistake("the scores are not scaled; divide them by the square root of d_head",
            "attention_weights", scaled(lambda n_embd, d_head: math.sqrt(d_head))),
    Mistake("the scores are scaled twice, by d_head; divide them once by its square root",
            "attention_weights", scaled(lambda n_embd, d_head: 1 / math.sqrt(d_head))),
    Mistake("the scores are divided by the square root of n_embd, where GPT-2 uses d_head",
            "attention_weights", scaled(lambda n_embd, d_head: math.sqrt(d_head / n_embd))),
    Mistake("the scores are multiplied by the square root of d_head; divide them by it",
            "attention_weights", scaled(lambda n_embd, d_head: d_head)),
    Mistake("there is no mask, so queries see later tokens", "attention_weights",
            masked(lambda query, key: key < -1)),
    Mistake("the mask is off by one: a query also sees the next token", "attention_weights",
            masked(lambda query, key: key > query + 1)),
    *(Mistake("the mask is off by one: a query does not see its own token", "attention_weights",
              masked(lambda query, key: key >= query, hidden)) for hidden in (-math.inf, -1e9)),
    Mistake("the mask is the wrong way round: queries see only themselves and later tokens",
            "attention_weights", masked(lambda query, key: key < query)),
    Mistake("the mask is -1e4, which hides nothing when scores are as low as that; use -inf",
            "attention_weights", masked(later, -1e4)),
    Mistake("the mask of -1e4 is added to the scores, which are too large for that; use -inf",
            "attention_weights", mask_by_sum(-1e4)),
    Mistake("the mask comes after the softmax, so the weights don't add up to 1",
            "attention_weights", mask_after_softmax),
    Mistake("the mask multiplies the scores by 0, which hides nothing; set them to -inf",
            "attention_weights", mask_by_product),
    *(Mistake("the softmax is over the wrong axis: over queries, not over keys", "softmax",
              softmax_over(-2, finite)) for finite in (False, True)),
    *(Mistake("the softmax is over the wrong axis: over heads, not over keys", "softmax",
              softmax_over(-3, finite)) for finite in (False, True)),
]  # fmt: skip

# --- mha ------------------------------------------------------------------------------------------


def attending(change):
    """Replaces mha's `attend` by change(attend)."""

    def changed(f, names):
        def mha(x, c_attn, c_proj, n_head, attend):
            return f(x, c_attn, c_proj, n_head, attend=change(attend))

        return mha

    return changed


def in_order(*order):  # of q, k and v
    return attending(lambda attend: lambda *qkv: attend(*(qkv[i] for i in order)))


def merge(x):  # [..., n_head, n_seq, d_head] -> [..., n_seq, n_embd]
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)


def split(x, n_head):  # and back
    x = x.reshape(*x.shape[:-1], n_head, -1)
    return x.swapaxes(-2, -3)


def interleave(x):
    """Takes the numbers of a head n_head apart, as if c_attn's result were [d_head, n_head]."""
    n_head = x.shape[-3]
    y = merge(x)
    y = y.reshape(*y.shape[:-1], -1, n_head).swapaxes(-1, -2)  # [..., n_seq, n_head, d_head]
    return y.swapaxes(-2, -3)


def without_transpose(x):
    """Reshapes to heads without swapping axes, so each "head" is a few neighbouring positions."""
    return merge(x).reshape(x.shape)


def merge_without_transpose(x):
    """Reads [n_head, n_seq, d_head] as [n_seq, n_embd], which mixes heads and positions."""
    n_head, n_seq, d_head = x.shape[-3:]
    return split(x.reshape(*x.shape[:-3], n_seq, n_head * d_head), n_head)


def q_k_v_within_heads(attend):
    """Reads c_attn's result as [n_head, 3, d_head], where GPT-2 has [3, n_head, d_head]."""

    def attend_to(q, k, v):
        n_head, d_head = q.shape[-3], q.shape[-1]
        x = np.concatenate([merge(q), merge(k), merge(v)], -1)
        x = x.reshape(*x.shape[:-1], n_head, 3, d_head)  # [..., n_seq, n_head, 3, d_head]
        return attend(*(x[..., i, :].swapaxes(-2, -3) for i in range(3)))

    return attend_to


def as_one_head(attend):
    def attend_to(q, k, v):
        y = attend(*(merge(x)[..., None, :, :] for x in (q, k, v)))
        return split(y[..., 0, :, :], q.shape[-3])

    return attend_to


def of_all(f):
    return attending(lambda attend: lambda *qkv: attend(*map(f, qkv)))


MHA = [
    Mistake("queries and keys are swapped", "mha", in_order(1, 0, 2)),
    Mistake("keys and values are swapped", "mha", in_order(0, 2, 1)),
    Mistake("queries and values are swapped", "mha", in_order(2, 1, 0)),
    Mistake("c_attn is split as k, v, q, where GPT-2 has q, k, v", "mha", in_order(2, 0, 1)),
    Mistake("c_attn is split as v, q, k, where GPT-2 has q, k, v", "mha", in_order(1, 2, 0)),
    Mistake("the heads are split in the wrong order, as [d_head, n_head], "
            "where GPT-2 has [n_head, d_head]", "mha", of_all(interleave)),
    Mistake("the heads are split in the wrong order: [n_seq, n_embd] is reshaped to "
            "[n_head, n_seq, d_head] without swapping axes", "mha", of_all(without_transpose)),
    Mistake("the heads are split and joined in the wrong order: [n_seq, n_embd] is reshaped to "
            "[n_head, n_seq, d_head] and back without swapping axes", "mha", attending(
                lambda attend: lambda *qkv: merge_without_transpose(
                    attend(*map(without_transpose, qkv))))),
    Mistake("the heads are split in the wrong order: c_attn is read as [n_head, 3, d_head], "
            "where GPT-2 has [3, n_head, d_head]", "mha", attending(q_k_v_within_heads)),
    Mistake("the heads are joined in the wrong order: [n_head, n_seq, d_head] is reshaped to "
            "[n_seq, n_embd] without swapping axes", "mha",
            attending(lambda attend: lambda *qkv: merge_without_transpose(attend(*qkv)))),
    Mistake("there is only one head; use n_head", "mha", attending(as_one_head)),
]  # fmt: skip

# --- transformer_block ----------------------------------------------------------------------------


def block_of(parts):
    """Replaces a block by parts(x, mha, ffn, norm_1, norm_2)."""

    def change(f, names):
        def block(x, mlp, attn, ln_1, ln_2, n_head, attend):
            return parts(
                x,
                lambda x: names["mha"](x, **attn, n_head=n_head, attend=attend),
                lambda x: names["ffn"](x, **mlp),
                lambda x: names["layer_norm"](x, **ln_1),
                lambda x: names["layer_norm"](x, **ln_2),
            )

        return block

    return change


def post_norm(x, mha, ffn, norm_1, norm_2):
    x = norm_1(x + mha(x))
    return norm_2(x + ffn(x))


def norm_in_the_stream(x, mha, ffn, norm_1, norm_2):
    x = norm_1(x)
    x = norm_2(x + mha(x))
    return x + ffn(x)


def norm_after(x, mha, ffn, norm_1, norm_2):
    x = x + norm_1(mha(x))
    return x + norm_2(ffn(x))


def no_first_residual(x, mha, ffn, norm_1, norm_2):
    x = mha(norm_1(x))
    return x + ffn(norm_2(x))


def no_second_residual(x, mha, ffn, norm_1, norm_2):
    x = x + mha(norm_1(x))
    return ffn(norm_2(x))


def no_residuals(x, mha, ffn, norm_1, norm_2):
    return ffn(norm_2(mha(norm_1(x))))


def side_by_side(x, mha, ffn, norm_1, norm_2):
    return x + mha(norm_1(x)) + ffn(norm_2(x))


def norms_swapped(x, mha, ffn, norm_1, norm_2):
    x = x + mha(norm_2(x))
    return x + ffn(norm_1(x))


BLOCK = [
    Mistake("post-norm: the norms come after the sums, where GPT-2 has them before each half",
            "transformer_block", block_of(post_norm)),
    Mistake("the stream itself is normalised; normalise a copy, and add to the original stream",
            "transformer_block", block_of(norm_in_the_stream)),
    Mistake("the norms come after attention and the ffn, where GPT-2 has them before",
            "transformer_block", block_of(norm_after)),
    Mistake("attention's result replaces the stream; add it (a residual is missing)",
            "transformer_block", block_of(no_first_residual)),
    Mistake("the ffn's result replaces the stream; add it (a residual is missing)",
            "transformer_block", block_of(no_second_residual)),
    Mistake("both results replace the stream; add them (the residuals are missing)",
            "transformer_block", block_of(no_residuals)),
    Mistake("attention and the ffn read the same stream; let the ffn also read attention's result",
            "transformer_block", block_of(side_by_side)),
    Mistake("ln_1 and ln_2 are swapped", "transformer_block", block_of(norms_swapped)),
]  # fmt: skip

# --- hidden_state and gpt2 ------------------------------------------------------------------------


def embedding(change):
    """Replaces inputs, wte and wpe by change(inputs, wte, wpe)."""

    def changed(f, names):
        def hidden_state(inputs, wte, wpe, blocks, ln_f, n_head):
            return f(*change(inputs, wte, wpe), blocks, ln_f, n_head)

        return hidden_state

    return changed


def head(matrix):
    """Multiplies the last stream by matrix(wte), [n_embd, n_vocab]."""

    def change(f, names):
        def logits(inputs, wte, wpe, blocks, ln_f, n_head):
            x = names["hidden_state"](inputs, wte, wpe, blocks, ln_f, n_head)
            return x @ matrix(wte)

        return logits

    return change


EMBEDDING = [
    Mistake("positions are counted from 1; count them from 0, so that token i gets row i of wpe",
            "hidden_state", embedding(lambda x, wte, wpe: (x, wte, np.roll(wpe, -1, 0)))),
    Mistake("positions are missing; add wpe's rows", "hidden_state",
            embedding(lambda x, wte, wpe: (x, wte, 0 * wpe))),
    Mistake("every token has position 0", "hidden_state",
            embedding(lambda x, wte, wpe: (x, wte, 0 * wpe + wpe[0]))),
    Mistake("positions go backwards", "hidden_state",
            embedding(lambda x, wte, wpe: (x, wte, wpe[: x.shape[-1]][::-1]))),
    Mistake("the embeddings are multiplied by the square root of n_embd, as in Vaswani et al. 2017",
            "hidden_state",
            embedding(lambda x, wte, wpe: (x, math.sqrt(wte.shape[-1]) * wte, wpe))),
    Mistake("the sequence is shifted by one token", "hidden_state",
            embedding(lambda x, wte, wpe: (np.roll(x, 1, -1), wte, wpe))),
    Mistake("the sequence is shifted by one token, the other way", "hidden_state",
            embedding(lambda x, wte, wpe: (np.roll(x, -1, -1), wte, wpe))),
]  # fmt: skip
HEAD = [
    Mistake("the head is transposed: wte's numbers are read as [n_embd, n_vocab]", "gpt2",
            head(lambda wte: wte.reshape(wte.shape[::-1]))),
    Mistake("the logits are divided by the square root of n_embd", "gpt2",
            head(lambda wte: wte.T / math.sqrt(wte.shape[-1]))),
]  # fmt: skip

# --- The loss -------------------------------------------------------------------------------------


def padded(multiple):
    def change(f, names):
        def losses(logits, tokens):
            n_more = -logits.shape[-1] % multiple
            return f(np.pad(logits, [(0, 0), (0, 0), (0, n_more)]), tokens)

        return losses

    return change


def own_tokens(f):
    """Asks every position for its own token."""
    return lambda logits, tokens: f(logits, np.concatenate([tokens[:, :1], tokens[:, :-1]], 1))


LOSS = [
    *(Mistake(f"the loss counts a padded vocabulary, whose size is a multiple of {multiple} and "
              "whose extra logits are 0", "losses", padded(multiple))
      for multiple in (128, 64, 8, 16, 32, 256)),
    Mistake("the targets are not shifted; the target is the next token, not the same one",
            "losses", same(own_tokens)),
    Mistake("the loss is in bits (log2), where GPT-2's is in nats", "losses",
            same(lambda f: lambda logits, tokens: f(logits, tokens) / math.log(2))),
    Mistake("the loss has a second softmax; give cross entropy logits, not probabilities",
            "losses", lambda f, names: lambda logits, tokens: f(gpt2.softmax(logits), tokens)),
    Mistake("the loss is a sum; divide it by the number of tokens", "loss",
            same(lambda f: lambda nats: nats.sum())),
    Mistake("the loss is the mean over the wrong axis: over sequences, not over positions",
            "loss", same(lambda f: lambda nats: nats.mean(0).sum())),
    Mistake("the loss is the mean over the wrong axis: over positions, not over sequences",
            "loss", same(lambda f: lambda nats: nats.mean(-1).sum())),
    Mistake("the loss is a perplexity; take its logarithm", "loss",
            same(lambda f: lambda nats: np.exp(nats.mean()))),
    Mistake("the loss leaves out the last position", "loss",
            same(lambda f: lambda nats: nats[:, :-1].mean() if nats.shape[1] > 1 else nats.mean())),
    Mistake("the loss leaves out the first position", "loss",
            same(lambda f: lambda nats: nats[:, 1:].mean() if nats.shape[1] > 1 else nats.mean())),
]  # fmt: skip


FORWARD = [*GELU, *LAYER_NORM, *LINEAR, *ATTENTION, *MHA, *BLOCK, *EMBEDDING, *HEAD, *LOSS]

# --- The gradient ---------------------------------------------------------------------------------


def norm_with_constants(f):
    """Computes dx without the two terms that come from the mean and the variance."""

    def norm(dy, x, g, b, eps=1e-5):
        _, gradients = f(dy, x, g, b)
        return dy * g * ((x.var(-1, keepdims=True) + eps) ** -0.5), gradients

    return norm


def bias_averaged(f):
    def linear(dy, x, w, b):
        dx, gradients = f(dy, x, w, b)
        return dx, gradients | {"b": gradients["b"] / len(dy)}

    return linear


def with_gradients(change):
    """Replaces dq, dk and dv by change(q, dq, dk, dv)."""

    def changed(f):
        def attention(q, k, v):
            y, backward = f(q, k, v)
            return y, lambda dy: change(q, *backward(dy))

        return attention

    return same(changed)


def queries_and_keys_scaled(power):  # of d_head
    def change(q, dq, dk, dv):
        scale = q.shape[-1] ** power
        return scale * dq, scale * dk, dv

    return change


def keys_without_transpose(f, names):
    def attention(q, k, v):
        y, backward = f(q, k, v)
        p = names["attention_weights"](q, k)

        def wrong_backward(dy):
            dq, _, dv = backward(dy)
            d_weights = dy @ v.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
            return dq, names["softmax_backward"](d_weights, p) @ q, dv

        return y, wrong_backward

    return attention


def values_without_transpose(f, names):
    def attention(q, k, v):
        y, backward = f(q, k, v)
        p = names["attention_weights"](q, k)
        return y, lambda dy: (*backward(dy)[:2], p @ dy)

    return attention


def backward_with(weights):
    """Gives the backward pass the weights weights(scores without mask, the right weights)."""

    def change(f, names):
        def attention(q, k, v):
            y, _ = f(q, k, v)
            right = names["attention_weights"]
            names["attention_weights"] = lambda q, k: weights(raw_scores(q, k), right(q, k))
            _, backward = f(q, k, v)
            names["attention_weights"] = right
            return y, backward

        return attention

    return change


BACKWARD = [
    Mistake("the gradient of softmax lacks the term that its sum of 1 requires", "softmax_backward",
            same(lambda f: lambda dy, y: y * dy)),
    Mistake("the gradient of layer_norm treats the mean and the variance as constants",
            "layer_norm_backward", same(norm_with_constants)),
    Mistake("the gradient of a linear layer's bias is a mean over tokens; take their sum",
            "linear_backward", same(bias_averaged)),
    Mistake("the gradient of GELU is that of ReLU", "gelu_backward",
            same(lambda f: lambda dy, x, y: dy * (x > 0))),
    Mistake("the gradients of queries and keys are not scaled; divide them by the square root of "
            "d_head, like the scores", "attention_forward",
            with_gradients(queries_and_keys_scaled(0.5))),
    Mistake("the gradients of queries and keys are scaled twice; divide them only once by the "
            "square root of d_head", "attention_forward",
            with_gradients(queries_and_keys_scaled(-0.5))),
    Mistake("the gradients of queries and keys are swapped", "attention_forward",
            with_gradients(lambda q, dq, dk, dv: (dk, dq, dv))),
    Mistake("the gradient of the keys lacks a transposition; it should be scores^T @ queries",
            "attention_forward", keys_without_transpose),
    Mistake("the gradient of the values lacks a transposition; it should be weights^T @ gradient",
            "attention_forward", values_without_transpose),
    Mistake("the mask is forgotten in the backward pass, which computes the weights again",
            "attention_forward", backward_with(lambda raw, weights: gpt2.softmax(raw))),
    Mistake("the mask is forgotten in the backward pass, which computes the weights again from the "
            "sums of the forward pass", "attention_forward",
            backward_with(lambda raw, weights: np.exp(raw - raw[..., :1]) * weights[..., :1])),
]  # fmt: skip

# --- AdamW ----------------------------------------------------------------------------------------


def adam_with(**values):
    return same(lambda f: lambda p, g, name, adam: f(p, g, name, adam | values))


def decay_of(chosen):
    """Applies weight decay only to the parameters for which chosen(p, name) is true."""

    def change(f):
        def step(p, g, name, adam):
            decayed = p * (1 - adam["learning_rate"] * adam["weight_decay"] * chosen(p, name))
            return f(p, g, name, adam | {"weight_decay": 0}) - p + decayed

        return step

    return same(change)


def uncorrected(b2):
    """Without bias correction, the moments after one step are (1 - b1) g and (1 - b2) g^2."""

    def change(f):
        def step(p, g, name, adam):
            factor = (1 - adam["adam_b1"]) / math.sqrt(1 - b2)
            values = {"learning_rate": adam["learning_rate"] * factor,
                      "weight_decay": adam["weight_decay"] / factor,
                      "adam_eps": adam["adam_eps"] / math.sqrt(1 - b2)}  # fmt: skip
            return f(p, g, name, adam | values)

        return step

    return same(change)


def decay_without_rate(f):
    def step(p, g, name, adam):
        return f(p, g, name, adam | {"weight_decay": adam["weight_decay"] / adam["learning_rate"]})

    return step


def decay_in_the_gradient(f):
    def step(p, g, name, adam):
        g = g + adam["weight_decay"] * p * (p.ndim == 2)
        return f(p, g, name, adam | {"weight_decay": 0})

    return step


STEP = [
    Mistake("weight decay is applied to biases and gains; apply it only to matrices", "first_step",
            decay_of(lambda p, name: True)),
    *(Mistake(f"Adam lacks the bias correction of its moments (b2 = {b2})", "first_step",
              uncorrected(b2)) for b2 in (0.95, 0.999)),
    Mistake("there is no weight decay", "first_step", adam_with(weight_decay=0)),
    Mistake("weight decay leaves out wte and wpe", "first_step",
            decay_of(lambda p, name: p.ndim == 2 and name not in ("wte", "wpe"))),
    Mistake("weight decay is not multiplied by the learning rate", "first_step",
            same(decay_without_rate)),
    Mistake("weight decay is added to the gradient, as in Adam with L2; shrink the parameter",
            "first_step", same(decay_in_the_gradient)),
    Mistake("weight decay is 0.01, but should be 0.1", "first_step",
            adam_with(weight_decay=0.01)),
    Mistake("weight decay is 0.01 for every parameter, but should be 0.1 for matrices only",
            "first_step", same(lambda f: lambda p, g, name, adam: decay_of(lambda p, name: True)(
                f, {})(p, g, name, adam | {"weight_decay": 0.01}))),
    Mistake("the gradient is added; subtract it", "first_step",
            same(lambda f: lambda p, g, name, adam: f(p, -g, name, adam))),
    Mistake("a plain gradient step, without Adam's division", "first_step",
            same(lambda f: lambda p, g, name, adam: f(p, 0 * g, name, adam)
                 - adam["learning_rate"] * g)),
    Mistake("Adam's eps is 1e-6, but should be 1e-8", "first_step", adam_with(adam_eps=1e-6)),
]  # fmt: skip
