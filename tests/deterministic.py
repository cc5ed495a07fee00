"""Values that are the same on every machine, each a function of a name and a shape.

The reference outputs in tests/data were computed by the official implementations with every
variable set by `checkpoint_value` (TensorFlow names) or `state_dict_value` (PyTorch names), on the
image of `image`. NumPy's legacy `RandomState` stream is frozen, so these values never change.
"""

import zlib

import numpy as np


def _generator(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)


def checkpoint_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the float32 value of one variable of an official TensorFlow checkpoint.

    `name` is the checkpoint key without its '/.ATTRIBUTES/VARIABLE_VALUE' ending, e.g.
    'encoder/_stem/_conv/kernel'; `shape` is the variable's TensorFlow shape.
    """
    leaf = name.split("/")[-1]
    x = _generator(name).standard_normal(size=shape)
    if leaf == "layer_scale":
        value = 0.3 + 0.05 * x
    elif leaf == "gamma":
        value = 1.0 + 0.1 * x
    elif leaf in ("beta", "bias", "moving_mean"):
        value = 0.1 * x
    elif leaf == "moving_variance":
        value = 1.0 + 0.2 * np.abs(x)
        if "kmeans_memory_batch_norm_retrieved_value" in name:  # sums over many pixels
            value = 900.0 * value
    elif leaf == "embeddings":
        value = 0.5 * x
    elif leaf == "cluster_centers":
        value = x
    elif leaf == "depthwise_kernel":
        value = x / np.sqrt(shape[0] * shape[1])
    else:  # the kernels
        if leaf == "qkv_kernel":
            fan_in = shape[0]
        elif len(shape) == 4 and shape[2] == 1:
            fan_in = shape[0] * shape[1]
        else:
            fan_in = int(np.prod(shape[:-1]))
        value = x * np.sqrt(1.5 / fan_in)
    return value.astype(np.float32)


def state_dict_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the value of one entry of the public PyTorch re-implementation's state dict.

    Float32, except for 'num_batches_tracked', which is an int64 zero.
    """
    leaf = name.split(".")[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    x = _generator(name).standard_normal(size=shape)
    if leaf == "running_var":
        value = 1.0 + 0.2 * np.abs(x)
        if "_kmeans_query_batch_norm_retrieved_value" in name:
            value = 900.0 * value
    elif leaf in ("running_mean", "bias"):
        value = 0.1 * x
    elif leaf == "gamma":
        value = 0.3 + 0.05 * x
    elif "_rpe" in name:
        value = 0.5 * x
    elif "_cluster_centers" in name:
        value = x
    elif len(shape) == 1:
        value = 1.0 + 0.1 * x
    elif len(shape) >= 3 and shape[1] == 1:
        value = x / np.sqrt(np.prod(shape[2:]))
    else:
        value = x * np.sqrt(1.5 / np.prod(shape[1:]))
    return value.astype(np.float32)


def image(name: str, height: int, width: int) -> np.ndarray:
    """Returns a smooth, noisy RGB image, uint8 of shape (height, width, 3)."""
    rng = _generator("image:" + name)
    coarse = rng.uniform(0, 255, size=(height // 16 + 2, width // 16 + 2, 3))
    ys = np.linspace(0, coarse.shape[0] - 1.001, height)
    xs = np.linspace(0, coarse.shape[1] - 1.001, width)
    y0, x0 = ys.astype(int), xs.astype(int)
    fy, fx = (ys - y0)[:, None, None], (xs - x0)[None, :, None]
    smooth = (
        coarse[y0][:, x0] * (1 - fy) * (1 - fx)
        + coarse[y0 + 1][:, x0] * fy * (1 - fx)
        + coarse[y0][:, x0 + 1] * (1 - fy) * fx
        + coarse[y0 + 1][:, x0 + 1] * fy * fx
    )
    noisy = smooth + rng.normal(0, 12, size=smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def prediction(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Returns float32 normal values in place of a predicted tensor of a loss reference."""
    return (_generator("prediction:" + name).standard_normal(size=shape) * scale).astype(np.float32)
