"""Draws the pictures of docs/, from the shipped model and the same functions as the pages.

    python docs/draw.py             # into docs/
    python docs/draw.py /tmp/look   # or into another folder

What is drawn is computed here, or read from models/shakespeare/README.md. Blue, from pale to dark,
says how much; red is for what a picture compares it with, or points at.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import backprop  # noqa: E402
import encoder as bpe  # noqa: E402
import gpt2  # noqa: E402
import llama_pico  # noqa: E402
import utils  # noqa: E402
from checking import mistakes, recording  # noqa: E402
from model_files import weights  # noqa: E402

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

INK, PALE, BLUE, RED = "#3d4248", "#d9e2ec", "#2b6cb0", "#b3423a"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "figure.dpi": 150,
} | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
BIGRAM = 2.49  # nats per letter: exercises.md counts it, since the text is not part of the project
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPEECH = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


def load():  # -> the shipped model
    return utils.load_encoder_hparams_and_params("shakespeare", str(ROOT / "models"))


def canvas(width=6, height=3.4, columns=1, **options):
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained", **options)


def shown(char):  # a label for a character that one cannot see
    return {" ": "␣", "\n": "⏎"}.get(char, char)


# --- A picture a page ---------------------------------------------------------------------------


def tokens():
    """The merges of " mother", as 01_tokens.md learns them."""
    text = "the other mother and her brother gather there, the others gather another feather"
    merges = bpe.train(text, 257 + 8).merges
    rows = []
    for n in range(len(merges) + 1):
        encoder = bpe.Encoder(merges[:n])
        row = [encoder.decode([id]) for id in encoder.encode(" mother")]
        if not rows or row != rows[-1][1]:
            rows.append(("bytes" if n == 0 else f"merge {n}", row))
    figure, axes = canvas(height=2.7)
    for y, (name, row) in enumerate(rows):
        x = 0
        newest = max(row, key=len) if y else None
        for piece in row:
            color = RED if piece == newest else PALE
            box = {"height": 0.72, "color": color, "align": "center"}
            axes.barh(y, len(piece) - 0.08, left=x + 0.04, **box)
            ink = "white" if piece == newest else INK
            label = "".join(map(shown, piece))
            axes.text(
                x + len(piece) / 2, y, label, ha="center", va="center", color=ink, fontsize=12
            )
            x += len(piece)
        axes.text(-0.25, y, name, ha="right", va="center")
        axes.text(x + 0.25, y, f"{len(row)} tokens", ha="left", va="center")
    axes.set(xlim=(-1.6, 8.6), ylim=(len(rows) - 0.4, -0.6))
    axes.set_axis_off()
    return figure


def embeddings():
    """The letters' rows of wte, seen from the side from which they differ most."""
    encoder, _, params = load()
    chars = LETTERS + LETTERS.upper()
    x = params["wte"][[encoder.encode(char)[0] for char in chars]]
    x = x - x.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    share = s**2 / (s**2).sum()
    points = u[:, :2] * s[:2]
    points *= np.sign(points[[chars.index("a"), chars.index("q")], [0, 1]])  # a right, q above
    points = push_apart(points, 0.07, 0.13)
    figure, axes = canvas(height=4.2)
    for char, point in zip(chars, points, strict=True):
        color = RED if char.isupper() else BLUE
        axes.text(*point, char, color=color, ha="center", va="center", fontsize=10)
    low, high = points.min(0) - 0.15, points.max(0) + 0.15
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.set_xlabel(f"first axis, {share[0]:.0%} of all differences")
    axes.set_ylabel(f"second axis, {share[1]:.0%}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("52 letters by their row of wte: the first axis is the case", loc="left")
    return figure


def push_apart(points, width, height):
    """Moves labels that would lie on each other, by no more than that takes."""
    points = points.copy()
    for _ in range(50):
        for i, j in zip(*np.triu_indices(len(points), 1), strict=True):
            gap = (points[j] - points[i]) / [width, height]
            if (length := np.hypot(*gap)) < 1:
                move = gap / max(length, 1e-6) * (1 - length) / 2 * [width, height]
                points[i] -= move
                points[j] += move
    return points


def heat(axes, weights, labels, numbers=True, size=9):
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    n = len(weights)
    axes.set_xticks(range(n), labels, fontsize=size)
    axes.set_yticks(range(n), labels, fontsize=size)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    for i in range(n if numbers else 0):
        for j in range(i + 1):
            color = "white" if weights[i, j] > 0.5 else INK
            axes.text(j, i, f"{weights[i, j]:.2f}", ha="center", va="center", color=color)


def weights_of(q, k):  # the trick of 03_attention.md: the average of a one and zeros is the weight
    return gpt2.attention(q, k, np.eye(k.shape[-2], dtype=k.dtype))


def attention():
    """The example of 03_attention.md, and one head of the shipped model."""
    unit = math.sqrt(2) * math.log(3)
    q = unit * np.array([[0, 0], [1, 0], [0, 0], [2, 0]])
    k = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    encoder, hparams, params = load()
    text, seen = "KING RICHARD", []

    def watch(q, k, v):
        seen.append(weights_of(q, k))
        return gpt2.attention(q, k, v)

    blocks = [block | {"attend": watch} for block in params["blocks"]]
    gpt2.gpt2(encoder.encode(text), **params | {"blocks": blocks}, n_head=hparams["n_head"])
    figure, (left, right) = canvas(height=3.3, columns=2)
    heat(left, weights_of(q, k), ["dogs", "bark", "cats", "sleep"])
    left.set_title("by hand: the verbs ask for nouns")
    heat(right, seen[0][1], [shown(char) for char in text], numbers=False)
    right.set_title("block 0, head 1: the letter before")
    left.set_ylabel("who asks")
    for axes in (left, right):
        axes.set_xlabel("how much it takes of each")
    return figure


def mask():
    """What each letter may see, and what a changed letter changes with the mask and without."""
    encoder, hparams, params = load()
    one, other = "KING RICHARD", "KING RUCHARD"
    n = len(one)
    figure, (left, right) = canvas(height=3.2, columns=2, gridspec_kw={"width_ratios": [1, 1.35]})
    left.imshow(np.tri(n), cmap="Blues", vmin=0, vmax=1.6)
    labels = [shown(char) for char in one]
    left.set_xticks(range(n), labels)
    left.set_yticks(range(n), labels)
    left.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    left.set_title("what each row may see")

    def open_attention(q, k, v):
        return gpt2.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])) @ v

    for attend, color, name in (
        (open_attention, RED, "without the mask"),
        (gpt2.attention, BLUE, "with it"),
    ):
        blocks = [block | {"attend": attend} for block in params["blocks"]]
        tree = params | {"blocks": blocks}
        a, b = (
            gpt2.gpt2(encoder.encode(t), **tree, n_head=hparams["n_head"]) for t in (one, other)
        )
        change = np.abs(a - b).max(-1)
        right.plot(range(n), change, "o-", color=color, markersize=4)
        right.text(2.8, change[:5].max() + 0.35, name, color=color, ha="center")
    right.axvline(6, color=INK, linewidth=0.8, linestyle=":")
    right.set_xticks(range(n), labels)
    right.set_ylabel("largest change of a logit")
    right.set_title("after I is changed to U")
    right.set_ylim(-0.6, None)
    right.grid(axis="y")
    return figure


