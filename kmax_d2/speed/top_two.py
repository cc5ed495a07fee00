"""On a GPU, the Triton kernel finds the two best queries of each pixel, where it runs."""

import functools
import logging
from collections.abc import Callable

import torch

from ..modeling.top_two import FASTER, top_two_queries

logger = logging.getLogger(__name__)


@functools.cache
def _fastest(device: torch.device) -> Callable:
    """The kernel, if Triton is installed and can compile for this GPU, which also takes a C compiler."""
    try:
        from .top_two_triton import top_two_in_one_kernel

        top_two_in_one_kernel(torch.zeros(2, 1, 1, device=device), (1, 1))
    except Exception as error:  # of many kinds, from a missing compiler to an old GPU
        reason = str(error).strip().partition("\n")[0]
        logger.warning("merging runs without its Triton kernel, and slower, because it fails here: %s", reason)
        return top_two_queries
    return top_two_in_one_kernel


def top_two_on_gpu(mask_logits: torch.Tensor, *place: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~kmax_d2.modeling.top_two.top_two_queries` by the kernel, or, where that fails, as on a CPU."""
    return _fastest(mask_logits.device)(mask_logits, *place)


FASTER["cuda"] = top_two_on_gpu
