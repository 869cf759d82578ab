"""engine/: every way to multiply gives the product, on any number of threads."""

import functools
import importlib.util
import io
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import types
import weakref

import numpy as np
import pytest
from conftest import REPO, forks, on_linux, slow

import backprop
import utils
from engine import kernels, processes, products, threads
from generation import lookup

X86_V4 = ["SkylakeX", "Cooperlake", "SapphireRapids"]  # OpenBLAS's processors with AVX-512


@pytest.fixture(params=[1, 2, 3, slow(5)])
def n_threads(request, monkeypatch):
    """Pretends that OpenBLAS had this many threads, whatever this machine is."""
    monkeypatch.setattr(threads, "n_threads", lambda: request.param)
    threads.start_workers.cache_clear()
    yield request.param
    threads.start_workers.cache_clear()


@pytest.fixture(params=["a second library", "NumPy's alone"])
def library(request, monkeypatch):
    """With the second OpenBLAS, where it is installed and of use, and without."""
    if request.param == "NumPy's alone":
        monkeypatch.setattr(kernels, "few_rows", lambda: None)
    elif kernels.few_rows() is None:
        pytest.skip("no AVX-512 kernels here, or scipy-openblas64 is not installed")


def close(y, x, w, exact=None):
    """Against float64, within what summing n_in float32 products in any order may lose."""
    exact = in_float64(x, w) if exact is None else exact
    return y.shape == exact.shape and np.abs(y - exact).max(initial=0) < 1e-5 * len(w) ** 0.5


def in_float64(x, w):
    return x.astype(np.float64) @ w.astype(np.float64)


@pytest.mark.parametrize("order", ["C", "F", "neither"])
@pytest.mark.parametrize("n_rows", [0, 1, 2, 7, slow(16), slow(64), 65, slow(161)])
def test_every_product_equals_the_plain_one(rng, n_threads, library, n_rows, order, monkeypatch):
    monkeypatch.setattr(products, "MIN_SIZE", 1)
    sizes = [(512, 300), (257, 1031), (2048, 65), (64, 2049), (131073, 1), (1, 131072)]
    for n_in, n_out in sizes[: 4 if n_rows > 64 else 6]:  # many rows of 131072 are memory, no news
        w = rng.standard_normal((n_in, n_out), dtype=np.float32)
        w = {"C": w, "F": np.asfortranarray(w), "neither": np.repeat(w, 2, axis=1)[:, ::2]}[order]
        x = rng.standard_normal((n_rows, n_in), dtype=np.float32)
        exact = in_float64(x, w)
        for where in (threads.own_threads(1), threads.own_threads(2)):
            with where:
                y = x @ w.view(products.Matrix)
            assert type(y) is np.ndarray and y.dtype == np.float32
            assert close(y, x, w, exact), (n_in, n_out)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_parts_themselves(rng, n_threads, order):
    """Each way by name, for sizes that `product` would not choose it for, too."""
    ways = [np.matmul, *([products.slabs_of_columns] if order == "F" else [])]
    if few_rows := kernels.few_rows():
        ways += [few_rows]
    for _ in range(40):
        n_rows, n_in, n_out = rng.integers(1, [40, 300, 300])
        w = np.asarray(rng.standard_normal((n_in, n_out), dtype=np.float32), order=order)
        x = rng.standard_normal((n_rows, n_in), dtype=np.float32)
        for way in ways:
            y = products.split_columns(x, w, way)
            assert close(y, x, w), (way.__name__, n_rows, n_in, n_out)


WAYS = {  # (rows, order of w): the way with our threads, and that with NumPy's
    (1, "C"): ("few rows", "NumPy"),
    (2, "C"): ("few rows", "row by row"),
    (3, "C"): ("few rows", "NumPy"),
    (64, "C"): ("few rows", "NumPy"),
    (65, "C"): ("columns", "NumPy"),
    (1, "F"): ("few rows", "NumPy"),
    (2, "F"): ("slabs", "row by row"),
    (160, "F"): ("slabs", "NumPy"),
    (161, "F"): ("columns", "NumPy"),
}


