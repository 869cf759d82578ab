"""Writes a checkpoint as OpenAI did. A small module, for a process that imports nothing else."""

import numpy as np

from model_files import weights


def write(folder, arrays, name="model.ckpt", step=None):
    """{our name: array}, by tf.compat.v1's Saver; conv weights are [1, n_in, n_out].

    step: gpt-2-simple's, which becomes a part of the files' names.
    """
    import tensorflow as tf

    v1 = tf.compat.v1
    folder.mkdir(exist_ok=True)
    with tf.Graph().as_default(), v1.Session() as session:
        for ours, array in arrays.items():
            value = array[None] if ours.endswith(".w") else array
            v1.Variable(value, name=weights.tensorflow_name(ours))
        v1.Variable(np.zeros(3, np.float32), name="optimizer/step")
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(folder / name), global_step=step)


def latest(folder):  # -> what TensorFlow says a folder's latest checkpoint is
    import tensorflow as tf

    return tf.train.latest_checkpoint(str(folder))
