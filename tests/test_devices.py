"""Several devices, several processes: the same losses and parameters as on one."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO, slow

import train_jax
import training.batches
from training import devices
from training.batches import fill_batches, read_batches
from training.state import init_params, start_state
from training.text import cut_windows
from utils import load_encoder_hparams_and_params

SIZES = {"n_vocab": 257, "n_ctx": 16, "n_embd": 24, "n_layer": 2}
TEXT = [np.random.default_rng(0).integers(0, 257, 5000, dtype=np.uint16)]


@pytest.fixture
def seed():
    seed = int(np.random.SeedSequence().entropy % 2**31)
    print("seed", seed)
    return seed


def start(seed, mesh, fsdp, optimizer):
    """-> the optimizer, the state before the first step, and its shardings."""
    schedule = train_jax.make_schedule(6, 1e-3, 1e-5, 2)
    optimizer = train_jax.make_optimizer(schedule, optimizer, 0.1, 1.0, 0.99)
    params = init_params(jax.random.key(seed), **SIZES)
    return optimizer, *start_state(params, None, 0, optimizer, 384, mesh, fsdp)


def train(seed, n_devices, fsdp, optimizer, dtype="float32"):
    """4 steps of 2 * 8 sequences -> the state, the losses in training and in validation."""
    mesh = devices.make_mesh(n_devices)  # that many of the 8 divide so large a batch
    optimizer, state, shardings = start(seed, mesh, fsdp, optimizer)
    how = {"dtype": dtype, "n_head": 3, "n_vocab": 257, "n_chunks": 2}
    steps = train_jax.make_train_steps(optimizer, 0.1, seed, shardings=shardings, **how)
    spec = devices.make_sharding(mesh, None, None, "data")
    batches = read_batches(TEXT, seed, 0, (4, 2, 8), 16, spec)
    state, (loss, *_) = steps(state, batches, 4)
    windows = fill_batches(cut_windows(TEXT, 16)[:13], 8)
    windows = devices.put(windows, 2 * (devices.make_sharding(mesh, None, "data"),))
    return state, float(loss), float(train_jax.validation_loss(state[0], *windows, **how))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("fsdp", [True, False])
def test_eight_devices_compute_what_one_does(seed, fsdp, optimizer):
    one, *wanted = train(seed, 1, False, optimizer)
    state, *losses = train(seed, 8, fsdp, optimizer)
    assert np.allclose(losses, wanted, rtol=1e-5)
    pairs = (jax.tree.leaves(devices.to_host(tree)) for tree in (state, one))
    for ours, theirs in zip(*pairs, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)
    blocks = state[0]["blocks"][0]
    for x, n_rows in ((state[0]["wte"], 384), (blocks["mlp"]["c_fc"]["w"], 24)):
        held = {shard.data.size for shard in x.addressable_shards}
        assert held == {x.size // 8 if fsdp else x.size} and len(x) == n_rows
    assert blocks["ln_1"]["g"].addressable_shards[0].data.shape == (24,)


@pytest.mark.parametrize("when", ["before the first step", slow("after some")])
def test_moments_of_layers_are_shared_out_without_fsdp_too(seed, when):
    if when == "after some":
        state, _, _ = train(seed, 2, False, "muon")
    else:
        _, state, _ = start(seed, devices.make_mesh(2), False, "muon")
    layers = [x for x in jax.tree.leaves(state[1]) if x.ndim == 3]
    assert layers and all(x.addressable_shards[0].data.shape[0] == 1 for x in layers)


def test_a_mesh_takes_as_many_cpus_as_divide_the_batch():
    assert [devices.make_mesh(n).size for n in (1, 4, 6, 7, 9, 12, 16)] == [1, 4, 6, 7, 3, 6, 8]


def test_every_device_reads_only_its_sequences(seed, monkeypatch):
    read = []

    def read_sequences(shards, starts, n):
        read.append(len(starts))
        return np.zeros((len(starts), n), np.int32)

    monkeypatch.setattr(training.batches, "read_sequences", read_sequences)
    spec = devices.make_sharding(devices.make_mesh(8), None, None, "data")
    read_batches(TEXT, seed, 0, (3, 2, 16), 16, spec)
    assert read == 8 * [3 * 2 * 2]


@pytest.mark.slow
def test_bfloat16_on_eight_devices_is_bfloat16_on_one(seed):
    _, *wanted = train(seed, 1, False, "adamw", "bfloat16")
    _, *losses = train(seed, 8, True, "adamw", "bfloat16")
    assert np.allclose(losses, wanted, rtol=2e-3)


# --- Processes ------------------------------------------------------------------------------------

RUN = ["--data", "python-docs", "--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--n_ctx", 16]
RUN += ["--n_steps", 60, "--eval_every", 30, "--checkpoint_every", 30, "--n_accumulate", 2]


def begin(*flags, n_processes=1, last=()):
    """The trainer in one or two processes of one device each; `last`: more flags of the last."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    processes = []
    for i in range(n_processes):
        command = [sys.executable, str(REPO / "train_jax.py"), *map(str, flags)]
        if n_processes > 1:
            command += ["--coordinator", address, "--num_processes", str(n_processes)]
            command += ["--process_id", str(i), *map(str, last if i else ())]
        environ = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environ)
        )
    return processes


