"""The precision in which a model predicts: the products of its network in float32, TF32 or bfloat16."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import UserError

PRECISIONS = ("float32", "tf32", "bfloat16")


@contextlib.contextmanager
def use_precision(precision: str, device: str) -> Iterator[None]:
    """Runs what is inside in one precision; afterwards PyTorch's settings are as before.

    "float32" is every product in full float32, which PyTorch's own default for convolutions is not; "tf32" is products
    of float32 with 10 bits of mantissa on the tensor cores of a GPU, and float32 elsewhere; "bfloat16" is autocast. The
    device is where the model is, such as "cpu" or "cuda:0". Raises UserError for another precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"the precision is {precision}, but there are {', '.join(PRECISIONS)}")
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision == "tf32"
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
