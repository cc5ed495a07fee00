"""Panoptic quality (Kirillov et al., CVPR 2019, section 4), with panopticapi's rules for void and crowds."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..data.segment_ids import NUM_IDS

VOID = 0
SCORES = ("PQ", "SQ", "RQ", "TP", "FP", "FN")


class Pair(NamedTuple):
    """A true and a predicted segment that match, of any two categories, or one that has no match.

    Attributes:
        true, predicted: the segment with its "area" in pixels; None for no match.
        iou: their IoU, above 1/2; 0 without a match.
        ignored: the predicted segment is mostly void or a crowd, so that it is no false positive.
    """

    true: Any  # dict | None
    predicted: Any
    iou: float
    ignored: bool

    @property
    def is_error(self) -> bool:
        """Whether this is a missed, a confused, or an invented segment."""
        return not self.is_hit and (self.true is not None or not self.ignored)

    @property
    def is_hit(self) -> bool:
        """Whether this is a true positive: a match within one category."""
        return bool(self.true and self.predicted) and self.true["category_id"] == self.predicted["category_id"]


def count_overlaps(ids: np.ndarray, true_ids: np.ndarray) -> dict[tuple[int, int], int]:
    """Counts the pixels of each (true id, id) in two maps (H, W) of 0 to 2^24 - 1."""
    pairs, sizes = np.unique(true_ids.astype(np.int64) * NUM_IDS + ids, return_counts=True)
    return {divmod(pair, NUM_IDS): size for pair, size in zip(pairs.tolist(), sizes.tolist(), strict=True)}


def pair_segments(
    overlaps: Mapping[tuple[int, int], int], segments: list[dict], true_segments: list[dict]
) -> list[Pair]:
    """Pairs the segments of one image with the true ones whose IoU, with void left out of the union, is above 1/2.

    Args:
        overlaps: from :func:`count_overlaps`; the id 0 is void.
        segments, true_segments: with "id" and "category_id"; the true ones may have "iscrowd". Areas are counted,
            whatever a JSON says: panopticapi trusts it, and with a wrong one its PQ may be above 1.

    Returns:
        Every predicted segment, and every true one that is no crowd. Raises ValueError if `segments` does not list the
        ids that occur in `overlaps`.
    """
    areas: Counter = Counter()
    true_areas: Counter = Counter()
    for (true_id, id_), size in overlaps.items():
        areas[id_] += size
        true_areas[true_id] += size
    predicted = {s["id"]: {**s, "area": areas[s["id"]]} for s in segments}
    truth = {s["id"]: {**s, "area": true_areas[s["id"]]} for s in true_segments}
    if areas.keys() - {VOID} != predicted.keys():
        raise ValueError(f"the prediction lists segments {sorted(predicted)} but its map has {sorted(areas)}")
    crowds = {true["category_id"]: id_ for id_, true in truth.items() if true.get("iscrowd")}
    void = {id_: overlaps.get((VOID, id_), 0) for id_ in predicted}
    ignored = {
        id_: void[id_] + overlaps.get((crowds.get(segment["category_id"], -1), id_), 0) > 0.5 * areas[id_]
        for id_, segment in predicted.items()
    }
    pairs, matched, true_matched = [], set(), set()
    for (true_id, id_), size in overlaps.items():
        if true_id not in truth or truth[true_id].get("iscrowd") or id_ not in predicted:
            continue
        iou = size / (areas[id_] + truth[true_id]["area"] - size - void[id_])
        if iou > 0.5:
            pairs.append(Pair(truth[true_id], predicted[id_], iou, ignored[id_]))
            matched.add(id_)
            true_matched.add(true_id)
    missed = [true for id_, true in truth.items() if id_ not in true_matched and not true.get("iscrowd")]
    invented = [segment for id_, segment in predicted.items() if id_ not in matched]
    pairs += [Pair(true, None, 0.0, False) for true in missed]
    return pairs + [Pair(None, segment, 0.0, ignored[segment["id"]]) for segment in invented]


def count_pairs(pairs: Iterable[Pair]) -> dict[int, np.ndarray]:
    """Returns for each category: sum of IoUs, true positives, false positives, false negatives.

    An unmatched true segment is a false negative, an unmatched predicted one a false positive unless it is ignored; a
    match of two categories is both.
    """
    counts: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for pair in pairs:
        if pair.is_hit:
            counts[pair.true["category_id"]] += (pair.iou, 1, 0, 0)
            continue
        if pair.true:
            counts[pair.true["category_id"]][3] += 1
        if pair.predicted:
            counts[pair.predicted["category_id"]][2] += not pair.ignored
    return dict(counts)


def match_segments(
    ids: np.ndarray, segments: list[dict], true_ids: np.ndarray, true_segments: list[dict]
) -> dict[int, np.ndarray]:
    """Counts, as :func:`count_pairs`, the :func:`pair_segments` of a predicted and a true id map (H, W)."""
    return count_pairs(pair_segments(count_overlaps(ids, true_ids), segments, true_segments))


def panoptic_quality(counts: Mapping[int, np.ndarray], categories: Iterable[int]) -> dict[str, float]:
    """Averages over those of the categories that occur; `counts` are sums of :func:`count_pairs` over all images.

    Returns "pq", "sq", and "rq" in 0..1, nan if no category occurs, and "n", the number of categories that occur.
    """
    rows = []
    for category in categories:
        iou, true_positive, false_positive, false_negative = counts.get(category, np.zeros(4)).tolist()
        total = true_positive + 0.5 * false_positive + 0.5 * false_negative
        if total:
            rows.append((iou / total, iou / true_positive if true_positive else 0.0, true_positive / total))
    pq, sq, rq = np.mean(rows, axis=0).tolist() if rows else (float("nan"),) * 3
    return {"pq": pq, "sq": sq, "rq": rq, "n": len(rows)}


def quality_row(counts: Mapping[int, np.ndarray], categories: Collection[int]) -> list:
    """Returns SCORES of :func:`panoptic_quality`: PQ, SQ, and RQ in percent, None if no category occurs, and counts."""
    average = panoptic_quality(counts, categories)
    _, *numbers = sum((counts[c] for c in categories if c in counts), np.zeros(4)).astype(int).tolist()
    return [100 * average[key] if average["n"] else None for key in ("pq", "sq", "rq")] + numbers
