"""train_jax.py --eval_tasks: the figures of evaluate.py, in the log, on all devices."""

import functools
import os

import conftest
import pytest
from test_devices import begin, finish
from test_evaluate import accuracy, write_lines

import training.flags
from encoder import Encoder
from evaluation import tasks
from training import progress
from utils import load_encoder_hparams_and_params

WORDS = ["the", "of a", "is", "object", "method", "x = 1", "returns", "to be"]
RUN = ["--data", "python-docs", "--n_layer", 2, "--n_head", 2, "--n_embd", 16, "--n_ctx", 32]
RUN += ["--batch_size", 4, "--n_steps", 40, "--eval_every", 40, "--eval_tasks_every", 15]
NAMES = ["hellaswag_acc", "hellaswag_acc_norm", "lambada_acc_last_word", "lambada_acc_last_token"]

run = functools.partial(conftest.run, "train_jax.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Thirty items of each task, in ordinary words."""
    folder = tmp_path_factory.mktemp("items")
    items = [
        {"ctx": f"{WORDS[i % 8]} {WORDS[i // 8]}", "label": i % 4}
        | {"endings": [WORDS[(i + 3 * j) % 8] for j in range(4)]}
        | {"text": f"{WORDS[i % 8]} {WORDS[i // 8]} e"}
        for i in range(30)
    ]
    write_lines(folder / "hellaswag.jsonl", items)
    write_lines(folder / "lambada.jsonl", items)
    return folder


def flag(data):
    return f"hellaswag={data / 'hellaswag.jsonl'},lambada={data / 'lambada.jsonl'}"


def figures(out):  # -> {step: {name: share}}
    lines = progress.read_log(out / "metrics.jsonl")
    lines = [line for line in lines if "hellaswag_acc" in line]
    return {line["step"]: {name: line[name] for name in NAMES} for line in lines}


def measured(place, data):  # -> {name: share}, by evaluate.py in NumPy
    _, hparams, params = load_encoder_hparams_and_params(str(place), ".")
    shares = {}
    for task in ("hellaswag", "lambada"):
        mark = tasks.TASKS[task].mark
        items = tasks.load_items(task, data / f"{task}.jsonl")
        items = [tasks.encode_item(*item, Encoder([]), hparams["n_ctx"]) for item in items]
        found = accuracy(items, mark, params, hparams["n_head"])
        shares |= {f"{task}_{name}": found[name] for name in found if name.startswith("acc")}
    return shares


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    code, printed, err = run(*RUN, "--eval_tasks", flag(data), "--out", out)
    assert (code, err) == (0, "")
    shares = ", ".join(f"{name} {figures(out)[30][name]:.4f}" for name in NAMES)
    assert f"step 30: {shares}\n" in printed
    return out


@pytest.mark.slow
def test_the_log_has_the_figures_of_evaluate(out, data):
    """Every 15 steps and at the end, there those of the checkpoint in NumPy."""
    found = figures(out)
    assert list(found) == [15, 30, 40]
    assert found[40] == pytest.approx(measured(out / "checkpoints" / "00000040", data), abs=0.04)
    assert any(0 < share < 1 for share in found[40].values())


@pytest.mark.slow
def test_a_run_goes_on_measuring_from_anywhere(out, data, tmp_path):
    """A relative path is one from where the run began."""
    path = os.path.relpath(data / "lambada.jsonl", conftest.REPO)
    flags = ["--eval_tasks", f"lambada={path}", "--n_steps", 2, "--out", tmp_path / "out"]
    code, _, err = run(*RUN[:-2], *flags, cwd=conftest.REPO)
    assert (code, err) == (0, "")
    code, _, err = run("--resume", tmp_path / "out", "--n_steps", 4, cwd=tmp_path)
    assert (code, err) == (0, "")
    lines = progress.read_log(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if "lambada_acc_last_word" in line] == [2, 4]


@pytest.mark.slow
def test_the_picture_has_a_curve_for_each(out, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes", reason="matplotlib is not installed")
    drawn, plot = {}, axes.Axes.plot

    def look(self, *args, **how):
        drawn.setdefault(how.get("color"), []).append(args)
        return plot(self, *args, **how)

    monkeypatch.setattr(axes.Axes, "plot", look)
    progress.plot(out)
    found = figures(out)
    for i, name in enumerate(sorted(NAMES)):
        (steps, shares), _ = drawn[f"C{2 + i}"]
        assert dict(zip(steps, shares, strict=True)) == {s: found[s][name] for s in found}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_measure_what_one_does(out, data, tmp_path, fsdp):
    flags = [*RUN, "--eval_tasks", flag(data), "--out", tmp_path / "out"]
    first, second = finish(begin(*flags, *(["--fsdp"] if fsdp else []), n_processes=2))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "hellaswag" in first[1] and "hellaswag" not in second[1]
    for step, shares in figures(tmp_path / "out").items():
        assert shares == pytest.approx(figures(out)[step], abs=0.04)  # of 30 items, one may differ


@pytest.mark.parametrize(
    "text", ["", "piqa", "hellaswag,", "lambada=", "lambada,lambada", "hellaswag lambada"]
)
def test_what_is_no_task_is_refused(text):
    with pytest.raises(ValueError, match=r"eval_tasks must be hellaswag, lambada or both, not "):
        training.flags.choose({"eval_tasks": text}, "cpu")


def test_tasks_are_read():
    assert training.flags.read_tasks(None) == {}
    assert training.flags.read_tasks("lambada") == {"lambada": None}
    both = training.flags.read_tasks("hellaswag=a=b.jsonl,lambada")
    assert both == {"hellaswag": "a=b.jsonl", "lambada": None}
    with pytest.raises(ValueError, match="eval_tasks_every needs --eval_tasks"):
        training.flags.choose({"eval_tasks_every": 5}, "cpu")
    with pytest.raises(ValueError, match="eval_tasks_every must be from 1 to"):
        training.flags.choose({"eval_tasks": "lambada", "eval_tasks_every": 0}, "cpu")


@pytest.mark.parametrize(
    "change", [{"eval_tasks": 1}, {"eval_tasks": "x"}, {"eval_tasks_every": "5"}]
)
def test_a_run_json_with_other_tasks_is_refused(change):
    flags = {"data": "x", "out": "y", "eval_tasks": "lambada", "eval_tasks_every": 15}
    saved = {"flags": training.flags.choose({"saved_dtype": "float32"} | flags, "cpu")}
    saved |= {"step": 0, "run": 1, "best": None, "text": {}}
    assert training.flags.check_saved(saved, "place")["eval_tasks_every"] == 15
    saved["flags"] |= change
    with pytest.raises(ValueError, match=r"place/run.json: damaged"):
        training.flags.check_saved(saved, "place")


def test_items_that_are_not_there_end_a_run_before_its_first_step(tmp_path):
    args = [*RUN, "--eval_tasks", "lambada=nowhere.jsonl", "--out", tmp_path / "out"]
    code, printed, err = run(*args)
    assert (code, printed) == (2, "") and err == "error: nowhere.jsonl: No such file or directory\n"
