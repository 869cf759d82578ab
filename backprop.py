"""GPT-2's other half in pure NumPy: the gradient, derived by hand, and training with it.

    python backprop.py --data shakespeare                # from text to a model, and no framework
    python gpt2.py "It was" --model_size mine            # then write with it

It needs only the packages that `make demo` installs (requirements/generate.txt).

gpt2.py computes the logits. This file computes how the loss changes with every number on the way.
If dy is the gradient with respect to a function's result y (how the loss changes with y), the chain
rule gives dx, the gradient with respect to its input x. So every function of gpt2.py has a
counterpart here, in the same order:

*  A small function f has f_backward(dy, ...), which takes dy and f's arguments, or f's result where
   that saves work. It returns dx, and the gradients of f's parameters under their names.
*  A function f that calls others has f_forward(...), which uses gpt2.py's functions as they are.
   It returns y and a function `backward`, which remembers the intermediate results that it needs,
   takes dy, and returns dx and the gradients of the parameters.

All tokens of a batch stand one after the other, [n_tokens, n_embd], because a few large products
are faster than many small ones. Only attention needs to know where each sequence begins.

Memory: the parameters take 4 bytes each. Adam takes twice as much as the parameters, and the
gradient of each thread as much again. Each token of the batch takes
4 * (n_layer * (16 * n_embd + n_head * n_seq) + 3 * n_vocab) bytes. Small models are trained by
several processes instead of threads.

You can train with your own parameters and batches of ids. All it takes is a loop over two
functions:

    for n_done, tokens in enumerate(batches):
        loss, gradients = loss_and_gradients(params, tokens, n_head)
        for name, p in leaves(params).items():
            adamw(p, leaves(gradients)[name], m[name], v[name], n_done, rate=1e-3)
"""

import contextlib
import functools
import math
import os
import sys

import numpy as np

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from engine import sharing
from gpt2 import attention_weights, gelu, gpt2, layer_norm, linear, softmax
from kv_cache import generate
from model_files.weights import leaves, nest
from plumbing.cli import run_cli
from training.checkpoints import State
from training.flags import JAX_ONLY, check_numpy, numpy_flags, numpy_help, read_flags
from training.init import init_tree
from training.progress import Machine, Stats, measure_peak
from training.run import run
from training.text import draw_sequences

# --- The gradient -------------------------------------------------------------------------------


def gelu_backward(dy, x, y):  # [...] each, y = gelu(x) -> dx
    """The derivative of gelu, times dy.

        y     = x s                       where s = (1 + tanh u) / 2
                                          and u = sqrt(2 / pi) (x + 0.044715 x^3)
        y'    = s + x s'                  by the product rule
        s'    = s (1 - s) 2u'             because tanh' = 1 - tanh^2
        y'    = s (1 + (x - x s) 2u')     with s' substituted and s factored out
              = s (1 + (x - y) 2u')       because x s is y
        2u'   = 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2)

    s is y / x, so tanh need not be computed again. At x = 0 that would be 0 / 0, and s is 1/2.
    """
    with np.errstate(invalid="ignore"):
        s = y / x
    s[x == 0] = 0.5
    c = 2 * math.sqrt(2 / math.pi)
    dx = x * x * (3 * 0.044715 * c) + c  # 2u'; from here on in place, which saves a tenth
    dx *= x - y
    dx += 1
    dx *= s
    dx *= dy
    return dx


def softmax_backward(dy, y):  # [..., n] each, y = softmax(x) -> dx
    """When x_j rises, y_j rises by y_j and, because the y add up to 1, every y_i falls by y_i y_j.

    So dx_j = y_j (dy_j - sum of all dy_i y_i): how much more y_j is worth than the average.
    """
    return y * (dy - np.vecdot(dy, y)[..., None])


def layer_norm_backward(dy, x, g, b, eps=1e-5):  # [n_tokens, n_embd] twice -> dx, {"g", "b"}
    """y = n g + b, where n is x with mean 0 and variance 1.

    All tokens share g and b, so dg and db are sums over the tokens. dx is dn = dy g, scaled as x
    was, with two parts taken away: its mean, because adding a number to all of x doesn't change n,
    and its part along n, because stretching x doesn't change n either.
    """
    n_embd = x.shape[-1]
    n = x - x.mean(-1, keepdims=True)  # not yet scaled
    scale = (np.vecdot(n, n) / n_embd + eps) ** -0.5
    dx = dy * g
    dx -= (dy @ g / n_embd)[:, None]  # its mean
    dx -= n * (np.vecdot(dx, n) / n_embd * scale * scale)[:, None]
    dx *= scale[:, None]
    n *= dy
    return dx, {"g": scale @ n, "b": np.ones_like(scale) @ dy}


