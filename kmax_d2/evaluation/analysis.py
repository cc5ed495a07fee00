"""What is wrong with a model: numbers from the paired segments of each image, all with contiguous classes."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from ..data import panoptic_png
from .panoptic_quality import Pair, count_overlaps, count_pairs, pair_segments

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 2**62)}  # COCO's limits, in pixels


def pair_image(ids: np.ndarray, segments: list[dict], file: str, true_segments: list[dict]) -> list[Pair]:
    """Pairs the segments of a predicted map (H, W) with those of a panoptic PNG; keeps what this module reads."""
    keys = ("id", "category_id", "score", "iscrowd", "area")
    slim = ([{key: s[key] for key in keys if key in s} for s in group] for group in (segments, true_segments))
    return pair_segments(count_overlaps(ids, panoptic_png.read(file, ids.shape)), *slim)


def class_counts(images: Sequence[list[Pair]], num_classes: int) -> np.ndarray:
    """Returns for each image and class the four numbers of :func:`count_pairs`: (I, K, 4)."""
    counts = np.zeros((len(images), num_classes, 4))
    for row, pairs in zip(counts, images, strict=True):
        for index, of_class in count_pairs(pairs).items():
            row[index] = of_class
    return counts


def confusion_matrix(pairs: Iterable[Pair], num_classes: int) -> np.ndarray:
    """Counts segments by true and predicted class: (K + 1, K + 1); the last row is invented, the last column missed."""
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=int)
    for pair in pairs:
        if pair.true or not pair.ignored:
            true, predicted = (s["category_id"] if s else num_classes for s in (pair.true, pair.predicted))
            matrix[true, predicted] += 1
    return matrix


def counts_by_size(pairs: Sequence[Pair]) -> dict[str, dict[int, np.ndarray]]:
    """Returns :func:`count_pairs` for each of SIZES of the true segment, or of one that is invented."""
    return {
        name: count_pairs(pair for pair in pairs if low <= (pair.true or pair.predicted)["area"] < high)
        for name, (low, high) in SIZES.items()
    }


def calibration(pairs: Iterable[Pair], num_bins: int = 10) -> tuple[float, list[tuple[int, float, float]]]:
    """Compares the scores of predicted segments with the part of them that is true positive.

    Returns the expected calibration error, 0..1 (Guo et al., ICML 2017), nan without segments; and for each range of
    scores that occurs the number of segments, their mean score, and their precision.
    """
    counted = [(p.predicted["score"], p.is_hit) for p in pairs if p.predicted and (p.is_hit or not p.ignored)]
    scores, hits = np.array(counted, dtype=float).reshape(-1, 2).T
    number = np.minimum(scores * num_bins, num_bins - 1).astype(int)
    bins = [
        (int(chosen.sum()), float(scores[chosen].mean()), float(hits[chosen].mean()))
        for chosen in (number == index for index in np.unique(number))
    ]
    gap = sum(size * abs(score - precision) for size, score, precision in bins)
    return gap / len(counted) if counted else float("nan"), bins


def bootstrap_difference(first: np.ndarray, second: np.ndarray, rounds: int = 1000, seed: int = 0) -> np.ndarray:
    """Resamples images to tell a difference between two models from chance.

    Takes :func:`class_counts` of both for the same images. Returns the (K + 1, 2) 95% interval of the second model's PQ
    less the first's, -1..1, of each class and of their mean; nan for a class that does not occur.
    """
    images = len(first)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=rounds)

    def qualities(counts: np.ndarray) -> np.ndarray:
        iou, hits, invented, missed = (draws @ counts[..., part] for part in range(4))
        total = hits + (invented + missed) / 2
        quality = np.divide(iou, total, out=np.full(total.shape, np.nan), where=total > 0)
        return np.column_stack([quality, np.nanmean(quality, axis=1)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of classes that do not occur
        return np.nanpercentile(qualities(second) - qualities(first), (2.5, 97.5), axis=0).T
