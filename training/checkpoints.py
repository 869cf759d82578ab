"""A training run's state on the disk: the run can continue from it exactly where it stopped.

    models/mine/metrics.jsonl                                   begins with the run's number
    models/mine/checkpoints/00000400/
        model.safetensors, config.json, vocab.json, merges.txt  a model folder like any other,
        adapter_model.safetensors, adapter_config.json          or an adapter's
        optimizer.safetensors                                   the optimizer's moments
        run.json                                  the run's number, step, flags, best loss, versions

Arrays are saved whole and unpadded, however many devices held them. A checkpoint is written under
another name and then renamed. The last two of a run are kept.
"""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import typing
from pathlib import Path

import numpy as np

from model_files.adapters import is_adapter, peft_config, write_adapter
from model_files.weights import read_safetensors, write_safetensors
from plumbing.cli import one_line
from plumbing.files import read_json, write_whole
from training import progress
from training.adapters import adapt, find_adapters
from training.flags import read_tasks
from training.text import NAMED_TEXTS
from utils import (
    Model,
    check_target,
    load_base_and_adapter,
    load_encoder_hparams_and_params,
    save_model,
)

CHECKPOINT = re.compile(r"[0-9]{8,}")  # a checkpoint's name; a folder "2024" is not ours
HALF_WRITTEN = re.compile(
    r"\.saving-.*|(metrics\.jsonl|loss\.png|chat_template\.jinja"
    r"|adapter_(config\.json|model\.safetensors))\.\d+\.tmp"
)
DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4")}


class State(typing.NamedTuple):
    """What a training step changes: state in, state out.

    The trainers' parameters and moments lie on devices, or in memory that processes share. In a
    checkpoint they are NumPy's arrays, and the moments have names: {name: array}.
    """

    params: object
    moments: object
    n_done: int  # steps done


class Checkpoint(typing.NamedTuple):
    """A folder in out/checkpoints, and what its run.json says."""

    folder: str
    metadata: dict


def save_checkpoint(out, model, state, metadata, previous=None):  # -> its folder
    """Write a checkpoint. Delete all others but `previous`, the folder of this run's last one.

    model: its tokenizer and sizes are written beside the state's parameters. metadata: what
    run.json says besides the step; its flags, if any, decide whether an adapter is written.
    """
    folder = os.path.join(out, "checkpoints")
    plain, stage = os.path.join(folder, f"{state.n_done:08d}"), None
    target = plain
    try:
        os.makedirs(folder, exist_ok=True)
        names = os.listdir(folder)
        older = {os.path.join(folder, name) for name in filter(CHECKPOINT.fullmatch, names)}
        for name in names:
            if name.startswith(".saving-"):
                shutil.rmtree(os.path.join(folder, name))  # half written
        stage = tempfile.mkdtemp(prefix=".saving-", dir=folder)
        save_params(stage, model._replace(params=state.params), metadata.get("flags", {}))
        write_safetensors(os.path.join(stage, "optimizer.safetensors"), state.moments)
        run_json = json.dumps({"step": state.n_done} | metadata, indent=1)
        write_whole(Path(stage, "run.json"), run_json)
        while target in older:  # an earlier run's; ours is 000000400 until it is deleted
            target = os.path.join(folder, "0" + os.path.basename(target))
        os.rename(stage, target)
    except OSError as error:
        reason = error.strerror.rpartition(": ")[2]  # save_model's message would name the stage
        raise OSError(error.errno, f"cannot write {target}: {reason}") from error
    finally:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)
    for old in sorted(older - {previous, target}):
        with contextlib.suppress(OSError):
            delete_checkpoint(old)
    with contextlib.suppress(OSError):
        os.rename(target, plain)
        target = plain
    return target


def with_full_paths(flags):
    """The flags with full paths, so that the run can be resumed from any directory."""
    if flags["data"] not in NAMED_TEXTS:
        flags = flags | {"data": os.path.abspath(flags["data"])}
    if tasks := read_tasks(flags.get("eval_tasks")):
        words = (f"{t}={os.path.abspath(path)}" if path else t for t, path in tasks.items())
        flags = flags | {"eval_tasks": ",".join(words)}
    return flags


def save_params(folder, model, flags, dtype="float32"):
    """Write a model's folder or, if adapters are trained, an adapter's, without the model."""
    if "lora_rank" not in flags:
        save_model(folder, *model, dtype)
        return
    targets = flags["lora_targets"].split(",")
    config = peft_config(flags["init_from"], flags["lora_rank"], flags["lora_alpha"], targets)
    template = model.encoder.chat_template
    write_adapter(folder, config, find_adapters(model.params), dtype, template)


