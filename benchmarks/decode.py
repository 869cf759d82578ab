"""How fast does the cached engine write, beside Hugging Face and CTranslate2?

usage: pip install -r requirements/benchmarks.txt; python benchmarks/decode.py

Random weights of GPT-2 124M's shape, greedy, from one model folder that all of them read: float32
memory-mapped here, float32 in PyTorch, CTranslate2's conversion to float32 and to int8. A step
writes one token for every row of the batch: the difference between writing 40 and 8 tokens after
16, by 32. The floor is the time of reading the weights once, at the rate of NumPy's product of a
vector with a matrix of their size (GEMV), measured in the same run. Then 32 prompts, with nothing
but the defaults.
"""

import json
import logging
import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
import torch
import transformers
from common import (
    HPARAMS,
    LONG,
    N_PROMPT,
    ROUNDS,
    alternate,
    hugging_face,
    machine,
    model_folder,
    print_table,
    step_seconds,
)

import gpt2
import kv_cache
import utils
from engine import kernels, products
from model_files import weights

N_HEAD, N_VOCAB = HPARAMS["n_head"], HPARAMS["n_vocab"]
ROWS = (1, 2, 4, 8, 16, 32, 64)


def ctranslate2_generator(folder, kind, temporary):
    out = str(Path(temporary, kind))
    ctranslate2.converters.TransformersConverter(folder).convert(out, quantization=kind)
    return ctranslate2.Generator(out, compute_type=kind, intra_threads=torch.get_num_threads())


def engines(folder, params, temporary):
    """{name: function of (ids, n_tokens) -> lists of new ids}"""
    model = hugging_face(params)
    vocab = json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8"))
    pieces = {id: piece for piece, id in vocab.items()}

    @torch.inference_mode()
    def theirs(ids, n):
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        out = model.generate(torch.tensor(ids), max_new_tokens=n, **options)
        return out[:, len(ids[0]) :].tolist()

    def translator(generator):
        def write(ids, n):
            prompts = [[pieces[i] for i in row] for row in ids]
            done = generator.generate_batch(
                prompts, max_length=n, min_length=n, sampling_topk=1, end_token=[],
                max_batch_size=len(ids), include_prompt_in_result=False,
            )  # fmt: skip
            return [row.sequences_ids[0] for row in done]

        return write

    kinds = {kind: ctranslate2_generator(folder, kind, temporary) for kind in ("float32", "int8")}
    options = {"batch_size": 64, "lookup": 0}  # a pass for each token, as the others make
    return {
        "kv_cache": lambda ids, n: kv_cache.generate(ids, params, N_HEAD, n, **options),
        "Hugging_Face": theirs,
        **{f"CTranslate2_{kind}": translator(generator) for kind, generator in kinds.items()},
    }


def seconds_a_step(engines, n_rows):
    ids = np.random.default_rng(n_rows).integers(0, N_VOCAB - 1, (n_rows, N_PROMPT)).tolist()
    texts = {name: write(ids, LONG) for name, write in engines.items()}
    assert all(len(row) == LONG for text in texts.values() for row in text)
    assert texts["kv_cache"] == texts["Hugging_Face"]
    return step_seconds(engines, ids)