def residuals():
    """What each half of a block writes into the stream, measured as on the page."""
    encoder, hparams, params = load()
    x = params["wte"][encoder.encode(SPEECH)] + params["wpe"][: len(SPEECH)]
    stream, halves = [x], []
    for block in params["blocks"]:
        c_proj = {name: 0 * array for name, array in block["mlp"]["c_proj"].items()}
        mute = block | {"mlp": block["mlp"] | {"c_proj": c_proj}}
        middle = gpt2.transformer_block(x, **mute, n_head=hparams["n_head"])
        x = gpt2.transformer_block(x, **block, n_head=hparams["n_head"])
        halves += [middle - stream[-1], x - middle]
        stream.append(x)
    sizes = [[np.linalg.norm(x, axis=-1).mean() for x in some] for some in (stream, halves)]
    figure, axes = canvas()
    places = np.arange(len(params["blocks"]))
    for shift, first, color in ((-0.19, 0, PALE), (0.19, 1, BLUE)):
        axes.bar(places + shift, sizes[1][first::2], width=0.36, color=color)
    axes.plot(np.arange(7) - 0.5, sizes[0], "o-", color=RED, markersize=4)
    axes.annotate("the stream", (3.5, sizes[0][4]), (-6, 6), color=RED, ha="right",
                  textcoords="offset points")  # fmt: skip
    axes.annotate("attention adds", (2.81, sizes[1][6]), (0, 4), ha="right",
                  textcoords="offset points")  # fmt: skip
    axes.annotate("the ffn adds", (5.19, sizes[1][11]), (0, 4), color=BLUE, ha="center",
                  textcoords="offset points")  # fmt: skip
    axes.set_xticks(places, [f"block {i}" for i in places])
    axes.set_ylabel("length of a token's vector")
    axes.grid(axis="y")
    return figure