def delete_checkpoint(folder):
    """Delete a checkpoint, run.json first, so that no run resumes from one half deleted."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, "run.json"))
    shutil.rmtree(folder)


def delete_half_written(out):
    """Delete the half-written files of a killed run. The folder must be locked by this run."""
    for path in Path(out).iterdir():
        if path.name.startswith(".saving-"):
            shutil.rmtree(path)
        elif HALF_WRITTEN.fullmatch(path.name):
            path.unlink()


def check_out(out, overwrite=False, is_adapter=False):
    """Raises ValueError or OSError if a new run could not write to `out`, or would replace files.

    With overwrite it may replace the files of a run and its model, one by one, and no others. A
    run that was stopped before it saved anything is never in the way.
    """
    folder = os.path.join(out, "checkpoints")
    check_target(out, is_adapter)
    if os.path.lexists(folder) and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise ValueError(f"{folder}: is not a folder we may write to")
    there = set(os.listdir(out)) if os.path.isdir(out) else set()
    if os.path.isdir(folder) and not os.listdir(folder):
        there -= {"checkpoints"}
    there -= {"metrics.jsonl", "snapshots"}
    there = {name for name in there if not HALF_WRITTEN.fullmatch(name)}
    if there and not overwrite:
        goes_on = f"--resume {out} continues its run, " if "checkpoints" in there else ""
        kinds = {"model.safetensors": "a model", "adapter_model.safetensors": "an adapter"}
        what = next((kinds[name] for name in kinds if name in there), min(there))
        raise ValueError(
            f"{out} holds {what}, which training would replace: {goes_on}"
            "--out names another folder, --overwrite replaces it"
        )


def find_out(resume, models_dir):  # the --resume flag -> the run's folder
    """The folder that --out makes of the same words; or a path, as --init_from takes it."""
    inside = os.path.join(models_dir, resume)
    return inside if os.path.isdir(inside) else resume


def find_checkpoint(out, before=math.inf):  # -> Checkpoint
    """The last one of the run in a folder, or the last before a step.

    Raises ValueError or OSError if there is none, or if it is damaged. If this run has replaced an
    earlier one, checkpoints of the earlier one do not count.
    """
    folder = os.path.join(out, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    complete = [n for n in names if os.path.isfile(os.path.join(folder, n, "run.json"))]
    complete = [n for n in complete if CHECKPOINT.fullmatch(n) and int(n) < before]
    complete.sort(key=int, reverse=True)
    if not complete:
        raise FileNotFoundError(f"{out}: nothing to resume: no checkpoint in {folder}")
    lines = progress.read_log(Path(out, "metrics.jsonl"))
    for name in complete:
        path = os.path.join(folder, name)
        with offering_earlier(out, path):
            run_json = os.path.join(path, "run.json")
            metadata = read_json(run_json)
            if lines and "run" not in metadata:
                raise ValueError(f"{run_json}: damaged, or written by another program")
        if not lines or metadata["run"] == progress.find_run(lines):
            return Checkpoint(path, metadata)
    raise FileNotFoundError(
        f"{out}: nothing to resume: its run was stopped before its first checkpoint, and those in "
        f"{folder} are an earlier run's; --overwrite begins once more"
    )


@contextlib.contextmanager
def offering_earlier(out, folder, read=None):
    """If reading a checkpoint fails, the error says how to continue from the one before it.

    read(Checkpoint) is tried on that one first: if it fails as well, there is nothing to offer.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        try:
            earlier = find_checkpoint(out, before=int(os.path.basename(folder)))
            if read:
                read(earlier)
        except (ValueError, OSError):
            raise error from None
        raise ValueError(
            f"{one_line(error)}: delete {folder}, and --resume continues from {earlier.folder}"
        ) from None


def load_checkpoint(folder, moment_shapes, models_dir=".", base=None):
    """Read what save_checkpoint wrote -> Model, {name: array} of moments.

    The moments come in the order of moment_shapes(params) -> {name: (shape, dtype)}, those that the
    optimizer needs. base: as in load_base_and_adapter. Raises ValueError or OSError if the
    moments are others, or if a file is damaged.
    """
    if is_adapter(folder):
        encoder, hparams, params, adapters = load_base_and_adapter(folder, models_dir, base)
        model = Model(encoder, hparams, adapt(params, adapters))
    else:
        model = load_encoder_hparams_and_params(folder, ".")
    path = os.path.join(folder, "optimizer.safetensors")
    tensors, wanted = read_safetensors(path), moment_shapes(model.params)
    if {name: (shape, DTYPES.get(d)) for name, (d, shape, _) in tensors.items()} != wanted:
        raise ValueError(f"{path}: is of another optimizer, or of another version of optax")
    moments = {
        name: tensors[name][2].view(dtype).reshape(shape).copy()
        for name, (shape, dtype) in wanted.items()
    }
    return model, moments
