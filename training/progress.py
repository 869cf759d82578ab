"""What a training run shows: its speed, and its losses as lines of JSON and as a picture.

models/mine/metrics.jsonl    {"step": 20, "loss": 4.1, ...}, {"step": 200, "validation": ...},
                             with "expected" if curves.py has the loss of such a run, and
                             {"step": 200, "hellaswag_acc": 0.28, ...} with --eval_tasks
models/mine/loss.png         the same, drawn; `progress.plot("models/mine")` makes it again
"""

import contextlib
import gc
import json
import math
import os
import time
import typing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model_files.weights import tensor_shapes
from plumbing.files import (
    close_before_renaming,
    open_locked,
    parse_json,
    replacing,
    write_whole,
)
from plumbing.quiet import quiet_tensorflow


class Machine(typing.NamedTuple):
    """The hardware: its name, its FLOP/s, and where that figure comes from."""

    name: str
    peak: float
    source: str  # "known" or "measured"


class Stats(typing.NamedTuple):
    """Measurements of a training step, or their means over several steps.

    gradient_norm: of the whole gradient, before it is clipped. clipped: 1 if it was clipped,
    otherwise 0. update_size: the norm of the update divided by the norm of the parameters.
    """

    loss: float  # nats per token
    gradient_norm: float
    clipped: float
    update_size: float


def measure_peak():  # -> NumPy's FLOP/s
    """Measures one large product."""
    n, seconds = 2048, []
    x = np.ones((n, n), np.float32)
    for _ in range(5):
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def flops_per_token(hparams, n_ctx, flops_per_param=6):
    """Returns the FLOP per token of a forward and a backward pass, 6 N + 12 L E T.

    N parameters (all but wpe) take six FLOP each (Kaplan et al. 2020, arXiv:2001.08361). In each of
    L layers, attention takes twelve for each of E = n_embd numbers and T = n_ctx positions, masked
    or not (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). nanoGPT counts the same way, and
    gets 855 million for GPT-2 124M. flops_per_param: 4 for a frozen model, whose parameters have no
    gradients.
    """
    n_params = sum(math.prod(shape) for name, shape in tensor_shapes(hparams) if name != "wpe")
    return flops_per_param * n_params + 12 * hparams["n_layer"] * hparams["n_embd"] * n_ctx


def make_log(out, run, n_done, machine, flops, learning_rate, tensorboard=False):
    """Returns log(values), which adds a line to out/metrics.jsonl and returns what the bar shows.

    run: the run's number. n_done: how many steps are done. flops: FLOP per token.
    learning_rate(n_done): of the next step.
    """
    print(
        f"{machine.name}, {machine.peak / 1e12:.3g} TFLOP/s ({machine.source}); "
        f"{flops / 1e6:.3g} MFLOP per token"
    )
    file, began = open_log(out, run, n_done), time.perf_counter()
    writer = open_tensorboard(os.path.join(out, "tensorboard")) if tensorboard else None

    def log(values):
        values = values | {"seconds": round(time.perf_counter() - began, 3)}
        shown = {}
        if "loss" in values:
            values["learning_rate"] = float(learning_rate(values["step"] - 1))
            shown["loss"] = f"{values['loss']:.3f}"
        if "tokens_per_second" in values:
            shown["tok/s"] = tqdm.format_sizeof(values["tokens_per_second"])
            if machine.source == "known":  # a measured peak depends on what else is running
                values["mfu"] = values["tokens_per_second"] * flops / machine.peak
                shown["mfu"] = f"{values['mfu']:.0%}"
        add_line(file, json.dumps(values))
        if writer:
            writer(values)
        return shown

    return log


# --- metrics.jsonl and loss.png -------------------------------------------------------------------


def open_log(out, run, n_done):  # -> an open file
    """Opens out/metrics.jsonl to append, and keeps the lines up to step n_done of a resumed run.

    The first line has the run's number, by which a run recognizes its checkpoints. The file is
    locked. Raises ValueError if another run is writing to this folder.
    """
    path = Path(out, "metrics.jsonl")
    try:
        os.makedirs(out, exist_ok=True)
        with open_locked(path, wait=False) as file:
            lines = [line for line in read_log(path) if line["step"] <= n_done] if n_done else []
            if run is not None and find_run(lines) is None:
                lines = [{"step": 0, "run": run}, *lines]
            close_before_renaming(file)
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        return open_locked(path, wait=False)
    except BlockingIOError:
        raise ValueError(f"{out}: another run is writing to this folder") from None
    except ValueError as error:  # the path, and why: it is no ordinary file
        raise OSError(f"cannot write {error}") from None
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


