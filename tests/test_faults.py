"""Kills, full disks, folders that turn read-only or vanish, clocks that go back: at any moment.

What was complete is still there, what is not complete does not look it, and the next run goes on.
SIXTYGPT_KILLS raises the number of kills at random times: SIXTYGPT_KILLS=50 pytest -k random
"""

import contextlib
import functools
import gzip
import hashlib
import http.client
import json
import os
import pty
import random
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import faults
import numpy as np
import pytest
import test_download
from conftest import REPO, TINY, exclaiming, on_linux, random_params, slow

import gpt2
import utils
from encoder import Encoder
from model_files import adapters
from training import checkpoints

KILLS = int(os.environ.get("SIXTYGPT_KILLS", 2))
server = test_download.server  # a fixture
FAULTS = ("killed", "full", "read-only")


def python(code, *args, timeout=120, also=""):
    """Run some Python, with tests/ and the project to import from, and `also`; -> its lines."""
    paths = os.pathsep.join([str(REPO), str(REPO / "tests"), str(also)])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout.splitlines()


# At every single change that the code makes to a folder

DOWNLOAD = """
import hashlib, os, sys, faults
from model_files import download
url, folder, fault, sha256 = sys.argv[1:]
path = folder + "/new/file"
download.BACKOFF = 0.001

def whole():
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() == sha256

for n in faults.at_every_change(folder, fault, lambda: download.download_file(url, path)):
    part = path + ".part"
    all_there = os.path.exists(part) and os.path.getsize(part) == 300_000
    assert not os.path.exists(path) or whole()
    download.download_file("http://127.0.0.1:9/nobody" if all_there else url, path)
    assert whole() and set(os.listdir(folder + "/new")) <= {"file", "file.part.json"}
print(n)
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_survives_a_fault_at_every_step(server, tmp_path, fault):
    sha256 = hashlib.sha256(server.files[test_download.FILE]).hexdigest()
    *lines, n = python(
        DOWNLOAD, server.url + test_download.FILE, tmp_path / "models", fault, sha256
    )
    assert int(n) >= (4 if fault == "full" else 6)  # folders, part, note; and the renaming
    assert all(line.startswith(f"cannot write {tmp_path}/models/new/file: ") for line in lines)
    assert len(lines) == (0 if fault == "killed" else int(n))


# Three models of one size, of which no two have a tensor or a merge in common.
MODELS = """
import json, os, shutil, sys, numpy as np, faults, utils
from encoder import Encoder
from model_files import weights
from training import checkpoints
folder, fault = sys.argv[1:]
hparams = {"n_vocab": 258, "n_ctx": 4, "n_embd": 4, "n_head": 2, "n_layer": 1}
encoders = {k: Encoder([("a", chr(97 + k))]) for k in (1, 2, 3)}

def params(k):
    return weights.nest({n: np.full(s, k, "f4") for n, s in weights.tensor_shapes(hparams)})

def which(place):  # the number of the model there, or None
    try:
        encoder, _, found = utils.load_encoder_hparams_and_params(str(place), ".")
    except (ValueError, OSError):
        return None
    k = int(found["wpe"][0, 0])
    assert all((weights.leaf(found, n) == k).all() for n, _ in weights.tensor_shapes(hparams))
    assert encoder.merges == encoders[k].merges, "a mixture"
    return k

def save(k, place=folder):
    utils.save_model(place, encoders[k], hparams, params(k))
"""

SAVING = """
before = folder + "-before"
save(1, before)
for n in faults.at_every_change(folder, fault, lambda: save(1)):
    assert which(folder) in (1, None)
for n in faults.at_every_change(folder, fault, lambda: save(2), before):
    assert which(folder) in ((1, 2) if fault == "full" else (1, 2, None))
    save(2)
    assert which(folder) == 2
encoders[2] = encoders[1]  # the same model with other weights, as a training run saves it
for n in faults.at_every_change(folder, fault, lambda: save(2), before):
    assert which(folder) in (1, 2)
print(n)
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_saving_survives_a_fault_at_every_step(tmp_path, fault):
    lines = python(MODELS + SAVING, tmp_path / "model", fault)
    assert int(lines.pop()) >= 7
    assert set(lines) <= {f"cannot write {tmp_path}/model: {words}" for words in WORDS[fault]}


