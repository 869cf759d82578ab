"""Draws what a key-value cache buys: benchmarks/cache.png.

usage: pip install -r requirements/benchmarks.txt; python benchmarks/plot.py

The time of one more token, by the length of the text before it, measured as in decode.py.
"""

import matplotlib
from common import ROOT, machine, model_folder
from decode import one_more

import utils

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

LENGTHS = (10, 20, 50, 100, 200, 500, 1000)


def main():
    with model_folder() as folder:
        _, _, params = utils.load_encoder_hparams_and_params(folder)
        points = [one_more(params, n)[:2] for n in LENGTHS]
    cached, plain = ([1e3 * p for p in line] for line in zip(*points, strict=True))
    print("  n   cached ms   without ms")
    for row in zip(LENGTHS, cached, plain, strict=True):
        print("{:>4}{:11.1f}{:13.1f}".format(*row))
    draw(cached, plain)


def draw(cached, plain):
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    for name, line, color in [("gpt2.py", plain, "#b3423a"), ("kv_cache.py", cached, "#2b6cb0")]:
        axes.plot(LENGTHS, line, "o-", color=color, linewidth=2, markersize=5)
        label = f"{name}, {line[-1]:,.0f} ms"
        above = {"xytext": (0, 9), "textcoords": "offset points", "ha": "right", "color": color}
        axes.annotate(label, (LENGTHS[-1], line[-1]), **above)
    axes.set(xscale="log", yscale="log", ylim=(10, max(plain) * 2))
    axes.set_xticks(LENGTHS, map(str, LENGTHS), minor=False)
    ticks = [10, 30, 100, 300, 1000]
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("tokens in the text so far")
    axes.set_ylabel("milliseconds for one more")
    axes.set_title("GPT-2 124M in NumPy, with and without a key-value cache", fontsize=11)
    axes.text(0.01, 0.02, machine(), transform=axes.transAxes, fontsize=7, color="gray")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "benchmarks" / "cache.png")


if __name__ == "__main__":
    main()