def add_line(file, text):
    """Writes a line and flushes it. Raises OSError, which names the file, if that fails."""
    try:
        file.write(text.encode() + b"\n")
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # otherwise Python would retry at exit, and complain
            file.close()
        raise OSError(error.errno, f"cannot write {file.name}: {error.strerror}") from None


def read_log(path):  # -> [dict]
    """Returns the lines of metrics.jsonl, without one that a kill cut short."""
    lines = []
    for text in Path(path).read_bytes().splitlines() if Path(path).is_file() else ():
        try:
            line = parse_json(text, path)
        except ValueError:
            break
        if type(line.get("step")) is int and all(map(is_number, line.values())):
            lines.append(line)
    return lines


def find_run(lines):  # of read_log -> the number of the run that wrote them, or None
    return next((line["run"] for line in lines if "run" in line), None)


def is_number(value):  # -> whether it can be drawn: a float, or an int of 64 bits
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def open_tensorboard(folder):  # -> a function that takes values
    """The function writes values to files for TensorBoard."""
    writer = import_writer()(folder)

    def write(values):
        for name in values.keys() - {"step", "seconds"}:
            writer.add_scalar(name, values[name], values["step"])
        writer.flush()

    return write


def import_writer():
    """Returns TensorBoard's writer. Raises ImportError, one clear line, if it isn't installed."""
    quiet_tensorflow()  # TensorBoard imports TensorFlow if it is installed
    try:
        from tensorboard.summary import Writer
    except ImportError:
        raise ImportError("--tensorboard needs TensorBoard: pip install tensorboard") from None
    return Writer


def plot(out):
    """Draws out/loss.png: losses and --eval_tasks' accuracies by step, and below them the stats.

    Raises ImportError if matplotlib isn't installed.
    """
    from matplotlib.figure import Figure

    lines = read_log(Path(out, "metrics.jsonl"))
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    plot_losses(axes, lines)
    plot_shares(axes, lines)
    plot_stats(below, lines)
    for panel in (axes, below):
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize="small")
    below.set_xlabel("step")
    with replacing(Path(out, "loss.png")) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    del figure, axes, below, panel  # reference cycles with megabytes of pixels: without this,
    gc.collect()  # Python would let dozens of them pile up


def points(lines, name):  # -> the steps, and the values at these steps
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def plot_losses(axes, lines):
    for name, label, style in (
        ("expected", "expected", {"color": "0.7", "linewidth": 3}),
        ("loss", "training", {"linewidth": 0.8, "alpha": 0.7}),
        ("validation", "validation", {"marker": "o", "markersize": 4}),
    ):
        steps, losses = points(lines, name)
        if steps:
            axes.plot(steps, losses, label=label, **style)
    steps, losses = points(lines, "validation")
    if losses:
        best = min(losses)
        axes.axhline(best, color="gray", linewidth=0.8, linestyle=":")
        title = f"best validation loss {best:.4f} at step {steps[losses.index(best)]}"
        axes.set_title(title, fontsize="medium")
    axes.set_ylabel("loss, nats per token")


def plot_stats(axes, lines):
    """Draws the gradient norm, the share of clipped steps and the update size, on a log scale."""
    for name, label in (
        ("gradient_norm", "gradient norm"),
        ("update_size", "update / parameters"),
        ("clipped", "share of steps clipped"),
    ):
        steps, values = points(lines, name)
        if any(values):
            axes.plot(steps, values, label=label, linewidth=0.8)
            axes.set_yscale("log")


def plot_shares(axes, lines):
    """Draws the accuracies on --eval_tasks, if there are any, with a scale on the right."""
    names = sorted({name for line in lines for name in line if "_acc" in name})
    right = axes.twinx() if names else None
    for i, name in enumerate(names):
        style = {"color": f"C{2 + i}", "marker": "s", "markersize": 3, "linestyle": "--"}
        right.plot(*points(lines, name), **style)
        axes.plot([], [], label=name, **style)  # for the legend, which shows only these axes
    if names:
        right.set_ylabel("accuracy")
