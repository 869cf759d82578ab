"""Everything that is claimed of a GPU, or wanted of it: one command, at most 8 minutes.

usage: python benchmarks/gpu.py [FOLDER]

The GPU-only tests; how fast gpt2-124M trains, by batch size and with the logits in parts or whole,
and where the time of the fastest goes; 300 real steps; the recipe `shakespeare`, all of it; and how
fast 124M reads and writes, beside transformers if its PyTorch has CUDA. Each figure stands beside
its anchor. A table in Markdown is printed and, with a picture, written to FOLDER (data/gpu).

Each part is a process of its own: it gives the GPU's memory back, and what fails or takes too long
ends that part alone. What was skipped is said, and why. Without a GPU all of it runs at toy size,
which says nothing about speed.
"""

import collections
import contextlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from common import HPARAMS, ROOT, alternate, hugging_face, random_params
from tqdm import tqdm

MINUTES = 8
LLM_C = "llm.c on an H100"
TOY = {"n_vocab": 257, "n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 1}
TOY_RUN = ["--recipe", "shakespeare", "--data", "python-docs", "--n_layer", 1, "--n_embd", 24]
TOY_RUN += ["--n_head", 2, "--n_ctx", 16, "--batch_size", 8]
TOY_RUN += ["--n_steps", 60, "--eval_every", 60, "--optimizer", "adamw", "--dtype", "float32"]


def show(what, value, unit="", anchor=None, whose="", less_is_better=False):
    """A row of the table: what a part prints, as soon as it knows it."""
    row = {"what": what, "value": value, "unit": unit, "anchor": anchor, "whose": whose}
    print(json.dumps(row | {"less_is_better": less_is_better}), flush=True)


def skip(what, why):
    print(json.dumps({"skipped": f"{what}: {why}"}), flush=True)


# --- The parts ----------------------------------------------------------------------------------


def machine(toy):
    """Which GPU, and what one large product reaches there: the peak that is really to be had."""
    import jax
    import jax.numpy as jnp

    devices = jax.devices()
    n = 256 if devices[0].platform == "cpu" else 8192
    print(
        json.dumps({"machine": f"{len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}"})
    )
    x = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    seconds = alternate(5, product=lambda: [product(x) for _ in range(10)][-1].block_until_ready())
    flops = 10 * 2 * n**3 / seconds["product"]
    show(f"a bfloat16 product of {n} x {n}", flops / 1e12, "TFLOP/s", 790, LLM_C)


def tests(toy):
    """pytest -m gpu."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, file=sys.stderr)  # into the part's log
    n = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    n |= {kind: int(number) for number, kind in re.findall(r"(\d+) (\w+)", done.stdout[-200:])}
    n_failed = n["failed"] + n["error"]
    show(
        "GPU-only tests that failed",
        n_failed,
        f"of {n_failed + n['passed']}",
        0,
        less_is_better=True,
    )
    for line in re.findall(r"^(?:FAILED|ERROR|SKIPPED) .*", done.stdout, re.M):
        skip("a test", line)


def training(toy):
    """Tokens a second of the recipe gpt2-124M in each way, and the largest kernels of the best."""
    import jax

    from training import devices, progress
    from training.flags import choose

    devices.start_jax(None, None, None)
    hparams, n = TOY if toy else HPARAMS, len(jax.devices())
    flags = choose({"recipe": "gpt2-124M", "data": "", "n_accumulate": 1}, jax.default_backend())
    flags |= {name: hparams[name] for name in ("n_layer", "n_head", "n_embd", "n_ctx")}
    ends, sides = time.monotonic() + 80, {}
    for n_rows, whole in itertools.product((2,) if toy else (64, 32, 16), (False, True)):
        what = f"batches of {n * n_rows}, logits {'whole' if whole else 'in parts'}"
        if sides and time.monotonic() > ends:
            skip(f"training, {what}", "out of time")
            continue
        flags |= {"batch_size": n * n_rows}
        try:
            train, n_tokens = trainer(flags, hparams["n_vocab"], whole)
            speed = n_tokens / alternate(1 if toy else 3, train=train)["train"]
        except jax.errors.JaxRuntimeError as error:  # out of memory, as a rule
            skip(f"training, {what}", " ".join(str(error).split())[:200])
            continue
        sides[what] = speed, train
        show(f"training, {what}", speed, "tokens/s", 468_000, LLM_C)
    what, (speed, train) = max(sides.items(), key=lambda side: side[1][0])
    show(f"the best of them, {what}", speed, "tokens/s", 332_000, "PyTorch on an H100")
    peak, source = devices.peak_flops(jax.devices(), flags["dtype"])
    flops = progress.flops_per_token(hparams, hparams["n_ctx"])
    share, theirs = (100 * tokens * flops / peak for tokens in (speed, 468_000))
    show(f"its MFU, of {peak / 1e12:.3g} TFLOP/s ({source})", share, "%", theirs, LLM_C)
    profile(train)


def trainer(flags, n_vocab, whole):  # -> a function that trains some steps, and their tokens
    import jax
    import numpy as np

    import train_jax
    from training import devices
    from training.state import count_rows, init_params, start_state

    n_steps, mesh = 10, devices.make_mesh(flags["batch_size"])
    rule = train_jax.JaxTrainer(flags).optimizer
    sizes = {name: flags[name] for name in ("n_ctx", "n_embd", "n_layer")}
    params = init_params(jax.random.key(0), n_vocab, **sizes)
    state, shardings = start_state(params, None, 0, rule, count_rows(n_vocab), mesh, False)
    how = train_jax.loss_options(flags, n_vocab, flags["batch_size"] // mesh.size)
    how |= {"n_chunks": 1} if whole else {"n_chunks": max(2, how["n_chunks"])}
    steps = train_jax.make_train_steps(rule, 0.0, 0, shardings=shardings, **how)
    shape = n_steps, 1, flags["batch_size"], flags["n_ctx"] + 1
    tokens = np.random.default_rng(0).integers(0, n_vocab, shape, dtype=np.int32)
    batches = devices.put(tokens, devices.make_sharding(mesh, None, None, "data"))

    def train():
        nonlocal state
        state, (loss, *_) = steps(state, batches, n_steps)
        return float(loss)

    return train, n_steps * flags["batch_size"] * flags["n_ctx"]


def profile(function):
    """The ten kernels that take longest, by JAX's profiler, as shares of all kernels' time."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            function()
        [path] = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    lines = [line for p in planes if p.name.startswith("/device:GPU") for line in p.lines]
    lines = [line for line in lines if line.name.startswith("Stream")]
    if not lines:  # a CPU's own threads
        lines = [line for p in planes for line in p.lines if line.name.startswith("tf_XLA")]
    seconds = collections.Counter()
    for line in lines:
        for event in line.events:
            if not re.search(r"::|: ", event.name):  # else the runtime's own remarks
                seconds[event.name] += event.duration_ns
    for name, time_taken in seconds.most_common(10):
        show(f"kernel {name[:60]}", 100 * time_taken / seconds.total(), "% of the time")


def learning(toy):
    """300 steps of 124M on the Python documentation: does the loss fall on this machine?"""
    flags = ["--recipe", "gpt2-124M", "--n_accumulate", 1, "--n_warmup", 50, "--n_steps", 300]
    flags += ["--data", "python-docs", "--eval_every", 300, "--checkpoint_every", 300]
    lines, _ = run_trainer(*(TOY_RUN if toy else flags))
    losses = [line["loss"] for line in lines if "loss" in line]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    show(f"{lines[-1]['step']} real steps: the loss from {losses[0]:.2f} to", losses[-1], "nats")
    show("their median speed, with bytes as tokens", median(speeds), "tokens/s")


def shakespeare(toy):
    """The recipe's whole run."""
    lines, seconds = run_trainer(*(TOY_RUN if toy else ["--recipe", "shakespeare"]))
    best = min(line["validation"] for line in lines if "validation" in line)
    whose = "nanoGPT on an A100"
    show("shakespeare: the best validation loss", best, "nats", 1.4697, whose, True)
    show("shakespeare: the whole run", seconds, "s", 180, whose, True)


def run_trainer(*flags):  # -> what it logged, seconds
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder, "out"), time.monotonic()
        command = [sys.executable, "train_jax.py", *map(str, flags), "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-300:])
        lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        return lines, time.monotonic() - began


def writing(toy):
    """Prefill and decode of 124M's shape, random weights, greedy, by ours and transformers'."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch needs room, too
    import jax
    import numpy as np

    import kv_cache_jax
    import train_jax

    hparams, dtype = (TOY, "float32") if toy else (HPARAMS, "bfloat16")
    n_read, n_prompt, short, long = (32, 29, 4, 35) if toy else (512, 129, 8, 40)
    params = random_params(hparams)
    theirs = load_theirs(params, hparams, toy)
    params = train_jax.narrow(jax.tree.map(jax.numpy.asarray, params), dtype)

    def ours(ids, n):
        return kv_cache_jax.generate(ids, params, hparams["n_head"], n, batch_size=len(ids))

    sides = {"ours": ours} | ({"theirs": theirs} if theirs else {})
    for n_rows in (1, 8) if toy else (1, 8, 32, 128):
        ids = np.random.default_rng(n_rows).integers(0, hparams["n_vocab"] - 1, (n_rows, n_read))
        runs = {}
        for name, side in sides.items():  # what is written has one shape, short or long
            runs[f"{name}, read"] = partial(side, ids.tolist(), 1)
            runs[f"{name}, short"] = partial(side, ids[:, :n_prompt].tolist(), short)
            runs[f"{name}, long"] = partial(side, ids[:, :n_prompt].tolist(), long)
        ms = {run: 1e3 * value for run, value in alternate(1 if toy else 3, **runs).items()}
        reads = [ms[f"{name}, read"] for name in sides]
        steps = [(ms[f"{name}, long"] - ms[f"{name}, short"]) / (long - short) for name in sides]
        rows = f"{n_rows} row{'s' * (n_rows > 1)}, {dtype}"
        for what, found in ((f"a step of {rows}", steps), (f"reading {n_read} of {rows}", reads)):
            beside = (found[1], "transformers here") if theirs else (None, "")
            show(what, found[0], "ms", *beside, less_is_better=True)


def load_theirs(params, hparams, toy):  # -> a function of (ids, n_tokens), or None
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        return skip("transformers beside us", f"{missing[0]} is not installed")
    import torch

    if not toy and not torch.cuda.is_available():
        return skip("transformers beside us", "PyTorch has no CUDA here")
    device, dtype = ("cpu", torch.float32) if toy else ("cuda", torch.bfloat16)
    model = hugging_face(params, hparams).to(device, dtype)

    @torch.inference_mode()
    def generate(ids, n):
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        ids = torch.tensor(ids, device=device)
        ones = torch.ones_like(ids)
        return model.generate(ids, attention_mask=ones, max_new_tokens=n, **options).tolist()

    return generate


# How many seconds each may take; the last ones take what is left of the 8 minutes.
PARTS = {machine: 40, tests: 150, training: 150, shakespeare: 110, learning: 110, writing: 150}


# --- All of them --------------------------------------------------------------------------------


def run_part(part, toy, seconds, folder, tick):  # -> its rows
    """At most so many seconds of it. tick() is called every now and then."""
    command = [sys.executable, __file__, "--part", part.__name__, *(["--toy"] if toy else [])]
    environ = os.environ | ({"JAX_NUM_CPU_DEVICES": "1"} if toy else {})
    log, ends = Path(folder, f"{part.__name__}.log"), time.monotonic() + seconds
    with tempfile.TemporaryFile("w+") as out, open(log, "w") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=environ, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < ends:
                time.sleep(0.2)
                tick()
        finally:
            late = process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # and what it has started
            process.wait()
        out.seek(0)
        rows = [json.loads(line) for line in out.read().splitlines() if line.startswith("{")]
    if late:
        rows.append({"skipped": f"the rest of {part.__name__}: not done after {seconds:.0f} s"})
    elif process.returncode:
        last = (log.read_text().strip().splitlines() or ["no reason given"])[-1]
        rows.append({"skipped": f"the rest of {part.__name__}: {last[:300]}"})
    return rows


def table(rows):  # -> Markdown
    lines = ["| what | here | anchor | whose | here / anchor |", "|---|---|---|---|---|"]
    for row in rows:
        if "what" in row:
            value, anchor = (number(row[key]) for key in ("value", "anchor"))
            ratio = f"{row['value'] / row['anchor']:.2f}" if row["anchor"] else ""
            cells = row["what"], f"{value} {row['unit']}", anchor, row["whose"], ratio
            lines.append("| " + " | ".join(cell.replace("|", "/").strip() for cell in cells) + " |")
    skipped = [f"- {row['skipped']}" for row in rows if "skipped" in row]
    return "\n".join([*lines, "", "Skipped:", "", *(skipped or ["- nothing"]), ""])


def number(x):
    return "" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def draw(rows, title, path):
    """How each figure compares with its anchor: above 1 is better, whichever way it counts."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("anchor") and row["value"]][::-1]
    better = [
        row["anchor"] / row["value"] if row["less_is_better"] else row["value"] / row["anchor"]
        for row in rows
    ]
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['what']} ({row['whose']})" for row in rows]
    axes.barh(names, better, color=["#2b6cb0" if x >= 1 else "#b3423a" for x in better])
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xlabel("times as good as the anchor")
    axes.set_title(title, fontsize="medium")
    axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=120)


