"""Resuming a run: what its checkpoint says, and whether everything else still matches it."""

from training.adapters import base_name
from training.checkpoints import load_checkpoint
from training.flags import check_saved
from training.text import check_data
from utils import MissingBase


def read_saved(checkpoint):  # -> the run's flags
    return check_saved(checkpoint.metadata, checkpoint.folder)


def with_new_places(flags, typed, models_dir):  # -> the run's flags
    """Replaces the paths of the text and the frozen model by those that were typed, if any.

    Raises FileNotFoundError if there is no text.
    """
    if "init_from" in typed and "lora_rank" not in flags:
        raise ValueError("this run's checkpoints are whole models, so leave out --init_from")
    if "init_from" in typed:
        flags = flags | {"init_from": base_name(typed["init_from"], models_dir)}
    if "data" in typed:
        flags = flags | {"data": typed["data"]}
    try:
        check_data(flags["data"])
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no text at {flags['data']}; if it has moved, pass its new path with --data"
        ) from None
    return flags


def load_all(flags, moment_shapes, models_dir, base, checkpoint):  # -> Model, {name: array}
    folder = checkpoint.folder
    try:
        model, moments = load_checkpoint(folder, moment_shapes, models_dir, base)
    except MissingBase as error:
        raise MissingBase(f"{error}; if it has moved, pass its new path with --init_from") from None
    check_sizes(flags, model.hparams, folder)
    return model, moments


def check_sizes(flags, hparams, folder):
    """Raises ValueError if a checkpoint's run.json and model don't match."""
    is_same = all(flags[name] == hparams[name] for name in ("n_layer", "n_head", "n_embd"))
    if not is_same or flags["n_ctx"] > hparams["n_ctx"]:
        raise ValueError(f"{folder}: the sizes in run.json are not the model's")


def check_description(description, flags, checkpoint):
    """Raises ValueError if a checkpoint was made with another text or another frozen model."""
    for key, value in checkpoint.metadata["text"].items():  # older checkpoints have fewer
        if key != "examples" and description.get(key) != value:  # a line for people
            name, noun = ("init_from", "model") if key == "base" else ("data", "text")
            raise ValueError(
                f"{flags[name]} is not the {noun} that {checkpoint.folder} was trained on"
            )
