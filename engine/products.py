"""x @ w for a few rows of x: the product that generation is made of, nearer to memory's speed.

To write one token for each of 8 texts, 8 rows are multiplied by every matrix of the model. That is
little arithmetic: the time should be that of reading the weights once. But OpenBLAS, which makes
NumPy's products, first rearranges ("packs") each matrix, as pays for hundreds of rows; so 2 rows of
GPT-2 124M take it three times as long as 1. Its AVX-512 kernels have a path that packs nothing, for
products of at most a million multiplications. Hence this file: cut w into slabs so small,

    x @ w  =  x[:, 0:32] @ w[0:32]  +  x[:, 32:64] @ w[32:64]  +  ...

and share them among threads of our own, for that path uses one. A slab of whole rows is contiguous
in memory, so nothing is copied, and weights mapped from a file stay there.

`wrap(params)` views the matrices as `Matrix`, whose `@` works like that; no function of gpt2.py
changes. On processors without AVX-512 everything is a plain product: the kernels there pack less,
and gain nothing here.
"""

import numpy as np

from engine import threads

MOST_ROWS_SUMMED, MOST_ROWS_SIDE_BY_SIDE = 16, 32  # of x; with more, packing pays
MIN_SIZE = 1 << 17  # a smaller matrix is not worth waking a thread


class Matrix(np.ndarray):
    """A 2-d array with fast products. These and its rows are plain arrays, its .T is a Matrix."""

    def __rmatmul__(self, x):  # [..., n_in] @ self, which is [n_in, n_out] -> [..., n_out]
        w, rows = self.view(np.ndarray), x.reshape(-1, x.shape[-1])
        return product(rows, w).reshape(*x.shape[:-1], w.shape[-1])

    def __matmul__(self, x):
        return self.view(np.ndarray) @ x

    def __getitem__(self, index):
        return self.view(np.ndarray)[index]


def wrap(params):
    """The same tree, every matrix in it a Matrix: views, nothing is copied. Done twice is once."""
    if isinstance(params, dict) and isinstance(params.get("wte"), Matrix):
        return params
    if isinstance(params, dict):
        return {name: wrap(value) for name, value in params.items()}
    if isinstance(params, list):
        return [wrap(value) for value in params]
    return params.view(Matrix) if params.ndim == 2 else params


def product(x, w):  # [rows, n_in], [n_in, n_out] -> [rows, n_out]
    """x @ w by whichever way is fastest; the same numbers up to float32's rounding."""
    by_rows, by_columns = w.flags.c_contiguous, w.flags.f_contiguous  # how it lies in memory
    plain = x.dtype != np.float32 or w.dtype != np.float32 or not (by_rows or by_columns)
    if plain or w.size < MIN_SIZE or len(x) == 0 or threads.n_threads() == 1:
        return x @ w
    if by_rows and 1 < len(x) <= MOST_ROWS_SUMMED:
        return sum_of_slabs(x, w)
    if by_columns and 1 < len(x) <= MOST_ROWS_SIDE_BY_SIDE:
        return row_of_slabs(x, w)
    return split_columns(x, w) if threads.n_users and (by_columns or len(x) > 1) else x @ w


def sum_of_slabs(x, w):  # slabs of w's rows, whose products add up
    (rows, n_in), n_out = x.shape, w.shape[1]
    height = max(1, min(1_000_000 // (rows * n_out), max(16, n_in // (12 * threads.n_threads()))))
    n_slabs = n_in // height
    cut = height * n_slabs
    parts = x[:, :cut].reshape(rows, n_slabs, height).swapaxes(0, 1)
    slabs = w[:cut].reshape(n_slabs, height, n_out)
    y, *others = threads.in_threads(lambda mine: (parts[mine] @ slabs[mine]).sum(0), n_slabs)
    for other in others:
        y += other
    if cut < n_in:
        y += x[:, cut:] @ w[cut:]
    return y


def row_of_slabs(x, w):  # slabs of w's columns, whose products stand side by side
    (rows, n_in), n_out = x.shape, w.shape[1]
    width = max(1, min(64, n_out, 800_000 // (rows * n_in)))
    n_slabs = n_out // width
    cut = width * n_slabs
    slabs = w.T[:cut].reshape(n_slabs, width, n_in).swapaxes(1, 2)
    y = np.empty((rows, n_out), np.float32)
    parts = y[:, :cut].reshape(rows, n_slabs, width).swapaxes(0, 1)
    threads.in_threads(lambda mine: np.matmul(x, slabs[mine], out=parts[mine]), n_slabs)
    y[:, cut:] = x @ w[:, cut:]
    return y


def split_columns(x, w):  # each thread some of the columns, packed as usual
    y = np.empty((len(x), w.shape[1]), np.float32)
    threads.in_threads(lambda mine: np.matmul(x, w[:, mine], out=y[:, mine]), w.shape[1])
    return y
