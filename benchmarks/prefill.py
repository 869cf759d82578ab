"""How fast does the cached engine read a prompt, beside Hugging Face and CTranslate2?

usage: pip install -r requirements/benchmarks.txt; python benchmarks/prefill.py

Random weights of GPT-2 124M's shape: 512 tokens, for the logits of the next one, and 8 prompts of
different lengths, together and one by one. Also what smaller chunks, which bound memory, cost, what
more threads gain, and the perplexity of a text of 4 x 1024 tokens, beside Hugging Face.
"""

import logging
import tempfile
from unittest import mock

import numpy as np
import torch
import transformers
from common import HPARAMS, alternate, hugging_face, machine, model_folder, print_table
from decode import N_HEAD, N_VOCAB, engines

import evaluate
import kv_cache
import utils
from engine import products, threads

ROUNDS = 7


def main():
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    with model_folder() as folder, tempfile.TemporaryDirectory() as temporary:
        _, _, params = utils.load_encoder_hparams_and_params(folder)
        contestants = engines(folder, params, temporary)
        print(f"{machine()}, PyTorch {torch.__version__}")
        rng = np.random.default_rng(0)
        ids = rng.integers(0, N_VOCAB, 512).tolist()
        assert contestants["kv_cache"]([ids], 1) == contestants["Hugging_Face"]([ids], 1)
        runs = {name: lambda read=read: read([ids], 1) for name, read in contestants.items()}
        print_table("512 tokens and the next", alternate(ROUNDS, **runs), "kv_cache")

        lengths = [20, 35, 50, 64, 80, 100, 40, 123]
        prompts = [rng.integers(0, N_VOCAB, n).tolist() for n in lengths]
        seconds = alternate(
            ROUNDS,
            together=lambda: kv_cache.generate(prompts, params, N_HEAD, 1, batch_size=8),
            one_by_one=lambda: [kv_cache.generate([p], params, N_HEAD, 1) for p in prompts],
        )
        print_table(f"8 prompts of {sum(lengths)} tokens in all", seconds, "together")

        matrices = products.wrap(params)
        seconds = {
            f"chunks of {chunk}": alternate(
                3, read=lambda c=chunk: read_once(long_prompt(rng), matrices, c)
            )["read"]
            for chunk in (64, 128, 256, 512, 1024)
        }
        print_table("1024 tokens, by the size of the chunks", seconds, "chunks of 512")
        by_threads(ids, matrices)
        time_perplexity(params)


def by_threads(ids, params):
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= threads.n_threads()]

    def read(n):
        threads.limit([(lib, n) for lib, _ in threads.blas()])
        with mock.patch.object(threads, "n_threads", lambda: n):
            read_once(ids, params, len(ids))

    read_once(ids, params, len(ids))  # starts the threads, all of them
    seconds = alternate(ROUNDS, **{str(n): lambda n=n: read(n) for n in counts})
    threads.limit(threads.blas())
    print_table(f"{len(ids)} tokens, by the number of threads", seconds, str(counts[-1]))


def time_perplexity(params):
    n_ctx, model = HPARAMS["n_ctx"], hugging_face(params)
    ids = np.random.default_rng(1).integers(0, N_VOCAB, 4 * n_ctx + 1)

    def ours():
        return evaluate.perplexity(ids, 1, 1, params, N_HEAD)["nats_per_token"]

    @torch.inference_mode()
    def theirs():
        nats = 0.0
        for start in range(0, 4 * n_ctx, n_ctx):
            window = torch.from_numpy(ids[start : start + n_ctx + 1])
            logits = model(window[None, :-1]).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        return nats / (4 * n_ctx)

    assert abs(ours() - theirs()) < 1e-4, (ours(), theirs())
    seconds = alternate(3, evaluate=ours, Hugging_Face=theirs)
    print_table("the perplexity of 4 x 1024 tokens", seconds, "evaluate")


def long_prompt(rng):
    return rng.integers(0, N_VOCAB, HPARAMS["n_ctx"]).tolist()


def read_once(ids, params, chunk):
    kv_cache.prefill(kv_cache.new_cache(params, N_HEAD), ids, params, N_HEAD, chunk)


if __name__ == "__main__":
    main()