def finish(processes):  # -> [(exit code, stdout, stderr)]
    texts = [process.communicate(timeout=200) for process in processes]
    return [(process.returncode, *two) for process, two in zip(processes, texts, strict=True)]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The folder of a run on one device, by the optimizer's name."""

    @functools.cache
    def trained(optimizer):
        out = tmp_path_factory.mktemp("one") / "out"
        [(code, printed, err)] = finish(begin(*RUN, "--optimizer", optimizer, "--out", out))
        assert code == 0, err
        return out

    return trained


@pytest.mark.parametrize("fsdp, optimizer", [(False, "muon"), (True, "muon"), (True, "adamw")])
@pytest.mark.slow
def test_two_processes_train_the_model_of_one(one_process, tmp_path, fsdp, optimizer):
    out, one = tmp_path / "out", one_process(optimizer)
    flags = [*RUN, "--optimizer", optimizer, "--out", out, *(["--fsdp"] if fsdp else [])]
    first, second = finish(begin(*flags, n_processes=2))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "step 60: " in first[1] and "step" not in second[1]
    assert same_model(out, one)
    for ours, theirs in zip(metrics(out), metrics(one), strict=True):
        for name in ("step", "loss", "validation"):
            assert name not in theirs or np.isclose(ours[name], theirs[name], rtol=1e-4)


def same_model(out, other):
    for place in ("", "checkpoints/00000060"):
        ours, theirs = (load_encoder_hparams_and_params(str(o / place), ".") for o in (out, other))
        pairs = zip(jax.tree.leaves(ours[2]), jax.tree.leaves(theirs[2]), strict=True)
        assert ours[1] == theirs[1]
        assert all(np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b) + 1e-4 for a, b in pairs)
    return True


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_one_alone_can_go_on(tmp_path):
    out = tmp_path / "out"
    processes = begin(*RUN, "--n_steps", 10**6, "--out", out, "--fsdp", n_processes=2)
    end = time.monotonic() + 120
    while not (out / "checkpoints" / "00000030" / "run.json").exists():
        assert time.monotonic() < end and processes[0].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish(processes)
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    assert "stopped after step" in first[1]
    run = max((out / "checkpoints").iterdir()) / "run.json"
    plan = json.loads(run.read_text())
    plan["flags"]["n_steps"] = plan["step"] + 10
    run.write_text(json.dumps(plan))
    [(code, printed, err)] = finish(begin("--resume", out))
    assert code == 0 and f"step {plan['step'] + 10}: " in printed, err


@pytest.mark.slow
def test_a_batch_that_no_two_processes_can_share_is_refused(tmp_path):
    flags = [*RUN, "--batch_size", 3, "--out", tmp_path / "out"]
    for code, _, err in finish(begin(*flags, n_processes=2)):
        assert code == 2 and "batch_size 3 must be a multiple of the 2 devices" in err


def test_processes_with_different_flags_are_refused(tmp_path):
    processes = begin(*RUN, "--out", tmp_path / "out", n_processes=2, last=["--seed", 7])
    for code, _, err in finish(processes):
        assert code == 2 and "started with different flags or texts" in err


@pytest.mark.slow  # half a minute, in which JAX waits for the one that has ended
def test_an_error_in_one_process_ends_the_other(tmp_path):
    processes = begin(*RUN, "--out", tmp_path / "out", n_processes=2, last=["--data", "nowhere"])
    first, second = finish(processes)
    assert first[0] != 0 and second[0] == 2 and "no text at nowhere" in second[2]


@pytest.mark.parametrize(
    "shape, axis",
    [((257, 24), 1), ((257, 23), None), ((24, 96), 1), ((96, 24), 0), ((64,), None)],
)
def test_fsdp_cuts_the_longest_axis_that_can_be_cut(shape, axis):
    mesh = devices.make_mesh(8)
    spec = devices.spread(np.zeros(shape), mesh, fsdp=True).spec
    assert [i for i, name in enumerate(spec) if name] == ([] if axis is None else [axis])
    assert not any(devices.spread(np.zeros(shape), mesh, fsdp=False).spec)
    layers = devices.spread(np.zeros((16, *shape)), mesh, fsdp=False).spec
    assert len(shape) == 1 or layers[0] == "data"


def test_a_platform_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    if any(device.platform != "cpu" for device in jax.devices()):
        pytest.skip("there is one")
    [(code, _, err)] = finish(begin(*RUN, "--out", tmp_path / "out"))
    assert (code, err) == (2, "error: JAX_PLATFORMS is cuda, but JAX finds no such device\n")


def test_put_and_to_host_are_inverse(seed):
    mesh = devices.make_mesh(8)
    tree = {"w": np.arange(48.0).reshape(6, 8), "b": np.arange(3)}
    placed = devices.put(tree, devices.spread(tree, mesh, fsdp=True))
    assert placed["w"].addressable_shards[0].data.shape == (6, 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, devices.to_host(placed), tree))
    assert isinstance(placed["b"], jnp.ndarray)