def linear_backward(dy, x, w, b):  # [n_tokens, n_out], [n_tokens, n_in] -> dx, {"w", "b"}
    """y_j is the sum over i of x_i w_ij, plus b_j.

    x_i acts on every y_j, with the slope w_ij, so dx = dy w^T. w_ij acts on every token, with the
    slope x_i. So dw_ij is the sum over the tokens of x_i dy_j, which makes dw = x^T dy.
    """
    return dy @ w.T, {"w": x.T @ dy, "b": np.ones_like(dy[:, 0]) @ dy}  # faster than dy.sum(0)


def ffn_forward(x, c_fc, c_proj):  # [n_tokens, n_embd] -> y, backward
    h = linear(x, **c_fc)
    a = gelu(h)

    def backward(dy):  # the same three steps in reverse -> dx, {"c_fc", "c_proj"}
        da, d_proj = linear_backward(dy, a, **c_proj)
        dx, d_fc = linear_backward(gelu_backward(da, h, a), x, **c_fc)
        return dx, {"c_fc": d_fc, "c_proj": d_proj}

    return linear(a, **c_proj), backward


def attention_forward(q, k, v):  # [..., n_q, d_head], two of [..., n_seq, d_head] -> y, backward
    """y = p v is a matrix product, as in linear, so dp = dy v^T and dv = p^T dy.

    The scores, q k^T, are another. The mask needs no code: the positions that it hides have p = 0,
    where softmax_backward gives 0.
    """
    p = attention_weights(q, k)

    def backward(dy):  # -> dq, dk, dv
        d_scores = softmax_backward(dy / math.sqrt(q.shape[-1]) @ v.swapaxes(-1, -2), p)
        return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dy

    return p @ v, backward


def attention_in_blocks_forward(q, k, v):  # the shapes of attention_forward
    """Several blocks of queries use the same keys and values, so dk and dv are sums over blocks."""
    n_q = q.shape[-2]
    n_seq = k.shape[-2]
    if n_q <= 64:
        return attention_forward(q, k, v)
    parts = []
    for start in range(0, n_q, 64):
        n_seen = n_seq - n_q + min(start + 64, n_q)
        block = np.s_[..., start : start + 64, :]
        seen = np.s_[..., :n_seen, :]
        parts.append((block, seen, *attention_forward(q[block], k[seen], v[seen])))

    def backward(dy):  # -> dq, dk, dv
        dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
        for block, seen, _, block_backward in parts:
            dq[block], dk_seen, dv_seen = block_backward(dy[block])
            dk[seen] += dk_seen
            dv[seen] += dv_seen
        return dq, dk, dv

    return np.concat([y for _, _, y, _ in parts], axis=-2), backward


def mha_forward(x, c_attn, c_proj, n_head, n_seq):  # [n_tokens, n_embd] -> y, backward
    """Only attention needs axes for heads and sequences; c_attn and c_proj work on tokens."""
    d_head = x.shape[-1] // n_head

    def split(x):  # [n_tokens, n_embd] -> [n_head, n_batch, n_seq, d_head]
        return x.reshape(-1, n_seq, n_head, d_head).transpose(2, 0, 1, 3)

    def merge(x):  # [n_head, n_batch, n_seq, d_head] -> [n_tokens, n_embd]
        return x.transpose(1, 2, 0, 3).reshape(-1, n_head * d_head)

    q, k, v = np.split(linear(x, **c_attn), 3, axis=-1)  # three of [n_tokens, n_embd]
    y, attention_backward = attention_in_blocks_forward(split(q), split(k), split(v))
    heads = merge(y)

    def backward(dy):  # -> dx, {"c_attn", "c_proj"}
        d_heads, d_proj = linear_backward(dy, heads, **c_proj)
        dq, dk, dv = attention_backward(split(d_heads))
        d = np.concat([merge(dq), merge(dk), merge(dv)], axis=-1)  # [n_tokens, 3 * n_embd]
        dx, d_attn = linear_backward(d, x, **c_attn)
        return dx, {"c_attn": d_attn, "c_proj": d_proj}

    return linear(heads, **c_proj), backward


