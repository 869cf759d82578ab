"""training/curves.py: which runs are compared with ours, and what they are told."""

import json

import conftest
import pytest
from conftest import REPO

from training import curves
from training.curves import expected_losses, read_curves
from training.flags import choose
from training.progress import read_log
from training.text import open_text

SMALL = {"n_layer": 1, "n_embd": 8, "n_ctx": 16, "n_steps": 40}


@pytest.mark.parametrize("name", read_curves())
def test_a_recipes_run_finds_its_curve(name):
    curve = read_curves()[name]
    flags = choose({"recipe": curve.recipe} | curve.flags, "cpu")
    found = expected_losses(flags, curve.text)
    assert found == dict(curve.validation) and max(found) == flags["n_steps"]
    losses = list(found.values())
    assert losses[0] > losses[-1] > 1 and list(found) == sorted(found)
    others = {"seed": 1, "eval_every": 50, "out": "elsewhere", "dtype": "bfloat16"}
    assert expected_losses(flags | others, curve.text) == found
    assert expected_losses(flags | {"learning_rate": 1e-3}, curve.text) == {}
    assert expected_losses(flags | {"n_steps": 10}, curve.text) == {}
    assert expected_losses(flags, "of another text") == {}


def test_the_curves_text_is_tiny_shakespeare():
    if not conftest.SHAKESPEARE.is_file():
        pytest.skip("no copy of tiny Shakespeare")
    fingerprint = open_text(str(conftest.SHAKESPEARE), None, 64).description["training"]
    assert {curve.text for curve in read_curves().values()} == {fingerprint}


@pytest.mark.parametrize("shift, verdict", [(0, "as expected"), (-1, "1.000 higher than expected")])
def test_a_run_is_told_whether_its_loss_is_as_expected(tmp_path, monkeypatch, shift, verdict):
    path = tmp_path / "text"
    path.write_bytes((REPO / "gpt2.py").read_bytes())
    text = open_text(str(path), None, 16).description["training"]
    flags = [word for name, x in SMALL.items() for word in (f"--{name}", x)]
    flags += ["--data", path, "--eval_every", 20]
    monkeypatch.setattr(curves, "CURVES", tmp_path / "curves.json")
    curves.CURVES.write_text("{}")
    code, said, _ = conftest.call_trainer(*flags, "--out", tmp_path / "first")
    assert code == 0 and "expected" not in said
    lines = read_log(tmp_path / "first" / "metrics.jsonl")
    losses = {line["step"]: line["validation"] for line in lines if "validation" in line}
    assert list(losses) == [20, 40] and not any("expected" in line for line in lines)

    wanted = [[step, loss + shift] for step, loss in losses.items()]
    curve = {"recipe": "shakespeare-cpu", "flags": SMALL, "text": text, "validation": wanted}
    curves.CURVES.write_text(json.dumps({"ours": curve}))
    code, said, _ = conftest.call_trainer(*flags, "--out", tmp_path / "second")
    assert code == 0 and said.count("expected") == 1
    assert f"the validation loss is {verdict}: {losses[40]:.4f}, and " in said
    lines = read_log(tmp_path / "second" / "metrics.jsonl")
    assert [[x["step"], x["expected"]] for x in lines if "expected" in x] == wanted
