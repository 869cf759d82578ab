"""What several test files need: real files, a printed seed, random models, transformers' twin."""

import contextlib
import ctypes
import functools
import gc
import importlib
import io
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import utils
from encoder import Encoder
from model_files import config, weights
from plumbing import cli

collect_ignore = ["fuzz.py"]  # a command, and atheris is not among what the tests install
REPO = Path(__file__).resolve().parent.parent
# GPT-2's own tokenizer files and tiny Shakespeare are not part of the project. Tests that want them
# look here, then where the project's own downloads land, and skip where there are none.
DATA = Path(os.environ.get("SIXTYGPT_DATA", REPO.parent / "shared" / "data"))


def first_there(*paths):
    return next((path for path in paths if path.exists()), paths[0])


GPT2_FILES = first_there(DATA / "gpt2-tokenizer", REPO / "models" / "124M")
SHAKESPEARE = first_there(DATA / "shakespeare" / "input.txt", REPO / "data" / "shakespeare.txt")


slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # one of a test's cases
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux, by /proc or prlimit")


def forks(test):
    """Marks a test. Python and JAX warn of threads that a forked process lacks: ours need none."""
    for category in ("DeprecationWarning", "RuntimeWarning"):
        test = pytest.mark.filterwarnings(f"ignore:.*fork:{category}")(test)
    return test


def pytest_collection_finish():
    """Eight devices for test_devices.py; and what two tests compile is compiled once."""
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_num_cpu_devices", 8)  # before JAX starts
        jax.config.update("jax_compilation_cache_dir", compiled.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


compiled = tempfile.TemporaryDirectory()


def pytest_terminal_summary(terminalreporter):
    """What was not run, and why: a line for each reason."""
    stats, markers = terminalreporter.stats, terminalreporter.config.option.markexpr
    counts = Counter(report.longrepr[2].split(": ", 1)[-1] for report in stats.get("skipped", []))
    if markers == "not slow":
        counts["slow: make test-all runs them, too"] = len(stats.get("deselected", []))
    if counts:
        terminalreporter.section("not run")
        for reason, n in counts.most_common():
            terminalreporter.line(f"{n:4} {reason}")


MOST_FREED, MOST_KEPT = 20 << 20, 150 << 20  # bytes of growth, until they are given back
memory = {"without what was freed": 0, "without what was compiled": 0}


@pytest.fixture(autouse=True, scope="module")
def memory_of_a_file_given_back():
    """What its fixtures held."""
    yield
    if sys.platform == "linux":
        gc.collect()
        trim()
        memory["without what was freed"] = resident()


@pytest.fixture(autouse=True)
def memory_given_back():
    """The C library keeps what was freed, XLA what it compiled: gigabytes, in the end."""
    yield
    if sys.platform == "linux" and resident() > memory["without what was freed"] + MOST_FREED:
        trim()
        if resident() > memory["without what was compiled"] + MOST_KEPT:
            if jax := sys.modules.get("jax"):
                jax.clear_caches()
            gc.collect()
            trim()
            memory["without what was compiled"] = resident()
        memory["without what was freed"] = resident()


def resident():  # bytes of memory that this process has
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trim():
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def run(script, *args, models_dir=None, timeout=300, **options):
    """A script as a person runs it: (its exit code, what it printed, what it complained)."""
    where = [] if models_dir is None else ["--models_dir", str(models_dir)]
    words = [word if isinstance(word, bytes) else str(word) for word in args]
    command = [sys.executable, str(REPO / script), *words, *where]
    done = subprocess.run(command, capture_output=True, timeout=timeout, **options)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def call(script, *args, models_dir=None, cwd=".", input=b""):
    """What `run` answers, but in this process: for what is about words, not about processes."""
    where = [] if models_dir is None else ["--models_dir", str(models_dir)]
    words = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in args]
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (input, b"", b"")]
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd), collected_warnings() as met:
        patch.setattr(sys, "argv", [script, *words, *where])
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        try:
            cli.run_cli(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as stop:
            code = stop.code
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])
    return code, out, "".join(f"{warning.message}\n" for warning in met) + err


