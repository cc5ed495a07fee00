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


def query_classes(merged: Segmentation) -> torch.Tensor:
    """(H, W) class of the query with the largest mask logit at each pixel, without thresholds: the official way."""
    return merged.query_class[merged.top_two.query[0]]


def semantic_result(
    classes: torch.Tensor, num_classes: int, real: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """One-hot (K, H, W) uint8 of a map of classes."""
    classes = resize_nearest(classes, real, size)
    return torch.zeros(num_classes, *size, dtype=torch.uint8, device=classes.device).scatter_(0, classes[None], 1)


def panoptic_instances(
    merged: Segmentation,
    is_thing: torch.Tensor,
    max_instances: int,
    real: tuple[int, int],
    size: tuple[int, int],
) -> Instances:
    """The official way: pixels of each thing class in the map of :func:`query_classes`, split by the pasted queries.

    Of two instances none share a pixel. The score is the mean class confidence of its pixels times the mean of their
    largest mask probability.

    Args:
        merged: of the image, padded or not.
        is_thing: (K,) bool.
        max_instances: so many at most, the best.
        real: height and width without padding.
        size: of the result.
    """
    top, probability, pasted = (
        resize_nearest(x, real, size)
        for x in (merged.top_two.query[0], merged.top_two.probability[0], merged.pasted_query)
    )
    num_queries, num_classes = len(merged.query_class), len(is_thing)
    # An instance is a pair of class and pasted query; the last key is for the pixels of none.
    classes = merged.query_class[top]
    none = num_classes * num_queries
    key = torch.where(is_thing.to(top.device)[classes] & (pasted >= 0), classes * num_queries + pasted, none)
    flat = key.flatten()
    area = torch.bincount(flat, minlength=none + 1)[:none]
    sums = [
        torch.bincount(flat, weights.flatten().double(), minlength=none + 1)[:none]
        for weights in (merged.query_confidence[top], probability)
    ]
    score = (sums[0] * sums[1] / area.clamp_min(1).double() ** 2).float()
    score, kept = score.topk(min(max_instances, none))
    kept, score = kept[score > 0], score[score > 0]
    return _instances(key == kept[:, None, None], score, kept // num_queries)


def query_instances(
    merged: Segmentation,
    is_thing: torch.Tensor,
    pixel_threshold: float,
    max_instances: int,
    real: tuple[int, int],
    size: tuple[int, int],
) -> Instances:
    """The usual way: the best thing queries, each with its whole mask and class confidence times mask score."""
    score = merged.query_score.where(is_thing.to(merged.query_score.device)[merged.query_class], 0)
    score, query = score.topk(min(max_instances, len(score)))
    score, query = score[score > 0], query[score > 0]
    top = merged.top_two
    # A pixel below the threshold belongs to no mask.
    best = resize_nearest(top.query.where(top.probability > pixel_threshold, -1), real, size)
    masks = (best[0] == query[:, None, None]) | (best[1] == query[:, None, None])
    present = masks.flatten(1).any(1)
    return _instances(masks[present], score[present], merged.query_class[query[present]])


def _instances(masks: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor) -> Instances:
    boxes = masks_to_boxes(masks)
    # Boxes reach to the far edge of their last pixel.
    boxes[:, 2:] += 1
    return Instances(
        tuple(masks.shape[-2:]), pred_masks=masks, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes
    )
