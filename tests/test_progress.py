"""training/progress.py: what is counted, the log of a run that is resumed, and the picture."""

import errno
import gc
import json
import os
from types import SimpleNamespace

import jax
import pytest
from conftest import TINY

import utils
from encoder import Encoder
from plumbing import files
from training import devices, progress
from training.output import Output
from training.text import open_text


def read(path):
    """The lines after the first, which has the run's number."""
    first, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {"step": 0, "run": 7}
    return lines


@pytest.fixture
def log(tmp_path):
    """make_log for tokens of 1000 FLOP, and 5 MFLOP/s."""

    def make(n_done=0, source="known", **options):
        machine = progress.Machine("1 x x", 5e6, source)
        return progress.make_log(
            tmp_path / "out", 7, n_done, machine, 1000, lambda n: n / 100, **options
        )

    return make


def test_a_line_is_in_the_file_at_once_and_the_bar_shows_the_same(log, tmp_path, capsys):
    write = log()
    assert "1 x x, 5e-06 TFLOP/s (known); 0.001 MFLOP per token" in capsys.readouterr().out
    assert write({"step": 20, "loss": 2.5}) == {"loss": "2.500"}
    shown = write({"step": 40, "loss": 2.25, "tokens_per_second": 1234.5})
    assert shown == {"loss": "2.250", "tok/s": "1.23k", "mfu": "25%"}
    assert write({"step": 40, "validation": 2.75}) == {}
    lines = read(tmp_path / "out" / "metrics.jsonl")
    assert all(line.pop("seconds") >= 0 for line in lines)
    assert lines == [
        {"step": 20, "loss": 2.5, "learning_rate": 0.19},
        {"step": 40, "loss": 2.25, "tokens_per_second": 1234.5, "learning_rate": 0.39}
        | {"mfu": 1234.5 * 1000 / 5e6},
        {"step": 40, "validation": 2.75},
    ]


def test_a_peak_that_was_measured_on_a_busy_machine_gives_no_share_of_it(log, capsys):
    write = log(source="measured")
    assert "5e-06 TFLOP/s (measured)" in capsys.readouterr().out
    shown = write({"step": 40, "loss": 2.25, "tokens_per_second": 1234.5})
    assert shown == {"loss": "2.250", "tok/s": "1.23k"}


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(log, tmp_path):
    path = tmp_path / "out" / "metrics.jsonl"
    write = log()
    for step in (20, 40, 60):
        write({"step": step, "loss": 2.0})
    with open(path, "a") as f:
        f.write('{"step": 80, "lo')  # cut short by a kill
    del write
    write = log(n_done=40)
    write({"step": 60, "loss": 3.0})
    assert [(line["step"], line["loss"]) for line in read(path)] == [
        (20, 2.0),
        (40, 2.0),
        (60, 3.0),
    ]
    del write
    log()  # a new run in the same folder begins anew
    assert read(path) == []


def test_two_runs_do_not_write_into_one_folder(log, tmp_path):
    write = log()
    write({"step": 20, "loss": 2.0})
    for n_done in (0, 10):
        with pytest.raises(ValueError, match="out: another run is writing to this folder"):
            log(n_done)
    write({"step": 40, "loss": 2.0})
    assert [line["step"] for line in read(tmp_path / "out" / "metrics.jsonl")] == [20, 40]
    del write  # as when a process ends, however it does
    log()


