"""Panoptic quality (Kirillov et al., CVPR 2019, section 4), with panopticapi's rules for void and crowds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from ..data.segment_ids import NUM_IDS

VOID = 0


def match_segments(
    ids: np.ndarray, segments: list[dict], true_ids: np.ndarray, true_segments: list[dict]
) -> dict[int, np.ndarray]:
    """Matches the segments of one image with the true ones.

    Two segments of one category match if their IoU, with void left out of the union, is above 1/2. An unmatched true
    segment is a false negative unless it is a crowd, an unmatched predicted one a false positive unless more than half
    of it is void or a crowd of its category.

    Args:
        ids, true_ids: (H, W) segment ids in 0..2^24 - 1; 0 is void.
        segments, true_segments: with "id" and "category_id". The true ones may have "iscrowd", and "area" (pixels),
            which counts instead of their pixels.

    Returns:
        For each category: sum of IoUs, true positives, false positives, false negatives.

    Raises:
        ValueError: `segments` does not list the ids that occur in `ids`.
    """
    categories = {segment["id"]: segment["category_id"] for segment in segments}
    truth = {segment["id"]: segment for segment in true_segments}
    pairs, sizes = np.unique(true_ids.astype(np.int64) * NUM_IDS + ids, return_counts=True)
    overlaps = {divmod(pair, NUM_IDS): size for pair, size in zip(pairs.tolist(), sizes.tolist(), strict=True)}
    areas: Counter = Counter()
    true_areas: Counter = Counter()
    for (true_id, id_), size in overlaps.items():
        areas[id_] += size
        true_areas[true_id] += size
    if areas.keys() - {VOID} != categories.keys():
        raise ValueError(f"the prediction lists segments {sorted(categories)} but its map has {sorted(areas)}")

    counts = {category: np.zeros(4) for category in {*categories.values(), *(s["category_id"] for s in true_segments)}}
    matched, true_matched = set(), set()
    for (true_id, id_), size in overlaps.items():
        true = truth.get(true_id)
        if true is None or true.get("iscrowd") or categories.get(id_) != true["category_id"]:
            continue
        true_area = true.get("area") or true_areas[true_id]
        iou = size / (areas[id_] + true_area - size - overlaps.get((VOID, id_), 0))
        if iou > 0.5:
            counts[true["category_id"]] += (iou, 1, 0, 0)
            matched.add(id_)
            true_matched.add(true_id)

    crowds = {}
    for true_id, true in truth.items():
        if true.get("iscrowd"):
            crowds[true["category_id"]] = true_id
        elif true_id not in true_matched:
            counts[true["category_id"]][3] += 1
    for id_, category in categories.items():
        ignored = overlaps.get((VOID, id_), 0) + overlaps.get((crowds.get(category), id_), 0)
        if id_ not in matched and ignored / areas[id_] <= 0.5:
            counts[category][2] += 1
    return counts


def panoptic_quality(counts: Mapping[int, np.ndarray], categories: Iterable[int]) -> dict[str, float]:
    """Averages PQ, SQ, and RQ over the categories that occur.

    Args:
        counts: for each category the sum of :func:`match_segments` over all images.
        categories: those to average over.

    Returns:
        "pq", "sq", and "rq" in 0..1, nan if no category occurs, and "n", the number of categories that occur.
    """
    rows = []
    for category in categories:
        iou, true_positive, false_positive, false_negative = counts.get(category, np.zeros(4)).tolist()
        total = true_positive + 0.5 * false_positive + 0.5 * false_negative
        if total:
            rows.append((iou / total, iou / true_positive if true_positive else 0.0, true_positive / total))
    pq, sq, rq = np.mean(rows, axis=0).tolist() if rows else (float("nan"),) * 3
    return {"pq": pq, "sq": sq, "rq": rq, "n": len(rows)}