@pytest.mark.parametrize("n_rows, order", WAYS)
def test_each_product_goes_its_way(n_rows, order, monkeypatch):
    """And what is too small, or not float32, or neither by rows nor by columns, goes NumPy's."""
    (way, theirs), ways = WAYS[n_rows, order], []

    def by(name):
        return lambda x, w, *_: ways.append(name) or np.zeros((len(x), w.shape[1]), x.dtype)

    monkeypatch.setattr(kernels, "has_avx512", lambda: True)
    monkeypatch.setattr(kernels, "most_rows", lambda: 64)
    monkeypatch.setattr(kernels, "few_rows", lambda: by("few rows"))
    monkeypatch.setattr(products, "row_by_row", by("row by row"))
    split = {np.matmul: "columns", products.slabs_of_columns: "slabs"}
    monkeypatch.setattr(products, "split_columns", lambda x, w, how: by(split[how])(x, w))
    x, w = np.zeros((n_rows, 1024), np.float32), np.zeros((1024, 1024), np.float32, order)
    for n_users in (1, 0):
        monkeypatch.setattr(threads, "n_users", n_users)
        for dtypes in (("f4", "f4"), ("f8", "f4"), ("f4", "f8")):
            products.product(*(a.astype(t) for a, t in zip((x, w), dtypes, strict=True)))
        products.product(x, np.zeros((1024, 2048), np.float32)[:, ::2])
        products.product(x, np.zeros((1024, 1024 // n_rows - 1), np.float32, order))
        if n_users == 0 and theirs == "NumPy":
            ways.append("NumPy")
    assert ways == [way, theirs]


def test_guesses_go_on_after_the_last_place_like_the_end(rng):
    """Against the plainest search, from ids so few that much comes again."""
    for _ in range(300):
        ids, n = rng.integers(0, 4, rng.integers(2, 12)).tolist(), int(rng.integers(1, 6))
        ends = [i for i in range(2, len(ids)) if ids[i - 2 : i] == ids[-2:]]
        wanted = [(ids[ends[-1] :] * 5)[i] for i in range(n)] if ends else []
        assert lookup.guess(ids, n) == wanted


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("slab", [64, 4096, 1 << 20])
def test_two_rows_are_multiplied_one_at_a_time(rng, order, slab, monkeypatch):
    """Slab by slab, the last one smaller; OpenBLAS keeps its threads."""
    monkeypatch.setattr(products, "SLAB", slab)
    for n_rows, n_in, n_out in [(2, 300, 517), (2, 517, 300), (3, 1, 40), (2, 40, 1), (0, 9, 9)]:
        w = np.asarray(rng.standard_normal((n_in, n_out), dtype=np.float32), order=order)
        x = rng.standard_normal((n_rows, n_in), dtype=np.float32)
        assert close(products.row_by_row(x, w), x, w), (n_rows, n_in, n_out)


@pytest.mark.parametrize(
    "n_rows, n_embd, ours",
    [(2, 768, 0), (3, 768, 1), (64, 768, 1), (65, 768, 0), (32, 512, 1), (33, 512, 0), (8, 256, 1)]
    + [(9, 256, 0), (3, 255, 0), (64, 64, 0)],
)
def test_a_pass_has_our_threads_for_few_rows_of_a_wide_model(n_rows, n_embd, ours, monkeypatch):
    monkeypatch.setattr(kernels, "few_rows", lambda: True)
    monkeypatch.setattr(kernels, "most_rows", lambda: 64)
    with products.own_threads(n_rows, n_embd):
        assert threads.n_users == ours
    monkeypatch.setattr(kernels, "few_rows", lambda: None)
    with products.own_threads(n_rows, n_embd):
        assert threads.n_users == 0


def test_padding_adds_rows_of_zeros_up_to_a_multiple_of_eight(rng):
    for n_rows, n_padded in [(0, 0), (1, 1), (2, 8), (8, 8), (9, 16), (64, 64)]:
        x = rng.standard_normal((n_rows, 7), dtype=np.float32)
        padded = kernels.pad(x)
        assert padded.shape == (n_padded, 7) and padded.dtype == np.float32
        assert np.array_equal(padded[:n_rows], x) and not padded[n_rows:].any()


@pytest.mark.parametrize(
    "cpu, most",
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n" * 2, sys.maxsize),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", 64),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", 64),
        (None, 64),
    ],
)
def test_how_many_rows_are_few_depends_on_the_processor(cpu, most, monkeypatch):
    def read(path, **_):
        if cpu is None or path != "/proc/cpuinfo":
            raise FileNotFoundError(path)
        return io.StringIO(cpu)

    monkeypatch.setattr(kernels, "open", read, raising=False)
    kernels.most_rows.cache_clear()
    assert kernels.most_rows() == most
    kernels.most_rows.cache_clear()


@pytest.mark.parametrize("name, has", [(name, True) for name in X86_V4] + [("Zen", False)])
def test_avx512_kernels_are_known_by_name(name, has, monkeypatch):
    lib = types.SimpleNamespace(architecture=name)
    monkeypatch.setattr(threads, "blas", lambda: [(lib, 1)])
    assert kernels.has_avx512() == has


def test_the_second_library_is_used_where_it_is_installed():
    installed = importlib.util.find_spec("scipy_openblas64") is not None
    usable = installed and kernels.has_avx512() and "OPENBLAS_CORETYPE" not in os.environ
    assert (kernels.few_rows() is not None) == usable


NOT_USED = {
    "somebody has chosen kernels": 'os.environ["OPENBLAS_CORETYPE"] = "Haswell"',
    "the package is not there": "importlib.util.find_spec = lambda name: None",
    "its file is damaged": "importlib.util.find_spec = damaged",
    "NumPy has no AVX-512 kernels": "kernels.AVX512 = set()",
}


@pytest.mark.parametrize("case", NOT_USED)
def test_without_a_second_library_numpys_serves(case, tmp_path):
    """In a new process: libraries are looked for once. The environment stays as it was."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libscipy_openblas64_.so").write_bytes(b"no library")
    script = f"""
import importlib.util, os, types
def damaged(name):
    return types.SimpleNamespace(origin={str(tmp_path / "__init__.py")!r})
import numpy as np
from engine import kernels, products
{NOT_USED[case]}
before = dict(os.environ)
assert kernels.few_rows() is None and dict(os.environ) == before
x, w = np.ones((8, 512), np.float32), np.ones((512, 512), np.float32)
assert np.array_equal(x @ w.view(products.Matrix), x @ w)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPO, timeout=60)


