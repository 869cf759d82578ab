"""Writes a checkpoint as OpenAI did. A small module, for a process that imports nothing else."""

import numpy as np

from model_files import weights


def write(folder, arrays):
    """{our name: array}, by tf.compat.v1's Saver; conv weights are [1, n_in, n_out]."""
    import tensorflow as tf

    v1 = tf.compat.v1
    folder.mkdir()
    with tf.Graph().as_default(), v1.Session() as session:
        for name, array in arrays.items():
            value = array[None] if name.endswith(".w") else array
            v1.Variable(value, name=weights.tensorflow_name(name))
        v1.Variable(np.zeros(3, np.float32), name="optimizer/step")
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(folder / "model.ckpt"))
