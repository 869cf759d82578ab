"""benchmarks/gpu.py: all of it at toy size where there is no GPU, and its table and picture."""

import importlib.util
import os
import subprocess
import sys
import time

import jax
import pytest
from conftest import REPO

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def gpu():
    """The script as a module, for its small functions."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("gpu", REPO / "benchmarks" / "gpu.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(REPO / "benchmarks"))
    return module


@pytest.mark.slow
def test_all_parts_run_at_toy_size_and_every_row_has_its_anchor(tmp_path):
    if jax.default_backend() == "gpu":
        pytest.skip("it would measure, for minutes")
    command = [sys.executable, str(REPO / "benchmarks" / "gpu.py"), str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "at toy size: no GPU was found" in done.stdout.splitlines()[0]
    logs = {path.name: path.read_text()[-500:] for path in (tmp_path / "report").glob("*.log")}
    assert "the rest of" not in done.stdout, (done.stdout, logs)
    assert sorted(logs) == [f"{part}.log" for part in sorted(
        ("machine", "tests", "training", "shakespeare", "writing", "learning"))]  # fmt: skip
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    found = {row[0].removeprefix("| "): row[1:] for row in rows}
    for name, anchor, whose in (
        ("a bfloat16 product of 256 x 256", "790", "llm.c on an H100"),
        ("training, batches of 2, logits whole", "468,000", "llm.c on an H100"),
        ("training, batches of 2, logits in parts", "468,000", "llm.c on an H100"),
        ("shakespeare: the best validation loss", "1.47", "nanoGPT on an A100"),
        ("shakespeare: the whole run", "180", "nanoGPT on an A100"),
    ):
        assert found[name][1:3] == [anchor, whose]
    assert 0 < sum(name.startswith("kernel ") for name in found) <= 10
    assert any(name.startswith("60 real steps: the loss from ") for name in found)
    for what in ("a step of", "reading 32 of"):
        for rows in ("1 row", "8 rows"):
            assert found[f"{what} {rows}, float32"][2] == "transformers here"
    assert "JAX finds no GPU here" in done.stdout  # why the tests were skipped
    assert (tmp_path / "report" / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "gpu.md").read_text() + "\n" == done.stdout


def test_a_part_that_fails_or_takes_too_long_is_skipped_with_its_reason(gpu, tmp_path, monkeypatch):
    script = tmp_path / "parts.py"
    script.write_text(
        "import sys, time\n"
        "print('{\"what\": 1}', flush=True)\n"
        "time.sleep(60) if sys.argv[2] == 'slow' else sys.exit('no room')\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))

    def slow(toy):
        pass

    def broken(toy):
        pass

    ticks, began = [], time.monotonic()
    rows = gpu.run_part(slow, True, 1.5, tmp_path, lambda: ticks.append(1))
    assert rows == [{"what": 1}, {"skipped": "the rest of slow: not done after 2 s"}] and ticks
    assert time.monotonic() - began < 30
    rows = gpu.run_part(broken, True, 30, tmp_path, lambda: None)
    assert rows == [{"what": 1}, {"skipped": "the rest of broken: no room"}]


def test_the_table_says_what_was_skipped_and_how_far_the_anchor_is(gpu):
    speed = {
        "what": "a | b",
        "value": 234_000.0,
        "unit": "tokens/s",
        "anchor": 468_000,
        "whose": "x",
    }
    alone = {"what": "c", "value": 0.12345, "unit": "s", "anchor": None, "whose": ""}
    text = gpu.table([{"machine": "m"}, speed, alone, {"skipped": "d: no time"}])
    assert "| a / b | 234,000 tokens/s | 468,000 | x | 0.50 |\n" in text
    assert "| c | 0.1235 s |  |  |  |\n" in text and text.endswith("Skipped:\n\n- d: no time\n")
    assert gpu.table([alone]).endswith("- nothing\n")


def test_the_picture_shows_how_much_better(gpu, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, barh = [], Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda self, *a, **k: drawn.append(a) or barh(self, *a, **k))
    row = {"unit": "s", "whose": "x", "less_is_better": True}
    rows = [row | {"what": "a", "value": 2.0, "anchor": 4.0}, {"skipped": "b"}]
    rows += [row | {"what": "c", "value": 2.0, "anchor": 1.0, "less_is_better": False}]
    gpu.draw(rows, "title", tmp_path / "gpu.png")
    assert drawn == [(["c (x)", "a (x)"], [2.0, 2.0])]
    assert os.path.getsize(tmp_path / "gpu.png") > 5000
