"""backprop.py as a person runs it: mistakes, runs that stop and go on, what they leave."""

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
import runs
from conftest import REPO, on_linux

import backprop
import gpt2
import utils
from encoder import Encoder
from engine import threads
from training.text import open_text

run = functools.partial(conftest.run, "backprop.py")
TINY_RUN = ["--data", REPO / "gpt2.py", "--n_layer", 1, "--n_embd", 8, "--n_ctx", 16]
TINY_RUN += ["--n_steps", 300, "--eval_every", 100, "--checkpoint_every", 50, "--ema", 0.9]
TINY_RUN += ["--snapshots", 12]


def test_it_imports_nothing_of_jax_and_no_other_framework(tmp_path):
    """Not even to train: the modules of a process that has done so."""
    code = f"""if True:
        import sys
        sys.argv = ["backprop.py", *{[str(x) for x in [*TINY_RUN, "--n_steps", 2]]}]
        sys.argv += ["--out", {str(tmp_path / "out")!r}]
        import backprop
        backprop.run_cli(backprop.main)
        print("loaded", *sorted({{name.split(".")[0] for name in sys.modules}}))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split("loaded")[-1].split())
    assert "numpy" in loaded
    assert not loaded & {"jax", "jaxlib", "optax", "torch", "tensorflow", "transformers"}


BAD = {
    "heads": (["--n_embd", 100, "--n_head", 3], "multiple of n_head"),
    "no steps": (["--n_steps", 0], "n_steps must be from 1 to"),
    "rate": (["--learning_rate", "nan"], "learning_rate must be more than 0"),
    "optimizer": (["--optimizer", "muon"], "doesn't support --optimizer muon; use train_jax.py"),
    "dtype": (["--dtype", "bfloat16"], "doesn't support --dtype bfloat16; use train_jax.py"),
    "drop": (["--dropout", 0.1], "doesn't support --dropout 0.1; use train_jax.py"),
    "fsdp": (["--fsdp"], "doesn't support --fsdp; use train_jax.py"),
    "processes": (["--num_processes", 2], "doesn't support --num_processes 2; use train_jax.py"),
    "no text": (["--data", "nowhere.txt"], "no text at nowhere.txt"),
    "no text for it": (["--init_from", "9M", "--data", "nowhere.txt"], "no text at nowhere.txt"),
    "no model": (["--init_from", "9M"], "no model '9M'"),
    "out": (["--out", "/dev/null/model"], "cannot write /dev/null/model"),
    "nothing there": (["--resume", "nowhere"], "nowhere: nothing to resume"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_ends_in_one_line_before_any_training(tmp_path, case):
    args, words = BAD[case]
    if "--resume" not in args:
        args = [*args, *([] if "--data" in args else ["--data", "python-docs"])]
        args += [] if "--out" in args else ["--out", tmp_path / "out"]
    code, out, err = conftest.call("backprop.py", *args)
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()


def test_the_help_lists_what_it_takes_and_train_jax_lists_all():
    """A flag is listed if it can be given a value other than its only one."""
    ours, theirs = (
        set(re.findall(r"^ +(?:-\w, )?--(\w+)=", conftest.call(script, "--help")[1], re.MULTILINE))
        for script in ("backprop.py", "train_jax.py")
    )
    assert theirs - ours == {
        "coordinator", "dropout", "dtype", "eval_tasks", "eval_tasks_every", "fsdp", "lora_alpha",
        "lora_rank", "lora_targets", "num_processes", "optimizer", "process_id",
    }  # fmt: skip
    assert ours < theirs and {"ema", "n_steps", "saved_dtype"} <= ours
    said = " ".join(conftest.call("backprop.py", "--help")[1].split())
    assert "needs only the packages of `make demo`" in said and "GROUP" not in said


def test_too_little_text_and_a_folder_in_use_are_refused(tmp_path):
    (tmp_path / "text").write_text("too short")
    code, out, err = run("--data", tmp_path / "text", "--out", tmp_path / "out")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "too few" in err
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    code, out, err = run("--data", "python-docs", "--out", tmp_path / "used")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "holds notes.txt" in err and "--overwrite" in err


begin = functools.partial(runs.begin, "backprop.py")


def ends(out):
    """All that a run leaves, but for the folder's own name, the run's number and the clock."""
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    lines = files.pop(Path("metrics.jsonl")).splitlines()
    del files[Path("loss.png")]
    lines = [line for line in map(json.loads, lines) if "validation" in line]
    losses = [(line["step"], line["validation"]) for line in lines]
    plans = [json.loads(files.pop(name)) for name in sorted(files) if name.name == "run.json"]
    for plan in plans:
        plan["flags"]["out"] = plan["run"] = None
    return files, plans, losses


def test_a_name_means_the_same_folder_to_out_resume_and_model_size(tmp_path):
    """Below ./models unless there is a slash in it. A run of an earlier ./name goes on as well."""
    sizes = ["--n_layer", 1, "--n_head", 2, "--n_embd", 8, "--n_ctx", 16]
    new = ["--data", REPO / "gpt2.py", *sizes, "--n_steps", 2, "--out"]
    for out, name, folder in (("new", "new", "models/new"), ("./old", "old", "old")):
        code, said, err = run(*new, out, cwd=tmp_path)
        assert (code, err) == (0, "") and (tmp_path / folder / "model.safetensors").is_file()
        assert said.endswith(f"the best model is in {'./' * (folder == 'old')}{folder}\n")
        code, said, err = run("--resume", name, "--n_steps", 3, cwd=tmp_path)
        assert (code, err) == (0, "") and f"resuming {folder} (shakespeare-cpu, on " in said
        flags = ["--model_size", name, "-n", 3]
        assert conftest.call("gpt2.py", "a", *flags, cwd=tmp_path)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["models", "old"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "never_stopped"
    code, printed, err = run(*TINY_RUN, "--out", out)
    assert (code, err) == (0, "") and "step 300:" in printed
    return out


@pytest.mark.parametrize("sign", ["SIGINT", "SIGTERM"])
@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(never_stopped, sign):
    out = never_stopped.parent / sign
    runs.stop_and_go_on("backprop.py", TINY_RUN, out, sign, step=50, n_steps=300)
    assert ends(out) == ends(never_stopped)


@on_linux
@pytest.mark.slow
def test_a_run_in_threads_comes_to_the_same_bits(never_stopped):
    out = never_stopped.parent / "threads"
    code = f"""if True:
        import sys, backprop
        from engine import processes
        processes.count = lambda *_: 1
        sys.argv = ["backprop.py", *{[str(x) for x in [*TINY_RUN, "--out", out]]}]
        backprop.run_cli(backprop.main)
    """
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True)
    assert ends(out) == ends(never_stopped)


def helpers(process):  # -> the processes that share its work
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found]


@pytest.mark.slow
@on_linux
@pytest.mark.skipif(threads.n_threads() == 1, reason="one core: nothing is shared")
def test_a_helper_that_is_killed_ends_the_run_in_one_line(never_stopped):
    out = never_stopped.parent / "helper"
    process = begin(*TINY_RUN, "--out", out)
    runs.wait_for_step(out, 50, process)
    pid = helpers(process)[-1]
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    line = f"error: process {pid}, which was doing a part of the work, has died\n"
    assert (process.returncode, err) == (2, line)
    code, _, err = run("--resume", out)
    assert (code, err) == (0, "") and ends(out) == ends(never_stopped)


@pytest.mark.slow
@on_linux
def test_ctrl_c_in_a_terminal_reaches_all_processes_and_loses_nothing(never_stopped):
    """A terminal sends it to each of them."""
    out = never_stopped.parent / "terminal"
    command = [sys.executable, REPO / "backprop.py", *map(str, TINY_RUN), "--out", out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    runs.wait_for_step(out, 50, process)
    os.killpg(process.pid, signal.SIGINT)
    printed, err = process.communicate(timeout=120)  # the helpers hold its output open, too
    assert (process.returncode, err) == (130, "") and "which is saved in " in printed
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    code, _, err = run("--resume", out)
    assert (code, err) == (0, "") and ends(out) == ends(never_stopped)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(never_stopped):
    out, rng = never_stopped.parent / "killed", np.random.default_rng()
    process = begin(*TINY_RUN, "--out", out)
    runs.wait_for_step(out, 100, process)
    time.sleep(rng.uniform(0, 0.1))
    process.kill()
    process.communicate()
    code, _, err = run("--resume", out)
    assert (code, err) == (0, "") and ends(out) == ends(never_stopped)


DAMAGE = {
    "model.safetensors": lambda file: os.truncate(file, file.stat().st_size - 9),
    "optimizer.safetensors": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "config.json": Path.unlink,
    "run.json": lambda file: file.write_text("["),
    "cut run.json": lambda file: os.truncate(file, file.stat().st_size // 2),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_it(
    never_stopped, tmp_path, what
):
    out = shutil.copytree(never_stopped, tmp_path / "out")
    last, before = out / "checkpoints" / "00000300", out / "checkpoints" / "00000250"
    DAMAGE[what](last / what.split()[-1])
    code, printed, err = conftest.call("backprop.py", "--resume", out)
    assert (code, printed) == (2, "") and err.count("\n") == 1 and str(last) in err
    assert err.endswith(f": delete {last}, and --resume continues from {before}\n")
    shutil.rmtree(last)
    code, printed, err = run("--resume", out)
    assert (code, err) == (0, "") and ") after step 250 of" in printed
    assert ends(out) == ends(never_stopped)


def test_a_damaged_checkpoint_is_not_offered_in_place_of_another(never_stopped, tmp_path):
    out = shutil.copytree(never_stopped, tmp_path / "out")
    for folder in (out / "checkpoints").iterdir():
        os.truncate(folder / "optimizer.safetensors", 99)
    code, printed, err = conftest.call("backprop.py", "--resume", out)
    assert (code, printed) == (2, "") and "00000300/optimizer.safetensors is incomplete" in err
    assert "delete" not in err


def test_a_run_goes_on_where_its_text_has_moved(never_stopped, tmp_path):
    out = shutil.copytree(never_stopped, tmp_path / "out")
    last = out / "checkpoints" / "00000300" / "run.json"
    plan = json.loads(last.read_text())
    plan["flags"]["data"] = gone = str(tmp_path / "gone.txt")
    last.write_text(json.dumps(plan))
    code, printed, err = conftest.call("backprop.py", "--resume", out)
    line = f"error: no text at {gone}; if it has moved, pass its new path with --data\n"
    assert (code, printed, err) == (2, "", line)
    moved = shutil.copy(REPO / "gpt2.py", tmp_path / "moved.py")
    other = tmp_path / "other.py"
    other.write_text(moved.read_text().replace("a", "b", 1))
    code, printed, err = conftest.call("backprop.py", "--resume", out, "--data", other)
    assert (code, printed) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: {other} is not the text that {last.parent} was trained on")
    code, printed, err = run("--resume", out, "--data", "moved.py", "--n_steps", 310, cwd=tmp_path)
    assert (code, err) == (0, "") and "step 310:" in printed
    code, printed, err = run("--resume", out, "--n_steps", 320)  # it knows the new place
    assert (code, err) == (0, "") and "step 320:" in printed
    code, printed, err = conftest.call("backprop.py", "--resume", out, "--init_from", "124M")
    assert (code, printed) == (2, "") and "leave out --init_from" in err


def test_what_it_trains_opens_in_transformers_and_in_gpt2(never_stopped):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch")
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(never_stopped), ".")
    model = transformers.GPT2LMHeadModel.from_pretrained(never_stopped)
    ids = encoder.encode("The if stat")
    theirs = model(torch.tensor([ids])).logits[0].detach().numpy()
    assert np.allclose(gpt2.gpt2(ids, **params, n_head=hparams["n_head"]), theirs, atol=1e-3)
    _, windows, *_ = open_text(str(REPO / "gpt2.py"), encoder, 16)
    windows = torch.from_numpy(windows).long()
    with torch.inference_mode():
        logits = model(windows[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    *_, (_, validation) = ends(never_stopped)[2]
    assert abs(theirs.item() - validation) < 1e-4 and validation < 4.5


def test_a_run_of_the_other_trainers_is_not_gone_on_with(never_stopped):
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    code, out, err = conftest.run("train_jax.py", "--resume", never_stopped, "--n_steps", 400)
    assert code == 2 and err.count("\n") == 1 and "is of another optimizer" in err


def test_finetuning_starts_at_the_models_own_loss(models, tmp_path):
    """With gradients of several batches, and 16 of its 48 positions."""
    folder, params = models
    (tmp_path / "text").write_text((REPO / "gpt2.py").read_text())
    flags = ["--data", tmp_path / "text", "--out", tmp_path / "out", "--n_ctx", 16, "--n_steps", 4]
    code, out, err = run("--init_from", "tiny", *flags, "--eval_every", 2, models_dir=folder)
    assert (code, err) == (0, "")
    losses = [float(x) for x in re.findall(r"validation (\d\S+)", out)]
    encoder = Encoder([])
    _, windows, *_ = open_text(str(tmp_path / "text"), encoder, 16)
    wanted, _ = backprop.loss_and_gradients(params, windows, conftest.TINY["n_head"])
    assert abs(losses[0] - wanted) < 1e-3 and losses[-1] < losses[0]
    _, hparams, tuned = utils.load_encoder_hparams_and_params(str(tmp_path / "out"), ".")
    assert (tuned["wpe"][16:] == params["wpe"][16:]).all()  # positions that no text reached
    assert (tuned["wpe"][:16] != params["wpe"][:16]).any()


def test_the_model_that_a_run_starts_from_does_not_stay_in_memory(models, tmp_path, monkeypatch):
    n_left = runs.count_arrays_left(monkeypatch, backprop.NumpyTrainer)
    flags = ["--init_from", models[0] / "tiny", "--data", REPO / "gpt2.py", "--n_ctx", 16]
    flags += ["--n_steps", 3, "--eval_every", 1, "--out", tmp_path / "out"]
    code, _, err = conftest.call("backprop.py", *flags)
    assert code == 0, err
    assert n_left == [0, 0, 0, 0]


def test_a_loss_that_explodes_ends_the_run_and_names_the_last_checkpoint(tmp_path):
    flags = ["--learning_rate", 1e9, "--n_warmup", 10**9, "--n_steps", 10**6, "--grad_clip", 1e30]
    flags += ["--checkpoint_every", 1, "--eval_every", 10**6]
    code, out, err = run(*TINY_RUN[:8], *flags, "--out", tmp_path / "out")
    words = r"error: training diverged: the loss is (\S+) at step (\d+); lower --learning_rate "
    found = re.fullmatch(words + r"\(the last checkpoint is (\S+)\)\n", err)
    assert code == 2 and found, err
    step = int(found[2])
    assert not float(found[1]) < 2 * np.log(257) and step > 1
    assert found[3] == str(tmp_path / "out" / "checkpoints" / f"{step - 1:08d}")
    utils.load_encoder_hparams_and_params(found[3], ".")


@on_linux
def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path):
    """Files of at most 20 kB, by prlimit: the first checkpoint cannot be written."""
    limit = ["prlimit", "--fsize=20000"]
    command = [*limit, sys.executable, str(REPO / "backprop.py"), *map(str, TINY_RUN)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot write" in done.stderr and "File too large" in done.stderr
    assert not list((tmp_path / "out").glob("checkpoints/*"))


# --- A run whose output nobody reads --------------------------------------------------------------


def is_complete(out):
    return (out / "model.safetensors").exists() and (out / "checkpoints/00000300/run.json").exists()


def test_a_run_outlives_the_reader_of_its_output(tmp_path):
    """As with `| head -1`."""
    process = begin(*TINY_RUN, "--out", tmp_path / "out")
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert process.stderr.read() == "" and is_complete(tmp_path / "out")


@conftest.on_linux
def test_a_run_outlives_the_disk_of_its_log(tmp_path):
    command = [sys.executable, str(REPO / "backprop.py"), *map(str, TINY_RUN)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--out", tmp_path / "out"], stdout=full, stderr=subprocess.PIPE, timeout=120
        )
    assert (done.returncode, done.stderr) == (0, b"") and is_complete(tmp_path / "out")


@conftest.on_linux
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_a_run_needs_no_terminal_and_no_file_to_write_to(tmp_path, closed):
    command = [sys.executable, str(REPO / "backprop.py"), *map(str, TINY_RUN)]
    line = shlex.join([*command, "--out", str(tmp_path / "out")])
    assert subprocess.run(["sh", "-c", f"{line} {closed}"], timeout=120).returncode == 0
    assert is_complete(tmp_path / "out")


@conftest.on_linux
def test_a_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path):
    out = tmp_path / "out"
    process = begin(*TINY_RUN, "--out", out)
    runs.wait_for_step(out, 50, process)
    process.send_signal(signal.SIGHUP)
    printed, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (128 + signal.SIGHUP, "")
    stopped = int(re.search(r"stopped after step (\d+), which is saved in ", printed)[1])
    assert (out / "checkpoints" / f"{stopped:08d}" / "run.json").exists()
