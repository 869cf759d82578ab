"""GPT-2 in sixty lines of NumPy. gpt2.py is the same model, explained and ready for use."""

import numpy as np


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, g, b):
    return (x - x.mean(-1, keepdims=True)) / (x.var(-1, keepdims=True) + 1e-5) ** 0.5 * g + b


def linear(x, w, b):  # [n_seq, n_in] -> [n_seq, n_out]
    return x @ w + b


def attention(q, k, v, causal):  # three of [n_head, n_seq, d_head] -> [n_head, n_seq, d_head]
    scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5
    return softmax(np.where(causal, scores, -np.inf)) @ v


def mha(x, c_attn, c_proj, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    heads = linear(x, **c_attn).reshape(len(x), 3, n_head, -1)
    q, k, v = heads.transpose(1, 2, 0, 3)
    x = attention(q, k, v, np.tri(len(x), dtype=bool))
    return linear(np.hstack(x), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + linear(gelu(linear(layer_norm(x, **ln_2), **mlp["c_fc"])), **mlp["c_proj"])


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] -> [n_seq, n_vocab]
    x = wte[inputs] + wpe[: len(inputs)]
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return layer_norm(x, **ln_f) @ wte.T


def generate(inputs, params, n_head, n_tokens_to_generate):
    ids, n_ctx = list(inputs), len(params["wpe"])
    if not ids:
        raise ValueError("the prompt has no tokens")
    if not 0 <= n_tokens_to_generate <= n_ctx - len(ids):
        raise ValueError(f"{len(ids)} + {n_tokens_to_generate} tokens do not fit n_ctx {n_ctx}")
    for _ in range(n_tokens_to_generate):
        logits = gpt2(ids, **params, n_head=n_head)[-1]
        if not np.isfinite(logits.max()):
            raise ValueError("the logits are not finite: the model's weights must be damaged")
        ids.append(int(logits.argmax()))
    return ids[len(inputs) :]


def main(prompt: str, n_tokens_to_generate: int = 40, model_size="124M", models_dir="models"):
    from utils import load_encoder_hparams_and_params

    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    ids = encoder.encode_prompt(prompt, hparams["n_ctx"])
    new_ids = generate(ids, params, hparams["n_head"], n_tokens_to_generate)
    print(encoder.decode(new_ids).split("<|endoftext|>")[0])


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