CHECKPOINTS = """
def begin(out, run):  # as a new run does
    os.makedirs(out, exist_ok=True)
    with open(out + "/metrics.jsonl", "w") as f:
        f.write(json.dumps({"step": 0, "run": run}) + chr(10))

def save(out, k, step, saved=(), run=8):
    state = checkpoints.State(params(k), {"mu": np.full(3, k, "f4")}, step)
    metadata, previous = {"flags": {"seed": k}, "run": run}, ([None] + [*saved])[-1]
    model = utils.Model(encoders[k], hparams, None)
    return checkpoints.save_checkpoint(out, model, state, metadata, previous)

def found():  # (step, the number of the model) of the checkpoint that would be resumed, or None
    try:
        place, run = checkpoints.find_checkpoint(folder)
    except FileNotFoundError:
        return None
    *_, moments = checkpoints.load_checkpoint(place, lambda p: {"mu": ((3,), np.dtype("f4"))})
    assert which(place) == run["flags"]["seed"] == moments["mu"][0]
    return run["step"], run["flags"]["seed"]

before = folder + "-before"
begin(before, 8)
saved = [save(before, 1, 40)]
saved += [save(before, 2, 60, saved)]
saved = [place.replace(before, folder) for place in saved]
for n in faults.at_every_change(folder, fault, lambda: save(folder, 3, 80, saved), before):
    assert found() in [(60, 2), (80, 3)]  # the same run goes on
    save(folder, 1, 100, saved)
    assert found() == (100, 1)
for n in faults.at_every_change(folder, fault, lambda: save(folder, 3, 80, saved[1:]), before):
    assert found() in [(60, 2), (80, 3)]  # a resumed run
    save(folder, 1, 100, saved[1:])
    assert found() == (100, 1) and len(os.listdir(folder + "/checkpoints")) == 2
begin(before, 9)  # from here on, the two in there are an earlier run's
olds = faults.files(before).items()
for step in (20, 60):
    for n in faults.at_every_change(folder, fault, lambda: save(folder, 3, step, run=9), before):
        assert found() in [None, (step, 3)]
        assert found() or all(old in faults.files(folder).items() for old in olds)
        save(folder, 1, 20, run=9)
for n in faults.at_every_change(folder, fault, lambda: save(folder, 3, 20, run=9), before):
    save(folder, 1, 20, run=9)
    assert found() == (20, 1) and len(os.listdir(folder + "/checkpoints")) == 1
print(n)
"""
WORDS = {
    "killed": [""],
    "full": ["No space left on device"],
    "read-only": ["Read-only file system"],
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_survives_a_fault_at_every_step(tmp_path, fault):
    lines = python(MODELS + CHECKPOINTS, tmp_path / "out", fault)
    assert int(lines.pop()) >= 10
    start = f"cannot write {tmp_path}/out/checkpoints/000000"
    assert all(line.startswith(start) and line.endswith(*WORDS[fault]) for line in lines)


# TensorFlow's part is played by a dict: a process that imported the real one could not be forked.
TENSORFLOW = """
import types, numpy as np
from model_files import weights
hparams = {"n_vocab": 258, "n_ctx": 4, "n_embd": 4, "n_head": 2, "n_layer": 1}
variables = {}
for name, shape in weights.tensor_shapes(hparams):
    shape = (1, *shape) if name.endswith(".w") else shape
    variables[weights.tensorflow_name(name)] = np.full(shape, 1, "f4")
shapes = {name: list(array.shape) for name, array in variables.items()}
reader = types.SimpleNamespace(
    get_variable_to_shape_map=lambda: shapes, get_tensor=variables.__getitem__
)
train = types.SimpleNamespace(load_checkpoint=lambda path: path.encode() and reader)
errors = types.SimpleNamespace(OpError=ZeroDivisionError)
"""
CONVERTING = """
import contextlib, io, json, resource
from model_files import convert
before, converted = folder + "-before", folder + "/model.safetensors"
spare = os.path.dirname(folder) + "/spare"
os.mkdir(before)
for name, text in {
    "model.ckpt.index": "", "vocab.bpe": "#version: 0.2\\na b\\n",
    "encoder.json": json.dumps(encoders[1].vocab), "hparams.json": json.dumps(hparams),
}.items():
    with open(before + "/" + name, "w") as f:
        f.write(text)
def work():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        convert.main(folder + "/model.ckpt", converted, spare)
    if not os.path.exists(converted):
        assert weights.read_safetensors(spare)
        assert said.getvalue() == f"notice: cannot write {converted}: Read-only file system\\n"
for n in faults.at_every_change(folder, fault, work, before):
    assert not os.path.exists(converted) or weights.read_safetensors(converted)
    assert which(folder) == 1 and os.path.exists(converted)
print(n)
os.unlink(converted)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a full disk, in the midst of the weights
there = os.listdir(folder)
assert which(folder) is None and os.listdir(folder) == there
"""


@pytest.mark.parametrize("fault", ["killed", "read-only"])
def test_a_conversion_survives_a_fault_at_every_step(tmp_path, fault):
    (tmp_path / "tensorflow.py").write_text(TENSORFLOW)
    *lines, n = python(MODELS + CONVERTING, tmp_path / "124M", fault, also=tmp_path)
    assert lines == []
    assert int(n) >= 2


LEFT_OVER = """
import subprocess
from pathlib import Path
folder = Path(os.fsdecode(b"\\xff124M"))
folder.mkdir()
for name, text in {
    "model.ckpt.index": "", "vocab.bpe": "#version: 0.2\\na b\\n",
    "encoder.json": json.dumps(encoders[1].vocab), "hparams.json": json.dumps(hparams),
}.items():
    (folder / name).write_text(text)
ended = subprocess.Popen(["true"])
ended.wait()
left = [f"model.safetensors.{pid}.tmp" for pid in (os.getpid(), ended.pid, "9" * 30, "x")]
for name in [*left, f"other.{ended.pid}.tmp"]:
    (folder / name).write_text("half of it")
before = set(os.listdir(folder))
assert which(folder) == 1
assert set(os.listdir(folder)) == before - {left[1]} | {"model.safetensors"}
(folder / "model.safetensors").unlink()
(folder / "hparams.json").write_text(json.dumps(hparams | {"n_layer": 2}))
try:
    utils.load_encoder_hparams_and_params(str(folder), ".")
except ValueError as error:
    print(str(error).encode(errors="surrogateescape"))
"""


def test_a_conversion_clears_what_a_killed_one_left_in_a_folder_of_any_name(tmp_path):
    """Not what a process still writes. The folder's name is no UTF-8, which TensorFlow wants."""
    (tmp_path / "tensorflow.py").write_text(TENSORFLOW)
    code = f"import os; os.chdir({str(tmp_path)!r})\n" + MODELS + LEFT_OVER
    [line] = python(code, "-", "-", also=tmp_path)
    assert line.startswith(repr(os.fsencode(tmp_path) + b"/\xff124M/model.ckpt: model/h1/")[:-1])


PREPARING = """
import os, sys, faults, prepare, utils
folder, fault, *inputs = sys.argv[1:]
how = {"shard_mb": 0.0004, "val_fraction": 0.2, "workers": 1, "out": folder}

def work():
    stdout, sys.stdout = sys.stdout, open(os.devnull, "w")
    try:
        prepare.main(*inputs, **how)
    finally:
        sys.stdout = stdout

def complete():
    return "meta.json" in os.listdir(folder)

work()
whole = faults.files(folder)
shards = {name for name in whole if name.endswith(".bin")}
for n in faults.at_every_change(folder, fault, work):
    there = faults.files(folder) if os.path.isdir(folder) else {}
    assert all(whole[name] == there[name] for name in shards & there.keys())
    assert "meta.json" not in there or whole.items() <= there.items()
    notes = {n for n in there if n.startswith(".work/0") and n.endswith(".json")}
    done = {f"{split}_{name[6:12]}.bin" for name in notes for split in ("train", "val")} & shards
    when = {name: os.stat(folder + "/" + name).st_mtime_ns for name in done}
    work()
    assert faults.files(folder) == whole
    assert all(os.stat(folder + "/" + name).st_mtime_ns == ns for name, ns in when.items())
print(n)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_preparation_survives_a_fault_at_every_step(tmp_path, fault):
    """Of a plain file and a packed one: no shard is half written, none is written again."""
    text = "".join(f"document {i} of some words\n<|endoftext|>\n" for i in range(30))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    out = tmp_path / "shards"
    *lines, n = python(PREPARING, out, fault, tmp_path / "a.txt", tmp_path / "b.txt.gz")
    assert int(n) > 20
    assert all(line.startswith(str(out)) and line.endswith(*WORDS[fault]) for line in lines)


# At random times, as whole processes


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)
    return random.Random(seed)


def begin(script, *args, **options):
    """A process group of its own, so that a test may kill its workers, too."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(REPO / script), *map(str, args)]
    return subprocess.Popen(command, start_new_session=True, **pipes | options)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), err
    return out


