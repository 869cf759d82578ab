"""How fast is the forward pass without a cache, beside picoGPT's and Hugging Face's?

usage: python benchmarks/forward.py

Random weights of GPT-2 124M's shape, float32. Two jobs: continue 10 tokens by 8, running the whole
sequence for every token; and read 512 tokens at once ("prefill") for the logits of the next.
"""

import numpy as np
import torch
from common import HPARAMS, alternate, hugging_face, machine, print_table, random_params

import gpt2
from model_files import weights


def pico_gpt2(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] -> [n_seq, n_vocab]
    """picoGPT's arithmetic, restated: NumPy scalars, x**3, a list of heads, every logit."""

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def softmax(x):
        e = np.exp(x - np.max(x, axis=-1, keepdims=True))
        return e / np.sum(e, axis=-1, keepdims=True)

    def layer_norm(x, g, b):
        mean, variance = np.mean(x, axis=-1, keepdims=True), np.var(x, axis=-1, keepdims=True)
        return g * ((x - mean) / np.sqrt(variance + 1e-5)) + b

    def linear(x, w, b):
        return x @ w + b

    x = wte[inputs] + wpe[range(len(inputs))]
    for block in blocks:
        mask = (1 - np.tri(len(x), dtype=x.dtype)) * -1e10
        qkv = linear(layer_norm(x, **block["ln_1"]), **block["attn"]["c_attn"])
        heads = [np.split(part, n_head, axis=-1) for part in np.split(qkv, 3, axis=-1)]
        heads = zip(*heads, strict=True)
        out = [softmax(q @ k.T / np.sqrt(q.shape[-1]) + mask) @ v for q, k, v in heads]
        x = x + linear(np.hstack(out), **block["attn"]["c_proj"])
        wide = gelu(linear(layer_norm(x, **block["ln_2"]), **block["mlp"]["c_fc"]))
        x = x + linear(wide, **block["mlp"]["c_proj"])
    return layer_norm(x, **ln_f) @ wte.T


def main():
    params, n_head = random_params(), HPARAMS["n_head"]
    model = hugging_face(params)
    ids = np.random.default_rng(1).integers(0, HPARAMS["n_vocab"], 512).tolist()
    prompt, long_prompt = torch.tensor([ids[:10]]), torch.tensor([ids])
    greedy = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def ours(ids, n):
        return gpt2.generate(ids, params, n_head, n)

    def pico():
        written = list(ids[:10])
        for _ in range(8):
            written.append(int(np.argmax(pico_gpt2(written, **params, n_head=n_head)[-1])))
        return written[10:]

    @torch.inference_mode()
    def theirs(prompt, n, use_cache=False):
        return model.generate(prompt, max_new_tokens=n, use_cache=use_cache, **greedy)[
            0, -n:
        ].tolist()

    @torch.inference_mode()
    def every_logit():
        return model(long_prompt).logits

    assert ours(ids[:10], 8) == pico() == theirs(prompt, 8)
    assert ours(ids, 1) == theirs(long_prompt, 1, True) == [int(every_logit()[0, -1].argmax())]
    print(f"{machine()}, PyTorch {torch.__version__}")
    print_table(
        "10 + 8 tokens without a cache",
        alternate(
            5,
            gpt2=lambda: ours(ids[:10], 8),
            Hugging_Face_generate=lambda: theirs(prompt, 8),
            picoGPT=pico,
        ),
        "gpt2",
    )
    print_table(
        "512 tokens at once",
        alternate(
            9,
            gpt2=lambda: ours(ids, 1),
            Hugging_Face_generate=lambda: theirs(long_prompt, 1, True),
            Hugging_Face_forward_all_logits=every_logit,
        ),
        "gpt2",
    )
    names = [name for name, _ in weights.tensor_shapes(HPARAMS) if name.endswith(".w")]
    matrices = [weights.leaf(params, name) for name in names]
    x = {n_in: np.ones((512, n_in), np.float32) for n_in in {len(w) for w in matrices}}

    def products(rows):
        return lambda: [x[len(w)][:rows] @ w for w in matrices]

    seconds = alternate(9, **{str(rows): products(rows) for rows in (1, 10, 512)})
    print("\nthe products with the blocks' weights alone (one pass)")
    for rows, value in seconds.items():
        rate = 2 * int(rows) * sum(w.size for w in matrices) / value
        print(f"{rows:>3} rows{value * 1e3:36.1f} ms{rate / 1e9:9.0f} GFLOP/s")


if __name__ == "__main__":
    main()
