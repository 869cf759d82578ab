"""What a training run shows of itself: its speed, its losses as lines of JSON, and as a picture.

models/mine/metrics.jsonl    {"step": 20, "loss": 4.1, ...}, {"step": 200, "validation": ...}
models/mine/loss.png         the same, drawn; `progress.draw("models/mine")` draws it again
"""

import contextlib
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from files import open_locked, parse_json, replacing, write_whole
from utils import quiet_tensorflow

# The makers' figures for dense products in bfloat16, FLOP/s of one device, by a part of its name.
KNOWN_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def flops_per_token(params, n_ctx):
    """6 N + 12 L E T for a forward and a backward pass: FLOP a token in stretches of T = n_ctx.

    Six for each of the N parameters a token is multiplied with, so all but wpe (Kaplan et al. 2020,
    arXiv:2001.08361), and twelve for each of attention's E numbers a layer and position, the masked
    ones too (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). nanoGPT counts like this: 855
    million for GPT-2 124M.
    """
    n_params = sum(x.size for x in jax.tree.leaves(params)) - params["wpe"].size
    return 6 * n_params + 12 * len(params["blocks"]) * params["wpe"].shape[1] * n_ctx


def peak_flops(devices, dtype):  # -> FLOP/s of all together, "known" or "measured"
    """The makers' figure in bfloat16, else what one large product reaches just now."""
    kind = devices[0].device_kind
    for name, peak in KNOWN_PEAKS.items():
        if name in kind and dtype == "bfloat16":
            return peak * len(devices), "known"
    n = 2048
    x = jax.device_put(jnp.ones((n, n), dtype), jax.local_devices()[0])
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # The CPU's devices are one processor, all of whose cores work on a single product.
    n_devices = 1 if devices[0].platform == "cpu" else len(devices)
    return n_devices * 2 * n**3 / min(seconds), "measured"


def make_log(out, n_done, flops, peak, source, schedule, tensorboard=False):
    """-> log(values), which adds a line to out/metrics.jsonl and returns what the bar shows.

    flops: those of a token; peak and source: of peak_flops. Every process makes one, the first
    process writes.
    """
    if jax.process_index() > 0:
        return lambda values: {}
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {peak / 1e12:.3g} TFLOP/s "
        f"({source}); a token takes {flops / 1e6:.4g} MFLOP (6 N + 12 L E T)"
    )
    file, began = open_log(out, n_done), time.perf_counter()
    writer = open_tensorboard(os.path.join(out, "tensorboard")) if tensorboard else None

    def log(values):
        values = values | {"seconds": round(time.perf_counter() - began, 3)}
        shown = {}
        if "loss" in values:
            values["learning_rate"] = float(schedule(values["step"] - 1))
            shown["loss"] = f"{values['loss']:.3f}"
        if "tokens_per_second" in values:
            values["mfu"] = values["tokens_per_second"] * flops / peak
            speed = tqdm.format_sizeof(values["tokens_per_second"])
            shown |= {"tok/s": speed, "mfu": f"{values['mfu']:.0%}"}
        add_line(file, json.dumps(values))
        if writer:
            writer(values)
        return shown

    return log


# --- metrics.jsonl and loss.png -------------------------------------------------------------------


def open_log(out, n_done):  # -> an open file
    """out/metrics.jsonl, to be added to: of a run resumed after n_done steps, the lines so far.

    It is locked: ValueError if another run is at work in this folder.
    """
    path = Path(out, "metrics.jsonl")
    try:
        os.makedirs(out, exist_ok=True)
        with open_locked(path, wait=False):
            kept = [line for line in read_log(path) if line["step"] <= n_done] if n_done else []
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        return open_locked(path, wait=False)
    except BlockingIOError:
        raise ValueError(f"{out}: another train_jax.py is at work there") from None
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


def add_line(file, text):
    """So that it is on the disk. OSError, which names the file, if it cannot be."""
    try:
        file.write(text.encode() + b"\n")
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # or Python would try once more, and complain, at exit
            file.close()
        raise OSError(error.errno, f"cannot write {file.name}: {error.strerror}") from None


def read_log(path):  # -> [dict]
    """The lines of metrics.jsonl, but for one that a kill cut short."""
    lines = []
    for text in Path(path).read_bytes().splitlines() if Path(path).is_file() else ():
        try:
            line = parse_json(text, path)
        except ValueError:
            break
        if type(line.get("step")) is int and all(map(is_number, line.values())):
            lines.append(line)
    return lines


def is_number(value):  # -> whether it can be drawn: a float, or an int of 64 bits
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def open_tensorboard(folder):  # -> a function that takes values
    """What TensorBoard reads."""
    writer = import_writer()(folder)

    def write(values):
        for name in values.keys() - {"step", "seconds"}:
            writer.add_scalar(name, values[name], values["step"])
        writer.flush()

    return write


def import_writer():
    """TensorBoard's own. ImportError, one clear line, if it is not installed."""
    quiet_tensorflow()  # which it imports, where there is one
    try:
        from tensorboard.summary import Writer
    except ImportError:
        raise ImportError("--tensorboard needs it: pip install tensorboard") from None
    return Writer


def draw(out):
    """out/loss.png: both losses by step. ImportError if there is no matplotlib."""
    from matplotlib.figure import Figure

    lines = read_log(Path(out, "metrics.jsonl"))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, style in (("loss", {"linewidth": 0.8, "alpha": 0.7}), ("validation", {"marker": "o"})):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            label = {"loss": "training", "validation": "validation"}[key]
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, **style)
    measured = [line for line in lines if "validation" in line]
    if measured:
        best = min(measured, key=lambda line: line["validation"])
        axes.axhline(best["validation"], color="gray", linewidth=0.8, linestyle=":")
        title = f"best validation loss {best['validation']:.4f} at step {best['step']}"
        axes.set_title(title, fontsize="medium")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with replacing(Path(out, "loss.png")) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
