"""GPT-2's initialisation, for both trainers: each has its own random numbers."""

import math

import numpy as np

from model_files.weights import nest, tensor_shapes


def init_tree(hparams, normal):  # -> a tree of parameters
    """Normal with deviation 0.02, biases 0, gains 1, all float32.

    normal(shape): the next random numbers, with deviation 1; it is called for wte, wpe, and the
    matrices of each block. Matrices that write into the residual stream are scaled by
    1 / sqrt(2 * n_layer), so that it has the same variance however many layers add to it (Radford
    et al. 2019, section 2.3).
    """
    params = {}
    for name, shape in tensor_shapes(hparams):
        if len(shape) == 1:
            params[name] = np.full(shape, name.endswith(".g"), np.float32)
            continue
        scale = 0.02
        if name.endswith("c_proj.w"):
            scale = 0.02 / math.sqrt(2 * hparams["n_layer"])
        params[name] = scale * normal(shape)
    return nest(params)
