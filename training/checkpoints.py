"""A training run's state on the disk: the run can go on from it exactly where it stopped.

    models/mine/metrics.jsonl                                   begins with the run's number
    models/mine/checkpoints/00000400/
        model.safetensors, config.json, vocab.json, merges.txt  a model folder like any other,
        adapter_model.safetensors, adapter_config.json          or an adapter's
        optimizer.safetensors                                   the optimizer's moments
        run.json                                  the run's number, step, flags, best loss, versions

Everything here is NumPy's, whole and unpadded, however many devices held it. A checkpoint is
written under another name and renamed as a whole; the last two of a run are kept.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from model_files.adapters import is_adapter, peft_config, write_adapter
from model_files.weights import read_safetensors, write_safetensors
from plumbing.files import read_json, write_whole
from training import progress
from training.adapters import adapt, find_adapters
from training.flags import read_tasks
from training.text import NAMED_TEXTS
from utils import (
    check_target,
    load_base_and_adapter,
    load_encoder_hparams_and_params,
    save_model,
)

CHECKPOINT = re.compile(r"[0-9]{8,}")  # a checkpoint's name; a folder "2024" is not ours
HALF_WRITTEN = re.compile(r"\.saving-.*|(metrics\.jsonl|loss\.png)\.\d+\.tmp")
DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4")}


def save_checkpoint(out, places, step, params, moments, about, encoder, hparams):  # -> where
    """Write a checkpoint and delete this run's others but the last. `places` lists them.

    params: the model's tree; moments: {name: array}; about: what run.json says besides the step.
    """
    folder = os.path.join(out, "checkpoints")
    plain, stage = os.path.join(folder, f"{step:08d}"), None
    place = plain
    try:
        os.makedirs(folder, exist_ok=True)
        names = os.listdir(folder)
        older = {os.path.join(folder, name) for name in filter(CHECKPOINT.fullmatch, names)}
        for name in names:
            if name.startswith(".saving-"):
                shutil.rmtree(os.path.join(folder, name))  # half written
        stage = tempfile.mkdtemp(prefix=".saving-", dir=folder)
        save_params(stage, encoder, hparams, params, about.get("flags", {}))
        write_safetensors(os.path.join(stage, "optimizer.safetensors"), moments)
        write_whole(Path(stage, "run.json"), json.dumps({"step": step} | about, indent=1))
        while place in older:  # an earlier run's: until that is deleted, ours is 000000400
            place = os.path.join(folder, "0" + os.path.basename(place))
        os.rename(stage, place)
    except OSError as error:
        why = error.strerror.rpartition(": ")[2]  # save_model's message would name the stage
        raise OSError(error.errno, f"cannot write {place}: {why}") from error
    finally:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)
    for old in [*places[:-1], *(older - {*places, place})]:  # `older` are an earlier run's
        with contextlib.suppress(OSError):
            put_away(old)
    with contextlib.suppress(OSError):
        os.rename(place, plain)
        place = plain
    places[:] = [*places[-1:], place]
    return place


def from_anywhere(flags):
    """The flags with full paths, so that the run can be resumed from any directory."""
    if flags["data"] not in NAMED_TEXTS:
        flags = flags | {"data": os.path.abspath(flags["data"])}
    if tasks := read_tasks(flags.get("eval_tasks")):
        words = (f"{t}={os.path.abspath(path)}" if path else t for t, path in tasks.items())
        flags = flags | {"eval_tasks": ",".join(words)}
    return flags


def save_params(folder, encoder, hparams, params, flags, dtype="float32"):
    """Write a model's folder or, if adapters are trained, an adapter's, without the model."""
    if "lora_rank" not in flags:
        return save_model(folder, encoder, hparams, params, dtype)
    targets = flags["lora_targets"].split(",")
    config = peft_config(flags["init_from"], flags["lora_rank"], flags["lora_alpha"], targets)
    write_adapter(folder, config, find_adapters(params), dtype)


def put_away(place):
    """Delete a checkpoint, run.json first, so that no run resumes from one half deleted."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(place, "run.json"))
    shutil.rmtree(place)


