"""The inputs of the model are checked before anything is computed."""

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import UserError


def check_images(images: Any, name: str = "images", shape: str = "(B, 3, H, W)") -> None:
    """Raises UserError unless the images are a tensor of this shape, with a pixel at least."""
    fits = isinstance(images, torch.Tensor) and images.dtype != torch.bool and not images.is_complex()
    fits = fits and images.ndim == shape.count(",") + 1 and images.shape[-3] == 3 and images.numel() > 0
    _require(fits, name, images, f"a tensor {shape} of integers or floats, RGB from 0 to 255")


def check_inputs(inputs: Any, training: bool, num_classes: int) -> None:
    """Raises UserError unless the inputs are those of :meth:`~kmax_d2.modeling.kmax_deeplab.KMaXDeepLab.forward`."""
    is_batch = isinstance(inputs, (list, tuple)) and len(inputs) > 0 and all(isinstance(x, Mapping) for x in inputs)
    _require(is_batch, "the batch", inputs, 'a list of dicts, each with an "image"')
    for index, x in enumerate(inputs):
        check_images(x.get("image"), f'"image" of input {index}', "(3, H, W)")
        for side in () if training else ("height", "width"):
            value = x.get(side, 1)
            fits = isinstance(value, numbers.Integral) and int(value) > 0
            _require(fits, f'"{side}" of input {index}', value, "a positive integer, the pixels of the result")
        if training:
            size = tuple(x["image"].shape[1:])
            _check_segments(x.get("segment_ids"), x.get("segment_classes"), size, f"of input {index}", num_classes)


def _check_segments(ids: Any, classes: Any, size: tuple[int, ...], of_input: str, num_classes: int) -> None:
    fits = _are_integers(classes, 1) and (not len(classes) or (classes.min() >= 0 and classes.max() < num_classes))
    wanted = f"a tensor (S,) of integers from 0 to {num_classes - 1}"
    _require(fits, f'"segment_classes" {of_input}', classes, wanted)
    fits = _are_integers(ids, 2) and ids.shape == size and ids.min() >= -1 and ids.max() < len(classes)
    wanted = f"a tensor of the image's size {size}, of integers from -1, void, to {len(classes) - 1}, the last segment"
    _require(fits, f'"segment_ids" {of_input}', ids, wanted)


def _are_integers(x: Any, dims: int) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim == dims and not (x.is_floating_point() or x.is_complex())


def _require(fits: object, name: str, value: Any, wanted: str) -> None:
    if not fits:
        raise UserError(f"{name} must be {wanted}, but is {_describe(value)}")


def _describe(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, (torch.Tensor, np.ndarray)):
        kind = f"{kind} {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
        is_scale = isinstance(value, torch.Tensor) and value.numel() > 0 and not value.is_complex()
        return f"a {kind} from {value.min()} to {value.max()}" if is_scale else f"a {kind}"
    if isinstance(value, (list, tuple)):
        return f"a {kind} of {', '.join(sorted({type(x).__name__ for x in value})) or 'nothing'}"
    return "missing" if value is None else repr(value) if isinstance(value, (numbers.Number, str)) else f"a {kind}"
