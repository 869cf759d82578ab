"""train_jax.py against plain restatements, PyTorch, and a run from text to a model folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SHAKESPEARE
from transformers import GPT2LMHeadModel

import train_jax
from encoder import Encoder
from utils import load_encoder_hparams_and_params

REPO = Path(__file__).parent.parent
SIZES = {"n_vocab": 257, "n_ctx": 16, "n_embd": 24, "n_layer": 2}


@pytest.fixture
def seed():
    seed = int(np.random.SeedSequence().entropy % 2**31)
    print("seed", seed)
    return seed


def run(*args, timeout=300):
    command = [sys.executable, str(REPO / "train_jax.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def names(tree):
    paths = jax.tree.leaves_with_path(tree)
    return {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in p): x for p, x in paths}


def test_initial_parameters_have_the_right_sizes_and_deviations(seed):
    params = names(train_jax.init_params(jax.random.key(seed), 257, 64, 128, 8))
    assert {x.dtype for x in params.values()} == {jnp.dtype("float32")}
    for name, x in params.items():
        if name.endswith(".b"):
            assert (x == 0).all()
        elif name.endswith(".g"):
            assert (x == 1).all()
        else:
            wanted = 0.02 / 4 if name.endswith("c_proj.w") else 0.02  # sqrt(2 * 8 layers) is 4
            assert abs(x.std() / wanted - 1) < 0.05, name
    loss = train_jax.loss(
        train_jax.init_params(jax.random.key(seed), 257, 64, 128, 8),
        jax.random.randint(jax.random.key(seed), (4, 65), 0, 257),
        n_head=4,
    )
    assert abs(loss - np.log(257)) < 0.1  # it knows nothing yet


def test_loss_is_the_mean_surprise(seed):
    params = train_jax.init_params(jax.random.key(seed), **SIZES)
    params = jax.tree.map(lambda x: x * 5, params)
    tokens = jax.random.randint(jax.random.key(seed + 1), (3, 17), 0, 257)
    logits = np.asarray(train_jax.gpt2(tokens[:, :-1], **params, n_head=3), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    surprise = [-np.log(p[i, t, tokens[i, t + 1]]) for i in range(3) for t in range(16)]
    assert abs(train_jax.loss(params, tokens, 3) / np.mean(surprise) - 1) < 1e-5


def test_only_the_matrices_of_the_blocks_decay_and_drop():
    params = train_jax.init_params(jax.random.key(0), **SIZES)
    chosen = {
        name for name, is_matrix in names(train_jax.is_hidden_matrix(params)).items() if is_matrix
    }
    layers = ("attn.c_attn.w", "attn.c_proj.w", "mlp.c_fc.w", "mlp.c_proj.w")
    assert chosen == {f"blocks.{i}.{layer}" for i in range(2) for layer in layers}


def test_weight_decay_shrinks_only_them():
    params = jax.tree.map(jnp.ones_like, train_jax.init_params(jax.random.key(0), **SIZES))
    optimizer = train_jax.make_optimizer(lambda _: 0.5, weight_decay=0.1, grad_clip=1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    chosen = names(train_jax.is_hidden_matrix(params))
    for name, update in names(updates).items():
        assert np.allclose(update, -0.05 if chosen[name] else 0, atol=1e-7), name


def test_schedule_warms_up_from_above_zero_and_ends_at_a_hundredth():
    schedule = train_jax.make_schedule(n_steps=1000, learning_rate=1.0, n_warmup=100)
    assert np.isclose(schedule(0), 0.01)
    assert np.isclose(schedule(50), 0.01 + 0.99 * 0.5)
    assert np.isclose(schedule(100), 1)
    assert np.isclose(schedule(550), (1 + 0.01) / 2)  # half of the cosine's way
    assert np.isclose(schedule(1000), 0.01)
    assert train_jax.make_schedule(n_steps=1, learning_rate=1.0, n_warmup=100)(0) > 0


def test_dropped_weights_are_the_asked_share_and_the_rest_is_scaled_up(seed):
    params = train_jax.init_params(jax.random.key(seed), 257, 64, 128, 2)
    params = jax.tree.map(lambda x: x + 1, params)  # no weight is 0 by itself
    dropped = names(train_jax.drop_weights(jax.random.key(seed), params, 0.25))
    chosen = names(train_jax.is_hidden_matrix(params))
    for name, x in names(params).items():
        if not chosen[name]:
            assert (dropped[name] == x).all()
            continue
        gone = dropped[name] == 0
        assert abs(gone.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / x.size)
        assert np.allclose(dropped[name], np.where(gone, 0, x / 0.75), rtol=1e-6)
        assert dropped[name].dtype == jnp.float32


def test_batches_are_stretches_of_the_text_from_anywhere_in_it(seed):
    text = [np.arange(7, dtype=np.uint16), np.arange(7, 20, dtype=np.uint16)]  # two shards
    batches = train_jax.read_batches(text, seed, 0, 50, 10, 16)
    assert batches.shape == (50, 10, 17) and batches.dtype == np.int32
    assert (np.diff(batches) == 1).all()
    assert set(batches[..., 0].flat) == {0, 1, 2, 3}  # the last stretch ends with the last token


def test_a_steps_batch_depends_on_the_seed_and_the_step_only(seed):
    text = [np.arange(5000, dtype=np.uint16)]
    whole = train_jax.read_batches(text, seed, 0, 8, 3, 16)
    assert (train_jax.read_batches(text, seed, 5, 3, 3, 16) == whole[5:]).all()
    assert len(np.unique(whole[..., 0])) > 15
    assert (train_jax.read_batches(text, seed + 1, 0, 8, 3, 16) != whole).any()


def test_the_largest_seed_draws_too():
    assert train_jax.read_batches([np.arange(99)], 2**32 - 1, 0, 1, 2, 8).shape == (1, 2, 9)


def test_places_beyond_31_bits_are_drawn(seed, monkeypatch):
    """9 * 10**9 ids, which no random number of 31 bits reaches by itself."""
    monkeypatch.setattr(train_jax, "count_ids", lambda shards: 9 * 10**9)
    monkeypatch.setattr(
        train_jax, "read_stretches", lambda shards, starts, n: np.repeat(starts[:, None], n, 1)
    )
    starts = train_jax.read_batches([], seed, 0, 50, 20, 64)
    assert 0 <= starts.min() < 2 * 10**9 and 7 * 10**9 < starts.max() < 9 * 10**9 - 64


def split_text(text, n_ctx):
    """As train_jax.main takes a text: training ids, and validation windows."""
    n_train = len(text) * 9 // 10
    return np.array(text[:n_train]), train_jax.cut_windows([np.array(text[n_train:])], n_ctx)


def test_validation_predicts_each_token_once(monkeypatch):
    windows = train_jax.cut_windows([np.arange(40), np.arange(40, 100)], n_ctx=16)
    assert list(windows[:, 1:].flat) == list(range(1, 1 + 6 * 16))
    assert (windows[:, :-1] + 1 == windows[:, 1:]).all()
    assert train_jax.cut_windows([np.arange(17)], n_ctx=16).shape == (1, 17)
    monkeypatch.setattr(train_jax, "MOST_VALIDATION", 32)  # of more, every third
    assert list(train_jax.cut_windows([np.arange(100)], 16)[:, 0]) == [0, 48]


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_many_steps_a_call_are_the_same_as_one_a_call(seed, drop_rate):
    batches = jax.random.randint(jax.random.key(seed), (8, 4, 17), 0, 257)
    schedule = train_jax.make_schedule(6, 1e-3, 2)
    optimizer = train_jax.make_optimizer(schedule, weight_decay=0.1, grad_clip=1.0)
    steps = train_jax.make_train_steps(optimizer, 3, drop_rate, seed)

    def start():
        params = train_jax.init_params(jax.random.key(seed), **SIZES)
        return params, optimizer.init(params), jnp.int32(0)

    together, mean = steps(start(), batches, 6)
    alone, losses = start(), []
    for i in range(6):
        alone, value = steps(alone, batches[i : i + 1], 1)
        losses.append(float(value))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), together, alone))
    assert np.isclose(mean, np.mean(losses), rtol=1e-6) and len(set(losses)) == 6
    assert {x.dtype.name for x in jax.tree.leaves(together)} == {"float32", "int32"}


BAD = {
    "heads": (["--n_embd", "100", "--n_head", "3"], "multiple of n_head"),
    "no steps": (["--n_steps", "0"], "n_steps must be 1 or more"),
    "drop": (["--drop_rate", "1"], "drop_rate must be"),
    "dtype": (["--dtype", "int8"], "dtype must be"),
    "seed": (["--seed", "-1"], "seed must be from 0"),
    "rate": (["--learning_rate", "nan"], "learning_rate must be more than 0"),
    "decay": (["--weight_decay", "-0.1"], "weight_decay must be 0 or more"),
    "out": (["--out", "/dev/null/model"], "cannot write /dev/null/model"),
    "no text": (["--data", "nowhere.txt"], "no text at nowhere.txt"),
    "a folder": (["--data", "."], ".: no token shards: expected"),
    "no tokenizer": (["--tokenizer", "9M"], "no model '9M'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_ends_in_one_line_before_any_training(tmp_path, case):
    args, words = BAD[case]
    data = [] if "--data" in args else ["--data", "python-docs"]
    to = [] if "--out" in args else ["--out", tmp_path / "out"]
    code, out, err = run(*args, *data, *to)
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "too short"])
def test_too_little_text_is_refused(tmp_path, text):
    (tmp_path / "text").write_text(text)
    code, out, err = run("--data", tmp_path / "text", "--out", tmp_path / "out")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "too few" in err


def test_ctrl_c_keeps_the_model(tmp_path):
    args = ["--data", "python-docs", "--out", tmp_path / "out", "--n_layer", 1, "--n_embd", 8]
    command = [sys.executable, str(REPO / "train_jax.py"), *map(str, [*args, "--eval_every", 20])]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
    assert "parameters" in process.stdout.readline()
    assert "step 20:" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "")
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out").config.n_embd == 8


def train_until(stop, n_before):
    """train() with stand-ins: which parameters and states it keeps when `stop` comes."""
    kept, saved = [], []

    def train_steps(state, batches, n):
        if state[0] == n_before:
            raise stop
        return (state[0] + 1, None, state[2] + n), 1.0

    def checkpoint(state, best):
        saved.append((state[0], best))

    every = {"eval": 10**6, "checkpoint": 10**6}
    with pytest.raises(stop):
        train_jax.train(
            (0, None, 0), train_steps, lambda *_: None, None, 1, 10**6, every, np.inf,
            kept.append, checkpoint,
        )  # fmt: skip
    return kept, saved


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_before_the_first_evaluation_keeps_the_model_too(stop):
    assert train_until(stop, n_before=2) == ([2], [(2, np.inf)])


def test_a_stop_before_the_first_step_keeps_nothing():
    assert train_until(KeyboardInterrupt, n_before=0) == ([], [])


TINY_RUN = ["--data", "python-docs", "--n_layer", 1, "--n_embd", 8, "--n_ctx", 16, "--n_steps", 600]
TINY_RUN += ["--eval_every", 100, "--checkpoint_every", 40, "--drop_rate", 0.1]


def begin(*args):
    command = [sys.executable, str(REPO / "train_jax.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(out, step, process):
    end = time.monotonic() + 120
    while process.poll() is None and not list(out.glob(f"checkpoints/{step:08d}/run.json")):
        assert time.monotonic() < end
        time.sleep(0.002)


def ends(out):
    """All bytes that a run leaves, but for the folder's own name in run.json."""
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return {
        name: data.replace(os.fsencode(out.name), b"OUT") if name.name == "run.json" else data
        for name, data in files.items()
    }


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "never_stopped"
    code, printed, err = run(*TINY_RUN, "--out", out)
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize("sign", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_goes_on_to_the_same_bits(never_stopped, sign):
    out = never_stopped.parent / sign
    process = begin(*TINY_RUN, "--out", out)
    wait_for_step(out, 120, process)
    process.send_signal(getattr(signal, sign))
    printed, err = process.communicate(timeout=120)
    assert (process.returncode, err) == ({"SIGINT": 130, "SIGTERM": 143}[sign], "")
    step = int(re.search(r"stopped after step (\d+), which is saved in ", printed)[1])
    assert 120 <= step < 600 and (out / "checkpoints" / f"{step:08d}" / "run.json").exists()
    code, printed, err = run("--resume", out)
    assert (code, err) == (0, "") and "step 600:" in printed
    assert ends(out) == ends(never_stopped)


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bits(never_stopped):
    out, rng = never_stopped.parent / "killed", np.random.default_rng()
    process = begin(*TINY_RUN, "--out", out)
    for step in (40, 240, 480):
        wait_for_step(out, step, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        places = sorted((out / "checkpoints").glob("0*"))
        assert 1 <= len(places) <= 3
        load_encoder_hparams_and_params(str(places[-1]), ".")
        process = begin("--resume", out)
    assert process.wait(120) == 0, process.stderr.read()
    assert ends(out) == ends(never_stopped)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["00000560", "00000600"]


def test_a_checkpoint_opens_in_transformers(never_stopped):
    place = never_stopped / "checkpoints" / "00000600"
    assert GPT2LMHeadModel.from_pretrained(place).config.n_embd == 8


def test_what_cannot_be_resumed_is_said_in_one_line(never_stopped, tmp_path):
    def refused(*args):
        code, out, err = run(*args)
        assert (code, out) == (2, "") and err.count("\n") == 1
        return err

    assert "nothing to resume: there is no" in refused("--resume", tmp_path)
    assert "leave out --n_steps" in refused("--resume", never_stopped, "--n_steps", 900)
    out = tmp_path / "copy"
    shutil.copytree(never_stopped, out)
    place = out / "checkpoints" / "00000600"
    (tmp_path / "text").write_text("another text " * 999)
    plan = json.loads((place / "run.json").read_text())
    plan["flags"]["data"] = str(tmp_path / "text")
    (place / "run.json").write_text(json.dumps(plan))
    assert "is not the text that" in refused("--resume", out)
    shutil.copy(never_stopped / "checkpoints" / "00000600" / "run.json", place)
    data = (place / "optimizer.safetensors").read_bytes()
    (place / "optimizer.safetensors").write_bytes(data[:-9])
    assert "optimizer.safetensors: cut short or corrupt" in refused("--resume", out)
    (place / "run.json").write_text("{")
    assert "run.json: not JSON" in refused("--resume", out)


def test_a_new_run_puts_an_older_ones_checkpoints_away(tmp_path):
    state = (params := train_jax.init_params(jax.random.key(0), **SIZES)), {}, jnp.int32(7)
    old = tmp_path / "checkpoints" / "00000900"
    old.mkdir(parents=True)
    hparams, saved = {**SIZES, "n_head": 3}, []
    for step, names in ((7, ["00000007"]), (9, ["00000007", "00000009"])):
        state = params, {"x": jnp.ones(3)}, jnp.int32(step)
        place = train_jax.save_checkpoint(tmp_path, saved, state, {}, Encoder([]), hparams)
        assert sorted(os.listdir(tmp_path / "checkpoints")) == names
        assert train_jax.find_checkpoint(tmp_path) == (place, {"step": step})


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    flags = [
        "--learning_rate",
        1e30,
        "--n_warmup",
        30,
        "--checkpoint_every",
        1,
        "--grad_clip",
        1e30,
    ]
    code, out, err = run(*TINY_RUN[:-6], *flags, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1
    assert re.search(r"the loss is (nan|inf) at step \d+: the(re| last) ", err)


@pytest.mark.slow
def test_the_shipped_model_has_the_validation_loss_that_its_readme_states():
    if not SHAKESPEARE.is_file():
        pytest.skip(f"tiny Shakespeare is not at {SHAKESPEARE} (set SIXTYGPT_DATA)")
    folder = REPO / "models" / "shakespeare"
    stated = float(re.search(r"\*\*([\d.]+)\*\* nats", (folder / "README.md").read_text())[1])
    encoder, hparams, params = load_encoder_hparams_and_params(str(folder), "models")
    _, windows = split_text(encoder.encode(SHAKESPEARE.read_text()), hparams["n_ctx"])
    validation = train_jax.evaluate(params, windows, hparams["n_head"])
    assert abs(validation - stated) < 1e-3 and stated <= 1.5
    assert sum(x.size for x in jax.tree.leaves(params)) == 2_768_064
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6


def bigram_loss(train, validation):
    """Nats a token when only the one before is known: counts of pairs, each counted once more."""
    pairs, firsts = Counter(zip(train[:-1], train[1:], strict=True)), Counter(train[:-1])
    n_seen = len(set(train))
    p = [
        (pairs[pair] + 1) / (firsts[pair[0]] + n_seen)
        for pair in zip(validation[:-1], validation[1:], strict=True)
    ]
    return -np.mean(np.log(p))


@pytest.mark.slow
def test_a_run_on_python_docs_learns_more_than_pairs_and_opens_in_transformers(tmp_path):
    code, out, err = run("--data", "python-docs", "--out", tmp_path / "docs", "--n_steps", 400)
    assert (code, err) == (0, "")
    validation = float(re.findall(r"validation (\S+)", out)[-1])

    ids = Encoder([]).encode(train_jax.load_text("python-docs"))
    train, windows = split_text(ids, n_ctx=64)
    assert validation < bigram_loss(train.tolist(), ids[len(train) :]) - 0.1

    model = GPT2LMHeadModel.from_pretrained(tmp_path / "docs")
    windows = torch.from_numpy(windows).long()
    with torch.inference_mode():
        logits = model(windows[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert abs(theirs - validation) < 1e-3

    command = [
        sys.executable,
        str(REPO / "gpt2.py"),
        "The ",
        "--model_size",
        str(tmp_path / "docs"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 41)
