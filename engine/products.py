"""x @ w for a few rows of x, the product that generation mostly consists of.

To write one token for each of 8 texts, 8 rows are multiplied by every matrix of the model. That is
little arithmetic, and should take no longer than reading the weights once. But OpenBLAS, which
computes NumPy's products, first rearranges ("packs") each matrix, which only pays for hundreds of
rows. Three things help:

*  for two rows, two products of a vector (GEMV), which never pack. They take turns on parts of the
   matrix that are small enough to stay in the processor's cache for the second one;
*  a library that packs faster, see kernels.py; and
*  for a matrix with contiguous columns, such as wte.T: the AVX-512 kernels do not pack when a
   product takes at most a million multiplications. So such a matrix is cut into slabs of columns
   that are small enough.

For the first, NumPy's OpenBLAS uses its own threads, as it does for a single row. Otherwise it uses
one thread, because the second library has its own, and for slabs our threads share the columns.
Nothing is copied, and weights mapped from a file stay there.

The matrices of a small model stay in the processor's cache. For these NumPy's own products are the
fastest (up to fewer rows the larger the model is), so they are used: see own_threads.

`wrap(params)` views the matrices as `Matrix`, whose `@` works like that. No function of gpt2.py
changes.
"""

import numpy as np

from engine import kernels, threads

MOST_ROWS_IN_SLABS = 160  # of x; with more, packing pays
MIN_SIZE = 1 << 20  # multiplications; smaller products are done before another thread wakes
MOST_ROWS_OF_GEMV = 2  # multiplied one at a time; three take as long as with few_rows
NARROWEST = 256  # n_embd; for narrower models NumPy's own products are best
SIZE_OF_A_ROW = 8192  # rows are few if they are at most n_embd**2 // this: measured on Zen 4
UNIT = 16  # columns that stay together
SLAB = 3 << 20  # bytes of a matrix that the cache still holds when the second row needs them


class Matrix(np.ndarray):
    """A 2-d array with fast products. Products and rows are plain arrays, the .T is a Matrix."""

    def __rmatmul__(self, x):  # [..., n_in] @ self, which is [n_in, n_out] -> [..., n_out]
        w, rows = self.view(np.ndarray), x.reshape(-1, x.shape[-1])
        return product(rows, w).reshape(*x.shape[:-1], w.shape[-1])

    def __matmul__(self, x):
        return self.view(np.ndarray) @ x

    def __getitem__(self, index):
        return self.view(np.ndarray)[index]


def wrap(params):
    """Returns the tree with every matrix viewed as a Matrix. A second call changes nothing."""
    if isinstance(params, dict):
        wte = params.get("wte")
        if isinstance(wte, Matrix) or wte is not None and wte.shape[1] < NARROWEST:
            return params
        return {name: wrap(value) for name, value in params.items()}
    if isinstance(params, list):
        return [wrap(value) for value in params]
    return params.view(Matrix) if getattr(params, "ndim", None) == 2 else params


def own_threads(n_rows, n_embd):
    """threads.own_threads for a pass of n_rows, unless NumPy's own products are best."""
    most = min(kernels.most_rows(), n_embd**2 // SIZE_OF_A_ROW) if n_embd >= NARROWEST else 0
    are_few = MOST_ROWS_OF_GEMV < n_rows <= most and kernels.few_rows()
    return threads.own_threads(n_rows if are_few else 1)


def product(x, w):  # [rows, n_in], [n_in, n_out] -> [rows, n_out]
    """Computes x @ w in the fastest way. The results differ only by float32's rounding."""
    by_rows, by_columns = w.flags.c_contiguous, w.flags.f_contiguous  # the layout of w
    plain = x.dtype != np.float32 or w.dtype != np.float32 or not (by_rows or by_columns)
    if plain or len(x) * w.size < MIN_SIZE:
        return x @ w
    if not threads.n_users:  # NumPy's OpenBLAS has its threads
        return row_by_row(x, w) if 2 <= len(x) <= MOST_ROWS_OF_GEMV and threads.blas() else x @ w
    if by_columns and 2 <= len(x) <= MOST_ROWS_IN_SLABS and kernels.has_avx512():
        return split_columns(x, w, slabs_of_columns)
    if len(x) <= kernels.most_rows() and (few_rows := kernels.few_rows()):
        y = np.empty((len(padded := kernels.pad(x)), w.shape[1]), np.float32)
        few_rows(padded, w, y)
        return y[: len(x)]
    return split_columns(x, w, np.matmul)


def row_by_row(x, w):  # [rows, n_in], [n_in, n_out] -> [rows, n_out]: a GEMV a row, slab by slab
    y = np.zeros((len(x), w.shape[1]), np.float32)
    by_rows = w.flags.c_contiguous
    step = max(UNIT, SLAB // w.strides[0 if by_rows else 1])
    for start in range(0, w.shape[0 if by_rows else 1], step):
        part = slice(start, start + step)
        for x_row, y_row in zip(x, y, strict=True):
            if by_rows:
                y_row += x_row[part] @ w[part]
            else:
                np.matmul(x_row, w[:, part], out=y_row[part])
    return y


def split_columns(x, w, multiply):  # each thread multiplies some of w's columns
    n_out = w.shape[1]
    y = np.empty((len(x), n_out), np.float32)

    def work(units):
        columns = slice(units.start * UNIT, units.stop * UNIT)
        multiply(x, w[:, columns], y[:, columns])

    threads.in_threads(work, -(-n_out // UNIT))
    return y


def slabs_of_columns(x, w, y):  # one product for each slab of w's columns, side by side in y
    (rows, n_in), n_out = x.shape, w.shape[1]
    width = max(1, min(64, n_out, 800_000 // (rows * n_in)))
    n_slabs = n_out // width
    cut = width * n_slabs
    slabs = w.T[:cut].reshape(n_slabs, width, n_in).swapaxes(1, 2)
    np.matmul(x, slabs, out=y[:, :cut].reshape(rows, n_slabs, width).swapaxes(0, 1))
    np.matmul(x, w[:, cut:], out=y[:, cut:])
