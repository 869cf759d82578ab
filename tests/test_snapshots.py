"""Snapshots of a run: at which steps, what they hold, and what never happens to the run."""

import doctest
import json

import conftest
import numpy as np
import pytest
from conftest import REPO

import backprop
import utils
from encoder import Encoder
from model_files.weights import leaves, read_safetensors
from training import output, snapshots
from training.snapshots import find_snapshots, read_snapshot, snapshot_steps, write_snapshot

TINY_RUN = ["--data", REPO / "gpt2.py", "--n_layer", 1, "--n_embd", 8, "--n_ctx", 16]
TINY_RUN += ["--n_steps", 8, "--eval_every", 4, "--checkpoint_every", 4, "--ema", 0]
HPARAMS = {"n_vocab": 257, "n_ctx": 16, "n_embd": 8, "n_head": 4, "n_layer": 1}


def with_numpy(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.processes.count", lambda *_: 1)  # no fork beside JAX's threads
        patch.setattr("backprop.measure_peak", lambda: 1e11)  # in a second
        return conftest.call("backprop.py", *args)


def train(out, *args, call=with_numpy):
    code, printed, err = call(*args, "--out", out)
    assert (code, err) == (0, ""), err
    return printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "with"
    train(out, *TINY_RUN, "--snapshots", 6)
    return out


def test_steps_are_distinct_and_the_last_is_the_runs_last(rng):
    assert doctest.testmod(snapshots).attempted == 1 and not doctest.testmod(snapshots).failed
    assert snapshot_steps(1, 2) == [0, 1] and snapshot_steps(5, 2) == [0, 5]
    for _ in range(300):
        n_steps, n = int(rng.integers(1, 4000)), int(rng.integers(2, 200))
        steps = snapshot_steps(n_steps, n)
        assert len(steps) == min(n, n_steps + 1) and steps == sorted(set(steps))
        assert (steps[0], steps[-1]) == (0, n_steps)
        ratios = np.divide(steps[2:], steps[1:-1])
        assert (ratios <= max(2, 1.6 * n_steps ** (1 / max(1, n - 2)))).all()


@pytest.mark.parametrize("script", ["backprop.py", "train_jax.py"])
def test_a_run_leaves_its_parameters_on_the_way(trained, tmp_path, script):
    out = trained
    if script == "train_jax.py":
        pytest.importorskip("jax", reason="JAX is not installed")
        out = tmp_path / "jax"
        train(out, *TINY_RUN, "--snapshots", 6, call=conftest.call_trainer)
    found = find_snapshots(out)
    assert [*found] == snapshot_steps(8, 6) == [0, 1, 2, 3, 5, 8]
    checkpoint = utils.load_encoder_hparams_and_params(f"{out}/checkpoints/00000008")
    for name, x in leaves(read_snapshot(found[8], HPARAMS)).items():
        wanted = leaves(checkpoint.params)[name].astype(np.float16)
        np.testing.assert_array_equal(x, wanted)
    first, last = (leaves(read_snapshot(found[step], HPARAMS)) for step in (0, 8))
    assert all(np.abs(first[name] - last[name]).max() > 0 for name in first)
    assert found[8].stat().st_size < 2 * sum(x.size for x in last.values()) + 4000


def test_a_snapshot_is_the_model_that_was_there_before_the_first_step(trained):
    flags = json.loads((trained / "checkpoints" / "00000008" / "run.json").read_text())["flags"]
    _, params = backprop.NumpyTrainer(flags).new_model(257)
    for name, x in leaves(read_snapshot(find_snapshots(trained)[0], HPARAMS)).items():
        np.testing.assert_array_equal(x, leaves(params)[name].astype(np.float16))


def test_snapshots_change_no_bit_of_the_run(trained, tmp_path):
    train(tmp_path / "without", *TINY_RUN)
    assert not (tmp_path / "without" / "snapshots").exists()
    for name in ("model.safetensors", "checkpoints/00000008/optimizer.safetensors"):
        assert (tmp_path / "without" / name).read_bytes() == (trained / name).read_bytes()


def test_a_resumed_run_goes_on_with_the_series(tmp_path):
    out = tmp_path / "run"
    train(out, *TINY_RUN, "--snapshots", 6)
    before = {step: path.read_bytes() for step, path in find_snapshots(out).items()}
    (out / "snapshots" / "00000009.safetensors").write_bytes(b"of a run that was killed later")
    (out / "snapshots" / "00000002.safetensors.77.tmp").write_bytes(b"half")
    (out / "snapshots" / "notes.txt").write_text("mine")
    code, _, err = with_numpy("--resume", out, "--n_steps", 12)
    assert (code, err) == (0, "")
    after = find_snapshots(out)
    assert [*after] == [0, 1, 2, 3, 5, 8, 12]  # what is due of snapshot_steps(12, 6) after 8
    assert all(after[step].read_bytes() == before[step] for step in before)
    assert len([*(out / "snapshots").iterdir()]) == len(after) + 1


def test_a_new_run_deletes_an_earlier_ones_snapshots(tmp_path):
    out = tmp_path / "run"
    train(out, *TINY_RUN, "--snapshots", 6)
    train(out, *TINY_RUN, "--overwrite")
    assert find_snapshots(out) == {}


def test_a_full_disk_says_one_line_and_loses_no_checkpoint(trained, tmp_path, monkeypatch):
    def write(out, hparams, params, n_done):
        if n_done == 3:
            raise OSError(28, "cannot write it: No space left on device")
        assert n_done < 3
        write_snapshot(out, hparams, params, n_done)

    monkeypatch.setattr(output, "write_snapshot", write)
    out = tmp_path / "full"
    printed = train(out, *TINY_RUN, "--snapshots", 6)
    line = "cannot write it: No space left on device: the run continues without more snapshots"
    assert printed.count(line) == 1 and printed.count("snapshots") == 1
    for name in ("model.safetensors", "checkpoints/00000004/optimizer.safetensors"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    assert [*find_snapshots(out)] == [0, 1, 2]


def test_a_folder_that_cannot_be_written_ends_no_run(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "snapshots").write_text("not a folder")
    printed = train(tmp_path / "out", *TINY_RUN, "--snapshots", 6)
    path = tmp_path / "out" / "snapshots" / "00000000.safetensors"
    assert f"cannot write {path}: " in printed
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()


def test_numbers_too_large_for_float16_are_the_largest(tmp_path, rng):
    params = conftest.random_params(rng, HPARAMS)
    params["wte"][3, 4] = -1e9
    write_snapshot(tmp_path, HPARAMS, params, 7)
    assert read_snapshot(find_snapshots(tmp_path)[7], HPARAMS)["wte"][3, 4] == -65504


def test_a_snapshot_is_a_models_weights(tmp_path, rng):
    """Beside the run's config.json it loads like any model."""
    params = conftest.random_params(rng, HPARAMS)
    utils.save_model(tmp_path, Encoder([]), HPARAMS, params)
    write_snapshot(tmp_path, HPARAMS, params, 7)
    path = find_snapshots(tmp_path)[7]
    assert {dtype for dtype, _, _ in read_safetensors(path).values()} == {"F16"}
    path.replace(tmp_path / "model.safetensors")
    loaded = leaves(utils.load_encoder_hparams_and_params(str(tmp_path)).params)
    for name, x in leaves(params).items():
        np.testing.assert_array_equal(loaded[name], x.astype(np.float16))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--snapshots", 1], "snapshots must be from 2 to 1000, not 1"),
        (["--snapshots", 0], "snapshots must be from 2 to 1000, not 0"),
        (["--snapshots", "many"], "snapshots"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, args, words):
    out = tmp_path / "out"
    code, printed, err = conftest.call("backprop.py", *TINY_RUN, *args, "--out", out)
    assert (code, printed, err.count("\n")) == (2, "", 1) and words in err and not out.exists()


def test_snapshots_of_adapters_are_refused():
    from training import flags

    typed = {"init_from": "x", "lora_rank": 2, "data": "text", "snapshots": 9}
    hparams = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_ctx": 8}
    with pytest.raises(ValueError, match="leave out --snapshots or --lora_rank"):
        flags.choose(typed, "cpu", hparams)


def test_the_same_parameters_make_the_same_bytes(rng, tmp_path):
    params = conftest.random_params(rng, HPARAMS)
    for n in range(12):
        write_snapshot(tmp_path / str(n), HPARAMS, params, 5)
    assert len({path.read_bytes() for path in tmp_path.rglob("*.safetensors")}) == 1
