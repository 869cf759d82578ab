"""A GPU's own attention, which plugs in where gpt2.py takes `attend`."""

import jax
import jax.numpy as jnp


def fused_attention(q, k, v, mask=None):  # [n_batch, n_head, n_seq, d_head] each -> the same
    """gpt2.attention for 16-bit numbers; its softmax is float32 even so.

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
