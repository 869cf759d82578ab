"""GPT-2's other half in pure NumPy: the gradient, derived by hand, and training with it.

    python backprop.py --data shakespeare                      # from text to a model, no framework
    python gpt2.py "It was" --model_size mine                  # then write with it

gpt2.py says what the model computes; this file says how the loss would change if anything in it
did. The chain rule does it, backwards: who knows dy, what the loss gains per change of a function's
result y, can work out dx, what it gains per change of the input x. So each function of gpt2.py has
a counterpart here, in the same order.

*  The small ones: f_backward(dy, ...) takes dy and f's own arguments (or its result, where that
   saves work) and returns dx, and the gradients of f's parameters under their names.
*  Those made of others: f_forward(...) calls gpt2.py's functions as they are and returns y and a
   function `backward` from dy to the same; what a gradient asks for is kept in it meanwhile.

`dy` always has the shape of y, `dx` that of x. The tokens of a batch stand one after the other in
one flat sequence, [n_tokens, n_embd], because a few large products are faster than many small ones;
only attention cuts it into sequences again. n_tokens is n_batch * n_seq; the rest is as in gpt2.py.

Memory, in float32: 4 bytes for each of the n parameters, once for itself, twice for the optimizer
and once a thread for its gradient; and what is kept for a token, 16 n_embd numbers a layer and
2 n_vocab for the logits.
"""

import math

import numpy as np

from engine.threads import in_threads, own_threads
from gpt2 import attention, attention_weights, gelu, layer_norm, linear, mha, softmax

# --------------------------------------------------------------------------------------------------
# The gradient
# --------------------------------------------------------------------------------------------------


def gelu_backward(dy, x, y):  # [...] each, y = gelu(x) -> dx
    """gelu is y = x s with s = (1 + tanh u) / 2, so y' = s + x s'.

    tanh' = 1 - tanh^2 makes s' = 2 s (1 - s) u', and x s is y again: y' = s + 2 y (1 - s) u'. No
    tanh is needed: s is y / x, but for x = 0, where it is 1/2. u is the bracket in gelu.
    """
    s = np.divide(y, x, out=np.full_like(x, 0.5), where=x != 0)
    slope = x * x
    slope *= 2 * math.sqrt(2 / math.pi) * 3 * 0.044715
    slope += 2 * math.sqrt(2 / math.pi)  # 2 u'
    slope *= y
    slope *= 1 - s
    slope += s
    slope *= dy
    return slope


def softmax_backward(dy, y):  # [..., n] each, y = softmax(x) -> dx
    """y_i rises with x_i by y_i (1 - y_i) and falls with every other x_j by y_i y_j.

    Summed over i, x_j changes the loss by y_j (dy_j - sum of all y_i dy_i): what j gains above the
    average, for the y sum to 1 and no more can be had for all of them together.
    """
    return y * (dy - np.vecdot(dy, y)[..., None])


def layer_norm_backward(dy, x, g, b, eps=1e-5):  # [n_tokens, n_embd] each -> dx, {"g", "b"}
    """y = n g + b, where n is x with mean 0 and variance 1: dn = dy g, dg = dy n, db = dy.

    dx has three terms: dn scaled as x was; less its mean, because a shift of all x changes no n;
    and less its part along n, because stretching x changes no n either. g and b serve every token,
    so their gradients are sums over the tokens.
    """
    n = x - x.mean(-1, keepdims=True)
    scale = (np.vecdot(n, n)[:, None] / x.shape[-1] + eps) ** -0.5
    n *= scale
    gradients = {"g": (dy * n).sum(0), "b": dy.sum(0)}
    dx = dy * g
    dx -= dx.mean(-1, keepdims=True)
    dx -= n * (np.vecdot(dx, n)[:, None] / x.shape[-1])
    dx *= scale
    return dx, gradients


def linear_backward(dy, x, w, b):  # [n_tokens, n_out], [n_tokens, n_in] -> dx, {"w", "b"}
    """y_j = sum of x_i w_ij + b_j: x_i reaches all y_j by w_ij, so dx = dy w^T.

    w_ij meets x_i in every token, so dw_ij is the sum over tokens of x_i dy_j, which is x^T dy.
    """
    return dy @ w.T, {"w": x.T @ dy, "b": dy.sum(0)}


