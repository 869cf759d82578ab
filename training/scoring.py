"""Scoring compiled by JAX, on all devices: how likely each token is after those before it.

`evaluate.py --backend jax` uses it, and `train_jax.py --eval_tasks`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from gpt2 import hidden_state
from training.devices import make_mesh, make_sharding, put, start_jax, to_host

TOKENS = 2**14  # in a pass, per GPU or TPU; an eighth per CPU device, because these share memory
LOGITS = 2**28  # how many float32 logits one device holds at once


def find_platform():  # -> "cpu", "gpu", "tpu", ...
    """Starts JAX, so call it once, before anything else here."""
    start_jax(None, None, None)
    return jax.default_backend()


def load_scorer(params, n_head):  # -> make_scorer's function, with these (NumPy) params
    """Copies the parameters to every device. Products are in full float32."""
    jax.config.update("jax_default_matmul_precision", "float32")
    mesh = make_mesh(len(jax.devices()))
    score_rows = make_scorer(mesh, n_head, len(params["wpe"]), len(params["wte"]))
    params = put(params, jax.tree.map(lambda _: make_sharding(mesh), params))
    return functools.partial(score_rows, params)


def make_scorer(mesh, n_head, n_ctx, n_vocab, narrow=None, attend=None):
    """Returns the function (params, rows) -> an iterator of each row's (log-probabilities, hits).

    rows: pairs (at most n_ctx + 1 ids, how many of the last ones to score). The
    answers are evaluate.score's. params may be spread over the mesh in any way, and have more rows
    of wte than n_vocab; `narrow` is applied to them first, `attend` replaces gpt2.attention. Rows
    run in batches, padded to a power of two of tokens: all batches of a call have one shape, and
    few calls need a new one.
    """
    sharding = make_sharding(mesh, "data")
    n_each = TOKENS if jax.default_backend() != "cpu" else TOKENS // 8

    @functools.partial(jax.jit, static_argnames="n_chunks")
    def score(params, tokens, n_chunks):
        params = narrow(params) if narrow else params
        return score_tokens(params, tokens, n_head, n_vocab, n_chunks, attend)

    def score_rows(params, rows):
        n_seq = min(max(16, round_up(max(len(ids) for ids, _ in rows) - 1)), n_ctx)
        n_mine = min(max(1, n_each // n_seq), round_up(-(-len(rows) // mesh.size)))  # a device's
        n_chunks, n_rows = 1, n_mine * mesh.size
        while n_mine * n_seq * n_vocab > n_chunks * LOGITS and n_seq % (2 * n_chunks) == 0:
            n_chunks *= 2
        for start in range(0, len(rows), n_rows):
            some = rows[start : start + n_rows]
            tokens = np.zeros((n_rows, n_seq + 1), np.int32)
            for row, (ids, _) in zip(tokens, some, strict=False):
                row[: len(ids)] = ids
            answers = to_host(score(params, put(tokens, sharding), n_chunks))
            for (ids, n_scored), *both in zip(some, *answers, strict=False):
                log_probs, hits = (x[len(ids) - 1 - n_scored : len(ids) - 1] for x in both)
                check_numbers(log_probs)
                yield log_probs, hits

    return score_rows


def check_numbers(log_probs):
    """Raises ValueError for NaN, which would silently make every answer count as wrong."""
    if not np.isfinite(log_probs).all():
        raise ValueError("the model's probabilities are not finite: its weights must be damaged")


def score_tokens(params, tokens, n_head, n_vocab, n_chunks=1, attend=None):
    """[n_rows, n_seq + 1] -> two of [n_rows, n_seq]: the log-probability of each token after the
    first, and whether it was the likeliest. The logits are computed in n_chunks parts."""
    if attend:
        params = params | {"blocks": [block | {"attend": attend} for block in params["blocks"]]}
    x = hidden_state(tokens[:, :-1], **params, n_head=n_head)
    wte = params["wte"].astype(params["blocks"][0]["attn"]["c_attn"]["w"].dtype)

    def answer(pair):  # [n_rows, n, n_embd], [n_rows, n] -> two of [n_rows, n]
        x, targets = pair
        logits = jnp.matmul(x.astype(wte.dtype), wte.T, preferred_element_type=jnp.float32)
        logits = jnp.where(jnp.arange(len(wte)) < n_vocab, logits, -jnp.inf)
        of_targets = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return of_targets - jax.nn.logsumexp(logits, -1), logits.argmax(-1) == targets

    def cut(x):  # [n_rows, n_seq, ...] -> [n_chunks, n_rows, n_seq / n_chunks, ...]
        return x.reshape(len(x), n_chunks, -1, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(answer, (cut(x), cut(tokens[:, 1:])))
    return jax.tree.map(lambda part: part.swapaxes(0, 1).reshape(len(tokens), -1), parts)


def score_items(items, score_rows):  # -> (item, the answers of its endings) of each
    """items: evaluation.tasks.Item. Those of similar length have one shape and run together."""

    def room(item):
        return round_up(item.n_seq)

    for _, group in itertools.groupby(sorted(items, key=room), key=room):
        group = list(group)
        rows = [(item.context + e, len(e)) for item in group for e in item.endings]
        answers = score_rows(rows)
        for item in group:
            yield item, list(itertools.islice(answers, len(item.endings)))


def round_up(n):  # -> a power of two
    return 1 << (n - 1).bit_length()