def transformer_block_forward(x, mlp, attn, ln_1, ln_2, n_head, n_seq):  # -> y, backward
    """The gradient of x + f(x) reaches x twice: directly, and through f."""
    y, mha_backward = mha_forward(layer_norm(x, **ln_1), **attn, n_head=n_head, n_seq=n_seq)
    middle = x + y
    y, ffn_backward = ffn_forward(layer_norm(middle, **ln_2), **mlp)

    def backward(dy):  # -> dx, {"mlp", "attn", "ln_1", "ln_2"}
        d, d_mlp = ffn_backward(dy)
        d, d_ln_2 = layer_norm_backward(d, middle, **ln_2)
        d += dy
        dx, d_attn = mha_backward(d)
        dx, d_ln_1 = layer_norm_backward(dx, x, **ln_1)
        dx += d
        return dx, {"mlp": d_mlp, "attn": d_attn, "ln_1": d_ln_1, "ln_2": d_ln_2}

    return middle + y, backward


def gpt2_forward(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_batch, n_seq] -> logits, backward
    """wte is used twice, so its gradient is the sum of two gradients.

    The first is that of the matrix that makes the logits, w^T of a linear. The second is that of
    the rows that the inputs look up: each row gets the sum over all positions that have its id.
    """
    n_batch, n_seq = inputs.shape
    inputs = inputs.ravel()
    backwards = []
    x = wte[inputs] + np.tile(wpe[:n_seq], (n_batch, 1))
    for block in blocks:
        x, backward = transformer_block_forward(x, **block, n_head=n_head, n_seq=n_seq)
        backwards.append(backward)
    y = layer_norm(x, **ln_f)

    def backward(d_logits):  # [n_tokens, n_vocab] -> a tree like the parameters
        d_wte = d_logits.T @ y
        d_wpe = np.zeros_like(wpe)
        d_blocks = []
        d, d_ln_f = layer_norm_backward(d_logits @ wte, x, **ln_f)
        for block_backward in reversed(backwards):
            d, d_block = block_backward(d)
            d_blocks.insert(0, d_block)
        ids, sums = sum_by_id(inputs, d)
        d_wte[ids] += sums
        d_wpe[:n_seq] = d.reshape(n_batch, n_seq, -1).sum(0)
        return {"wte": d_wte, "wpe": d_wpe, "blocks": d_blocks, "ln_f": d_ln_f}

    return y @ wte.T, backward


def sum_by_id(ids, rows):  # [n], [n, n_embd] -> the different ids, the sum of the rows of each
    """Adds up the rows of each id.

    If an id occurs twice, `d_wte[ids] += rows` adds only one of its rows, and np.add.at is slow. So
    the rows are sorted by id. Then the rows of an id are neighbours, and reduceat adds them up.
    """
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    first = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    return ids[first], np.add.reduceat(rows[order], first)


def cross_entropy(logits, targets):  # [n, n_vocab], [n] -> nats [n], the gradient of their sum
    """With p = softmax(logits), -ln p[target] is ln(sum of exp(logits)) minus the target's logit.

    The first term has the slope p. The second has the slope 1 at the target and 0 elsewhere. The
    gradient is their difference. The ln of the sum is computed from the likeliest token, whose p is
    never 0.
    """
    p = softmax(logits)
    rows = np.arange(len(logits))
    best = logits.argmax(-1)
    nats = logits[rows, best] - np.log(p[rows, best]) - logits[rows, targets]
    p[rows, targets] -= 1
    return nats, p


def loss_and_gradients(params, tokens, n_head, n_tokens=None):  # [n_batch, n_seq + 1] ids
    """Returns the mean of -ln p[next token], in nats, as a float, and its gradient, like params.

    n_tokens: divide the sums by this number, if the batch is part of a larger one. By default it is
    the number of tokens that the batch predicts.

    Threads share the sequences. Their sums are added in the order of the batch, so the same machine
    always computes the same bits.
    """
    if n_tokens is None:
        n_tokens = tokens[:, 1:].size

    def evaluate(sequences):  # a slice of the batch
        rows = tokens[sequences]
        logits, backward = gpt2_forward(rows[:, :-1], **params, n_head=n_head)
        nats, d_logits = cross_entropy(logits, rows[:, 1:].ravel())
        d_logits /= n_tokens
        return nats.sum(dtype=np.float64) / n_tokens, leaves(backward(d_logits))

    loss, gradients = sharing.add_up(sharing.over_sequences(evaluate, len(tokens)))
    return loss, nest(gradients)


# --- Training -----------------------------------------------------------------------------------