def main(folder):
    os.makedirs(folder, exist_ok=True)
    began, rows, toy = time.monotonic(), [], False
    with tqdm(total=60 * MINUTES, unit="s", disable=None) as bar:

        def tick():
            bar.update(round(time.monotonic() - began) - bar.n)

        for part, seconds in PARTS.items():
            bar.set_description(part.__name__)
            left = 60 * MINUTES - 10 - (time.monotonic() - began)
            if left < 20:
                rows.append({"skipped": f"{part.__name__}: the {MINUTES} minutes are over"})
                continue
            rows += run_part(part, toy, min(seconds, left), folder, tick)
            toy = not any("machine" in row and "cpu" not in row["machine"] for row in rows)
    title = next((row["machine"] for row in rows if "machine" in row), "no machine")
    title += ", at toy size: no GPU was found" if toy else ""
    text = f"{title}, {time.monotonic() - began:.0f} s\n\n{table(rows)}"
    print(text)
    Path(folder, "gpu.md").write_text(text, "utf-8")
    draw(rows, title, Path(folder, "gpu.png"))


if __name__ == "__main__":
    if "--part" in sys.argv:
        {part.__name__: part for part in PARTS}[sys.argv[2]](toy="--toy" in sys.argv)
    elif len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "data" / "gpu"))
