"""Mask-wise merging (MaX-DeepLab; k-means Mask Transformer, Sec. 3.3) without a loop over queries on the device.

A mask is where its probability is above a threshold of more than a third, so at most two masks meet at a pixel. The
two best queries of each pixel therefore hold all that merging needs: areas and overlaps are counts over them, and
whether a mask is pasted follows from an N × N table of overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

# A strip that stays in a processor's cache; a GPU wants few large ones.
LOGITS_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}


class TopTwo(NamedTuple):
    """The two best queries of each pixel.

    Attributes:
        query: (2, H, W) int64 indices, best first.
        probability: (2, H, W), softmax over all queries.
    """

    query: torch.Tensor
    probability: torch.Tensor


class Segmentation(NamedTuple):
    """What merging gives for one image.

    Attributes:
        segment_ids: (H, W) int32, 0 is void.
        segments: one dict for each segment: "id", "category_id" (contiguous), "isthing", "area" and "score".
        pasted_query: (H, W) int64, the query pasted at each pixel, before the area limits; -1 for none.
        query_class: (N,) best non-void class of each query.
        query_confidence: (N,) its probability.
        query_score: (N,) confidence times mask score of each query.
        top_two: the two best queries of each pixel.
    """

    segment_ids: torch.Tensor
    segments: list[dict]
    pasted_query: torch.Tensor
    query_class: torch.Tensor
    query_confidence: torch.Tensor
    query_score: torch.Tensor
    top_two: TopTwo


def _interpolation(
    positions: int, pixels: int, extent: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each pixel along one axis of a resized map the two positions that it lies between, and how far."""
    last = positions - 1
    place = torch.arange(pixels, device=device) * (last * extent / max(pixels - 1, 1))
    before = place.long().clamp_max(last)
    return before, (before + 1).clamp_max(last), place - before


def _upsampled(mask_logits: torch.Tensor, size: tuple[int, int], extent: tuple[float, float]) -> Iterator[torch.Tensor]:
    """The logits (N, h, w) upsampled bilinearly (aligned corners) to `size`, as strips (rows, W, N) from the top down.

    The (N, H, W) logits are never whole in memory.
    """
    logits = mask_logits.float().permute(1, 2, 0).contiguous()
    height, width, queries = logits.shape
    device = logits.device
    above, below, down = _interpolation(height, size[0], extent[0], device)
    factor, rest = divmod(size[1] - 1, max(width - 1, 1))
    regular = rest == 0 and width > 1 and extent[1] == 1
    if regular:  # every position has the same pixels after it, and nothing is to be gathered
        steps = torch.arange(factor, device=device)[:, None] / factor
        logits = torch.cat([logits, logits[:, -1:]], dim=1)
    else:
        left, right, across = _interpolation(width, size[1], extent[1], device)
    rows = max(1, LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE["cuda"]) // (size[1] * queries))
    for start in range(0, size[0], rows):
        part = slice(start, start + rows)
        strip = torch.lerp(logits[above[part]], logits[below[part]], down[part, None, None])
        if regular:
            yield torch.lerp(strip[:, :-1, None], strip[:, 1:, None], steps).flatten(1, 2)[:, : size[1]]
        else:
            yield torch.lerp(strip[:, left], strip[:, right], across[:, None])


def top_two_queries(
    mask_logits: torch.Tensor, size: tuple[int, int], extent: tuple[float, float] = (1.0, 1.0)
) -> TopTwo:
    """Upsamples logits bilinearly (aligned corners) and keeps each pixel's two best queries.

    Args:
        mask_logits: (N, h, w) with N ≥ 2.
        size: (H, W) to upsample to.
        extent: the share of the map's height and width that the pixels span; less than 1 leaves padding out.
    """
    queries, probabilities = [], []
    for strip in _upsampled(mask_logits, size, extent):
        best, first = strip.max(-1)
        strip = (strip - best[..., None]).exp_()
        partition = strip.sum(-1)
        runner_up, second = strip.scatter_(-1, first[..., None], -1.0).max(-1)
        queries.append(torch.stack([first, second]))
        probabilities.append(torch.stack([1 / partition, runner_up / partition]))
    return TopTwo(torch.cat(queries, 1), torch.cat(probabilities, 1))


