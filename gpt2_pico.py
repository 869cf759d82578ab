"""GPT-2 in sixty lines of NumPy. Read this first; gpt2.py is the same model, explained in full.

    python gpt2_pico.py "KING RI" --model_size shakespeare --n_tokens_to_generate 6  # prints CHARD

Shapes are [what goes in] -> [what comes out]. c_fc is {"w": array, "b": array}; **c_fc passes both.
    n_seq    tokens in the sequence        n_embd  numbers that describe one token
    n_vocab  tokens in the vocabulary      n_head  heads of d_head = n_embd / n_head numbers each
"""

import numpy as np


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))  # minus the maximum: exp cannot overflow
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, g, b):
    return (x - x.mean(-1, keepdims=True)) / (x.var(-1, keepdims=True) + 1e-5) ** 0.5 * g + b


def linear(x, w, b):  # [n_seq, n_in] -> [n_seq, n_out]
    return x @ w + b


def ffn(x, c_fc, c_proj):  # [n_seq, n_embd] -> [n_seq, n_embd]
    return linear(gelu(linear(x, **c_fc)), **c_proj)  # [n_seq, 4 * n_embd] in between


def attention(q, k, v):  # three of [n_head, n_seq, d_head] -> [n_head, n_seq, d_head]
    # A query says what its token looks for, a key what a token offers, a value what it hands over.
    # The better a key fits a token's query, the more of that key's value the token receives.
    scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5  # [n_head, n_seq, n_seq], variance near 1
    seen = np.tri(q.shape[1], dtype=bool)  # [n_seq, n_seq]: each token sees itself and those before
    return softmax(np.where(seen, scores, -np.inf)) @ v


def mha(x, c_attn, c_proj, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    x = linear(x, **c_attn)  # [n_seq, 3 * n_embd]: every token's query, key and value
    x = x.reshape(len(x), 3 * n_head, -1).swapaxes(0, 1)  # [3 * n_head, n_seq, d_head]
    q, k, v = np.split(x, 3)  # three of [n_head, n_seq, d_head]
    x = attention(q, k, v).swapaxes(0, 1)  # [n_seq, n_head, d_head]
    return linear(x.reshape(len(x), -1), **c_proj)  # the heads side by side again


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    # Both add to x, the "residual stream": what it holds stays, and gradients pass undiminished.
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)  # tokens look back
    return x + ffn(layer_norm(x, **ln_2), **mlp)  # each token by itself


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] -> [n_seq, n_vocab]
    x = wte[inputs] + wpe[: len(inputs)]  # [n_seq, n_embd]: what each token is, and where
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return layer_norm(x, **ln_f) @ wte.T  # how well x fits each token's vector


def generate(inputs, params, n_head, n_tokens_to_generate):  # ids -> the new ids
    ids = list(inputs)  # a copy: the caller's list stays as it is
    assert ids, "the prompt has no tokens: the model needs at least one to start from"
    assert n_tokens_to_generate >= 0, "n_tokens_to_generate must be 0 or more"
    too_long = f"{len(ids)} + {n_tokens_to_generate} tokens do not fit n_ctx {len(params['wpe'])}"
    assert len(ids) + n_tokens_to_generate <= len(params["wpe"]), too_long
    for _ in range(n_tokens_to_generate):
        logits = gpt2(ids, **params, n_head=n_head)[-1]  # [n_vocab], of the last position
        assert np.isfinite(logits).all(), "the logits are not finite: damaged weights?"
        ids.append(int(logits.argmax()))
    return ids[len(inputs) :]


def main(prompt: str, n_tokens_to_generate: int = 40, model_size="124M", models_dir="models"):
    from utils import load_encoder_hparams_and_params

    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    ids = encoder.encode_prompt(prompt, hparams["n_ctx"])
    new_ids = generate(ids, params, hparams["n_head"], n_tokens_to_generate)
    print(encoder.decode(encoder.before_end(new_ids)))  # generate does not stop at the end


if __name__ == "__main__":
    __import__("sys").path.insert(0, __file__.rpartition("/")[0])  # python -P and -I leave it out
    from plumbing.cli import run_cli

    run_cli(main)
