"""Is the engine's way to multiply ever slower than NumPy's own products?

usage: python benchmarks/products.py [MODEL ...]

The same passes of the engine with engine/products.py and with plain NumPy (`@`, its own threads),
the two taking turns: a token for each of some rows that have 16, and the beginning of one text.
MODEL: shakespeare, the shipped model's shape; 30M, of 384 numbers a token; or 124M. All, if none.
"""

import contextlib
import sys
import time
from unittest import mock

import numpy as np
from common import HPARAMS, alternate, machine, random_params

import kv_cache
from engine import kernels, products, slices

SHAPES = {
    "shakespeare": {"n_vocab": 257, "n_ctx": 256, "n_embd": 192, "n_head": 6, "n_layer": 6},
    "30M": HPARAMS | {"n_ctx": 256, "n_embd": 384, "n_head": 6, "n_layer": 6},
    "124M": HPARAMS | {"n_ctx": 256},
}
PASSES = [(n, 1) for n in (1, 2, 3, 4, 8, 16, 32, 64)] + [(1, n) for n in (2, 5, 16, 64, 128, 250)]


@contextlib.contextmanager
def plain_numpy():
    """Products by NumPy, with its threads; and no slices of tokens, which have threads of ours."""
    with (
        mock.patch.object(products, "product", np.matmul),
        mock.patch.object(products, "own_threads", lambda *_: contextlib.nullcontext()),
        mock.patch.object(slices, "MIN_TOKENS", 10**9),
    ):
        yield


def passes(params, hparams, n_rows, n_new):  # -> a function that makes some passes, and how many
    rng, n_head, n_before = np.random.default_rng(0), hparams["n_head"], 16 * (n_new == 1)
    ids = rng.integers(0, hparams["n_vocab"], (n_rows, n_new)).tolist()
    caches = [kv_cache.new_cache(params, n_head, 256) for _ in range(n_rows)]

    def run(n=1):
        for _ in range(n):
            for cache in caches:
                cache.n_seq = n_before
            x = kv_cache.extend(caches, ids, params, n_head)
            kv_cache.next_logits(x, params, n_rows * n_new)

    run(2)
    start = time.perf_counter()
    run()
    n = max(1, round(0.15 / (time.perf_counter() - start)))
    return lambda: run(n), n


def main():
    print(f"{machine()}, a second library: {'yes' if kernels.few_rows() else 'no'}")
    for name in sys.argv[1:] or SHAPES:
        params = products.wrap(random_params(SHAPES[name]))
        print(f"\n{name}, ms a pass\n{'rows':>6}{'tokens':>8}{'NumPy':>10}{'ours':>10}")
        for n_rows, n_new in PASSES:
            ours, n = passes(params, SHAPES[name], n_rows, n_new)

            def plain(ours=ours):
                with plain_numpy():
                    ours()

            seconds = alternate(9, plain=plain, ours=ours)
            ratio = seconds["plain"] / seconds["ours"]
            each = "".join(f"{1e3 * value / n:10.2f}" for value in seconds.values())
            print(f"{n_rows:>6}{n_rows * n_new:>8}{each}{ratio:7.2f}x", flush=True)


if __name__ == "__main__":
    main()
