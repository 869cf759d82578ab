"""Kills, full disks, folders that turn read-only or vanish, clocks that go back: at any moment.

What was complete is still there, what is not complete does not look it, and the next run goes on.
SIGXTYGPT_KILLS raises the number of kills at random times: SIXTYGPT_KILLS=50 pytest -k random
"""

import gzip
import hashlib
import os
import subprocess
import sys

import pytest
import test_download
from conftest import REPO

server = test_download.server  # a fixture
FAULTS = ("killed", "full", "read-only")


def python(code, *args, timeout=120):
    """Run some Python, with tests/ and the project to import from; -> its lines."""
    paths = os.pathsep.join([str(REPO), str(REPO / "tests")])
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
import os, sys, faults, utils
url, folder, fault, sha256 = sys.argv[1:]
path = folder + "/new/file"
utils.BACKOFF = 0.001

def whole():
    with open(path, "rb") as f:
        return utils.hashlib.file_digest(f, "sha256").hexdigest() == sha256

for n in faults.at_every_change(folder, fault, lambda: utils.download_file(url, path)):
    part = path + ".part"
    all_there = os.path.exists(part) and os.path.getsize(part) == 300_000
    assert not os.path.exists(path) or whole()
    utils.download_file("http://127.0.0.1:9/nobody" if all_there else url, path)
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
import os, shutil, sys, numpy as np, checkpoints, faults, utils
from encoder import Encoder
folder, fault = sys.argv[1:]
hparams = {"n_vocab": 258, "n_ctx": 4, "n_embd": 4, "n_head": 2, "n_layer": 1}
encoders = {k: Encoder([("a", chr(97 + k))]) for k in (1, 2, 3)}

def params(k):
    return utils.nest({n: np.full(s, k, "f4") for n, s in utils.tensor_shapes(hparams)})

def which(place):  # the number of the model there, or None
    try:
        encoder, _, found = utils.load_encoder_hparams_and_params(str(place), ".")
    except (ValueError, OSError):
        return None
    k = int(found["wpe"][0, 0])
    assert all((utils.leaf(found, n) == k).all() for n, _ in utils.tensor_shapes(hparams))
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
def save(out, k, step, saved=()):
    moments, run = {"mu": np.full(3, k, "f4")}, {"flags": k}
    what = params(k), moments, run, encoders[k], hparams
    return checkpoints.save_checkpoint(out, [*saved], step, *what)

def found():  # (step, the number of the model) of the checkpoint that would be resumed, or None
    try:
        place, run = checkpoints.find_checkpoint(folder)
    except FileNotFoundError:
        return None
    *_, moments = checkpoints.load_checkpoint(place, lambda p: {"mu": ((3,), np.dtype("f4"))})
    assert which(place) == run["flags"] == moments["mu"][0]
    return run["step"], run["flags"]

before = folder + "-before"
saved = [save(before, 1, 40), save(before, 2, 60)]
saved = [place.replace(before, folder) for place in saved]
for n in faults.at_every_change(folder, fault, lambda: save(folder, 3, 80, saved), before):
    assert found() in [(60, 2), (80, 3)]  # the same run goes on
    save(folder, 1, 100, saved)
    assert found() == (100, 1)
for n in faults.at_every_change(folder, fault, lambda: save(folder, 3, 80, saved[1:]), before):
    assert found() in [(60, 2), (80, 3)]  # a resumed run
    save(folder, 1, 100, saved[1:])
    assert found() == (100, 1) and len(os.listdir(folder + "/checkpoints")) == 2
for n in faults.at_every_change(folder, fault, lambda: save(folder, 3, 20), before):
    at_risk = [] if fault == "full" else [None, (40, 1)]  # while the old one is put away
    assert found() in [(60, 2), (20, 3), *at_risk]
    save(folder, 1, 20)
    assert found() == (20, 1) and len(os.listdir(folder + "/checkpoints")) == 1
print(n)
"""
WORDS = {
    "killed": [""],
    "full": ["No space left on device"],
    "read-only": ["Read-only file system"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_survives_a_fault_at_every_step(tmp_path, fault):
    lines = python(MODELS + CHECKPOINTS, tmp_path / "out", fault)
    assert int(lines.pop()) >= 10
    start = f"cannot write {tmp_path}/out/checkpoints/000000"
    assert all(line.startswith(start) and line.endswith(*WORDS[fault]) for line in lines)


# TensorFlow's part is played by a dict: a process that imported the real one could not be forked.
CONVERTING = """
import json, resource, types
tf = types.ModuleType("tensorflow")
variables = {}
for name, shape in utils.tensor_shapes(hparams):
    shape = (1, *shape) if name.endswith(".w") else shape
    variables[utils.tensorflow_name(name)] = np.full(shape, 1, "f4")
shapes = {name: list(array.shape) for name, array in variables.items()}
reader = types.SimpleNamespace(
    get_variable_to_shape_map=lambda: shapes, get_tensor=variables.__getitem__
)
tf.train = types.SimpleNamespace(load_checkpoint=lambda path: reader)
tf.errors = types.SimpleNamespace(OpError=ZeroDivisionError)
sys.modules["tensorflow"] = tf

before, weights = folder + "-before", folder + "/model.safetensors"
os.mkdir(before)
for name, text in {
    "model.ckpt.index": "", "vocab.bpe": "#version: 0.2\\na b\\n",
    "encoder.json": json.dumps(encoders[1].vocab), "hparams.json": json.dumps(hparams),
}.items():
    with open(before + "/" + name, "w") as f:
        f.write(text)
for n in faults.at_every_change(folder, fault, lambda: which(folder) == 1 or sys.exit(1), before):
    assert not os.path.exists(weights) or utils.read_safetensors(weights)
    assert which(folder) == 1 and os.path.exists(weights)
print(n)
os.unlink(weights)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a full disk, in the midst of the weights
there = os.listdir(folder)
assert which(folder) == 1 and os.listdir(folder) == there
"""


@pytest.mark.parametrize("fault", ["killed", "read-only"])
def test_a_conversion_survives_a_fault_at_every_step(tmp_path, fault):
    """Where it cannot be written, the model loads all the same, and nothing is said."""
    [n] = python(MODELS + CONVERTING, tmp_path / "124M", fault)
    assert int(n) >= 2


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