def test_the_second_library_is_loaded_apart(rng):
    """Its own kernels and threads; NumPy's stays as it is; no trace in the environment."""
    if kernels.few_rows() is None:
        pytest.skip("no AVX-512 kernels here, or scipy-openblas64 is not installed")
    script = """
import os
before = dict(os.environ)
from engine import kernels, threads
from threadpoolctl import threadpool_info
numpys = threadpool_info()
assert kernels.few_rows() and dict(os.environ) == before
now = threadpool_info()
(second,) = [lib for lib in now if lib["filepath"] not in {lib["filepath"] for lib in numpys}]
assert (second["architecture"], second["num_threads"]) == ("Haswell", threads.n_threads())
assert [lib for lib in now if lib != second] == numpys
assert os.popen("echo $OPENBLAS_CORETYPE").read() == "\\n"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPO, timeout=60)


def test_the_same_product_is_the_same_to_the_last_bit(rng, n_threads, library):
    x = rng.standard_normal((8, 768), dtype=np.float32)
    w = rng.standard_normal((768, 700), dtype=np.float32).view(products.Matrix)
    first = x @ w
    assert all(np.array_equal(first, x @ w) for _ in range(20))


def test_leading_axes_and_vectors(rng, n_threads):
    w = rng.standard_normal((512, 300), dtype=np.float32)
    for shape in [(512,), (1, 512), (3, 4, 512), (2, 3, 5, 512)]:
        x = rng.standard_normal(shape, dtype=np.float32)
        np.testing.assert_allclose(x @ w.view(products.Matrix), x @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["C", "F"])
def test_other_dtypes_are_left_to_numpy(rng, n_threads, order):
    for kinds in [("f4", "f8"), ("f8", "f4"), ("f8", "f8"), ("f2", "f2")]:
        x = rng.standard_normal((4, 512)).astype(kinds[0])
        w = np.asarray(rng.standard_normal((512, 512)), kinds[1], order=order)
        with threads.own_threads(4):
            y = x @ w.view(products.Matrix)
            assert y.dtype == np.result_type(x, w) and np.array_equal(y, x @ w)


def test_wrap_copies_nothing_and_leaks_nothing(rng):
    params = {"wte": rng.standard_normal((9, 256)), "blocks": [{"b": np.ones(3), "w": np.eye(4)}]}
    narrow = params | {"wte": params["wte"][:, 1:]}
    assert products.wrap(narrow) is narrow
    wrapped = products.wrap(params)
    assert type(params["wte"]) is np.ndarray
    for before, after in [(params["wte"], wrapped["wte"]), *zip(
        params["blocks"][0].values(), wrapped["blocks"][0].values(), strict=True
    )]:  # fmt: skip
        assert np.shares_memory(before, after) and before.strides == after.strides
    wte = wrapped["wte"]
    assert type(wte) is type(wte.swapaxes(0, 1)) is products.Matrix
    for plain in (wte[1], wte[[1, 2]], wte[2:], wte @ np.ones(256), np.ones(9) @ wte):
        assert type(plain) is np.ndarray
    assert type(wrapped["blocks"][0]["b"]) is np.ndarray


def test_in_threads_keeps_order_and_covers_everything(n_threads):
    for n in (1, 2, 3, 4, 24, 100):
        parts = threads.in_threads(lambda mine, n=n: list(range(n))[mine], n)
        assert sum(parts, []) == list(range(n)) and all(parts)

    def slower_when_earlier(mine):
        time.sleep(0.02 * (n_threads - mine.start))
        return mine.start

    assert threads.in_threads(slower_when_earlier, n_threads) == list(range(n_threads))
    seen = threads.in_threads(lambda mine: threading.get_ident(), n_threads)
    assert seen[0] == threading.get_ident() and len(seen) == n_threads


def test_a_threads_share_is_not_shared_again(n_threads):
    def outer(mine):
        inner = threads.in_threads(lambda part: (threading.get_ident(), part), 100)
        return inner == [(threading.get_ident(), slice(0, 100))]

    if n_threads > 1:
        assert threads.in_threads(outer, 100) == [True] * n_threads
    assert len(threads.in_threads(lambda mine: 1, 100)) == n_threads  # busy no more


def test_an_error_in_a_worker_is_raised_by_the_caller(n_threads):
    def work(mine):
        if mine.start > 0:
            raise MemoryError(f"at {mine.start}")
        return "fine"

    if n_threads > 1:
        with pytest.raises(MemoryError, match="at "):
            threads.in_threads(work, 100)
    assert threads.in_threads(lambda mine: "fine", n_threads) == ["fine"] * n_threads


def test_ctrl_c_waits_for_the_workers(n_threads):
    written = []

    def work(mine):
        if mine.start == 0:
            raise KeyboardInterrupt
        time.sleep(0.1)
        written.append(mine)

    with pytest.raises(KeyboardInterrupt):
        threads.in_threads(work, 100)
    assert len(written) == n_threads - 1


def test_workers_keep_nothing_alive(n_threads):
    large = np.ones(9)
    alive = weakref.ref(large)
    threads.in_threads(lambda mine, large=large: large[0], n_threads)
    del large
    deadline = time.monotonic() + 5
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive() is None


def test_own_threads_gives_openblas_its_threads_back():
    def counts():
        return [lib.num_threads for lib, _ in threads.blas()]

    before = [n for _, n in threads.blas()]
    assert counts() == before
    with threads.own_threads(1):
        assert counts() == before
    with threads.own_threads(2):
        assert counts() == [1] * len(before)
        with threads.own_threads(2):
            pass
        assert counts() == [1] * len(before)
    with pytest.raises(RuntimeError), threads.own_threads(2):
        raise RuntimeError
    assert counts() == before

    entered, leave = threading.Barrier(2), threading.Event()

    def other():
        with threads.own_threads(2):
            entered.wait()
            leave.wait()

    thread = threading.Thread(target=other)
    with threads.own_threads(2):
        thread.start()
        entered.wait()
    assert counts() == [1] * len(before)  # the other is still inside
    leave.set()
    thread.join()
    assert counts() == before


def test_ctrl_c_at_the_door_leaves_the_count_of_users_alone(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(threads, "blas", interrupted)
    with pytest.raises(KeyboardInterrupt), threads.own_threads(2):
        raise AssertionError("nobody gets in")
    assert threads.n_users == 0


def test_a_library_that_nobody_can_count_leaves_all_cores(rng, monkeypatch):
    """Apple's Accelerate, which threadpoolctl does not know."""
    monkeypatch.setattr(threads, "blas", lambda: [])
    monkeypatch.setattr(products, "MIN_SIZE", 1)
    monkeypatch.delenv("VECLIB_MAXIMUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if hasattr(os, "sched_getaffinity"):
        assert threads.n_threads() == len(os.sched_getaffinity(0))
        monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert threads.n_threads() == threads.parts(100) == 3
    for value, n in (("2", 2), ("0", 3), ("many", 3), ("", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert threads.n_threads() == n
    monkeypatch.setenv("VECLIB_MAXIMUM_THREADS", "1")
    assert threads.n_threads() == 1
    x, w = (rng.standard_normal(n, dtype=np.float32) for n in [(2, 512), (512, 512)])
    assert close(x @ w.view(products.Matrix), x, w)


def test_several_callers_at_once(rng, n_threads):
    w = rng.standard_normal((768, 700), dtype=np.float32)
    xs = [rng.standard_normal((n, 768), dtype=np.float32) for n in (2, 5, 8, 16)]
    right = []

    def call(x):
        right.append(all(close(x @ w.view(products.Matrix), x, w) for _ in range(30)))

    callers = [threading.Thread(target=call, args=(x,)) for x in xs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert right == [True] * len(xs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@forks
def test_a_forked_process_starts_its_own_workers(n_threads):
    assert threads.in_threads(lambda mine: 1, n_threads) == [1] * n_threads
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for workers it does not have
        os._exit(0 if threads.in_threads(lambda mine: 1, n_threads) == [1] * n_threads else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@forks
def test_a_forked_process_has_no_users_and_free_locks(monkeypatch):
    """Whatever its parent's threads were doing: they are not there to leave, or to let go."""
    monkeypatch.setattr(threads, "n_threads", lambda: 2)
    before = [(lib.num_threads, n) for lib, n in threads.blas()]
    held = threading.Event(), threading.Event()

    def hold():
        with threads.lock, threads.stepping:
            held[0].set()
            held[1].wait()

    holder = threading.Thread(target=hold)
    with threads.own_threads(2):
        holder.start()
        held[0].wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that waits for a lock
            parts = threads.in_step(lambda number, part, meet: part, 6, 2)
            fine = threads.n_users == 0 and parts == [slice(0, 3), slice(3, 6)]
            os._exit(
                0 if fine and [(lib.num_threads, n) for lib, n in threads.blas()] == before else 1
            )
        held[1].set()
        holder.join()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc, and Linux's /proc")
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_PERTURB_": "0"}])
def test_freed_memory_is_kept_for_the_next_array_unless_the_user_has_chosen(chosen):
    """In a new process: how much of some arrays' memory is given back as soon as they are freed.

    And how many MiB of the heap are to have pages of 2 MiB.
    """
    script = """
import numpy as np
from engine import memory
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 >> 20
def given_back(n_arrays, size):
    arrays = [np.ones(size << 20, np.uint8) for _ in range(n_arrays)]
    before = resident()
    del arrays
    return (before - resident()) / (n_arrays * size)
memory.keep()
huge, size = 0, 0
with open("/proc/self/smaps") as f:
    for line in f:
        size = int(line.split()[1]) if line.startswith("Size:") else size
        huge += size * (line.startswith("VmFlags:") and "hg" in line.split())
print(huge >> 10, given_back(1, 70), given_back(1, 30), given_back(8, 6), given_back(3, 30))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | chosen
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=REPO, env=env, timeout=60, stdout=-1
    )
    huge, too_large, one, several, too_many = map(float, done.stdout.split())
    kernel = [int(number) for number in re.findall(r"\d+", platform.release())[:2]]
    if os.path.exists("/sys/kernel/mm/transparent_hugepage") and kernel >= [4, 6]:  # NumPy's limit
        assert huge == 0 if chosen else 60 <= huge <= 62
    assert too_large > 0.9  # more than the heap has room for, or may grow by
    if chosen:
        assert one > 0.9
    else:
        assert max(one, several) < 0.1 and too_many > 0.9  # more than 64 MiB together


class Mkl:
    """As threadpoolctl shows it."""

    internal_api, num_threads = "mkl", 6

    def set_num_threads(self, n):
        self.num_threads = n


def test_mkl_stays_on_one_thread_while_ours_work(monkeypatch):
    library = Mkl()

    class Controller:
        def select(self, **asked):
            assert asked == {"user_api": "blas"}
            return types.SimpleNamespace(lib_controllers=[library])

    monkeypatch.setattr("threadpoolctl.ThreadpoolController", Controller)
    monkeypatch.setattr(threads, "find_blas", functools.cache(threads.find_blas.__wrapped__))
    assert threads.n_threads() == 6 and not kernels.has_avx512()
    with threads.own_threads(2):
        assert library.num_threads == 1 and threads.n_threads() == 6
    assert library.num_threads == 6


NO_BLAS = """
import threadpoolctl
threadpoolctl.ThreadpoolController.select = lambda self, **_: threadpoolctl.ThreadpoolController()
threadpoolctl.ThreadpoolController.lib_controllers = property(lambda self: [], lambda self, _: None)
import numpy as np, backprop, gpt2, kv_cache, utils
from engine import threads
assert threads.blas() == [] and threads.n_threads() == threads.usable_cores()
encoder, hparams, params = utils.load_encoder_hparams_and_params("shakespeare", "models")
n_head = hparams["n_head"]
prompts = [encoder.encode(text) for text in ("ROMEO:", "To be", "O!" * 80)]
texts = kv_cache.generate(prompts, params, n_head, 12)
assert texts == [gpt2.generate(ids, params, n_head, 12) for ids in prompts], texts
tokens = np.arange(60).reshape(4, 15)
loss, gradients = backprop.loss_and_gradients(params, tokens, n_head)
print(loss)
"""


def test_texts_and_training_without_any_library_that_can_be_counted():
    done = subprocess.run([sys.executable, "-c", NO_BLAS], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, hparams, params = utils.load_encoder_hparams_and_params("shakespeare", str(REPO / "models"))
    tokens = np.arange(60).reshape(4, 15)
    loss, _ = backprop.loss_and_gradients(params, tokens, hparams["n_head"])
    assert float(done.stdout) == pytest.approx(loss, rel=1e-5)


def test_two_first_callers_at_once_lose_no_threads():
    """In a new process, where nothing has been looked up yet."""
    script = """
import threading, numpy as np
from engine import kernels, products, threads
barrier = threading.Barrier(4)
def call():
    barrier.wait()
    with threads.own_threads(2):
        np.ones((2, 512), np.float32) @ np.ones((512, 512), np.float32).view(products.Matrix)
callers = [threading.Thread(target=call) for _ in range(4)]
for c in callers: c.start()
for c in callers: c.join()
counts = [(lib.num_threads, n) for lib, n in threads.blas()]
from threadpoolctl import ThreadpoolController
print(counts, threads.n_users)
assert all(now == first for now, first in counts) and threads.n_users == 0
assert not counts or threads.n_threads() == max(n for _, n in counts)
import os
assert not counts or max(n for _, n in counts) == min(64, len(os.sched_getaffinity(0)))
"""
    env = {k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")}
    for _ in range(3):
        subprocess.run([sys.executable, "-c", script], check=True, cwd=REPO, env=env, timeout=60)


def test_ctrl_c_while_the_workers_start_ends_the_call(n_threads, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(threads, "workers", interrupted)
    if n_threads > 1:
        with pytest.raises(KeyboardInterrupt):
            threads.in_threads(lambda mine: 1, n_threads)


def test_ctrl_c_between_two_workers_does_not_wait_for_the_second(monkeypatch):
    """Of three slices one is handed out, none of the others; nobody would ever do them."""
    monkeypatch.setattr(threads, "n_threads", lambda: 3)
    threads.start_workers.cache_clear()
    tasks, done = threads.workers(), []

    class Interrupted:
        def put(self, task):
            tasks.put(task)
            raise KeyboardInterrupt

    monkeypatch.setattr(threads, "workers", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        threads.in_threads(lambda mine: time.sleep(0.05) or done.append(mine.start), 3)
    assert len(done) == 1
    threads.start_workers.cache_clear()


def test_waiting_workers_do_not_keep_a_process_alive():
    script = "from engine import threads; threads.n_threads = lambda: 3; "
    script += "print(sum(threads.in_threads(lambda mine: mine.stop - mine.start, 10)))"
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, cwd=REPO, timeout=30) == b"10\n"


# --- Processes ------------------------------------------------------------------------------------


@on_linux
@forks
@pytest.mark.parametrize("n", [2, 3, 5])
def test_processes_return_what_threads_do(rng, monkeypatch, n):
    """The numbers, and the arrays in the room made for them; the first process makes new ones."""
    monkeypatch.setattr(threads, "n_threads", lambda: n)
    threads.start_workers.cache_clear()
    weights = rng.standard_normal((4, 3), dtype=np.float32)
    seen = processes.shared(weights)
    assert seen.dtype == weights.dtype and (seen == weights).all()

    def work(rows, out=None, power=1):
        y = (rows @ seen) ** power
        out = out or {"y": np.empty((3, 3), np.float32), "sums": np.empty(3)}
        out["y"][:], out["sums"][:] = y.T @ y, y.sum(0, dtype=float)
        return len(rows) + power, out

    before = []
    arrays = {"y": np.full((3, 3), np.nan, np.float32), "sums": np.full(3, np.nan)}
    with processes.sharing(work, n, arrays) as share:
        for round_ in range(5):
            seen += 1  # what was written in one process, all know
            rows = rng.standard_normal((n + 4 * round_, 4), dtype=np.float32)
            ours = share(rows, power=round_)
            theirs = processes.share_in_threads(work, rows, power=round_)
            assert [number for number, _ in ours] == [number for number, _ in theirs]
            for (_, a), (_, b) in zip(ours, theirs, strict=True):
                assert a["y"].dtype == np.float32 and a["sums"].dtype == float
                assert all((a[name] == b[name]).all() for name in ("y", "sums"))
            before.append((ours[0][1], theirs[0][1]))
    assert all((a["y"] == b["y"]).all() for a, b in before)  # the first one's stay as they were
    threads.start_workers.cache_clear()


@pytest.mark.parametrize(
    "platform_, n_bytes, n",
    [("linux", 1 << 24, 5), ("linux", (1 << 24) + 1, 1), ("darwin", 1, 1), ("win32", 1, 1)],
)
def test_processes_are_for_small_models_on_linux(platform_, n_bytes, n, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform_)
    monkeypatch.setattr(threads, "n_threads", lambda: 5)
    assert [processes.count(n_rows, n_bytes) for n_rows in (12, 2)] == [n, min(n, 2)]


def tell_pid(rows, out):
    return os.getpid(), out


@on_linux
@forks
def test_processes_end_with_the_block_and_their_errors_are_raised():
    def work(rows, out):
        if rows.start > 0:
            raise MemoryError(f"at {rows.start}")
        return os.getpid(), out

    with processes.sharing(work, 3, {}) as share, pytest.raises(MemoryError, match="at 3"):
        share(range(9))
    with processes.sharing(tell_pid, 3, {}) as share:
        pids = [pid for pid, _ in share(range(9))]
        assert pids[0] == os.getpid() and len(set(pids)) == 3
        assert [pid for pid, _ in share(range(9))] == pids
    for pid in pids[1:]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@on_linux
@forks
def test_a_killed_process_is_missed_and_a_ctrl_c_is_not_theirs():
    with processes.sharing(tell_pid, 3, {}) as share:
        _, (second, _), (third, _) = answers = share(range(9))
        for sign in (signal.SIGINT, signal.SIGTERM):
            os.kill(second, sign)
        assert share(range(9)) == answers
        os.kill(third, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match=f"process {third}, which .* has died"):
            for _ in range(100):  # a moment may pass
                share(range(9))


@on_linux
def test_processes_do_not_outlive_a_killed_one():
    script = """
import os, time
from engine import processes
with processes.sharing(lambda rows, out: (os.getpid(), out), 4, {}) as share:
    print(*[pid for pid, _ in share(range(8))], flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert pids[0] == process.pid and len(pids) == 4
    process.kill()
    process.communicate(timeout=60)  # the others hold its output open until they end
    assert not any(is_at_work(pid) for pid in pids)


def is_at_work(pid):  # a process whose parent is gone may stay a zombie for a moment
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