def sampling():
    """The next letter after "I will not " and what the three knobs make of it."""
    encoder, hparams, params = load()
    logits = gpt2.gpt2(encoder.encode("I will not "), **params, n_head=hparams["n_head"])[-1]
    order = np.argsort(-logits)[:14]
    plain = gpt2.probabilities(logits, 1)[order]
    settings = [
        ("temperature 0.5: sharper", {"temperature": 0.5}),
        ("temperature 1.5: flatter", {"temperature": 1.5}),
        ("top_k 4: the four likeliest", {"temperature": 1, "top_k": 4}),
        ("top_p 0.6: until 60% is reached", {"temperature": 1, "top_p": 0.6}),
    ]
    figure, grid = plt.subplots(
        2, 2, figsize=(6, 3.8), layout="constrained", sharex=True, sharey=True
    )
    for axes, (name, options) in zip(grid.ravel(), settings, strict=True):
        axes.bar(range(14), gpt2.probabilities(logits, **options)[order], color=BLUE, width=0.7)
        axes.step(np.arange(15) - 0.5, [*plain, plain[-1]], where="post", color=RED, linewidth=1)
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_xticks(range(14), [shown(encoder.decode([id])) for id in order])
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, 0))
        axes.grid(axis="y")
    grid[0, 0].text(5.8, 0.085, "as the model has it", color=RED, fontsize=8)
    return figure


def gradients():
    """Slopes measured and by hand, and by hand with a term of the layer norm's left out."""
    encoder, hparams, params = load()
    text = np.array([encoder.encode("The moon was new and the road was long.")])
    n_head = hparams["n_head"]
    arrays = {name: x.astype(np.float64) for name, x in weights.leaves(params).items()}
    rng, places = np.random.default_rng(0), []
    for name, x in arrays.items():
        places += [(name, tuple(rng.integers(0, n) for n in x.shape)) for _ in range(2)]

    def loss():
        logits = gpt2.gpt2(text[:, :-1], **weights.nest(arrays), n_head=n_head)[0]
        return backprop.cross_entropy(logits, text[0, 1:])[0].mean()

    def measure(name, place, step=1e-4):
        x, before = arrays[name], arrays[name][place]
        x[place] = before + step
        up = loss()
        x[place] = before - step
        down = loss()
        x[place] = before
        return (up - down) / (2 * step)

    def forgetful(dy, x, g, b):  # without the part along n
        n = gpt2.layer_norm(x, 1.0, 0.0)
        dx = dy * g / x.std(-1, keepdims=True)
        return dx - dx.mean(-1, keepdims=True), {"g": (dy * n).sum(0), "b": dy.sum(0)}

    measured = np.abs([measure(*where) for where in places])
    figure, axes = canvas(height=3.8)
    right = backprop.layer_norm_backward
    for f, color, name in ((forgetful, RED, "a term is missing"), (right, BLUE, "by hand")):
        backprop.layer_norm_backward = f
        found = weights.leaves(backprop.loss_and_gradients(params, text, n_head)[1])
        found = np.abs([found[name][place] for name, place in places])
        seen = (measured > 1e-9) & (found > 0)
        axes.plot(measured[seen], found[seen], "o", color=color, markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="slope, measured", ylabel="slope, by backprop.py")
    axes.legend(loc="upper left", frameon=False)
    axes.grid()
    return figure


