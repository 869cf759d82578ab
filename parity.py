"""Where does another GPT-2 differ from gpt2.py, and why?

    python parity.py export --model_size 124M --out reference.safetensors
    python parity.py compare theirs.npz --model_size 124M
    python parity.py check hf:models/shakespeare          # transformers' model of the folder
    python parity.py check student.py                     # functions of gpt2.py, one by one

`export` writes every intermediate result of the forward pass, every gradient, and a step of AdamW.
`compare` finds the first of somebody's tensors whose difference is more than rounding, the line of
gpt2.py that computes it, and which common mistake gives the same result. From Python:

    arrays = parity.record(model, tokens)                 # a PyTorch model's, by hooks
    verdict = parity.compare(arrays, params, n_head)
    print(parity.describe(verdict))

The code behind this is in checking/.
"""

import json as json_format
import os
import sys

import numpy as np

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import backprop
from checking import assignment, causes, files, pytorch, report
from checking import names as known
from checking.precision import DTYPES
from checking.random_model import random_case
from checking.recording import ADAMW, make_case
from model_files.config import query_scales, read_hparams
from plumbing.cli import did_you_mean
from utils import find_model, load_encoder_hparams_and_params

TEXT = "Alan Turing theorized that computers would one day become"
PARTS = {"params": "params.", "forward": "", "gradients": "grad.", "step": "step."}
COMMANDS = ("export", "compare", "check")

record = pytorch.record


def compare(arrays, params, n_head, tokens=None, dtype="float32", source="theirs"):
    """Compares {name: array} with gpt2.py's and returns a Verdict, for `describe`.

    tokens: [n_batch, n_seq + 1] ids, unless arrays has them, as `record`'s arrays do.

    Raises ValueError for unknown names, unknown layouts and NaN.
    """
    arrays = dict(arrays)
    found = arrays.pop("tokens", None)
    tokens = found if found is not None else tokens
    if tokens is None:
        raise ValueError(f"{source}: no tokens; pass them, or add an array named tokens")
    case = make_case(params, n_head, tokens, backprop, dtype)
    arrays = files.check_numbers({name: np.asarray(x) for name, x in arrays.items()}, source)
    return causes.compare(arrays, case, source)


def describe(verdict, source="theirs"):  # -> lines of text
    return report.text(verdict, source)


def reference(params, n_head, tokens, parts=tuple(PARTS)):  # -> {name: array}, its case
    """Returns every tensor in float32 and, unless it is a parameter, in float64 as float64.NAME."""
    case = make_case(params, n_head, tokens, backprop)
    kinds = [PARTS[part] for part in parts]
    arrays = {"tokens": case.tokens.astype(np.int32)}
    for name, twin in causes.twins(case, kinds).items():
        if known.split_kind(name)[0] in kinds:
            arrays[name] = np.asarray(twin.rounded, np.float32)
            if not name.startswith("params."):
                arrays[f"float64.{name}"] = np.asarray(twin.exact, np.float64)
    return arrays, case


# --- The command line -----------------------------------------------------------------------------


def main(
    command: str,
    theirs: str | None = None,
    model_size: str = "124M",
    models_dir: str = "models",
    text: str = TEXT,
    random: str | None = None,
    seed: int = 0,
    out: str = "reference.safetensors",
    parts: str = "params,forward,gradients,step",
    dtype: str = "float32",
    json: bool = False,
    names: bool = False,
):
    """Compare another GPT-2 with gpt2.py: export, compare or check.

    The exit code is 0 if everything agrees, 1 if something differs, and 2 for bad input.

    Args:
        command: export writes our tensors, compare reads theirs, check runs theirs.
        theirs: for compare, an .npz or .safetensors file; for check, hf:FOLDER or a Python file.
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. A missing model is downloaded once.
        models_dir: the folder that holds the models.
        text: the text for the models to read. A file that holds tokens doesn't need it.
        random: use a random model instead of model_size, such as n_layer=2,n_head=3; n_embd,
            n_vocab, n_ctx, n_batch and n_seq can also be set.
        seed: the seed of the random model and its tokens.
        out: the file that export writes, .safetensors or .npz.
        parts: the parts that export writes, a list such as params,forward,gradients,step.
        dtype: the precision in which theirs was computed: float32, bfloat16 or float16.
        json: print one JSON object.
        names: list the names that compare accepts, and stop.
    """
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        raise ValueError(f"no command {command!r}{hint or '; use export, compare or check'}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is unknown; use one of {', '.join(DTYPES)}")
    if names:
        print(known.table())
        return
    model = model_size, models_dir, text, random, seed
    if command == "export":
        export(model, out, parts)
        return
    if not theirs:
        raise ValueError(f"{command} needs a file, as in python parity.py {command} theirs.npz")
    if command == "compare":
        agrees = compare_file(theirs, model, dtype, json)
    elif theirs.startswith("hf:"):
        agrees = check_hugging_face(theirs.removeprefix("hf:"), models_dir, text, dtype, json)
    else:
        agrees = check_functions(theirs, seed, json)
    if not agrees:
        sys.exit(1)


def load_case(model_size, models_dir, text, random, seed):  # -> params, n_head, tokens, words
    if random is not None:
        return random_case(random, seed)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    tokens = np.array([encoder.encode(text)])
    return params, hparams["n_head"], tokens, f"{model_size}, reading {text!r}"


def export(model, out, parts):
    chosen = [part.strip() for part in parts.split(",") if part.strip()]
    for part in chosen:
        if part not in PARTS:
            raise ValueError(f"--parts {part} is unknown; use some of {','.join(PARTS)}")
    files.check_ending(out)
    params, n_head, tokens, about = load_case(*model)
    arrays, case = reference(params, n_head, tokens, chosen)
    files.write_arrays(out, arrays, files.metadata(case, about))
    n = sum(not name.startswith("float64.") for name in arrays)
    size = sum(x.nbytes for x in arrays.values()) / 1e6
    print(f"{out}: {n} tensors in float32 and their float64 twins, {size:.1f} MB ({about})")


def compare_file(path, model, dtype, json):  # -> does all agree?
    arrays = files.read_arrays(path)
    params, n_head, tokens, _ = load_case(*model)
    return show(compare(arrays, params, n_head, tokens, dtype, path), path, json)


def check_hugging_face(folder, models_dir, text, dtype, json):  # -> does all agree?
    model_dir = find_model(folder, models_dir)
    if any(scale != 1 for scale in query_scales(model_dir, read_hparams(model_dir))):
        raise ValueError(
            f"{model_dir} scales its attention, which gpt2.py folds into the weights when loading; "
            "their attention can't be compared"
        )
    params, n_head, tokens, _ = load_case(model_dir, models_dir, text, None, 0)
    model = pytorch.hugging_face(model_dir, dtype)
    arrays = pytorch.record_hugging_face(model, tokens, ADAMW)
    verdict = compare(arrays, params, n_head, tokens, dtype, folder)
    return show(verdict, f"hf:{folder}", json)


def check_functions(path, seed, json):  # -> do all agree?
    module = assignment.load_module(path)
    params, n_head, tokens, _ = random_case("n_layer=2,n_head=3,n_embd=24,n_batch=2,n_seq=7", seed)
    results = assignment.check_module(module, make_case(params, n_head, tokens, backprop))
    print(
        json_format.dumps(assignment.data(results)) if json else assignment.describe(results, path)
    )
    return all(result.agrees for result in results)


def show(verdict, source, json):  # -> does all agree?
    print(json_format.dumps(report.data(verdict)) if json else describe(verdict, source))
    return verdict.first is None


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