def ffn_forward(x, c_fc, c_proj):  # [n_tokens, n_embd] -> y, backward
    h = linear(x, **c_fc)
    a = gelu(h)

    def backward(dy):  # -> dx, {"c_fc", "c_proj"}
        da, d_proj = linear_backward(dy, a, **c_proj)
        dx, d_fc = linear_backward(gelu_backward(da, h, a), x, **c_fc)
        return dx, {"c_fc": d_fc, "c_proj": d_proj}

    return linear(a, **c_proj), backward


def attention_backward(dy, q, k, v):  # [..., n_q, d_head] twice, [..., n_seq, d_head] twice
    """-> dq, dk, dv. With weights p, y = p v is a product like linear's: dv = p^T dy, dp = dy v^T.

    Then dp goes back through softmax to the scores q k^T / sqrt(d_head), again a product. p is made
    a second time: to keep n_seq^2 numbers a head would cost more. What the mask hides has p = 0 and
    so gets nothing. Long sequences are cut in halves as in gpt2.attention; what is in both adds up.
    """
    n_q, n_seq = q.shape[-2], k.shape[-2]
    if n_q > 64:
        early, late = np.s_[..., : n_q // 2, :], np.s_[..., n_q // 2 :, :]
        seen = np.s_[..., : n_seq - n_q + n_q // 2, :]
        dq, dk_seen, dv_seen = attention_backward(dy[early], q[early], k[seen], v[seen])
        dq_late, dk, dv = attention_backward(dy[late], q[late], k, v)
        dk[seen] += dk_seen
        dv[seen] += dv_seen
        return np.concat([dq, dq_late], axis=-2), dk, dv
    p = attention_weights(q, k)
    dscores = softmax_backward(dy @ v.swapaxes(-1, -2), p)
    dscores /= math.sqrt(q.shape[-1])
    return dscores @ k, dscores.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dy


def mha_forward(x, c_attn, c_proj, n_head, n_seq):  # [n_tokens, n_embd] -> y, backward
    """`attend`, which gpt2.mha lets us hand in, sees each sequence alone and keeps what it saw."""
    kept, n_tokens = [], len(x)

    def split(x):  # [n_head, n_tokens, d_head] -> [n_head, n_batch, n_seq, d_head]
        return x.reshape(n_head, -1, n_seq, x.shape[-1])

    def attend(q, k, v):
        kept[:] = split(q), split(k), split(v)
        out = attention(*kept).reshape(q.shape)
        kept.append(out.swapaxes(0, 1).reshape(x.shape))
        return out

    def backward(dy):  # -> dx, {"c_attn", "c_proj"}
        q, k, v, merged = kept
        d, d_proj = linear_backward(dy, merged, **c_proj)
        d = split(d.reshape(n_tokens, n_head, -1).swapaxes(0, 1))
        d = np.concat(attention_backward(d, q, k, v)).reshape(3 * n_head, n_tokens, -1)
        dx, d_attn = linear_backward(d.swapaxes(0, 1).reshape(n_tokens, -1), x, **c_attn)
        return dx, {"c_attn": d_attn, "c_proj": d_proj}

    return mha(x, c_attn, c_proj, n_head, attend), backward


def transformer_block_forward(x, mlp, attn, ln_1, ln_2, n_head, n_seq):  # -> y, backward
    """A sum hands its gradient on to both sides: past each half as it is, and through the half."""
    y, mha_backward = mha_forward(layer_norm(x, **ln_1), **attn, n_head=n_head, n_seq=n_seq)
    middle = x + y
    y, ffn_backward = ffn_forward(layer_norm(middle, **ln_2), **mlp)

    def backward(dy):  # -> dx, {"mlp", "attn", "ln_1", "ln_2"}
        d, d_mlp = ffn_backward(dy)
        d, d_ln_2 = layer_norm_backward(d, middle, **ln_2)
        d += dy
        d_half, d_attn = mha_backward(d)
        dx, d_ln_1 = layer_norm_backward(d_half, x, **ln_1)
        dx += d
        return dx, {"mlp": d_mlp, "attn": d_attn, "ln_1": d_ln_1, "ln_2": d_ln_2}

    return middle + y, backward


def gpt2_forward(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_batch, n_seq] -> logits, backward
    """wte serves twice and gets both gradients: what its rows did to the logits, as the w^T of a
    linear, and what they did as inputs, where each row gets the sum over all places of its id."""
    (n_batch, n_seq), inputs, halves = inputs.shape, inputs.ravel(), []
    x = wte[inputs] + np.tile(wpe[:n_seq], (n_batch, 1))
    for block in blocks:
        x, backward = transformer_block_forward(x, **block, n_head=n_head, n_seq=n_seq)
        halves.append(backward)
    y = layer_norm(x, **ln_f)

    def backward(dlogits):  # [n_tokens, n_vocab] -> a tree like the parameters
        d_wte, d_wpe, d_blocks = dlogits.T @ y, np.zeros_like(wpe), []
        d, d_ln_f = layer_norm_backward(dlogits @ wte, x, **ln_f)
        for block_backward in reversed(halves):
            d, d_block = block_backward(d)
            d_blocks.insert(0, d_block)
        ids, sums = sum_by_id(inputs, d)
        d_wte[ids] += sums
        d_wpe[:n_seq] = d.reshape(n_batch, n_seq, -1).sum(0)
        return {"wte": d_wte, "wpe": d_wpe, "blocks": d_blocks, "ln_f": d_ln_f}

    return y @ wte.T, backward


def sum_by_id(ids, rows):  # [n], [n, n_embd] -> the different ids, the sum of each one's rows
    """`d_wte[ids] += rows` would keep one row of each id, and np.add.at goes row by row: sorted, an
    id's rows are neighbours, and reduceat adds up neighbours."""
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    first = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    return ids[first], np.add.reduceat(rows[order], first)


def cross_entropy(logits, targets):  # [n, n_vocab], [n] -> [n], nats; and the gradient of their sum
    """-ln p of the target, where p = softmax(logits): the logarithm of a sum, less one logit.

    The sum's logarithm has softmax for its gradient, and the one logit has 1: together p - y, where
    y is 1 at the target and 0 elsewhere. The sum is read off the likeliest, whose p is never 0.
    """
    p, rows, best = softmax(logits), np.arange(len(logits)), logits.argmax(-1)
    nats = logits[rows, best] - np.log(p[rows, best]) - logits[rows, targets]
    p[rows, targets] -= 1
    return nats, p


def loss_and_gradients(params, tokens, n_head):  # [n_batch, n_seq + 1] -> nats a token, a tree
    """The mean of -ln p(next token), a float, and its gradient, arrays like those of params.

    The batch is cut among threads, each with sequences of its own and OpenBLAS on that thread
    alone, so that all of the work is shared and not the products only. The parts are added up in
    the order of the batch: the same bits each time, on one machine.
    """

    def work(mine):
        logits, backward = gpt2_forward(tokens[mine, :-1], **params, n_head=n_head)
        nats, dlogits = cross_entropy(logits, tokens[mine, 1:].ravel())
        dlogits /= n
        return nats.sum(dtype=np.float64), backward(dlogits)

    n = tokens[:, 1:].size
    with own_threads(len(tokens)):  # a single sequence is left to OpenBLAS and its threads
        parts = in_threads(work, len(tokens))
    nats, gradients = parts[0]
    for more, others in parts[1:]:
        nats += more
        tree_map(lambda a, b: np.add(a, b, out=a), gradients, others)
    return float(nats / n), gradients


def tree_map(f, *trees):
    """A tree of the results of f, called with the arrays at the same place of all the trees."""
    if isinstance(trees[0], dict):
        return {name: tree_map(f, *(tree[name] for tree in trees)) for name in trees[0]}
    if isinstance(trees[0], list):
        return [tree_map(f, *nodes) for nodes in zip(*trees, strict=True)]
    return f(*trees)