def marginal_classes(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    size: tuple[int, int],
    extent: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """(H, W) int64, the class with the largest sum over the queries of class probability times mask probability.

    Arguments as for :class:`MaskWiseMerging`.
    """
    classes = class_logits.float().softmax(1)[:, :-1]
    # Dividing by the sum over queries would not change which class is the largest.
    strips = (
        (strip - strip.amax(-1, keepdim=True)).exp_() @ classes for strip in _upsampled(mask_logits, size, extent)
    )
    return torch.cat([strip.argmax(-1) for strip in strips])


class MaskWiseMerging:
    """Pastes masks one after the other, the most confident first.

    Args:
        is_thing: for each class whether it is a thing.
        pixel_threshold: a mask is where its probability is above this; at least 1/3.
        thing_threshold, stuff_threshold: least class confidence of a pasted mask.
        overlap_threshold: share of its pixels that must still be free.
        class_power, mask_power: order by confidence^class_power · mask score^mask_power.
        thing_area_limit, stuff_area_limit: smaller segments become void, in pixels of the merged map.
    """

    def __init__(
        self,
        is_thing: Sequence[bool],
        *,
        pixel_threshold: float = 0.4,
        thing_threshold: float = 0.7,
        stuff_threshold: float = 0.5,
        overlap_threshold: float = 0.8,
        class_power: float = 1.0,
        mask_power: float = 1.0,
        thing_area_limit: int = 400,
        stuff_area_limit: int = 6400,
    ):
        if pixel_threshold < 1 / 3:
            raise ValueError(
                f"the pixel threshold must be at least 1/3, so that two masks meet at most: {pixel_threshold}"
            )
        self.is_thing = torch.tensor(list(is_thing), dtype=torch.bool)
        self.pixel_threshold = pixel_threshold
        self.thing_threshold = thing_threshold
        self.stuff_threshold = stuff_threshold
        self.overlap_threshold = overlap_threshold
        self.class_power = class_power
        self.mask_power = mask_power
        self.thing_area_limit = thing_area_limit
        self.stuff_area_limit = stuff_area_limit

    def __call__(
        self,
        class_logits: torch.Tensor,
        mask_logits: torch.Tensor,
        size: tuple[int, int],
        extent: tuple[float, float] = (1.0, 1.0),
    ) -> Segmentation:
        """Merges one image.

        Args:
            class_logits: (N, K + 1), void last.
            mask_logits: (N, h, w).
            size: (H, W) of the map to merge on.
            extent: the share of the mask logits' height and width that it spans.
        """
        class_logits, mask_logits = class_logits.detach(), mask_logits.detach()
        num_queries = class_logits.shape[0]
        confidence, query_class = class_logits.float().softmax(1)[:, :-1].max(1)
        mask_score = self._mask_score(mask_logits)
        order = torch.argsort(confidence**self.class_power * mask_score**self.mask_power, descending=True, stable=True)
        top_two = top_two_queries(mask_logits, size, extent)
        above = top_two.probability > self.pixel_threshold
        first, second = top_two.query
        # Masks meet only where the runner-up is above the threshold, and there the best is too.
        area = torch.bincount(first[above[0]], minlength=num_queries)
        pairs = torch.bincount((first * num_queries + second)[above[1]], minlength=num_queries**2)
        overlap = pairs.view(num_queries, num_queries)
        overlap = overlap + overlap.T
        area = area + torch.bincount(second[above[1]], minlength=num_queries)

        # The one transfer to the host: a few numbers for each query.
        table = torch.cat([t.double().flatten() for t in (order, query_class, confidence, area, overlap)]).cpu()
        segments, segment_of_query = self._paste(table, num_queries)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(num_queries, device=order.device)
        lookup = segment_of_query.to(order.device)

        ids = lookup[top_two.query] * above
        second_wins = (ids[1] > 0) & ((ids[0] == 0) | (rank[second] < rank[first]))
        keep = torch.zeros(len(segments) + 1, dtype=torch.int32)
        kept = []
        for segment in segments:
            limit = self.thing_area_limit if segment["isthing"] else self.stuff_area_limit
            if segment["area"] >= limit:
                kept.append(segment | {"id": len(kept) + 1})
                keep[segment["id"]] = len(kept)
        winner = torch.where(second_wins, ids[1], ids[0])
        pasted_query = torch.where(second_wins, second, first).where(winner > 0, -1)
        segment_ids = keep.to(order.device)[winner]
        return Segmentation(segment_ids, kept, pasted_query, query_class, confidence, confidence * mask_score, top_two)

    def _mask_score(self, mask_logits: torch.Tensor) -> torch.Tensor:
        """(N,) mean probability where it is above the threshold, on the map as predicted; 0 if nowhere."""
        probability = mask_logits.float().flatten(1).softmax(0)
        probability = probability * (probability > self.pixel_threshold)
        return probability.sum(1) / (probability > 0).sum(1).clamp_min(1)

    def _paste(self, table: torch.Tensor, num_queries: int) -> tuple[list[dict], torch.Tensor]:
        """Decides which masks are pasted; gives the segments and the (N,) segment of each query, 0 for none."""
        order, query_class, confidence, area, overlap = table.split([num_queries] * 4 + [num_queries**2])
        overlap = overlap.view(num_queries, num_queries)
        is_thing = self.is_thing[query_class.long()]
        threshold = torch.where(is_thing, self.thing_threshold, self.stuff_threshold)
        candidates = (confidence >= threshold) & (area > 0)
        segments: list[dict] = []
        stuff: dict[int, dict] = {}
        segment_of_query = torch.zeros(num_queries, dtype=torch.int64)
        covered = torch.zeros(num_queries, dtype=torch.float64)
        for query in order.long()[candidates[order.long()]].tolist():
            free = area[query] - covered[query]
            if free <= self.overlap_threshold * area[query]:
                continue
            covered += overlap[query]
            category = int(query_class[query])
            segment = stuff.get(category)
            if segment is None:
                segment = {
                    "id": len(segments) + 1,
                    "category_id": category,
                    "isthing": bool(is_thing[query]),
                    "area": 0,
                    "score": float(confidence[query]),
                }
                segments.append(segment)
                if not segment["isthing"]:
                    stuff[category] = segment
            segment["area"] += int(free)
            segment_of_query[query] = segment["id"]
        return segments, segment_of_query
