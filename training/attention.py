"""Attention to use as a block's `attend`: a GPU's fused kernel, and one for packed examples."""

import functools

import jax
import jax.numpy as jnp

from corpus.examples import BEGINS, READ, is_learned


def fused_attention(q, k, v, mask=None):  # [n_batch, n_head, n_seq, d_head] each -> the same
    """gpt2.attention in 16-bit precision. Its softmax is still computed in float32.

    mask: [n_batch, 1, n_seq, n_seq], True where a query may see a key that is not after it.

    Uses cuDNN's kernel if there is one for these shapes, else XLA's, which holds all the scores.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # JAX wants [n_batch, n_seq, n_head, d_head]
    device, d_head = jax.devices()[0], q.shape[-1]
    has_cudnn = device.platform == "gpu" and "cuda" in device.client.platform_version
    has_cudnn = has_cudnn and float(device.compute_capability) >= 8  # Ampere, Hopper and later
    fits = d_head % 8 == 0 and d_head <= 128 and q.dtype != jnp.float32
    kernel = "cudnn" if has_cudnn and fits else "xla"
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=kernel)
    return out.swapaxes(1, 2)


# --- Rows of examples that corpus/examples.py has packed ----------------------------------------


def unpack(params, tokens):  # [n_batch, n_seq + 1] -> params, inputs, targets, attend
    """Each example as if it stood alone: its positions from 0, its attention within itself.

    Targets that are not to be learned are -1. The result's wpe is [n_batch, n_seq, n_embd], with
    a row for every token; gpt2.hidden_state takes it as it takes any other.
    """
    ids = tokens & (READ - 1)
    positions = jnp.arange(tokens.shape[1] - 1)
    begins = jnp.where(tokens[:, :-1] & BEGINS > 0, positions, 0)
    start = jax.lax.cummax(begins, axis=1)  # [n_batch, n_seq], the position where an example begins
    targets = jnp.where(is_learned(tokens[:, 1:]), ids[:, 1:], -1)
    params = params | {"wpe": params["wpe"][positions - start]}
    return params, ids[:, :-1], targets, functools.partial(attend_within, start)


def attend_within(start, q, k, v):  # [n_batch, n_seq], [n_batch, n_head, n_seq, d_head] each
    """Causal attention within each example: tokens with the same start are of one example."""
    return fused_attention(q, k, v, mask=start[:, None, :, None] == start[:, None, None, :])


def learned_share(tokens, packed):  # [..., n_seq + 1] -> [...]
    """The share of each row's targets that are learned. In plain text that is all of them, so 1."""
    return is_learned(tokens[..., 1:]).mean(-1) if packed else jnp.ones(tokens.shape[:-1])