def slope():
    """The loss on the way down its own gradient, and the straight line that the gradient is."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    from train_jax import losses

    encoder, hparams, params = load()
    ids = np.array([encoder.encode("The moon was new and the road was long; nobody sang.")])
    loss = jax.jit(lambda tree: losses(tree, ids, hparams["n_head"])[0])
    start, gradient = jax.value_and_grad(loss)(params)
    length = math.sqrt(sum(float((g * g).sum()) for g in jax.tree.leaves(gradient)))
    far = np.linspace(-0.1, 0.4, 51)
    move = jax.jit(lambda t: loss(jax.tree.map(lambda p, g: p - t / length * g, params, gradient)))
    curve = np.array([move(jnp.float32(t)) for t in far])
    figure, axes = canvas()
    axes.plot(far, curve, color=BLUE, linewidth=2)
    axes.plot(far, start - length * far, color=RED, linewidth=1)
    axes.plot(0, start, "o", color=INK, markersize=5)
    axes.annotate("the parameters now", (0, start), (10, 4), textcoords="offset points")
    axes.annotate("what the gradient promises", (0.3, start - 0.3 * length), (-8, -4), color=RED,
                  textcoords="offset points", ha="right", va="center")  # fmt: skip
    axes.annotate("the loss", (far[-1], curve[-1]), (0, -14), color=BLUE, ha="right",
                  textcoords="offset points")  # fmt: skip
    axes.set_xlabel("distance walked downhill, all parameters together")
    axes.set_ylabel("loss, nats per letter")
    axes.grid()
    return figure


def training():
    """The shipped model's validation loss, from the table in its README."""
    text = (ROOT / "models" / "shakespeare" / "README.md").read_text("utf-8")
    rows = {name: re.search(rf"^\| {name} \|(.*)\|$", text, re.M)[1].split("|")
            for name in ("step", "validation")}  # fmt: skip
    steps, values = ([float(cell) for cell in row] for row in rows.values())
    figure, axes = canvas()
    start = math.log(257)
    axes.plot([0, steps[0]], [start, values[0]], color=BLUE, linewidth=1, linestyle=":")
    axes.plot(0, start, "o", color=BLUE, markerfacecolor="white")
    axes.plot(steps, values, "o-", color=BLUE, linewidth=2, markersize=4)
    axes.annotate(f"nothing known: ln 257 = {start:.2f}", (0, start), (10, -3),
                  textcoords="offset points")  # fmt: skip
    axes.axhline(BIGRAM, color=RED, linewidth=1)
    axes.text(
        steps[-1], BIGRAM + 0.06, f"counting pairs of letters: {BIGRAM}", color=RED, ha="right"
    )
    axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), (0, -14), color=BLUE, ha="center",
                  textcoords="offset points")  # fmt: skip
    axes.set(ylim=(1, 5.9), xlim=(-0.025 * steps[-1], 1.05 * steps[-1]))
    bits = axes.secondary_yaxis("right", functions=(lambda y: y / math.log(2),
                                                    lambda y: y * math.log(2)))  # fmt: skip
    bits.set_ylabel("the same in bits")
    bits.spines["right"].set_visible(False)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats per letter")
    axes.grid()
    return figure


def checkpoint():
    """Where the parameters of the released sizes are."""
    sizes = {"124M": (12, 768), "355M": (24, 1024), "774M": (36, 1280), "1558M": (48, 1600)}
    groups = ("wte", "wpe", "attention", "ffn")
    colors = ("#b6cde4", PALE, "#6fa0cf", BLUE)
    figure, axes = canvas(height=2.8)
    for y, (name, (n_layer, n_embd)) in enumerate(sizes.items()):
        hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_layer": n_layer}
        counts = dict.fromkeys(groups, 0)
        for tensor, shape in weights.tensor_shapes(hparams):
            kind = {"attn": "attention", "mlp": "ffn"}.get(tensor.split(".")[-3:][0], tensor)
            counts[kind] = counts.get(kind, 0) + math.prod(shape)  # the norms: too thin to see
        total, left = sum(counts.values()), 0
        for group, color in zip(groups, colors, strict=True):
            share = counts[group] / total
            axes.barh(y, share, left=left, color=color, height=0.66, edgecolor="white")
            ink = "white" if color == BLUE else INK
            if share > 0.04:
                axes.text(left + share / 2, y, f"{share:.0%}", ha="center", va="center", color=ink)
            if y == 0:
                axes.text(left + share / 2, -0.5, group, ha="center", va="bottom")
            left += share
        axes.text(-0.015, y, f"{name}\n{total:,}", ha="right", va="center", fontsize=8)
    axes.set(xlim=(-0.2, 1.0), ylim=(3.5, -0.9))
    axes.set_axis_off()
    return figure


def lora():
    """The singular values of a matrix, and of what 12_lora.md adds to it."""
    name, n = "blocks.0.attn.c_attn.w", 12
    with tempfile.TemporaryDirectory() as out:
        flags = "--lora_rank 4 --n_ctx 64 --batch_size 8 --n_accumulate 1 --n_steps 60"
        flags += " --learning_rate 3e-3 --eval_every 60 --data python-docs --init_from"
        command = [sys.executable, str(ROOT / "train_jax.py"), *flags.split()]
        base = str(ROOT / "models" / "shakespeare")
        subprocess.run([*command, base, "--out", out], check=True, stdout=subprocess.DEVNULL)
        tuned = weights.leaf(utils.load_encoder_hparams_and_params(out)[2], name)
    w = weights.leaf(load()[2], name)
    figure, axes = canvas()
    for matrix, color, label, shift in ((w, BLUE, "w", -0.2), (tuned - w, RED, "its update", 0.2)):
        values = np.linalg.svd(matrix, compute_uv=False)[:n]
        axes.bar(np.arange(1, n + 1) + shift, values, width=0.4, color=color, label=label)
    axes.set_xticks(range(1, n + 1))
    axes.set(xlabel="direction, the strongest first", ylabel="singular value")
    axes.set_title(f"Of w's {len(w)} directions, the first {n}; its update has 4", loc="left")
    axes.set_ylim(0, 5.6)
    axes.legend(frameon=False, ncols=2)
    axes.grid(axis="y")
    return figure