def learning_rate(n_done, n_steps, learning_rate, min_learning_rate, n_warmup):
    """Linear warmup from learning_rate / n_warmup, then cosine decay to min_learning_rate."""
    first = learning_rate / n_warmup
    n_warmup = min(n_warmup, n_steps // 2)
    if n_done < n_warmup:
        return first + (learning_rate - first) * n_done / n_warmup
    height = 1 + math.cos(math.pi * min(1, (n_done - n_warmup) / (n_steps - n_warmup)))
    return min_learning_rate + (learning_rate - min_learning_rate) * height / 2


def scheduled_rate(n_done, flags):  # the learning rate of a run with these flags
    names = "n_steps", "learning_rate", "min_learning_rate", "n_warmup"
    return learning_rate(n_done, *(flags[name] for name in names))


def adamw(p, gradient, m, v, n_done, rate, weight_decay=0.0, b2=0.99, scale=1.0, b1=0.9):
    """Updates one array p in place. Before the first step, m and v are zeros of p's shape.

    Adam (Kingma & Ba 2015, arXiv:1412.6980) divides m, a moving average of the gradients, by the
    square root of v, a moving average of their squares. Both start at 0, so at first they are too
    small, by the factors c1 and c2. Weight decay shrinks p separately (Loshchilov & Hutter 2019,
    arXiv:1711.05101). The gradient is multiplied by scale, which is below 1 when it is clipped.
    """
    c1 = 1 - b1 ** (n_done + 1)
    c2 = 1 - b2 ** (n_done + 1)
    m *= b1
    m += gradient * ((1 - b1) * scale)
    v *= b2
    v += np.square(gradient) * ((1 - b2) * scale**2)
    p *= 1 - rate * weight_decay
    p -= m / (np.sqrt(v) + 1e-8 * c2**0.5) * (rate * c2**0.5 / c1)


def is_matrix(name):  # "blocks.0.attn.c_attn.w" -> True, "blocks.0.ln_1.g" -> False
    """Weight decay is for matrices only, not for biases and gains ("vectors" joins these)."""
    return not name.endswith((".b", ".g", "vectors"))


def moment_kinds(flags):
    """The first letters of the moments' names: means, mean squares and, with --ema, averages."""
    return "mva" if flags["ema"] else "mv"


def train_step(params, moments, n_done, batches, flags, evaluate):
    """Takes one step in place and returns its Stats.

    batches: [n_accumulate, batch_size, n_ctx + 1].
    params: {name: array}.
    moments: {"m.wte": array, "v.wte": array, ...} and, with --ema, the averages of the parameters,
        {"a.wte": array, ...}.
    evaluate: evaluate(tokens, n_tokens=n) is loss_and_gradients, with gradients named like params.
    """
    n_tokens = batches[..., 1:].size
    loss, gradients = sharing.add_up(evaluate(tokens, n_tokens=n_tokens) for tokens in batches)
    trees = [{name: moments[f"{kind}.{name}"] for name in params} for kind in moment_kinds(flags)]
    pieces = sharing.cut(params, gradients, *trees)
    rate = scheduled_rate(n_done, flags)
    norm = sharing.norm(pieces, index=2)  # of the gradients
    scale = min(1, flags["grad_clip"] / (norm or 1))

    def update(name, p, gradient, m, v, average=None):
        before = p.copy()
        weight_decay = flags["weight_decay"] if is_matrix(name) else 0.0
        adamw(p, gradient, m, v, n_done, rate, weight_decay, flags["adam_b2"], scale)
        if average is not None:  # it keeps less at first, and so soon forgets the initial values
            average += (1 - min(flags["ema"], (2 + n_done) / (11 + n_done))) * (p - average)
        squares.append((np.square(before).sum(), np.square(p - before).sum()))

    squares = []  # of the parameters, of their updates
    sharing.for_each(update, pieces)
    of_params, of_updates = (math.fsum(x) for x in zip(*squares, strict=True))
    return Stats(loss, norm, float(scale < 1), math.sqrt(of_updates / of_params))


# --- The trainer --------------------------------------------------------------------------------


class NumpyTrainer:
    """What the loop in training/run.py needs from NumPy. Each method is explained there."""

    is_main = True
    versions = {"numpy": np.__version__}
    steps_per_call = (10, 5, 1)
    seconds_per_call = 0.5  # Ctrl-C is seen only between calls
    generate = staticmethod(generate)

    @staticmethod
    def running(options):
        return contextlib.nullcontext("cpu")

    def __init__(self, flags):
        check_numpy(flags)  # a resumed run may have been started by train_jax.py
        self.flags = flags
        self.stack = contextlib.ExitStack()

    def new_model(self, n_vocab):  # -> hparams, parameters
        rng = np.random.default_rng(self.flags["seed"])
        hparams = {"n_vocab": n_vocab}
        hparams |= {name: self.flags[name] for name in ("n_ctx", "n_embd", "n_head", "n_layer")}
        return hparams, init_tree(hparams, lambda shape: rng.standard_normal(shape, np.float32))

    def moment_shapes(self, params):  # -> {"m.wte": (shape, dtype), ..., "v.wte": ...}
        shapes = {name: (x.shape, np.dtype("<f4")) for name, x in leaves(params).items()}
        return {
            f"{kind}.{name}": shapes[name] for kind in moment_kinds(self.flags) for name in shapes
        }

    def start(self, model, moments, n_done, text):
        self.text = text
        if moments is None:
            shapes = self.moment_shapes(model.params)
            moments = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
            if self.flags["ema"]:  # the average starts as a copy of the parameters
                moments |= {f"a.{name}": np.array(x) for name, x in leaves(model.params).items()}
        n_head, batch_size = self.flags["n_head"], self.flags["batch_size"]
        context = start_sharing(model.params, moments, n_head, batch_size)
        self.shared = self.stack.enter_context(context)
        arrays, moments = self.shared.by_name
        return State(nest(arrays), moments, n_done)

    def machine(self):
        return Machine("NumPy", measure_peak(), "measured")

    def read(self, n_done, n):  # -> [n, n_accumulate, batch_size, n_ctx + 1]
        flags = self.flags
        shape = flags["n_accumulate"], flags["batch_size"], flags["n_ctx"] + 1
        steps = range(n_done, n_done + n)
        return [draw_sequences(self.text.train, flags["seed"], step, shape) for step in steps]

    def steps(self, state, batches, n):
        shared = self.shared
        stats = []
        for i in range(n):
            of_step = train_step(
                shared.params,
                shared.moments,
                state.n_done + i,
                batches[i],
                self.flags,
                shared.evaluate,
            )
            stats.append(of_step)
        means = Stats(*(math.fsum(x) / n for x in zip(*stats, strict=True)))
        return state._replace(n_done=state.n_done + n), means

    def learning_rate(self, n_done):
        return scheduled_rate(n_done, self.flags)

    def averaged(self, state):
        if not self.flags["ema"]:
            return state.params
        averages = {name: x for name, x in state.moments.items() if name.startswith("a.")}
        return nest({name.removeprefix("a."): x for name, x in averages.items()})

    def validate(self, params):
        windows, n = self.text.windows, self.flags["batch_size"]
        total = 0.0
        for start in range(0, len(windows), n):
            total += sum_of_nats(params, windows[start : start + n], self.flags["n_head"])
        return total / windows[:, 1:].size

    def measure_tasks(self, params):
        return {}

    def gather_params(self, params):
        return params

    def gather(self, state):
        return state

    def agree(self, signals):  # -> one of them, or 0
        return max(signals, default=0)

    def close(self):
        self.stack.close()


def start_sharing(params, moments, n_head, batch_size):  # a context, which gives a sharing.Shared
    """Runs sharing.share for loss_and_gradients, with copies of the parameters and moments.

    moments: {"m.wte": zeros, "v.wte": zeros, ...}.

    This is the fastest loop for a small model, because processes share each batch and an update
    changes only two arrays.

        with start_sharing(params, moments, n_head, batch_size) as shared:
            moments = shared.moments
            for n_done, tokens in enumerate(batches):
                loss, gradients = shared.evaluate(tokens, n_tokens=tokens[:, 1:].size)
                for name, p in shared.params.items():
                    m, v = moments[f"m.{name}"], moments[f"v.{name}"]
                    adamw(p, gradients[name], m, v, n_done, rate=1e-3)
    """

    def evaluate(arrays, tokens, n_tokens):  # {name: array} -> loss, {name: array}
        loss, gradients = loss_and_gradients(nest(arrays), tokens, n_head, n_tokens)
        return loss, leaves(gradients)

    return sharing.share(evaluate, leaves(params), moments, batch_size)


def sum_of_nats(params, tokens, n_head):  # [n, n_seq + 1] -> the sum over all tokens
    def evaluate(sequences):
        rows = tokens[sequences]
        logits = gpt2(rows[:, :-1], **params, n_head=n_head)
        logits = logits.reshape(-1, logits.shape[-1])
        return cross_entropy(logits, rows[:, 1:].ravel())[0].sum(dtype=np.float64)

    return float(sum(sharing.over_sequences(evaluate, len(tokens))))


@functools.wraps(read_flags, assigned=[])  # for its signature
def main(*args, **kwargs):
    typed, options = read_flags(*args, **kwargs)
    run(NumpyTrainer, numpy_flags(typed, options), options)


main.__doc__ = numpy_help()
main.unlisted = JAX_ONLY


if __name__ == "__main__":
    run_cli(main)
