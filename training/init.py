"""GPT-2's initialization, for both trainers. Each of them has its own random numbers."""

import math

import numpy as np

from model_files.weights import nest, tensor_shapes


def init_tree(hparams, normal):  # -> a tree of parameters
    """Matrices are normal with standard deviation 0.02, biases 0 and gains 1, all float32.

    normal(shape): returns the next random numbers, with standard deviation 1. It is called for wte,
    wpe, and the matrices of each block. Matrices that write into the residual stream are scaled by
    1 / sqrt(2 * n_layer), so that the stream's variance doesn't depend on how many layers add to it
    (Radford et al. 2019, section 2.3).
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
