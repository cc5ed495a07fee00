"""Made-up annotations and predictions, for timing and tests of models with random weights."""

import functools
from collections.abc import Sequence

import torch
from torch import nn

from ..modeling.merging import MaskWiseMerging

SEGMENTS = 12


def made_up_segments(size: Sequence[int], num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns an id map (H, W) with three bands of four columns, and the class of each of its segments."""
    rows = torch.arange(size[0])[:, None] * 3 // size[0]
    columns = torch.arange(size[1]) * (SEGMENTS // 3) // size[1]
    return rows * (SEGMENTS // 3) + columns, torch.arange(SEGMENTS) * 7 % num_classes


@functools.cache
def made_up_prediction(
    class_shape: tuple[int, ...], mask_shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns class logits (N, K + 1) and mask logits (N, h, w) of some confident masks and many void queries."""
    ids, classes = made_up_segments(mask_shape[1:], class_shape[1] - 1)
    query = torch.randperm(class_shape[0])[:SEGMENTS]  # fewer if there are fewer queries
    class_logits, mask_logits = torch.randn(*class_shape), torch.randn(*mask_shape)
    class_logits[:, -1] += 10
    class_logits[query, classes[: len(query)]] += 20
    mask_logits[query] += 12 * (ids == torch.arange(len(query))[:, None, None])
    return class_logits.to(device), mask_logits.to(device)


class MadeUpMerging(nn.Module):
    """Stands in for a model's merging, and gives it a made-up prediction: a random one is all void."""

    def __init__(self, merging: MaskWiseMerging):
        super().__init__()
        self.merging = merging
        self.is_thing = merging.is_thing

    def forward(self, class_logits: torch.Tensor, mask_logits: torch.Tensor, *args, **kwargs) -> object:
        """Takes the arguments of the merging; of the logits only shape and device matter."""
        made_up = made_up_prediction(class_logits.shape, mask_logits.shape, class_logits.device)
        return self.merging(*made_up, *args, **kwargs)
