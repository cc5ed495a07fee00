"""The terms of the training loss (MaX-DeepLab, Sec. 3.3; kMaX-DeepLab, Sec. 4.1).

Each function gives one value for each image, (B,), before its weight.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F

from .layers import places
from .matcher import VOID, Matching, Targets

MATCHED_WEIGHT = 0.75
UNMATCHED_WEIGHT = 0.25
DICE_SMOOTH = 1.0
TEMPERATURE = 0.3
SIMILARITIES_AT_ONCE = 2**21  # a block that stays in a processor's cache


def _mean_of_nonzero(losses: torch.Tensor) -> torch.Tensor:
    """(B, M) terms to their sum over the number that are not zero, (B,); zero where all are."""
    return losses.sum(1) / (losses != 0).sum(1).clamp_min(1)


def pq_class_loss(
    class_logits: torch.Tensor, targets: Targets, matching: Matching, min_weight: float = 1e-5
) -> torch.Tensor:
    """PQ-style class term: cross-entropy of every query, a matched one weighted by its dice.

    Args:
        class_logits: (B, N, K + 1), void last.
        targets, matching: ground truth and the matching of the final prediction.
        min_weight: floor of the detached weights.
    """
    num_classes = class_logits.shape[2] - 1
    at = (matching.image, matching.query)
    target = torch.full(class_logits.shape[:2], num_classes, device=class_logits.device)
    target[at] = targets.classes[matching.image, matching.segment]
    weight = UNMATCHED_WEIGHT * matching.void_share.clamp_min(min_weight)
    weight[at] = MATCHED_WEIGHT * matching.dice.clamp_min(min_weight)
    losses = F.cross_entropy(class_logits.transpose(1, 2), target, reduction="none")
    return _mean_of_nonzero(losses * weight)


def _interpolation(size: int, positions: int, like: torch.Tensor) -> torch.Tensor:
    """(size, positions), what linear resizing (aligned corners) multiplies one axis by.

    On CPUs the products are several times as fast as PyTorch's resizing of maps that are not channels-last.
    """
    one_hot = torch.eye(positions, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(one_hot, size=size, mode="linear", align_corners=True)[0].T


def _resized(x: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else rows @ x @ columns.T


class _MatchedLogSoftmax(torch.autograd.Function):
    """The matched rows of a log-softmax over the queries. The softmax is made anew in the backward pass."""

    @staticmethod
    def forward(
        ctx, mask_logits: torch.Tensor, image: torch.Tensor, query: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        rows = columns = None
        if tuple(mask_logits.shape[2:]) != size:
            rows, columns = (
                _interpolation(n, m, mask_logits) for n, m in zip(size, mask_logits.shape[2:], strict=True)
            )
        logits = _resized(mask_logits, rows, columns).flatten(2)
        log_partition = logits.logsumexp(1)
        ctx.save_for_backward(mask_logits, log_partition, image, query, rows, columns)
        return logits[image, query] - log_partition[image]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mask_logits, log_partition, image, query, rows, columns = ctx.saved_tensors
        logits = _resized(mask_logits, rows, columns)
        total = torch.zeros_like(log_partition).index_add_(0, image, grad)
        grad_logits = (logits.flatten(2) - log_partition[:, None]).exp_().mul_(-total[:, None])
        grad_logits[image, query] += grad  # no query is matched twice
        grad_logits = grad_logits.view_as(logits)
        return grad_logits if rows is None else rows.T @ grad_logits @ columns, None, None, None


def matched_log_probability(mask_logits: torch.Tensor, matching: Matching, size: tuple[int, int]) -> torch.Tensor:
    """Log-softmax over the queries of resized mask logits, of the matched queries alone.

    Nothing as large as the resized logits is kept for the gradient, which needs a few passes over them only.

    Args:
        mask_logits: (B, N, h, w), of any size.
        matching: T matched pairs.
        size: (H, W) to resize to, bilinearly.

    Returns:
        (T, H · W).
    """
    return _MatchedLogSoftmax.apply(mask_logits, matching.image, matching.query, tuple(size))


def pq_mask_loss(
    log_probability: torch.Tensor, num_queries: int, targets: Targets, matching: Matching, min_weight: float = 1e-5
) -> torch.Tensor:
    """PQ-style mask term: one minus dice of each matched pair, weighted by its class probability.

    Args:
        log_probability: (T, P) of the matched pairs, from :func:`matched_log_probability`.
        num_queries: N.
        targets, matching: ground truth and the matching of the final prediction.
        min_weight: floor of the detached weights.
    """
    segment_ids = targets.segment_ids[matching.image]
    probability = log_probability.exp() * (segment_ids != VOID)
    inside = segment_ids == matching.segment[:, None]
    intersection = (probability * inside).sum(1)
    dice = (2 * intersection + DICE_SMOOTH) / (inside.sum(1) + probability.sum(1) + DICE_SMOOTH)
    losses = (1 - dice) * matching.class_probability.clamp_min(min_weight)
    return _sum_by_image(losses, targets, matching) * MATCHED_WEIGHT / num_queries


def mask_id_loss(log_probability: torch.Tensor, targets: Targets, matching: Matching) -> torch.Tensor:
    """Mask-id cross-entropy: each pixel's softmax over queries against the query matched to its mask.

    Void pixels, and those of masks that found no query, have no target. Arguments as for :func:`pq_mask_loss`.
    """
    inside = targets.segment_ids[matching.image] == matching.segment[:, None]
    losses = -log_probability * inside
    counts = _sum_by_image((losses != 0).sum(1), targets, matching)
    return _sum_by_image(losses.sum(1), targets, matching) / counts.clamp_min(1)


def _sum_by_image(values: torch.Tensor, targets: Targets, matching: Matching) -> torch.Tensor:
    """(T,) values of the matched pairs to their sum for each image, (B,)."""
    return values.new_zeros(len(targets.classes)).index_add(0, matching.image, values)


def _sums_by_segment(values: torch.Tensor, segment_ids: torch.Tensor, targets: Targets) -> torch.Tensor:
    """For each of k pixels the sum of `values` (B, k, C) over the pixels of its segment (B, k); void is one too."""
    index = (segment_ids + 1)[..., None].expand_as(values)
    sums = values.new_zeros(values.shape[0], targets.classes.shape[1] + 1, values.shape[2])
    return sums.scatter_add(1, index, values).gather(1, index)


def sample_pixels(targets: Targets, num_samples: int, temperature: float) -> torch.Tensor:
    """Samples pixels without replacement, those of small masks more often, void pixels only last.

    A Gumbel top-k on temperature · log(P / area of the pixel's mask).

    Args:
        targets: ground truth with P pixels an image.
        num_samples: pixels to draw; at most P are.
        temperature: 0 draws uniformly; the larger, the more small masks are preferred.

    Returns:
        (B, min(num_samples, P)) indices into P.
    """
    segment_ids = targets.segment_ids
    pixels = segment_ids.shape[1]
    area = _sums_by_segment(torch.ones_like(segment_ids, dtype=torch.float32)[..., None], segment_ids, targets)[..., 0]
    gumbel = -torch.log(torch.empty_like(area).exponential_())
    score = temperature * torch.log(pixels / area) + gumbel
    score = score.masked_fill(segment_ids == VOID, -torch.inf)
    return score.topk(min(num_samples, pixels), dim=1).indices


class _RowLogSumExp(torch.autograd.Function):
    """log Σ_j exp(f_i · f_j / T) for every i of (B, k, C) features whose squared lengths stay well below 80 T.

    The (k, k) similarities are symmetric: half of them are made, a block at a time, and anew in the backward pass.
    """

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> torch.Tensor:
        partition = features.new_zeros(features.shape[:2])
        scaled = features / TEMPERATURE
        for rows, columns in _blocks(features):
            weight = _exp_similarity(scaled, features, rows, columns)
            partition[:, rows] += weight.sum(2)
            if rows != columns:
                partition[:, columns] += weight.sum(1)
        ctx.save_for_backward(features, partition)
        return partition.log()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        features, partition = ctx.saved_tensors
        # Every feature stands in its own row and in everybody's column.
        share = grad / partition
        result, scaled = torch.zeros_like(features), features / TEMPERATURE
        for rows, columns in _blocks(features):
            weight = _exp_similarity(scaled, features, rows, columns)
            weight.mul_(share[:, rows, None] + share[:, None, columns])
            result[:, rows] += torch.bmm(weight, features[:, columns])
            if rows != columns:
                result[:, columns] += torch.bmm(weight.transpose(1, 2), features[:, rows])
        return result.div_(TEMPERATURE)


def _blocks(features: torch.Tensor) -> list[tuple[slice, slice]]:
    """Square blocks of rows and columns on and above the diagonal."""
    batch, samples = features.shape[:2]
    step = max(1, math.isqrt(SIMILARITIES_AT_ONCE // batch))
    parts = [slice(start, start + step) for start in range(0, samples, step)]
    return list(combinations_with_replacement(parts, 2))


def _exp_similarity(scaled: torch.Tensor, features: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    return torch.bmm(scaled[:, rows], features[:, columns].transpose(1, 2)).exp_()


def sample_features(feature_map: torch.Tensor, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Features at some pixels of the resized map, without resizing it all (bilinear, aligned corners).

    Args:
        feature_map: (B, C, h, w), of any size.
        pixels: (B, k) indices into the H · W pixels of a map of `size` (H, W).

    Returns:
        (B, k, C).
    """
    if tuple(feature_map.shape[-2:]) == tuple(size):
        features = places(feature_map)
        return features.gather(1, pixels[..., None].expand(-1, -1, features.shape[2]))
    height, width = size
    position = torch.stack([pixels % width / max(width - 1, 1), pixels // width / max(height - 1, 1)], dim=2)
    grid = 2 * position[:, None].to(feature_map.dtype) - 1
    return F.grid_sample(feature_map, grid, align_corners=True, padding_mode="border")[:, :, 0].transpose(1, 2)


def instance_discrimination_loss(features: torch.Tensor, pixels: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Pixel-wise instance discrimination: pixels of one mask shall be alike, those of others not.

    The cross-entropy of row i against equal targets on the pixels of i's mask is log Σ_j exp(f_i·f_j/T) - f_i·c/T,
    c being the mean feature of that mask. A void pixel has no row, but is a column.

    Args:
        features: (B, k, C) features of the sampled pixels.
        pixels: (B, k) these pixels.
        targets: ground truth.
    """
    segment_ids = targets.segment_ids.gather(1, pixels)
    counts = _sums_by_segment(torch.ones_like(features[..., :1]), segment_ids, targets)
    centroids = _sums_by_segment(features, segment_ids, targets) / counts
    losses = _RowLogSumExp.apply(features) - (features * centroids).sum(2) / TEMPERATURE
    return _mean_of_nonzero(losses * (segment_ids != VOID))


def _semantic_cross_entropy(logits: torch.Tensor, segment_ids: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Logits (B, C, P), C ≥ K, of pixels and the masks (B, P) these belong to, to losses (B, P); zero for void."""
    classes = targets.classes.gather(1, segment_ids.clamp_min(0)).where(segment_ids != VOID, VOID)
    return F.cross_entropy(logits, classes, reduction="none", ignore_index=VOID)


def semantic_loss(logits: torch.Tensor, pixels: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Cross-entropy of the sampled pixels, void left out.

    Args:
        logits: (B, k, C) logits of the sampled pixels, C ≥ K.
        pixels: (B, k) these pixels.
        targets: ground truth.
    """
    segment_ids = targets.segment_ids.gather(1, pixels)
    return _mean_of_nonzero(_semantic_cross_entropy(logits.transpose(1, 2), segment_ids, targets))


def hardest_semantic_loss(
    logits: torch.Tensor, segment_ids: torch.Tensor, targets: Targets, segment_weights: torch.Tensor, share: float
) -> torch.Tensor:
    """Cross-entropy of the pixels where it is largest, void left out (as in Panoptic-DeepLab, for Cityscapes).

    Args:
        logits: (B, C, P) logits of every pixel, C ≥ K.
        segment_ids: (B, P) mask of each of these pixels.
        targets: ground truth.
        segment_weights: (B, S) factor on the losses of each mask's pixels, before the choice of the largest.
        share: these are so many of P, from 0 to 1.
    """
    weights = segment_weights.gather(1, segment_ids.clamp_min(0))
    losses = _semantic_cross_entropy(logits, segment_ids, targets) * weights
    return _mean_of_nonzero(losses.topk(round(share * losses.shape[1]), dim=1).values)


def small_instance_weights(targets: Targets, is_thing: torch.Tensor, area: int, weight: float) -> torch.Tensor:
    """(B, S): `weight` for each mask of a thing of fewer than `area` pixels, 1 for the rest.

    Args:
        targets: ground truth.
        is_thing: (K,) bool, of the contiguous classes.
        area: in pixels of the crop.
        weight: of pixels of small things.
    """
    small = is_thing[targets.classes] & (targets.areas < area)
    return torch.ones_like(targets.areas, dtype=torch.float32).masked_fill(small, weight)