def test_where_there_are_no_locks_nothing_is_kept_apart(log, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    log()({"step": 20, "loss": 2.0})
    assert len(read(tmp_path / "out" / "metrics.jsonl")) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_line_that_cannot_be_written_names_the_file(log, tmp_path):
    log()
    os.unlink(tmp_path / "out" / "metrics.jsonl")
    os.symlink("/dev/full", tmp_path / "out" / "metrics.jsonl")
    file = open(tmp_path / "out" / "metrics.jsonl", "ab+")  # noqa: SIM115
    with pytest.raises(OSError, match=r"cannot write .*out/metrics.jsonl: No space left on device"):
        progress.add_line(file, "{}")
    assert file.closed


def test_a_picture_that_cannot_be_written_leaves_the_old_one(log, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write = log()
    progress.plot(tmp_path / "out")
    before = (tmp_path / "out" / "loss.png").read_bytes()
    write({"step": 20, "loss": 2.0})

    def replace(source, to):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        progress.plot(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["loss.png", "metrics.jsonl"]
    assert (tmp_path / "out" / "loss.png").read_bytes() == before


def test_the_picture_shows_both_losses(log, tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write = log()
    progress.plot(tmp_path / "out")  # before there is anything to see
    for step in range(20, 200, 20):
        write({"step": step, "loss": 4 - step / 100})
    write({"step": 100, "validation": 3.5})
    progress.plot(tmp_path / "out")
    from matplotlib.image import imread

    picture = imread(tmp_path / "out" / "loss.png")
    assert picture.shape == (900, 960, 4) and matplotlib
    colours = {tuple(c) for c in (picture[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    assert (255, 127, 14) in colours  # the second line's orange, matplotlib's "C1"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["loss.png", "metrics.jsonl"]


def test_pictures_do_not_pile_up_in_memory(log, tmp_path):
    """Not even while Python's collector, which looks for circles now and then, has not come."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    log()
    gc.disable()
    try:
        for _ in range(3):
            progress.plot(tmp_path / "out")
        left = [x for x in gc.get_objects() if type(x).__name__ in ("Figure", "FigureCanvasAgg")]
    finally:
        gc.enable()
    assert not left


@pytest.mark.slow
def test_tensorboard_gets_the_same_numbers(log, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    write = log(tensorboard=True)
    write({"step": 20, "loss": 2.5})
    write({"step": 20, "validation": 2.75})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert sorted(events.Tags()["tensors"]) == ["learning_rate", "loss", "validation"]
    for name, value in (("loss", 2.5), ("validation", 2.75)):
        [event] = events.Tensors(name)
        assert event.step == 20 and event.tensor_proto.float_val[0] == value


class Device:
    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"


def test_a_known_device_has_the_makers_figure_in_bfloat16_only():
    assert devices.peak_flops([Device()] * 4, "bfloat16") == (4 * 989e12, "known")
    assert devices.peak_flops([Device()] * 4, "float32")[1] == "measured"


@pytest.mark.parametrize("n_devices", [1, 2])
def test_a_cpus_peak_is_that_of_one_product_on_all_cores(monkeypatch, n_devices):
    ticks = iter(range(100))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(ticks))  # a product a second
    peak = devices.peak_flops(jax.devices()[:n_devices], "float32")
    assert peak == (2 * 2048**3, "measured")


def test_the_title_names_the_best(log, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes", reason="matplotlib is not installed")
    titles = []
    monkeypatch.setattr(axes.Axes, "set_title", lambda self, title, **_: titles.append(title))
    write = log()
    for step, validation in ((100, 3.5), (200, 2.5), (300, 2.75)):
        write({"step": step, "validation": validation})
    progress.plot(tmp_path / "out")
    assert titles == ["best validation loss 2.5000 at step 200"]


GOOD = {"step": 20, "loss": 2.0}
STRANGE = [
    b'{"step": "20", "loss": 2.0}',
    b'{"step": true, "loss": 2.0}',
    b'{"step": 20.0, "loss": 2.0}',
    b'{"step": NaN, "loss": 2.0}',
    b'{"loss": 2.0}',
    b'{"step": 20, "loss": "2"}',
    b'{"step": 20, "validation": null}',
    b'{"step": 20, "loss": [2.0, 3.0]}',
    b'{"step": 20, "validation": true}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b'{"step": 20, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 20, "loss": ' + b"[" * 500 + b"]" * 500 + b"}",
]


@pytest.mark.parametrize("line", STRANGE, ids=lambda line: line[:40].decode())
def test_lines_that_the_trainer_never_writes_are_left_out(log, tmp_path, line):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "metrics.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, line, good]))
    assert progress.read_log(path) == [GOOD, GOOD]
    progress.plot(tmp_path / "out")
    log(n_done=40)
    assert read(path) == [GOOD, GOOD]


@pytest.mark.parametrize("line", [b"\xff", b"[" * 10**5, b"[1]", b'{"step": ' + b"9" * 5000 + b"}"])
def test_a_log_ends_where_it_is_no_json(log, tmp_path, line):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), line, json.dumps(GOOD).encode()]))
    log(n_done=40)
    assert read(path) == [GOOD]


def test_a_run_writes_to_no_link_that_came_with_its_folder(log, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("precious")
    temporary = [f"{name}.{os.getpid()}.tmp" for name in ("loss.png", "metrics.jsonl")]
    for name in ("loss.png", *temporary):
        (tmp_path / "out" / name).symlink_to("../precious")
    log(n_done=40)({"step": 60, "loss": 3.0})
    progress.plot(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [line["step"] for line in read(tmp_path / "out" / "metrics.jsonl")] == [60]


@pytest.mark.parametrize("what", ["a link", "a pipe"])
def test_a_log_that_is_no_file_is_refused(log, tmp_path, what):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("precious")
    path = tmp_path / "out" / "metrics.jsonl"
    path.symlink_to("../precious") if what == "a link" else os.mkfifo(path)
    with pytest.raises(OSError, match=r"^cannot write .*metrics\.jsonl: [^N]"):
        log(n_done=40)
    assert (tmp_path / "precious").read_text() == "precious"


# --- Samples --------------------------------------------------------------------------------------


def sample_of(data, n_ctx, capsys):  # -> the prompt and the length that are asked for, what is said
    """Output.show_sample for a model that writes "So\\n\\nbe it"."""
    encoder = Encoder([])
    text = open_text(str(data), encoder, n_ctx)
    flags = {"out": "out", "data": str(data), "seed": 7}
    model = utils.Model(encoder, TINY | {"n_ctx": n_ctx}, None)
    trainer = SimpleNamespace(versions={}, is_main=True)
    asked = []

    def generate(prompts, params, n_head, n, endoftext, temperature, seed):
        asked.append((prompts, n, temperature, seed))
        return [encoder.encode("So\n\nbe it")]

    Output(flags, model, text, trainer).show_sample(generate, {})
    [([prompt], n, temperature, seed)] = asked
    assert (temperature, seed) == (0.8, 7)
    return encoder.decode(prompt), n, capsys.readouterr().out


def test_a_sample_names_its_prompt_and_its_temperature(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Some words.\n" * 99)
    said = '  a sample, at temperature 0.8, after "\\n":\n    So\n    be it\n'
    assert sample_of(tmp_path / "text.txt", 48, capsys) == ("\n", 47, said)


@pytest.mark.parametrize("n_ctx, prompt", [(128, "Is 2 even?"), (6, "en?")])
def test_a_sample_follows_the_prompt_of_a_validation_example(tmp_path, capsys, n_ctx, prompt):
    """Of 12 examples the second is drawn to validate with; it may be cut on the left."""
    path = tmp_path / "examples.jsonl"
    lines = [{"prompt": f"Is {i} even?", "completion": " No"} for i in range(1, 13)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = f'  a sample, at temperature 0.8, after "{prompt}":\n    So\n    be it\n'
    assert sample_of(path, n_ctx, capsys) == (prompt, min(100, n_ctx - len(prompt)), said)
