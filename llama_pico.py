"""Llama in sixty lines of NumPy: what changed since GPT-2. Read gpt2_pico.py first.

    python llama_pico.py "The sea is" SmolLM2-135M  # a folder downloaded from the Hugging Face Hub

Shapes are those of gpt2_pico.py. There are n_head heads of queries, and n_kv_head of keys and
values. PyTorch stores a matrix as [n_out, n_in], hence the .T. docs/13_since_gpt2.md explains each
change.
"""

import numpy as np


def silu(x):  # x * sigmoid(x), a bend like gelu; written with tanh, which cannot overflow
    return 0.5 * x * (1 + np.tanh(0.5 * x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, weight, eps):  # layer_norm without subtracting the mean or adding a bias
    return x / ((x * x).mean(-1, keepdims=True) + eps) ** 0.5 * weight


def swiglu(x, gate_proj, up_proj, down_proj):  # [n_seq, n_embd] -> [n_seq, n_embd]
    return (silu(x @ gate_proj.T) * (x @ up_proj.T)) @ down_proj.T  # one half scales the other


def rotate(x, theta):  # [n_head, n_seq, d_head] -> the same; q @ k then depends on the distance
    a, b = np.split(x, 2, axis=-1)  # numbers i of a and of b are the coordinates of a point ...
    frequency = theta ** -np.linspace(0, 1, a.shape[-1], endpoint=False)  # [d_head / 2]
    angle = np.arange(x.shape[1])[:, None] * frequency  # [n_seq, d_head / 2], growing with position
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)  # ... turned by angle


def attention(q, k, v):  # [n_head, n_seq, d_head], k and v [n_kv_head, ...] -> the shape of q
    k = np.repeat(k, len(q) // len(k), axis=0)  # [n_head, n_seq, d_head]: heads share keys ...
    v = np.repeat(v, len(q) // len(v), axis=0)  # ... and values
    scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5  # [n_head, n_seq, n_seq]
    seen = np.tri(q.shape[1], dtype=bool)
    return softmax(np.where(seen, scores, -np.inf)) @ v


def split_heads(x, d_head):  # [n_seq, n_head * d_head] -> [n_head, n_seq, d_head]
    return x.reshape(len(x), -1, d_head).swapaxes(0, 1)


def gqa(x, q_proj, k_proj, v_proj, o_proj, d_head, theta):  # [n_seq, n_embd] -> [n_seq, n_embd]
    q = rotate(split_heads(x @ q_proj.T, d_head), theta)  # [n_head, n_seq, d_head]
    k = rotate(split_heads(x @ k_proj.T, d_head), theta)  # [n_kv_head, n_seq, d_head]
    v = split_heads(x @ v_proj.T, d_head)  # [n_kv_head, n_seq, d_head]: values are not turned
    x = attention(q, k, v).swapaxes(0, 1)  # [n_seq, n_head, d_head]
    return x.reshape(len(x), -1) @ o_proj.T


def llama(inputs, embed_tokens, blocks, norm, lm_head, d_head, theta, eps):  # -> [n_seq, n_vocab]
    x = embed_tokens[inputs]  # [n_seq, n_embd]: what each token is; rotate adds where it stands
    for block in blocks:
        h = rms_norm(x, block["input_layernorm"], eps)
        x = x + gqa(h, **block["self_attn"], d_head=d_head, theta=theta)
        x = x + swiglu(rms_norm(x, block["post_attention_layernorm"], eps), **block["mlp"])
    return rms_norm(x, norm, eps) @ lm_head.T  # a matrix of its own, unless it is tied


def generate(inputs, params, hparams, n_tokens_to_generate):  # ids -> the new ids
    ids = list(inputs)
    for _ in range(n_tokens_to_generate):
        logits = llama(ids, **params, **hparams)[-1]  # [n_vocab], of the last position
        assert np.isfinite(logits).all(), "the logits are not finite: damaged weights?"
        ids.append(int(logits.argmax()))
    return ids[len(inputs) :]


def main(prompt: str, model_dir: str, n_tokens_to_generate: int = 40):
    from model_files import llama as files

    params, hparams = files.read_llama(model_dir)
    encode, decode = files.text_or_ids(model_dir)
    ids = files.check_ids(encode(prompt), len(params["embed_tokens"]), n_tokens_to_generate)
    print(decode(generate(ids, params, hparams, n_tokens_to_generate)))  # to the end of text


if __name__ == "__main__":
    __import__("sys").path.insert(0, __file__.rpartition("/")[0])  # python -P and -I leave it out
    from plumbing.cli import run_cli

    run_cli(main)