def call_trainer(*args, **options):
    """`call` for train_jax.py, on one device: JAX has started here with the tests' eight."""
    import jax

    from training import devices

    precision = jax.config.jax_default_matmul_precision
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR"):  # they are chosen
            patch.setenv(name, "")
        patch.setattr("train_jax.make_mesh", lambda batch_size: devices.make_mesh(1))
        patch.setattr("train_jax.peak_flops", lambda *_: (1e11, "measured"))  # in a second
        try:
            return call("train_jax.py", *args, **options)
        finally:
            jax.config.update("jax_default_matmul_precision", precision)


@contextlib.contextmanager
def collected_warnings():
    """Those that a script shows: Python's own choice of them, and not pytest's."""
    with warnings.catch_warnings(record=True) as met:
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        yield met


def random_params(rng, hparams):
    """Float32 parameters that make logits of a few units, and attention that has preferences."""
    arrays = {}
    for name, shape in weights.tensor_shapes(hparams):
        kind = name.split(".")[-1]
        embedding = 2 * hparams["n_embd"] ** -0.5
        scales = {"wte": embedding, "wpe": embedding, "w": shape[0] ** -0.5, "g": 0.3, "b": 0.3}
        arrays[name] = rng.standard_normal(shape, dtype=np.float32) * scales[kind]
        arrays[name] += kind == "g"  # gains around 1
    return weights.nest(arrays)


def tree_map(f, node):
    if isinstance(node, dict):
        return {key: tree_map(f, child) for key, child in node.items()}
    if isinstance(node, list):
        return [tree_map(f, child) for child in node]
    return f(node)


def hugging_face(params, hparams):
    """transformers' GPT-2 with a copy of these parameters; skips the test without transformers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {theirs: hparams[ours] for ours, theirs in config.HUGGING_FACE_SIZES.items()}
    sizes["n_inner"] = hparams.get("n_inner")
    settings = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(settings).eval()  # eval: no dropout
    names = [name for name, _ in weights.tensor_shapes(hparams)]
    state = {
        "transformer." + weights.hugging_face_name(name): torch.tensor(weights.leaf(params, name))
        for name in names
    }
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model


def exclaiming(hparams):
    """Parameters whose equal logits always give id 0, which is "!" where ids are bytes."""
    return weights.nest({n: np.ones(s, np.float32) for n, s in weights.tensor_shapes(hparams)})


TINY = {"n_vocab": 257, "n_ctx": 48, "n_embd": 16, "n_head": 2, "n_layer": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder with one random byte-level model, "tiny", and that model's parameters."""
    seed = secrets.randbits(32)
    print("seed", seed)
    folder = tmp_path_factory.mktemp("models")
    params = random_params(np.random.default_rng(seed), TINY)
    utils.save_model(folder / "tiny", Encoder([]), TINY, params)
    return folder, params


@pytest.fixture(scope="module")
def params(models):
    return models[1]


# --- Servers; they need starlette -----------------------------------------------------------------


@contextlib.contextmanager
def serving(params, hparams=TINY, **options):
    """A client of serve.py's application, whose tokens are bytes, in this process."""
    from starlette.testclient import TestClient

    import serve

    app = serve.make_app("tiny", Encoder([]), hparams, params, **options)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client
    assert not app.state.engine.thread.is_alive()


@contextlib.contextmanager
def on_a_port(app):  # -> (host, port)
    """The application behind uvicorn, on a port of its own."""
    import serve

    with serve.listen("127.0.0.1", 0) as listening:
        server = serve.server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def client(params):
    with serving(params) as client:
        yield client


@pytest.fixture(scope="module")
def address(params):
    import serve

    with on_a_port(serve.make_app("tiny", Encoder([]), TINY, params)) as address:
        yield address


@pytest.fixture(scope="module")
def openai_client(address):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    host, port = address
    return openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)