def text_of(rng, n):  # documents of a few words each
    words = ["a", "king's", "hören", "我们", "🙂", "x" * 70, "1984", "\n\n"]
    return "".join(
        " ".join(rng.choices(words, k=rng.randrange(1, 40))) + f" {i}\n<|endoftext|>\n"
        for i in range(n)
    )


@pytest.mark.slow
def test_preparation_killed_at_random_times_makes_the_same_bytes(tmp_path, rng):
    text = text_of(rng, 4000)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    args = [tmp_path / "a.txt", tmp_path / "b.txt.gz", "--shard_mb", "0.02", "--workers", "2"]
    started = time.monotonic()
    finish(begin("prepare.py", *args, "--out", tmp_path / "whole"))
    seconds = time.monotonic() - started
    whole, n_killed, n_finished = faults.files(tmp_path / "whole"), 0, 0
    while n_killed < KILLS:
        process, out = begin("prepare.py", *args, "--out", tmp_path / "out"), tmp_path / "out"
        try:
            process.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            rng.choice([os.kill, os.killpg])(process.pid, signal.SIGKILL)
            n_killed += 1
        process.communicate()
        there = faults.files(out) if out.exists() else {}
        shards = {name for name in there if name.endswith(".bin")}
        assert all(there[name] == whole[name] for name in shards)
        assert "meta.json" not in there or whole.items() <= there.items()
        if process.returncode == 0:
            assert there == whole
            n_finished += 1
            shutil.rmtree(out)
    finish(begin("prepare.py", *args, "--out", out))
    assert faults.files(out) == whole
    print(f"preparation: {n_killed} kills, {n_finished + 1} runs that finished, all alike")