def rotary():
    """How rotary positions turn the four points of a head, and the scores that come of it."""
    n_seq, d_head, theta = 33, 8, 1e4
    ones = np.zeros((1, n_seq, d_head))
    ones[..., : d_head // 2] = 1  # every point starts at (1, 0)
    horizontal = llama_pico.rotate(ones, theta)[0, :, : d_head // 2]  # [n_seq, 4], cosines
    figure, (left, right) = canvas(columns=2, width_ratios=[1.25, 1])
    colors = [RED, BLUE, "#7ba4d0", "#b6cce3"]
    for i, color in enumerate(colors):
        left.plot(horizontal[:, i], color=color, label=f"point {i + 1}")
    left.set(xlabel="position", ylabel="first coordinate", ylim=(-1.1, 1.75))
    left.set_yticks([-1, 0, 1])
    left.legend(frameon=False, ncols=2, loc="upper center")
    left.set_title("Each point turns at its own speed", loc="left")
    left.grid(axis="y")

    n_seq = 12
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, d_head))
    q = llama_pico.rotate(np.repeat(q, n_seq, axis=1), theta)
    k = llama_pico.rotate(np.repeat(k, n_seq, axis=1), theta)
    scores = np.where(np.tri(n_seq, dtype=bool), q[0] @ k[0].T, np.nan)
    right.imshow(scores, cmap="Blues")
    right.set(xlabel="position of the key", ylabel="position of the query")
    right.set_xticks(range(0, n_seq, 2))
    right.set_title("Scores depend on the distance", loc="left")
    return figure


def first_difference():
    """How far every tensor is from float64: for a correct float32 model, and with 14's mistakes."""
    encoder, hparams, params = load()
    case = recording.make_case(params, hparams["n_head"], [encoder.encode(SPEECH)], backprop)
    exact = recording.forward(case, "float64")
    shown = {"correct": (INK, None, None)}
    causes = {"exact GELU": "exact GELU", "mask off by one": "a query also sees the next token"}
    for (label, cause), color in zip(causes.items(), (BLUE, RED), strict=True):
        found = next(m for m in mistakes.FORWARD if cause in m.cause)
        shown[label] = color, found, None
    found = next(m for m in mistakes.FORWARD if "weight of attn.c_proj is transposed" in m.cause)
    shown["c_proj transposed in block 4"] = "#6fa0cf", found, 4
    figure, axes = canvas()
    names = [name for name in exact if not name.endswith(("attn.masked", "loss", "losses"))]
    for label, (color, mistake, block) in shown.items():
        arrays = recording.forward(case, "float32", mistake, block)
        errors = [relative_error(arrays[name], exact[name]) for name in names]
        axes.semilogy(np.maximum(errors, 1e-9), color=color, linewidth=1.5, label=label)
    starts = [names.index(f"blocks.{i}.ln_1") for i in range(hparams["n_layer"])]
    axes.set_xticks(starts, [f"block {i}" for i in range(len(starts))])
    axes.set(ylabel="distance from float64, relative", ylim=(1e-9, 10))
    axes.set_title("A wrong model leaves the line of rounding where its mistake is", loc="left")
    axes.legend(frameon=False, ncols=2, loc="lower right")
    axes.grid(axis="y")
    return figure


def relative_error(x, exact):
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


PICTURES = {
    "01_tokens": tokens,
    "02_embeddings": embeddings,
    "03_attention": attention,
    "04_mask": mask,
    "05_residuals": residuals,
    "06_sampling": sampling,
    "08_gradients": gradients,
    "09_slope": slope,
    "10_training": training,
    "11_checkpoint": checkpoint,
    "12_lora": lora,
    "13_since_gpt2": rotary,
    "14_first_difference": first_difference,
}


def main(folder=ROOT / "docs"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, picture in PICTURES.items():
            path = Path(folder, f"{name}.png")
            picture().savefig(path)
            plt.close("all")
            Image.open(path).convert("RGB").quantize(256, dither=0).save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
