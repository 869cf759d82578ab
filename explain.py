"""Opens up GPT-2: writes an HTML page that shows what the model did with a text.

    python explain.py "Alan Turing theorized that computers would one day become"
    python explain.py "To be, or not to be" --run models/mine    # how a model of your own learned

gpt2.py's own forward pass runs once, unchanged. These files turn it into a page, in reading order:

    pages/recording.py     `watch` notes the arguments and the result of every call of gpt2.py's
                           functions. From these calls, `record` picks the attention weights, the
                           stream after each block, and the logits.
    pages/predictions.py   reads the logits: the likeliest tokens, and how surprising each one was
    pages/explanation.py   `explain` does the whole job: it records, rounds and packs the arrays
    pages/explain.html     draws the data in any browser, without a network

With --run, pages/learning.py does the same with every snapshot of a training run, and
pages/learning.html draws them with a slider over the steps.

The logit lens reads the stream after each block as if it were the last (nostalgebraist,
"interpreting GPT: the logit lens", 2020). serve.py serves the same page at /explain, where heads
can also be switched off.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from pages.explanation import explain, is_page
from plumbing.cli import count
from plumbing.files import write_whole


def main(
    text: str,
    model_size: str = "124M",
    models_dir: str = "models",
    out: str | None = None,
    run: str | None = None,
    overwrite: bool = False,
):
    """Write an HTML page that shows what GPT-2 did with a text. Open it in any browser.

    Args:
        text: the text for the model to read, at most 256 tokens.
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. A missing model is downloaded once.
        models_dir: the folder that holds the models.
        out: the file to write. The default is explain.html or, with run, learning.html. A page that
            this script wrote earlier is replaced.
        run: the folder of a training run with --snapshots. The page then shows how that model
            learned, model_size is ignored, and the text may have at most 128 tokens.
        overwrite: also replace a file that is not a page of this script.
    """
    out = out or ("explain.html" if run is None else "learning.html")
    path = Path(os.path.realpath(out))  # if --out is a link, write the file that it points to
    check_out(out, path, overwrite)  # before any download
    if run is None:
        n_tokens, html = explain_model(text, model_size, models_dir)
    else:
        n_tokens, html = explain_run(text, run, models_dir)
    try:
        write_whole(path, html)
    except OSError as error:  # its own text names a temporary file
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    size = path.stat().st_size / 1e6
    print(f"{path}: {count(n_tokens, 'token')}, {size:.1f} MB. Open it in a browser.")


def explain_model(text, model_size, models_dir):  # -> the number of tokens, the page's text
    from utils import load_encoder_hparams_and_params

    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encoder.encode_prompt(text, hparams["n_ctx"])
    model = os.path.basename(os.path.abspath(model_size))
    return len(inputs), explain(inputs, encoder, hparams, params, model)


def explain_run(text, run, models_dir):  # -> the number of tokens, the page's text
    """Raises ValueError or OSError if the folder holds no run, or the run has no snapshots."""
    from kv_cache import generate
    from pages.learning import Run, learning
    from training.checkpoints import find_out
    from training.progress import read_log
    from training.snapshots import find_snapshots, read_snapshot
    from utils import load_encoder_hparams_and_params

    folder = find_out(run, models_dir)
    if not os.path.isdir(folder):
        raise ValueError(f"--run {run}: no such folder; name the --out folder of a training run")
    paths = find_snapshots(folder)
    if len(paths) < 2:
        raise ValueError(
            f"--run {run}: has {count(len(paths), 'snapshot')}, but the page needs 2; train with "
            f"--snapshots, as in python train_jax.py --snapshots 60 --overwrite --out {folder}"
        )
    encoder, hparams, _ = load_encoder_hparams_and_params(folder, models_dir)
    inputs = encoder.encode_prompt(text, hparams["n_ctx"])

    def read(step):
        return read_snapshot(paths[step], hparams)

    name = os.path.basename(os.path.abspath(folder))
    story = Run(name, [*paths], read, read_log(Path(folder, "metrics.jsonl")))
    return len(inputs), learning(inputs, story, encoder, hparams, generate)


def check_out(out, path, overwrite=False):
    """Raises ValueError if --out is not the name of a file that can be written."""
    if path.is_file():
        if overwrite or is_page(path):
            return
        raise ValueError(f"--out {out} is not a page of explain.py; add --overwrite to replace it")
    if path.is_dir():
        problem = "is a folder"
    elif path.exists():
        problem = "is not an ordinary file"
    elif not path.parent.is_dir():
        problem = f"there is no folder {path.parent}"
    else:
        return
    raise ValueError(f"--out {out}: {problem}; name a file, such as explain.html")


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
