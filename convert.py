"""OpenAI's TensorFlow checkpoint as model.safetensors: for utils.py, in a process of its own.

    python convert.py models/124M models/124M/model.safetensors

TensorFlow's reader aborts its process on some damaged files; the one that wants the model goes on.
"""

import os
import sys

import numpy as np

from cli import one_line, run_cli
from utils import (
    hugging_face_name,
    quiet_tensorflow,
    read_hparams,
    tensor_shapes,
    tensorflow_name,
    write_safetensors,
)


def main(model_dir: str, path: str, spare: str | None = None):
    """Convert the TensorFlow checkpoint of MODEL_DIR.

    Args:
        model_dir: a folder with hparams.json and model.ckpt.*.
        path: the file to write.
        spare: the file to write where that is not possible.
    """
    tensors = read_checkpoint(os.path.join(model_dir, "model.ckpt"), read_hparams(model_dir))
    try:
        write_safetensors(path, tensors)
    except OSError as error:
        if spare is None:
            raise
        write_safetensors(spare, tensors)
        print(f"notice: {path} not written: {error.strerror}", file=sys.stderr)


def read_checkpoint(checkpoint, hparams):  # -> {Hugging Face's key: float32 array}
    """The variables of a checkpoint; ValueError if it is not as `hparams` says, or unreadable."""
    quiet_tensorflow()
    import tensorflow as tf

    try:
        return read_variables(tf.train.load_checkpoint(checkpoint), hparams, checkpoint)
    except (tf.errors.OpError, RuntimeError, IndexError) as error:
        raise ValueError(f"{checkpoint}: unreadable: {one_line(error)}") from None


def read_variables(reader, hparams, checkpoint):  # -> {Hugging Face's key: float32 array}
    """Exactly the variables a model of these sizes has. Conv weights are [1, n_in, n_out]."""
    found = reader.get_variable_to_shape_map()
    tensors = {}
    for name, shape in tensor_shapes(hparams):
        variable = tensorflow_name(name)
        stored = (1, *shape) if name.endswith(".w") else shape
        if tuple(found.get(variable, ())) != stored:
            sizes = found.get(variable, "missing")
            raise ValueError(f"{checkpoint}: {variable} is {sizes}, hparams.json asks for {stored}")
        tensor = reader.get_tensor(variable)
        if tensor.dtype != np.float32:
            raise ValueError(f"{checkpoint}: {variable} is {tensor.dtype}, not float32")
        tensors[hugging_face_name(name)] = tensor.reshape(shape)  # equal but for that leading 1
    extra = f"model/h{hparams['n_layer']}/ln_1/g"
    if extra in found:
        raise ValueError(f"{checkpoint}: {extra} is one layer more than hparams.json has")
    return tensors


if __name__ == "__main__":
    run_cli(main)
