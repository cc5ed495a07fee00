"""The terms of the training loss (MaX-DeepLab, Sec. 3.3; kMaX-DeepLab, Sec. 4.1).

Each loss is one value per image, (B,), before weighting.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .layers import flatten_pixels, resize
from .matcher import VOID, Matching, Targets

MATCHED_WEIGHT = 0.75
UNMATCHED_WEIGHT = 0.25
DICE_SMOOTH = 1.0
TEMPERATURE = 0.3
SIMILARITY_BLOCK = 512  # samples; a block of their similarities should stay in a processor's cache


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
    at = (matching.image, matching.query)
    target = torch.full(class_logits.shape[:2], class_logits.shape[2] - 1, device=class_logits.device)
    target[at] = targets.classes[matching.image, matching.segment]
    weight = UNMATCHED_WEIGHT * matching.void_share.clamp_min(min_weight)
    weight[at] = MATCHED_WEIGHT * matching.dice.clamp_min(min_weight)
    losses = F.cross_entropy(class_logits.transpose(1, 2), target, reduction="none")
    return _mean_of_nonzero(losses * weight)


def matched_log_probability(mask_logits: torch.Tensor, matching: Matching, size: Sequence[int]) -> torch.Tensor:
    """Log-softmax over the queries of mask logits (B, N, h, w) resized to `size`, of the T matched ones: (T, H · W).

    Only the mask logits are kept for the backward pass, which computes the rest again.
    """

    def log_probability(mask_logits: torch.Tensor) -> torch.Tensor:
        return resize(mask_logits, size).flatten(2).log_softmax(1)[matching.image, matching.query]

    return checkpoint(log_probability, mask_logits, use_reentrant=False)


def pq_mask_loss(
    log_probability: torch.Tensor, num_queries: int, targets: Targets, matching: Matching, min_weight: float = 1e-5
) -> torch.Tensor:
    """PQ-style mask term: one minus dice of each matched pair, weighted by its class probability.

    Arguments as for :func:`pq_class_loss`, but for log-probabilities (T, P) from :func:`matched_log_probability`.
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

    Void pixels and those of unmatched masks have no target. Arguments as for :func:`pq_mask_loss`.
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

    A Gumbel top-k on temperature · log(P / area of the pixel's mask): 0 draws uniformly.

    Returns:
        (B, min(num_samples, P)) indices into the P pixels of an image.
    """
    segment_ids = targets.segment_ids
    pixels = segment_ids.shape[1]
    area = _sums_by_segment(torch.ones_like(segment_ids, dtype=torch.float32)[..., None], segment_ids, targets)[..., 0]
    gumbel = -torch.log(torch.empty_like(area).exponential_())
    score = temperature * torch.log(pixels / area) + gumbel
    score = score.masked_fill(segment_ids == VOID, -torch.inf)
    return score.topk(min(num_samples, pixels), dim=1).indices


def sample_features(feature_map: torch.Tensor, pixels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Features at some pixels of a map (B, C, h, w), as if it were resized to `size` (bilinear, aligned corners).

    Indices (B, k) into the H · W pixels of that size give (B, k, C).
    """
    if tuple(feature_map.shape[-2:]) == tuple(size):
        features = flatten_pixels(feature_map)
        return features.gather(1, pixels[..., None].expand(-1, -1, features.shape[2]))
    height, width = size
    position = torch.stack([pixels % width / max(width - 1, 1), pixels // width / max(height - 1, 1)], dim=2)
    grid = 2 * position[:, None].to(feature_map.dtype) - 1
    return F.grid_sample(feature_map, grid, align_corners=True, padding_mode="border")[:, :, 0].transpose(1, 2)


def _exp_similarity_sums(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of exp(f_i·f_j/T) over j, (B, r), and over i, (B, c), of features (B, r, C) and (B, c, C)."""
    # Features are at most of unit length, so that no maximum has to be subtracted.
    similarity = (rows / TEMPERATURE @ columns.mT).exp_()
    return similarity.sum(2), similarity.sum(1)


def _log_partition(features: torch.Tensor) -> torch.Tensor:
    """log Σ_j exp(f_i·f_j/T) of features (B, k, C) of at most unit length, (B, k).

    Similarity is symmetric, so blocks on and above the diagonal serve rows and columns.
    """
    blocks = features.split(SIMILARITY_BLOCK, dim=1)
    partitions = [features.new_zeros(block.shape[:2]) for block in blocks]
    for i, j in combinations_with_replacement(range(len(blocks)), 2):
        by_row, by_column = _exp_similarity_sums(blocks[i], blocks[j])
        partitions[i] = partitions[i] + by_row
        if i != j:
            partitions[j] = partitions[j] + by_column
    return torch.cat(partitions, dim=1).log()


def instance_discrimination_loss(features: torch.Tensor, pixels: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Pixel-wise instance discrimination: pulls the features of a mask together and those of different masks apart.

    The cross-entropy of row i against equal targets on the pixels of i's mask is log Σ_j exp(f_i·f_j/T) - f_i·c/T,
    c being the mean feature of that mask. A void pixel has no row, but is a column.

    The k sampled pixels (B, k) have the features (B, k, C), of at most unit length.
    """
    segment_ids = targets.segment_ids.gather(1, pixels)
    counts = _sums_by_segment(torch.ones_like(features[..., :1]), segment_ids, targets)
    centroids = _sums_by_segment(features, segment_ids, targets) / counts
    losses = _log_partition(features) - (features * centroids).sum(2) / TEMPERATURE
    return _mean_of_nonzero(losses * (segment_ids != VOID))


def _semantic_cross_entropy(logits: torch.Tensor, segment_ids: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Logits (B, C, P), C ≥ K, of pixels and the masks (B, P) these belong to, to losses (B, P); zero for void."""
    classes = targets.classes.gather(1, segment_ids.clamp_min(0)).where(segment_ids != VOID, VOID)
    return F.cross_entropy(logits, classes, reduction="none", ignore_index=VOID)


def semantic_loss(logits: torch.Tensor, pixels: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Cross-entropy of sampled pixels (B, k), void left out, from their logits (B, k, C), C ≥ K."""
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
        share: the fraction of the P pixels to take, from 0 to 1.
    """
    weights = segment_weights.gather(1, segment_ids.clamp_min(0))
    losses = _semantic_cross_entropy(logits, segment_ids, targets) * weights
    return _mean_of_nonzero(losses.topk(round(share * losses.shape[1]), dim=1).values)


def small_instance_weights(targets: Targets, is_thing: torch.Tensor, area: int, weight: float) -> torch.Tensor:
    """(B, S): `weight` for masks of things, by `is_thing` (K,), of fewer than `area` pixels of the crop, else 1."""
    small = is_thing[targets.classes] & (targets.areas < area)
    return torch.ones_like(targets.areas, dtype=torch.float32).masked_fill(small, weight)