TRAINING = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--n_ctx", 16, "--n_steps", 240]
TRAINING += ["--eval_every", 20, "--checkpoint_every", 40]


def start_training(*args, script="train_jax.py"):
    """-> the process, when it begins to write into its folder: what comes before is JAX's start."""
    process = begin(script, *args)
    read_until("FLOP", process)
    return process


def read_until(words, process):
    """Read the lines of its output up to the one with these words."""
    while words not in (line := process.stdout.readline()):
        assert line, f"{words} was not printed"


OTHERS = {  # the other trainers, and how many bytes are too few for a model, and for its moments
    "train_jax.py": (
        ["--lora_rank", 16, "--lora_targets", ",".join(adapters.LAYERS)],
        12_000,
        25_000,
    ),
    "backprop.py": ([], 20_000, 40_000),
}


@pytest.fixture(scope="module", params=OTHERS)
def other_training(request, tmp_path_factory):
    """As `training`, of LoRA adapters and by backprop.py. -> script, flags, and what it makes."""
    seed = secrets.randbits(32)
    print("seed", seed)
    script, folder = request.param, tmp_path_factory.mktemp("other")
    (folder / "text").write_text(text_of(random.Random(seed), 300))
    flags = ["--data", folder / "text", *TRAINING, *OTHERS[script][0]]
    if script == "train_jax.py":
        hparams = {"n_vocab": 257, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 1}
        params = random_params(np.random.default_rng(seed), hparams)
        utils.save_model(folder / "base", Encoder([]), hparams, params)
        sizes = ("--n_layer", "--n_head", "--n_embd")  # the base's
        at = [flags.index(name) for name in sizes]
        flags = [word for i, word in enumerate(flags) if i not in at and i - 1 not in at]
        flags += ["--init_from", folder / "base"]
    finish(begin(script, *flags, "--out", folder / "whole"))
    return script, flags, trained(folder / "whole")


