"""What is wrong with a model: numbers from the paired segments of each image, all with contiguous classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..data import panoptic_png
from .panoptic_quality import Pair, count_overlaps, count_pairs, pair_segments, panoptic_quality

# COCO's limits between sizes of objects, in pixels.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 2**62)}


class Bin(NamedTuple):
    """The predicted segments of a range of scores: how many, their mean score, and which part is true positive."""

    number: int
    score: float
    precision: float


def pair_image(ids: np.ndarray, segments: list[dict], record: dict) -> list[Pair]:
    """Pairs the segments of a predicted map (H, W) with those of a dataset's record; keeps what this module reads."""
    predicted, truth = (
        [{key: s[key] for key in ("id", "category_id", "score", "iscrowd", "area") if key in s} for s in group]
        for group in (segments, record["segments_info"])
    )
    overlaps = count_overlaps(ids, panoptic_png.read(record["pan_seg_file_name"]))
    return pair_segments(overlaps, predicted, truth)


def errors_of(pairs: Iterable[Pair]) -> list[Pair]:
    """Returns the missed, the confused, and the invented segments."""
    return [pair for pair in pairs if not pair.is_hit and (pair.true or not pair.ignored)]


def class_counts(images: Sequence[list[Pair]], num_classes: int) -> np.ndarray:
    """Returns for each image and class the four numbers of :func:`count_pairs`: (I, K, 4)."""
    counts = np.zeros((len(images), num_classes, 4))
    for row, pairs in zip(counts, images, strict=True):
        for index, of_class in count_pairs(pairs).items():
            row[index] = of_class
    return counts


def confusion_matrix(images: Iterable[list[Pair]], num_classes: int) -> np.ndarray:
    """Counts segments by true and predicted class: (K + 1, K + 1); the last row is invented, the last column missed."""
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=int)
    for pair in (pair for pairs in images for pair in pairs if pair.true or not pair.ignored):
        true, predicted = (num_classes if s is None else s["category_id"] for s in (pair.true, pair.predicted))
        matrix[true, predicted] += 1
    return matrix


def counts_by_size(images: Iterable[list[Pair]]) -> dict[str, dict[int, np.ndarray]]:
    """Returns :func:`count_pairs` for each of SIZES; the area is a true segment's, of invented ones the predicted."""
    singles: list[Pair] = []
    for pair in (pair for pairs in images for pair in pairs):
        confused = pair.true and pair.predicted and not pair.is_hit
        singles += [pair._replace(predicted=None), pair._replace(true=None)] if confused else [pair]
    area = [(pair.true or pair.predicted)["area"] for pair in singles]
    return {
        name: count_pairs(pair for pair, pixels in zip(singles, area, strict=True) if low <= pixels < high)
        for name, (low, high) in SIZES.items()
    }


def calibration(images: Iterable[list[Pair]], num_bins: int = 10) -> tuple[float, list[Bin]]:
    """Compares scores with precision, over the predicted segments that count.

    Returns:
        the expected calibration error, 0..1 (Guo et al., ICML 2017), nan without segments; and a bin for each range of
        scores that is not empty.
    """
    counted = [pair for pairs in images for pair in pairs if pair.predicted and (pair.is_hit or not pair.ignored)]
    scores, hits = (
        np.array(x, dtype=float) for x in ([p.predicted["score"] for p in counted], [p.is_hit for p in counted])
    )
    index = np.minimum(scores * num_bins, num_bins - 1).astype(int)
    chosen = [index == number for number in np.unique(index)]
    bins = [Bin(int(c.sum()), float(scores[c].mean()), float(hits[c].mean())) for c in chosen]
    gap = sum(b.number * abs(b.score - b.precision) for b in bins)
    return gap / len(counted) if counted else float("nan"), bins


def image_quality(pairs: list[Pair]) -> float:
    """Returns the PQ of one image, 0..1, over the classes in it; 1 if there is nothing to find and nothing found."""
    counts = count_pairs(pairs)
    result = panoptic_quality(counts, counts)
    return result["pq"] if result["n"] else 1.0


def bootstrap_difference(first: np.ndarray, second: np.ndarray, rounds: int = 1000, seed: int = 0) -> np.ndarray:
    """Resamples images to tell a difference between two models from chance.

    Args:
        first, second: :func:`class_counts` of both, for the same images.
        rounds: number of resamples.
        seed: of the random numbers.

    Returns:
        (K + 1, 2) 95% interval of the second model's PQ less the first's, -1..1, of each class and of their mean; nan
        for a class that does not occur.
    """
    images = len(first)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=rounds)

    def qualities(counts: np.ndarray) -> np.ndarray:
        iou, hits, invented, missed = np.moveaxis((draws @ counts.reshape(images, -1)).reshape(rounds, -1, 4), 2, 0)
        total = hits + (invented + missed) / 2
        quality = np.divide(iou, total, out=np.full(iou.shape, np.nan), where=total > 0)
        return np.column_stack([quality, np.nanmean(quality, axis=1)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of classes that do not occur
        return np.nanpercentile(qualities(second) - qualities(first), (2.5, 97.5), axis=0).T
