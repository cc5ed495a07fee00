"""From the merged map of one image to Detectron2's results at the original size."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import masks_to_boxes

from .merging import Segmentation


def resize_nearest(labels: torch.Tensor, real: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Cuts the real part out of padded labels (..., H, W) and resizes it to `size` by the nearest pixel centers."""
    if tuple(labels.shape[-2:]) == tuple(size) == tuple(real):
        return labels
    rows, columns = (
        ((torch.arange(n, device=labels.device) + 0.5) * (m / n)).long().clamp_max(m - 1)
        for m, n in zip(real, size, strict=True)
    )
    return labels[..., rows[:, None], columns]


def panoptic_result(
    merged: Segmentation, real: tuple[int, int], size: tuple[int, int]
) -> tuple[torch.Tensor, list[dict]]:
    """Segment ids (H, W) int32 at `size`, and the segments that have a pixel there."""
    segment_ids = resize_nearest(merged.segment_ids, real, size)
    areas = torch.bincount(segment_ids.flatten(), minlength=len(merged.segments) + 1).tolist()
    return segment_ids, [s | {"area": areas[s["id"]]} for s in merged.segments if areas[s["id"]] > 0]


def semantic_result(
    merged: Segmentation, num_classes: int, real: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """One-hot (K, H, W) uint8 of each pixel's class: that of the query with the largest mask logit, no thresholds."""
    classes = resize_nearest(merged.query_class[merged.top_two.query[0]], real, size)
    return torch.zeros(num_classes, *size, dtype=torch.uint8, device=classes.device).scatter_(0, classes[None], 1)


def instance_result(
    merged: Segmentation,
    is_thing: torch.Tensor,
    pixel_threshold: float,
    max_instances: int,
    real: tuple[int, int],
    size: tuple[int, int],
) -> Instances:
    """The best thing queries, each with its whole mask and class confidence times mask score."""
    score = merged.query_score.where(is_thing.to(merged.query_score.device)[merged.query_class], 0)
    score, query = score.topk(min(max_instances, len(score)))
    score, query = score[score > 0], query[score > 0]
    top = merged.top_two
    # A pixel below the threshold belongs to no mask.
    best = resize_nearest(top.query.where(top.probability > pixel_threshold, -1), real, size)
    masks = (best[0] == query[:, None, None]) | (best[1] == query[:, None, None])
    present = masks.flatten(1).any(1)
    masks, score, query = masks[present], score[present], query[present]
    boxes = masks_to_boxes(masks) if len(masks) else masks.new_zeros(0, 4, dtype=torch.float32)
    # Boxes reach to the far edge of their last pixel.
    boxes[:, 2:] += 1
    return Instances(
        size, pred_masks=masks, pred_boxes=Boxes(boxes), scores=score, pred_classes=merged.query_class[query]
    )