def trained(out):
    """All bytes that a run leaves, but for the log's times, the folder's name, the run's number."""
    there = faults.files(out)
    there.pop("loss.png", None)
    lines = list(map(json.loads, there.pop("metrics.jsonl").splitlines()))
    log = [(line["step"], line.get("loss"), line.get("validation")) for line in lines]
    number = b'"run": %d' % lines[0]["run"]  # another one in every run
    same = {os.fsencode(out): b"OUT", number: b'"run": 7'}
    for name, data in there.items():
        for found, instead in same.items():
            there[name] = data = data.replace(found, instead)
    return there, log


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The flags of a training run, and what it makes."""
    seed = secrets.randbits(32)
    print("seed", seed)
    folder = tmp_path_factory.mktemp("training")
    (folder / "text").write_text(text_of(random.Random(seed), 300))
    flags = ["--data", folder / "text", *TRAINING]
    finish(begin("train_jax.py", *flags, "--out", folder / "whole"))
    return flags, trained(folder / "whole")


def wait_until(condition, process):  # or it has ended
    while process.poll() is None and not condition():
        time.sleep(0.002)


@pytest.mark.slow
def test_training_killed_at_random_times_comes_to_the_same_bits(training, tmp_path, rng):
    kill_at_random_times("train_jax.py", *training, tmp_path / "out", rng)


@pytest.mark.slow
def test_other_training_killed_at_random_times_does_so_too(other_training, tmp_path, rng):
    kill_at_random_times(*other_training, tmp_path / "out", rng)


def kill_at_random_times(script, flags, whole, out, rng):
    n_killed, n_finished = 0, 0
    fresh = again = [*flags, "--out", out, "--overwrite"]  # it may be killed before a checkpoint

    def n_lines():
        log = out / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    while n_killed < KILLS:
        process, n = start_training(*again, script=script), rng.randrange(len(whole[1]))
        wait_until(lambda n=n: n_lines() >= n, process)
        time.sleep(rng.uniform(0, 0.3))  # of a look at the validation text, a save, a picture
        process.kill()
        _, err = process.communicate()
        assert err == "" and process.returncode in (0, -signal.SIGKILL)
        n_killed += process.returncode != 0
        if process.returncode == 0:
            assert trained(out) == whole
            n_finished += 1
            shutil.rmtree(out)
        try:
            place, _ = checkpoints.find_checkpoint(out)
            utils.load_encoder_hparams_and_params(place, ".")
            again = ["--resume", out]
        except FileNotFoundError:  # there is none yet
            again = fresh
        if any(out.glob("*model.safetensors")):
            utils.load_encoder_hparams_and_params(str(out), ".")
    finish(begin(script, *again))
    assert trained(out) == whole
    print(f"{script}: {n_killed} kills, {n_finished + 1} runs that finished, all alike")


@pytest.mark.slow
@on_linux
def test_training_survives_full_disks_and_a_folder_that_is_lost(training, tmp_path):
    """One after the other, and then goes on to the same bits as if nothing had been."""
    meet_full_disks("train_jax.py", *training, tmp_path, 20_000, 40_000)


@pytest.mark.slow
@on_linux
def test_other_training_survives_full_disks_too(other_training, tmp_path):
    meet_full_disks(*other_training, tmp_path, *OTHERS[other_training[0]][1:])


def meet_full_disks(script, flags, whole, tmp_path, n_less, n_more):
    """n_less: bytes that are too few for the best model; n_more: and for the moments."""
    out, away = tmp_path / "out", tmp_path / "away"

    def ends(process, *refused):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.count("\n") == 1
        assert any(err.startswith(f"error: cannot write {place}: ") for place in refused), err
        return err

    def fill_disk(process, n_bytes):  # no file may be larger now
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    start = functools.partial(start_training, script=script)
    process = start(*flags, "--out", out)
    wait_until((out / "checkpoints" / "00000040").exists, process)
    fill_disk(process, n_less)  # no room for the best model, nor for a checkpoint's
    places = [out / "checkpoints" / f"{step:08d}" for step in range(40, 241, 40)]
    assert ends(process, out, *places).endswith(": File too large\n")
    process = start("--resume", out)
    fill_disk(process, n_more)  # for a model, but not for the moments
    assert ends(process, *places).endswith(": File too large\n")
    process = start("--resume", out)
    read_until("resuming ", process)
    process.stdout.readline()  # a look at the validation text
    process.send_signal(signal.SIGSTOP)
    os.rename(out, away)
    out.write_text("a file")
    process.send_signal(signal.SIGCONT)
    ends(process, out, *places)
    assert out.read_text() == "a file"
    out.unlink()
    os.rename(away, out)
    finish(begin(script, "--resume", out))
    assert trained(out) == whole


READ_ONLY = """
import importlib, sys, faults
from plumbing import cli
script, out, n = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
faults.arm(out, "read-only", n)
cli.run_cli(importlib.import_module(script.removesuffix(".py")).main)
"""


@pytest.mark.slow
def test_other_training_survives_folders_that_turn_read_only(other_training, tmp_path, rng):
    """At once, early and late: one line each, and then the same bits as if nothing had been."""
    script, flags, whole = other_training
    out = tmp_path / "out"
    fresh = again = [*flags, "--out", out, "--overwrite"]
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    for n in (0, rng.randrange(1, 10), rng.randrange(20, 40)):
        command = [sys.executable, "-c", READ_ONLY, script, out, n, *again]
        before = faults.files(out)
        done = subprocess.run(
            [*map(str, command)], env=os.environ | {"PYTHONPATH": path},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (n, done.stderr)
        assert done.stderr.startswith(f"error: cannot write {out}"), (n, done.stderr)
        assert done.stderr.endswith(": Read-only file system\n")
        assert n or faults.files(out) == before
        try:
            place, _ = checkpoints.find_checkpoint(out)
            utils.load_encoder_hparams_and_params(place, ".")
            again = ["--resume", out]
        except FileNotFoundError:
            again = fresh
    finish(begin(script, *again))
    assert trained(out) == whole


@pytest.mark.slow
def test_two_trainings_into_one_folder(training, tmp_path):
    begin_twice("train_jax.py", *training, tmp_path / "out")


@pytest.mark.slow
def test_two_other_trainings_into_one_folder(other_training, tmp_path):
    begin_twice(*other_training, tmp_path / "out")


def begin_twice(script, flags, whole, out):
    first = start_training(*flags, "--out", out, script=script)
    wait_until((out / "metrics.jsonl").exists, first)
    second = begin(script, *flags, "--out", out, "--overwrite")
    _, err = second.communicate(timeout=120)
    held = (second.returncode, err) == (2, f"error: {out}: another run is writing to this folder\n")
    assert held or second.returncode == 0 and first.poll() == 0, err  # or the first had ended
    finish(first)
    assert trained(out) == whole


CACHE = """
import os, sys, warnings, jax, jax.numpy as jnp
from pathlib import Path
from training import devices
devices.start_jax(None, None, None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
double = jax.jit(lambda x: jnp.sin(x) * 2)
double(jnp.ones(3))
whole = {path: path.stat().st_size for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*-cache")}
for path, size in whole.items():
    os.truncate(path, size // 2)
for _ in range(2):
    jax.clear_caches()
    double(jnp.ones(3))
assert whole and all(path.stat().st_size > 0.9 * size for path, size in whole.items())
warnings.warn("something else")
"""


def test_what_a_kill_cut_short_in_jaxs_cache_is_made_again_without_a_word(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    done = subprocess.run([sys.executable, "-c", CACHE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *source = done.stderr.splitlines()  # which newer Pythons show, too
    assert first.endswith("UserWarning: something else") and len(source) < 2


def test_what_a_kill_left_of_a_save_is_cleared_away(tmp_path):
    (tmp_path / ".saving-abc").mkdir()
    (tmp_path / ".saving-abc" / "model.safetensors").write_bytes(b"half")
    half_written = ["metrics.jsonl.123.tmp", "loss.png.123.tmp"]
    half_written += ["adapter_config.json.123.tmp", "adapter_model.safetensors.123.tmp"]
    for name in (*half_written, "metrics.jsonl", "notes.tmp"):
        (tmp_path / name).write_text("x")
    checkpoints.delete_half_written(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "notes.tmp"]


def test_a_page_that_a_full_disk_refuses_leaves_the_old_one(tmp_path):
    (tmp_path / "explain.html").write_text("an older page")
    model = ["--model_size", "shakespeare", "--models_dir", REPO / "models"]
    command = [sys.executable, REPO / "explain.py", "ROMEO", "--overwrite", *model]
    limited = ["sh", "-c", 'ulimit -f 19; exec "$@"', "-", *map(str, command)]  # 10 or 19 kB
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    problem = f"error: cannot write {tmp_path}/explain.html: File too large\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", problem)
    assert faults.files(tmp_path) == {"explain.html": b"an older page"}


# A server, killed under load and started again

N_CLIENTS, N_PROMPTS, N_NEW = 8, 12, 20


def start_server(*args):  # -> the process, its port
    process = begin("serve.py", *args)
    return process, int(process.stdout.readline().rpartition(":")[2])


def ask(port, prompt, is_stream):  # -> (the text so far, whether all of it has come)
    data = {"prompt": prompt, "max_tokens": N_NEW, "temperature": 0, "ignore_eos": True}
    text, client = "", http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(client):
        client.request("POST", "/v1/completions", json.dumps(data | {"stream": is_stream}))
        answer = client.getresponse()
        assert answer.status == 200
        if not is_stream:
            return json.loads(answer.read())["choices"][0]["text"], True
        for line in answer:
            event = line.removeprefix(b"data: ").strip()
            if event == b"[DONE]":
                return text, True
            if event and line.endswith(b"\n"):
                text += json.loads(event)["choices"][0]["text"]
    return text, False


@pytest.mark.slow
def test_a_server_killed_under_load_answers_rightly_when_it_is_back(tmp_path, rng):
    params = random_params(np.random.default_rng(rng.randrange(2**32)), TINY)
    utils.save_model(tmp_path / "tiny", Encoder([]), TINY, params)
    prompts = [[rng.randrange(256) for _ in range(rng.randrange(1, 25))] for _ in range(N_PROMPTS)]
    ids = [gpt2.generate(prompt, params, TINY["n_head"], N_NEW) for prompt in prompts]
    texts, counts, answers = list(map(Encoder([]).decode, ids)), Counter(), deque()
    port, deadline = 0, None

    def client(seed):
        rng = random.Random(seed)
        while time.monotonic() < deadline:
            i = rng.randrange(N_PROMPTS)
            answers.append((i, *ask(port, prompts[i], rng.random() < 0.5)))

    while counts["kills"] < KILLS:
        process, port = start_server("--model_size", tmp_path / "tiny", "--port", port)
        wait = rng.uniform(0, 1)
        deadline = time.monotonic() + wait + 0.2  # some ask when there is nobody
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(client, rng.random()) for _ in range(N_CLIENTS)]
            time.sleep(wait)
            process.kill()
            counts["kills"] += 1
            for one in asked:
                one.result()
        assert process.communicate()[1] == ""
    process, port = start_server("--model_size", tmp_path / "tiny", "--port", port)
    for i, prompt in enumerate(prompts):
        answers.append((i, *ask(port, prompt, i % 2 == 0)))
    second = begin("serve.py", "--model_size", tmp_path / "tiny", "--port", port)
    taken = "error: Address already in use"
    assert second.communicate(timeout=60)[1].startswith(taken) and second.returncode == 2
    process.terminate()
    process.communicate(timeout=60)
    for i, text, is_whole in answers:
        assert text == texts[i] if is_whole else texts[i].startswith(text.rstrip("\ufffd"))
        counts["whole" if is_whole else "cut off"] += 1
    assert counts["whole"] >= N_PROMPTS
    print(dict(counts))


# A clock that goes back or forward, or stands still

BACKWARDS = """
import itertools, sys, time
hour = 3600 if "forward" in sys.argv else -3600
clock = map(float, itertools.count(2e9, hour))  # at every look
time.time = lambda: next(clock)
time.time_ns = lambda: int(next(clock) * 1e9)
if "still" in sys.argv:
    time.monotonic = time.perf_counter = lambda: 1000.0
sys.argv = [word for word in sys.argv if word not in ("back", "forward", "still")]
import importlib; from plumbing import cli
cli.run_cli(importlib.import_module(sys.argv.pop(1).removesuffix(".py")).main)
"""


def begin_backwards(program, *args, **pipes):
    command = [sys.executable, "-c", BACKWARDS, program, *map(str, args)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(REPO)}, **pipes)


def run_backwards(program, *args):
    """With a terminal for stderr, so that there are bars, which look at the clock all the time."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process = begin_backwards(program, *args, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # which is how a terminal's end is told
        while some := os.read(screen, 2**16):
            shown += some
    process.communicate(timeout=120)
    os.close(screen)
    assert process.returncode == 0, shown.decode()
    return shown


@pytest.mark.parametrize("clock", [slow("back"), slow("forward"), "still"])
def test_preparation_does_not_trust_the_clock(tmp_path, rng, clock):
    (tmp_path / "a.txt").write_text(text_of(rng, 300))
    args = [tmp_path / "a.txt", "--workers", "1", "--shard_mb", "0.01", "--out"]
    finish(begin("prepare.py", *args, tmp_path / "whole"))
    assert b"tokens/s" in run_backwards("prepare.py", *args, tmp_path / "out", clock)
    whole = faults.files(tmp_path / "whole")
    assert faults.files(tmp_path / "out") == whole
    for name in whole:  # made in the future, or long ago: nothing is made again
        os.utime(tmp_path / "out" / name, (2**32, 2**32) if rng.random() < 0.5 else (0, 0))
    there = {name: (tmp_path / "out" / name).stat() for name in whole}
    finish(begin("prepare.py", *args, tmp_path / "out"))
    assert all((tmp_path / "out" / name).stat().st_mtime == s.st_mtime for name, s in there.items())
    text = (tmp_path / "a.txt").read_bytes()
    (tmp_path / "a.txt").write_bytes(text[::-1])  # as long, and older than the shards that it made
    os.utime(tmp_path / "a.txt", (0, 0))
    _, err = (process := begin("prepare.py", *args, tmp_path / "out")).communicate(timeout=60)
    assert process.returncode == 2 and "(other sources)" in err


CLOCKS = pytest.mark.parametrize("clock", ["back", "forward"])


@pytest.mark.slow
@CLOCKS
def test_training_does_not_trust_the_clock(training, tmp_path, clock):
    flags, whole = training
    out = tmp_path / "out"
    assert b"tok/s" in run_backwards("train_jax.py", *flags, "--out", out, clock)
    assert trained(out) == whole


@pytest.mark.slow
@CLOCKS
def test_other_training_does_not_trust_the_clock_either(other_training, tmp_path, clock):
    script, flags, whole = other_training
    assert b"tok/s" in run_backwards(script, *flags, "--out", tmp_path / "out", clock)
    assert trained(tmp_path / "out") == whole


@CLOCKS
def test_the_server_does_not_trust_the_clock(tmp_path, clock):
    """No request comes to its --timeout because of it, and every answer says when it was made."""
    params = exclaiming(TINY)
    utils.save_model(tmp_path / "tiny", Encoder([]), TINY, params)
    args = ["serve.py", clock, "--model_size", tmp_path / "tiny", "--timeout", 100, "--port", 0]
    process = begin_backwards(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    port = int(process.stdout.readline().rpartition(b":")[2])
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda i: ask(port, [i], i % 2 == 0), range(20)))
    process.terminate()
    assert process.communicate(timeout=60)[1] == b""
    assert answers == [(N_NEW * "!", True)] * 20


def test_the_last_checkpoint_is_that_of_the_last_step_not_of_the_latest_date(tmp_path):
    for step in ("00000009", "00000010", "00000100"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "run.json").write_text("{}")
    for path in (tmp_path / "checkpoints" / "00000100").rglob("*"):
        os.utime(path, (0, 0))
    assert checkpoints.find_checkpoint(tmp_path)[0].endswith("00000100")


def test_a_download_does_not_trust_the_clock(server, tmp_path, monkeypatch):
    clock = iter(range(2 * 10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    server.faults = ["drop", "refuse", "drop"]
    assert test_download.fetched(server, tmp_path / "models" / "file")
    assert test_download.resumed_at(server) == [0, 9, 9, 13]
