"""Opens GPT-2 up: one HTML page that shows what the model did with a text.

    python explain.py "Alan Turing theorized that computers would one day become"

The forward pass is gpt2.py's own, run once, unchanged. How it becomes a page, in reading order:

    pages/recording.py     `watch` notes the arguments and the result of every call of gpt2.py's
                           functions; from these calls `record` picks the arrays of interest:
                           the attention weights, the stream after each block, the logits
    pages/predictions.py   what the logits say: the likeliest tokens, and how surprising each was
    pages/explanation.py   `explain`, which does all of it: it records, then rounds and packs
    pages/explain.html     draws the data in any browser, without a network

What the page calls the logit lens is nostalgebraist's "interpreting GPT: the logit lens" (2020):
the stream after each block, read as if it were the last. serve.py sends the same page (/explain),
on which heads can be switched off.
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
    out: str = "explain.html",
    overwrite: bool = False,
):
    """Write an HTML page that shows what GPT-2 did with a text. Open it in any browser.

    Args:
        text: what the model reads, at most 256 tokens.
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. A model that is missing is downloaded once.
        models_dir: the folder that holds the models.
        out: the file to write; an earlier page of this script is replaced.
        overwrite: also replace a file that is not such a page.
    """
    from utils import load_encoder_hparams_and_params

    path = Path(os.path.realpath(out))  # if --out is a link, the file it points to is written
    check_out(out, path, overwrite)  # before any download
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encoder.encode_prompt(text, hparams["n_ctx"])
    model = os.path.basename(os.path.abspath(model_size))
    html = explain(inputs, encoder, hparams, params, model)
    try:
        write_whole(path, html)
    except OSError as error:  # its own text would name a temporary file
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    size = path.stat().st_size / 1e6
    print(f"{path}: {count(len(inputs), 'token')}, {size:.1f} MB. Open it in a browser.")


def check_out(out, path, overwrite=False):
    """Raises ValueError if --out is not the name of a file that can be written."""
    if path.is_file():
        if overwrite or is_page(path):
            return
        raise ValueError(f"--out {out}: is not a page of explain.py; --overwrite replaces it")
    if path.is_dir():
        problem = "is a folder"
    elif path.exists():
        problem = "is not an ordinary file"
    elif not path.parent.is_dir():
        problem = f"there is no folder {path.parent}"
    else:
        return
    raise ValueError(f"--out {out}: {problem}; expected a file's name, such as explain.html")


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
