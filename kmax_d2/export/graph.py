"""The network, and all from image to panoptic result, as modules whose forward is one graph without control flow.

They compute what :class:`~kmax_d2.modeling.KMaXDeepLab` does at test, for a batch of images of one size.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..modeling import KMaXDeepLab, kmeans
from ..modeling.layers import backbone_maps, flatten_pixels, padded_side
from ..modeling.merging import MaskWiseMerging

PARTS = 8  # of a map, so that its one-hot matrices do not take much memory at once
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def _in_float32(norm: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return norm(x.float()).to(x.dtype)


class NetworkGraph(nn.Module):
    """Images (B, H, W, 3), uint8, RGB, to class logits (B, N, K + 1), void last, and mask logits (B, N, h, w).

    They are padded to the next 32k + 1 pixels a side, and h = (H' - 1) / 4 + 1 of the padded height H', likewise w.

    Args:
        model: in inference mode, with batch norms folded in this type.
        dtype: of the network's products, by autocast; logits are float32. For float16, the model's norms are changed in
            place to compute in float32.
    """

    def __init__(self, model: KMaXDeepLab, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.backbone, self.pixel_decoder = model.backbone, model.pixel_decoder
        self.transformer_decoder = model.transformer_decoder
        self.dtype = dtype
        if dtype == torch.float16:  # ONNX has no norm of float16 by float32 weights, as autocast has
            for norm in [module for module in self.modules() if isinstance(module, NORMS)]:
                norm.forward = functools.partial(_in_float32, norm.forward)
        self.register_buffer("mean", model.pixel_mean.clone())
        self.register_buffer("std", model.pixel_std.clone())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, W, 3) to class logits and mask logits."""
        height, width = images.shape[1:3]
        scaled = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        batch = F.pad(scaled, (0, padded_side(width) - width, 0, padded_side(height) - height))
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32), _sums_as_products():
            prediction, _ = self.transformer_decoder(self.pixel_decoder(backbone_maps(self.backbone, batch)), False)
        return prediction.class_logits.float(), prediction.mask_logits.float()


class PanopticGraph(nn.Module):
    """Images (B, H, W, 3), uint8, RGB, to panoptic results.

    Returns segment ids (B, H, W), int32, 0 for void, and a table (B, N, 3), float32, whose row i - 1 holds the
    contiguous class, the score, and the area in pixels of the segment i. Rows without a segment have the area 0.

    Args:
        model: in inference mode.
        dtype: as for :class:`NetworkGraph`.
    """

    def __init__(self, model: KMaXDeepLab, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.network = NetworkGraph(model, dtype)
        self.merging = model.merging
        self.register_buffer("is_thing", model.merging.is_thing.clone())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, W, 3) to segment ids and the table of segments."""
        height, width = images.shape[1:3]
        class_logits, mask_logits = self.network(images)
        size = padded_side(height), padded_side(width)
        ids, classes, scores = merge(self.merging, self.is_thing, class_logits, mask_logits, size)
        ids = ids[:, :height, :width]
        areas = count_pairs(ids, torch.zeros_like(ids), (class_logits.shape[1] + 1, 1))[:, 1:, 0]
        return ids.int(), torch.stack([classes.float(), scores, areas], dim=2)


def merge(
    merging: MaskWiseMerging,
    is_thing: torch.Tensor,
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:class:`~kmax_d2.modeling.merging.MaskWiseMerging` as tensor operations.

    Args:
        merging: whose options count.
        is_thing: (K,) bool.
        class_logits, mask_logits: as :class:`NetworkGraph` gives them.
        size: (H, W) of the map to merge on.

    Returns:
        (B, H, W) int64 segment ids, 0 for void; the (B, N) class and score of the segment i in column i - 1.
    """
    queries = class_logits.shape[1]
    upsampled = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=True)
    value, query = upsampled.topk(2, dim=1)
    probability = (value - upsampled.logsumexp(1, keepdim=True)).exp()
    masks = torch.where(probability > merging.pixel_threshold, query, queries)  # (B, 2, H, W), N for none

    confidence, query_class = class_logits.softmax(2)[..., :-1].max(2)
    small = mask_logits.flatten(2).softmax(1)
    above = (small > merging.pixel_threshold).to(small.dtype)
    mask_score = (small * above).sum(2) / above.sum(2).clamp_min(1)
    priority = confidence**merging.class_power * mask_score**merging.mask_power
    order = priority.sort(dim=1, descending=True).indices

    pairs = count_pairs(masks[:, 0], masks[:, 1], (queries + 1, queries + 1))
    area = (pairs.sum(2) + pairs.sum(1))[:, :-1].gather(1, order)
    ranked = F.one_hot(order, queries).to(pairs.dtype)  # a permutation, since not all runtimes can gather from a matrix
    overlap = ranked @ (pairs + pairs.transpose(1, 2))[:, :-1, :-1] @ ranked.transpose(1, 2)
    overlap = overlap.tril(-1)  # of each rank with those before it

    score, ranked_class = confidence.gather(1, order), query_class.gather(1, order)
    pasted, first, id_of_rank = _paste(merging, score, is_thing[ranked_class], ranked_class, area, overlap)
    column = torch.where(first, id_of_rank - 1, queries)  # of the table

    ranks = torch.arange(queries, device=order.device).expand_as(order)
    rank = torch.full_like(order, queries).scatter(1, order, torch.where(pasted, ranks, queries))
    rank, id_of_rank = F.pad(rank, (0, 1), value=queries), F.pad(id_of_rank, (0, 1))
    winner = rank.gather(1, masks.flatten(1)).view_as(masks).amin(1)
    ids = id_of_rank.gather(1, winner.flatten(1)).view_as(winner)

    table = torch.zeros_like(F.pad(score, (0, 1)))
    classes = table.scatter(1, column, ranked_class.to(table.dtype))[:, :-1]
    return ids, classes, table.scatter(1, column, score)[:, :-1]