def floor(params):
    """(seconds to read the weights once, bytes a second), by NumPy's GEMV."""
    names = [name for name, _ in weights.tensor_shapes(HPARAMS) if name != "wpe"]
    n_bytes = sum(weights.leaf(params, name).nbytes for name in names)
    x, w = np.ones(768, np.float32), np.ones((768, n_bytes // 4 // 768), np.float32)
    seconds = alternate(ROUNDS, gemv=lambda: x @ w)["gemv"]
    return seconds, n_bytes / seconds


def time_products(params):
    """The products with the blocks' matrices alone: what engine/products.py is for."""
    print(f"\na second library: {'yes' if kernels.few_rows() else 'no'}", end="")
    names = [name for name, _ in weights.tensor_shapes(HPARAMS) if name.endswith(".w")]
    arrays = [weights.leaf(params, name) for name in names]
    matrices, tensors = [w.view(products.Matrix) for w in arrays], list(map(torch.tensor, arrays))
    print(f"\nthe blocks' products alone, ms\n{'rows':>6}{'NumPy':>10}{'ours':>10}{'PyTorch':>10}")
    for n_rows in ROWS:
        x = {n_in: np.ones((n_rows, n_in), np.float32) for n_in in {len(w) for w in arrays}}

        def fast(x=x, n_rows=n_rows):
            with products.own_threads(n_rows, HPARAMS["n_embd"]):
                for w in matrices * 10:
                    x[len(w)] @ w

        def plain(x=x, arrays=arrays):
            for w in arrays * 10:
                x[len(w)] @ w

        def theirs(x=x):
            plain({n_in: torch.from_numpy(array) for n_in, array in x.items()}, tensors)

        seconds = alternate(ROUNDS, plain=plain, fast=fast, theirs=theirs)
        print(f"{n_rows:>6}" + "".join(f"{value * 100:10.1f}" for value in seconds.values()))


def lookup(params):
    """One row with guesses and without: a text that repeats itself, and one that never does.

    A pass of seven guesses and a token costs little more than one of four: kernels.py fills up
    eight rows in any case.
    """
    n, ids = 200, np.random.default_rng(0).integers(0, N_VOCAB, N_PROMPT).tolist()
    print(f"\n{n} tokens after {N_PROMPT}, one row: ms per token, plain and with --lookup 4 and 7")
    for name, temperature in {"repeats": 0.0, "does not": 1.0}.items():

        def write(guesses, temperature=temperature):
            how = {"temperature": temperature, "seed": 0, "lookup": guesses}
            return kv_cache.generate([ids], params, N_HEAD, n, **how)[0]

        text = write(0)
        assert text == write(4) == write(7)
        seconds = alternate(ROUNDS, **{str(k): lambda k=k: write(k) for k in (0, 4, 7)})
        print(f"{name:>10}", *(f"{1e3 * value / n:8.1f}" for value in seconds.values()), end="")
        print("".join(f"{seconds['0'] / seconds[k]:8.2f}x" for k in ("4", "7")), end="")
        threes = len(set(zip(text, text[1:], text[2:], strict=False)))
        print(f"   ({threes} different runs of three tokens)")


def defaults(params):
    """32 prompts of 4 to 64 tokens, 40 more for each, as a user calls it: no option is given.

    transformers reads the same prompts as one batch, padded on the left.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, N_VOCAB - 1, rng.integers(4, 65)).tolist() for _ in range(32)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    model = hugging_face(params)
    options = {"max_new_tokens": LONG, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    @torch.inference_mode()
    def theirs():
        return model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()

    def ours():
        return kv_cache.generate(prompts, params, N_HEAD, LONG)

    assert ours() == theirs()
    seconds = alternate(ROUNDS, kv_cache=ours, Hugging_Face=theirs)
    print_table(f"32 prompts of 4 to 64 tokens, {LONG} more for each", seconds, "kv_cache")


def one_more(params, n):
    """(seconds with the cache, seconds without, the cache) for one more token after n, one row."""
    ids = np.random.default_rng(n).integers(0, N_VOCAB, n).tolist()
    cache = kv_cache.new_cache(params, N_HEAD)
    kv_cache.prefill(cache, ids[:-1], params, N_HEAD)

    def cached():
        for _ in range(5):
            cache.n_seq = n - 1  # forgets the token that the last step appended
            kv_cache.step([cache], ids[-1:], params, N_HEAD)

    def plain():
        gpt2.generate(ids, params, N_HEAD, 1)

    seconds = alternate(ROUNDS, cached=cached, plain=plain)
    return seconds["cached"] / 5, seconds["plain"], cache


def by_length(params):
    """What a cache buys, and what it costs in memory."""
    print("\none more token after n, one row, and the cache's size")
    print(f"{'n':>6}{'cached ms':>12}{'without ms':>12}{'':8}{'MiB':>8}{'docstring: MiB':>17}")
    for n in (10, 100, 1000):
        cached, plain, cache = one_more(params, n)
        room = cache.kv.shape[3]
        print(f"{n:>6}{cached * 1e3:12.1f}{plain * 1e3:12.1f}{plain / cached:7.1f}x", end="")
        print(f"{cache['kv'].nbytes / 2**20:8.2f}{room * 72 / 2**10:17.2f}")


def main():
    logging.disable()  # transformers on generation settings
    transformers.utils.logging.disable_progress_bar()
    with model_folder() as folder, tempfile.TemporaryDirectory() as temporary:
        _, _, params = utils.load_encoder_hparams_and_params(folder)
        contestants = engines(folder, params, temporary)
        versions = f"PyTorch {torch.__version__}, CTranslate2 {ctranslate2.__version__}"
        print(f"{machine()}, {versions}")
        for n_rows in ROWS:
            seconds = seconds_a_step(contestants, n_rows)
            if n_rows == 1:
                least, rate = floor(params)
                seconds[f"the floor, at {rate / 1e9:.1f} GB/s"] = least
            print_table(f"a step of {n_rows} row{'s' * (n_rows > 1)}", seconds, "kv_cache")
        defaults(params)
        time_products(params)
        lookup(params)
        by_length(params)


if __name__ == "__main__":
    main()
