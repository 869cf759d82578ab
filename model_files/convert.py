"""Converts OpenAI's TensorFlow checkpoint to model.safetensors, once, in a separate process.

    python -m model_files.convert models/124M/model.ckpt models/124M/model.safetensors

TensorFlow's reader aborts its process on some damaged files. In a separate process it cannot
abort ours.
"""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from model_files.config import read_hparams
from model_files.weights import (
    WEIGHTS,
    hugging_face_name,
    read_safetensors,
    tensor_shapes,
    tensorflow_name,
    write_safetensors,
)
from plumbing.cli import one_line, run_cli
from plumbing.files import check_file, remove_left_over
from plumbing.quiet import quiet_tensorflow

OPENAI_CHECKPOINT = "model.ckpt"


def has_tensorflow():
    """Returns whether TensorFlow is installed, without importing it."""
    return importlib.util.find_spec("tensorflow") is not None


def needs_tensorflow(checkpoint):  # -> the error's text
    advice = "pip install -r requirements.txt, with Python 3.13 or older"
    return f"{checkpoint}: reading it for the first time needs tensorflow: {advice}"


def find_checkpoint(model_dir):
    """Returns the path that a folder's `checkpoint` file names, without its endings.

    gpt-2-simple writes model-1000.index, model-1000.meta and so on, and keeps several of them.
    `checkpoint` names the latest, for tf.train.latest_checkpoint. Only the last part of its path
    counts, since the path may be another machine's. Without a `checkpoint` file, the name is
    OpenAI's model.ckpt.
    """
    path = os.path.join(model_dir, "checkpoint")
    if os.path.isfile(path):
        check_file(path)
        with open(path, encoding="utf-8", errors="replace") as file:
            found = re.search(r'^model_checkpoint_path:\s*"([^"\n]*)"', file.read(), re.MULTILINE)
        name = os.path.basename(found[1]) if found else ""
        if re.fullmatch(r"\w[\w.-]*", name) and os.path.isfile(
            os.path.join(model_dir, name + ".index")
        ):
            return os.path.join(model_dir, name)
    return os.path.join(model_dir, OPENAI_CHECKPOINT)


def converted_path(checkpoint):
    """Returns the path of a checkpoint's tensors as safetensors. Each checkpoint has its own."""
    folder, name = os.path.split(checkpoint)
    return os.path.join(folder, WEIGHTS if name == OPENAI_CHECKPOINT else f"{name}.safetensors")


def convert_checkpoint(checkpoint, path):
    """Writes the tensors of a TensorFlow checkpoint to `path`, and returns them.

    They are returned in read_safetensors' form. Another process does the work, because TensorFlow's
    reader aborts on some damaged files. If `path` cannot be written, the model still loads, with a
    notice. Raises ValueError if the checkpoint cannot be read.
    """
    model_dir, name = os.path.split(checkpoint)
    if not has_tensorflow():
        raise ImportError(needs_tensorflow(checkpoint))
    if sys.stderr.isatty():
        print(f"notice: converting {checkpoint}, which happens only once ...", file=sys.stderr)
    project = str(Path(__file__).resolve().parent.parent)
    python_path = os.pathsep.join([project, *filter(None, [os.environ.get("PYTHONPATH")])])
    with contextlib.suppress(OSError):  # the folder may be read-only
        remove_left_over(path)
    with tempfile.TemporaryDirectory() as folder:
        spare = os.path.join(folder, WEIGHTS)
        readable_dir = model_dir
        if not is_utf8(model_dir):  # TensorFlow can't open such a path, but can follow a link to it
            readable_dir = os.path.join(folder, "model")
            os.symlink(os.path.abspath(model_dir), readable_dir)
        target = os.path.join(readable_dir, os.path.basename(path))
        source = os.path.join(readable_dir, name)
        command = [sys.executable, "-P", "-m", "model_files.convert", source, target, spare]
        environment = os.environ | {"PYTHONPATH": python_path}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment
        )
        *_, message = done.stderr.decode(errors="replace").strip().split("\n")
        message = message.replace(readable_dir, model_dir)
        end = how_it_died(done.returncode)
        if end:
            message = f"{checkpoint} is damaged or too large: TensorFlow's reader died of {end}"
        if done.returncode != 0:
            raise ValueError(message.removeprefix("error: "))
        if message.startswith("notice: ") and sys.stderr.isatty():
            print(message, file=sys.stderr)
        return read_safetensors(path if os.path.isfile(path) else spare)  # a map outlives its file


def how_it_died(code):  # a process's exit code -> "SIGABRT", "exit code 3", or "" if it ended
    """Python itself exits with 0, 1 or 2. Windows, which has no signals, gives larger numbers."""
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}" if code > 2 else ""


def is_utf8(path):
    try:
        return bool(path.encode())
    except UnicodeEncodeError:
        return False


def main(checkpoint: str, path: str, spare: str | None = None):
    """Convert a TensorFlow checkpoint.

    Args:
        checkpoint: its path without endings. hparams.json must be in the same folder.
        path: the file to write.
        spare: the file to write if path cannot be written.
    """
    tensors = read_checkpoint(checkpoint, read_hparams(os.path.dirname(checkpoint)))
    try:
        write_safetensors(path, tensors)
    except OSError as error:
        if spare is None:
            raise
        write_safetensors(spare, tensors)
        print(f"notice: cannot write {path}: {error.strerror}", file=sys.stderr)


def read_checkpoint(checkpoint, hparams):  # -> {Hugging Face's key: float32 array}
    """Reads a checkpoint. Raises ValueError if it is unreadable, or its sizes are not hparams'."""
    quiet_tensorflow()
    import tensorflow as tf

    try:
        return read_variables(tf.train.load_checkpoint(checkpoint), hparams, checkpoint)
    except (tf.errors.OpError, RuntimeError, IndexError) as error:
        raise ValueError(f"{checkpoint} is unreadable: {one_line(error)}") from None


def read_variables(reader, hparams, checkpoint):  # -> {Hugging Face's key: float32 array}
    """Reads exactly the variables of a model of these sizes. Its weights are [1, n_in, n_out]."""
    shapes = reader.get_variable_to_shape_map()
    tensors = {}
    for name, shape in tensor_shapes(hparams):
        variable = tensorflow_name(name)
        stored = (1, *shape) if name.endswith(".w") else shape
        if tuple(shapes.get(variable, ())) != stored:
            found = shapes.get(variable, "missing")
            raise ValueError(
                f"{checkpoint}: {variable} is {found}, but hparams.json asks for {stored}"
            )
        tensor = reader.get_tensor(variable)
        if tensor.dtype != np.float32:
            raise ValueError(f"{checkpoint}: {variable} is {tensor.dtype}, not float32")
        tensors[hugging_face_name(name)] = tensor.reshape(shape)  # without that leading 1
    extra = f"model/h{hparams['n_layer']}/ln_1/g"
    if extra in shapes:
        raise ValueError(f"{checkpoint}: {extra} is one layer more than hparams.json says")
    return tensors


if __name__ == "__main__":
    run_cli(main)