def clear_away(out):
    """Delete the half-written files of a killed run. The folder must be locked by this run."""
    for path in Path(out).iterdir():
        if path.name.startswith(".saving-"):
            shutil.rmtree(path)
        elif HALF_WRITTEN.fullmatch(path.name):
            path.unlink()


def check_out(out, overwrite=False, is_adapter=False):
    """ValueError or OSError if a new run could not write to `out`, or would replace files in it.

    With overwrite it may replace the files of a run and its model, one by one, and no others. A
    run that was stopped before it saved anything is never in the way.
    """
    folder = os.path.join(out, "checkpoints")
    if not out:
        raise ValueError("--out is empty: name the folder to write")
    check_target(out, is_adapter)
    if os.path.lexists(folder) and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise ValueError(f"{folder}: is not a folder we may write to")
    there = set(os.listdir(out)) if os.path.isdir(out) else set()
    if os.path.isdir(folder) and not os.listdir(folder):
        there -= {"checkpoints"}
    there = {name for name in there - {"metrics.jsonl"} if not HALF_WRITTEN.fullmatch(name)}
    if there and not overwrite:
        goes_on = f"--resume {out} goes on with its run, " if "checkpoints" in there else ""
        kinds = {"model.safetensors": "a model", "adapter_model.safetensors": "an adapter"}
        what = next((kinds[name] for name in kinds if name in there), min(there))
        raise ValueError(
            f"{out} holds {what}, which training would replace: {goes_on}"
            "--out names another folder, --overwrite replaces it"
        )


def find_out(resume, models_dir):  # the --resume flag -> the run's folder
    """A folder in models_dir, as --init_from takes it, or a path."""
    if not resume:
        raise ValueError("--resume is empty: name the folder of a run")
    inside = os.path.join(models_dir, resume)
    return inside if os.path.isdir(inside) else resume


def find_checkpoint(out):  # -> its path, what run.json says
    """The last checkpoint of the run in a folder. ValueError or OSError if there is none.

    If this run has replaced an earlier one, checkpoints of the earlier one do not count.
    """
    folder = os.path.join(out, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    complete = [n for n in names if os.path.isfile(os.path.join(folder, n, "run.json"))]
    complete = sorted(filter(CHECKPOINT.fullmatch, complete), key=int, reverse=True)
    if not complete:
        raise FileNotFoundError(f"{out}: nothing to resume: no checkpoint in {folder}")
    lines = progress.read_log(Path(out, "metrics.jsonl"))
    for name in complete:
        place = os.path.join(folder, name)
        saved = read_json(os.path.join(place, "run.json"))
        if not lines or saved.get("run") == progress.find_run(lines):
            return place, saved
    raise FileNotFoundError(
        f"{out}: nothing to resume: its run was stopped before its first checkpoint, and those in "
        f"{folder} are an earlier run's; --overwrite begins once more"
    )


def load_checkpoint(place, shapes, models_dir="."):  # -> encoder, hparams, params, {name: array}
    """Read what save_checkpoint wrote. The moments come in the order of shapes(params).

    shapes(params) gives {name: (shape, dtype)} of the moments that the optimizer needs. ValueError
    if the file has others.
    """
    if is_adapter(place):
        encoder, hparams, params, adapters = load_base_and_adapter(place, models_dir)
        params = adapt(params, adapters)
    else:
        encoder, hparams, params = load_encoder_hparams_and_params(place, ".")
    path = os.path.join(place, "optimizer.safetensors")
    tensors, wanted = read_safetensors(path), shapes(params)
    if {name: (shape, DTYPES.get(d)) for name, (d, shape, _) in tensors.items()} != wanted:
        raise ValueError(f"{path}: is of another optimizer, or of another version of optax")
    moments = {
        name: tensors[name][2].view(dtype).reshape(shape).copy()
        for name, (shape, dtype) in wanted.items()
    }
    return encoder, hparams, params, moments
