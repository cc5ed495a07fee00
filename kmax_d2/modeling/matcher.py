"""Bipartite matching of ground-truth masks and queries by the product of dice and class probability (MaX-DeepLab)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment

VOID = -1
EPS = 1e-5


class Targets(NamedTuple):
    """Ground truth of a batch, read at the mask logits' positions.

    Attributes:
        segment_ids: (B, P) int64, the mask that each pixel belongs to, -1 for void.
        classes: (B, S) int64, S ≥ 1, the contiguous class of each mask; -1 pads images that have fewer.
        areas: (B, S) int64, the pixels of each mask in the whole crop.
    """

    segment_ids: torch.Tensor
    classes: torch.Tensor
    areas: torch.Tensor

    def repeat(self, count: int) -> Targets:
        """The same for `count` batches, one after the other."""
        return Targets(*(part.repeat(count, 1) for part in self))


class Matching(NamedTuple):
    """T matched pairs over the whole batch, and how well each fits. No gradient passes.

    Attributes:
        image, segment, query: (T,) int64 indices.
        dice: (T,) overlap of mask and query.
        class_probability: (T,) the query's probability of the mask's class.
        void_share: (B, N) share of each query's mass that lies on void pixels.
    """

    image: torch.Tensor
    segment: torch.Tensor
    query: torch.Tensor
    dice: torch.Tensor
    class_probability: torch.Tensor
    void_share: torch.Tensor

    def repeat(self, count: int) -> Matching:
        """The same for `count` batches, one after the other."""
        batch = len(self.void_share)
        first_image = torch.arange(count, device=self.image.device).repeat_interleave(len(self.image)) * batch
        image, segment, query, dice, probability = (part.repeat(count) for part in self[:-1])
        return Matching(image + first_image, segment, query, dice, probability, self.void_share.repeat(count, 1))


@torch.no_grad()
def match(class_logits: torch.Tensor, mask_logits: torch.Tensor, targets: Targets) -> Matching:
    """Matches each mask to one query by class logits (B, N, K + 1), void last, and mask logits (B, N, P).

    If there are more masks than queries, some stay unmatched.
    """
    probability = mask_logits.softmax(dim=1)
    total = probability.sum(2)
    valid = (targets.segment_ids != VOID).float()
    on_valid = torch.bmm(probability, valid[..., None])[..., 0]
    segments = torch.arange(targets.classes.shape[1], device=targets.classes.device)
    masks = (targets.segment_ids[..., None] == segments).float()  # (B, P, S)
    intersection = torch.bmm(probability, masks)  # (B, N, S)
    area = masks.sum(1)
    dice = intersection / ((on_valid[:, :, None] + area[:, None, :]) / 2 + EPS)
    classes = targets.classes.clamp_min(0)[:, None, :].expand(-1, class_logits.shape[1], -1)
    class_probability = class_logits.softmax(dim=2).gather(2, classes)
    # One transfer for the batch. SciPy needs finite costs; if they are not, the loss reports it more clearly.
    similarity = (dice * class_probability).nan_to_num().cpu().numpy()
    counts = (targets.classes != VOID).sum(1).tolist()
    rows: list[tuple[int, int, int]] = []
    for index, count in enumerate(counts):
        assigned = linear_sum_assignment(similarity[index, :, :count], maximize=True)
        rows += [(index, segment, query) for query, segment in zip(*assigned, strict=True)]
    pairs = torch.as_tensor(rows, dtype=torch.int64).reshape(-1, 3).to(mask_logits.device)
    image, segment, query = pairs.unbind(1)
    at = image, query, segment
    return Matching(image, segment, query, dice[at], class_probability[at], (total - on_valid) / (total + EPS))