def _paste(
    merging: MaskWiseMerging, score: torch.Tensor, thing: torch.Tensor, classes: torch.Tensor, *counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decides which masks are pasted. All tensors are in order of rank.

    Args:
        merging: whose options count.
        score, thing, classes: (B, N) of each mask.
        counts: (B, N) area in pixels, and (B, N, N) overlap of each mask with those before it.

    Returns:
        (B, N): whether a mask is pasted, whether it is the first of its segment, and the segment's id, 0 for none.
    """
    area, overlap = counts
    queries = score.shape[1]
    threshold = torch.where(thing, merging.thing_threshold, merging.stuff_threshold)
    candidate = (score >= threshold) & (area > 0)
    # Whether a mask is pasted depends on those before it: after i rounds, the first i are settled.
    pasted, free = candidate, area
    for _ in range(queries):
        free = area - (overlap @ pasted.to(overlap.dtype)[..., None]).squeeze(2)
        pasted = candidate & (free > merging.overlap_threshold * area)

    itself = torch.eye(queries, dtype=torch.bool, device=score.device)
    same = (classes[:, :, None] == classes[:, None]) & ~thing[:, :, None] | itself
    same = (same & pasted[:, None]).to(free.dtype)  # (B, N, N): the pasted masks of each one's segment
    segment_area = (same @ free[..., None]).squeeze(2)
    limit = torch.where(thing, float(merging.thing_area_limit), float(merging.stuff_area_limit))
    first = pasted & (same.tril(-1).sum(2) == 0) & (segment_area >= limit)
    number = first.long().cumsum(1) * first
    return pasted, first, (same @ number.to(same.dtype)[..., None]).squeeze(2).long() * pasted


def count_pairs(one: torch.Tensor, other: torch.Tensor, numbers: tuple[int, int]) -> torch.Tensor:
    """How often each pair of values is at one position of two maps (B, H, W): (B, *numbers) float32, exact to 2^24.

    It is a product of one-hot matrices: runtimes add the duplicates of a scatter from several threads without a lock.
    """
    one, other = one.flatten(1), other.flatten(1)
    parts = [_one_hot(one[:, i::PARTS], numbers[0]) @ _one_hot(other[:, i::PARTS], numbers[1]).mT for i in range(PARTS)]
    return torch.stack(parts).sum(0)


def sum_clusters(assignment: torch.Tensor, values: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """:func:`~kmax_d2.modeling.kmeans.kmeans_update` as a product with the one-hot assignment."""
    return _one_hot(assignment.flatten(1), num_clusters) @ flatten_pixels(values)


@contextlib.contextmanager
def _sums_as_products() -> Iterator[None]:
    """Makes :func:`sum_clusters` the update of the clusters inside the block."""
    plain = kmeans.kmeans_update
    kmeans.kmeans_update = sum_clusters
    try:
        yield
    finally:
        kmeans.kmeans_update = plain


def _one_hot(values: torch.Tensor, number: int) -> torch.Tensor:
    """(B, P) integers to (B, number, P) float32."""
    return (values[:, None] == torch.arange(number, device=values.device)[:, None]).float()
