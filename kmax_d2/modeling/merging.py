"""Mask-wise merging (MaX-DeepLab; k-means Mask Transformer, Sec. 3.3) without a loop over queries on the device.

A mask is where its probability is above a threshold of more than a third, so at most two masks meet at a pixel. The
two best queries of each pixel therefore hold all that merging needs: areas and overlaps are counts over them, and
whether a mask is pasted follows from an N × N table of overlaps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from ..errors import UserError
from .build import thing_mask
from .top_two import by_rows, find_top_two, row_strips


class Segmentation(NamedTuple):
    """The merged result of one image.

    Attributes:
        segment_ids: (H, W) int32, 0 is void.
        segments: one dict for each segment: "id", "category_id" (contiguous), "isthing", "area" and "score".
        pasted_query: (H, W) int16, the query pasted at each pixel, before the area limits; -1 for none.
        query_class: (N,) best non-void class of each query.
        query_confidence: (N,) its probability.
        query_score: (N,) confidence times mask score of each query.
        best_query: (H, W) int16, the query with the largest mask logit at each pixel.
        best_probability: (H, W), its probability there.
        masks: (2, H, W) int16, the queries whose masks are at each pixel, before merging; N for none.
    """

    segment_ids: torch.Tensor
    segments: list[dict]
    pasted_query: torch.Tensor
    query_class: torch.Tensor
    query_confidence: torch.Tensor
    query_score: torch.Tensor
    best_query: torch.Tensor
    best_probability: torch.Tensor
    masks: torch.Tensor


def count_values(values: torch.Tensor, number: int) -> torch.Tensor:
    """(number,) int64, how often each of 0, 1, ..., number − 1 is among int64 values, which hold no others."""
    return count_without_waiting(values, number) if values.is_cuda else values.flatten().bincount(minlength=number)


def count_without_waiting(values: torch.Tensor, number: int, copies: int = 256) -> torch.Tensor:
    """:func:`count_values` for a GPU, where `bincount` would wait for the largest value.

    Neighbors are counted in different copies of the bins, as additions to one bin take turns.
    """
    copy = torch.arange(values.numel(), device=values.device) % copies
    counts = torch.zeros(number * copies, dtype=torch.int32, device=values.device)
    one = counts.new_ones(1).expand(values.numel())
    return counts.scatter_add_(0, values.flatten() * copies + copy, one).view(number, copies).sum(1)


def look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index] of a table with one axis, for an index of any integer type; faster on a CPU."""
    return table.index_select(0, index.flatten().int()).view(index.shape)


MERGING_REGISTRY = Registry("MERGING")
MERGING_REGISTRY.__doc__ = """
Classes that merge masks, named by `MODEL.KMAX.TEST.MERGING` and built by their class method `from_config(cfg)`. They
have the attributes `is_thing`, `thing_area_limit`, and `stuff_area_limit`, and are called as
:meth:`MaskWiseMerging.__call__`, whose result they return.
"""


@MERGING_REGISTRY.register()
@dataclass(eq=False)
class MaskWiseMerging:
    """Pastes masks one after the other, the most confident first.

    Attributes:
        is_thing: for each class whether it is a thing.
        pixel_threshold: a mask is where its probability is above this; at least 1/3.
        thing_threshold, stuff_threshold: least class confidence of a pasted mask.
        overlap_threshold: a mask is pasted if more than this fraction of its pixels is still free.
        class_power, mask_power: order by confidence^class_power · mask score^mask_power.
        thing_area_limit, stuff_area_limit: smaller segments become void, in pixels of the merged map.
    """

    is_thing: Any  # becomes a tensor
    pixel_threshold: float = 0.4
    thing_threshold: float = 0.7
    stuff_threshold: float = 0.5
    overlap_threshold: float = 0.8
    class_power: float = 1.0
    mask_power: float = 1.0
    thing_area_limit: int = 400
    stuff_area_limit: int = 6400

    def __post_init__(self) -> None:
        self.is_thing = torch.as_tensor(self.is_thing, dtype=torch.bool)
        if self.pixel_threshold < 1 / 3:
            raise UserError(
                f"MODEL.KMAX.TEST.PIXEL_THRESHOLD is {self.pixel_threshold}, but must be at least 1/3, so that no more "
                "than two masks meet at a pixel"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> MaskWiseMerging:
        """Builds the merging of a config."""
        test = cfg.MODEL.KMAX.TEST
        options = {field.name: test[field.name.upper()] for field in fields(cls) if field.name != "is_thing"}
        if not test.MERGE_AT_CROP:
            options |= {"thing_area_limit": 0, "stuff_area_limit": 0}
        return cls(thing_mask(cfg), **options)

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
            extent: the fraction of the mask logits' height and width that the map spans.
        """
        class_logits, mask_logits = class_logits.detach(), mask_logits.detach()
        query, probability = find_top_two(mask_logits, size, extent)
        masks = query.masked_fill(~(probability > self.pixel_threshold), len(class_logits))
        best = query[0].clone(), probability[0].clone()
        del query, probability  # half of which is kept
        confidence, query_class = class_logits.float().softmax(1)[:, :-1].max(1)
        mask_score = self._mask_score(mask_logits)
        order = torch.argsort(confidence**self.class_power * mask_score**self.mask_power, descending=True, stable=True)
        counts = self._counts(masks, len(class_logits))

        # The only transfer to the host: a few numbers for each query.
        numbers = torch.cat([t.double().flatten() for t in (order, query_class, confidence, *counts)]).cpu()
        segments, tables = self.paste(numbers, len(class_logits))
        # Memory that is not pinned has been read when the call returns, so there is nothing to wait for.
        segment_ids, pasted_query = self._paint(masks, tables.to(masks.device, non_blocking=True))
        of_queries = query_class, confidence, confidence * mask_score
        return Segmentation(segment_ids, segments, pasted_query, *of_queries, *best, masks)

    @staticmethod
    def _counts(masks: torch.Tensor, num_queries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """From the masks at each pixel, (2, H, W) queries or N for none, to (N,) areas and (N, N) overlaps."""
        bins = num_queries + 1
        pairs = torch.zeros(bins, bins, dtype=torch.int64, device=masks.device)
        for rows in row_strips(masks.shape):
            best, runner_up = masks[:, rows].long()
            pairs += count_values(best * bins + runner_up, bins**2).view(bins, bins)
        # Masks meet only where the runner-up is above the threshold, and there the best is too.
        area = pairs.sum(1) + pairs.sum(0)
        return area[:-1], (pairs + pairs.T)[:-1, :-1]

    @staticmethod
    def _paint(masks: torch.Tensor, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(H, W) segment ids and pasted queries of the masks at each pixel, by the tables of :meth:`paste`."""
        rank_of_query, query_of_rank, id_of_rank = tables.short()
        winner = by_rows(lambda strip: torch.minimum(*look_up(rank_of_query, strip)), masks)
        segment_ids = by_rows(functools.partial(look_up, id_of_rank.int()), winner)
        return segment_ids, by_rows(functools.partial(look_up, query_of_rank), winner)

    def _mask_score(self, mask_logits: torch.Tensor) -> torch.Tensor:
        """(N,) mean probability where it is above the threshold, on the map as predicted; 0 if nowhere."""
        probability = mask_logits.float().flatten(1).softmax(0)
        probability = torch.nn.functional.threshold(probability, self.pixel_threshold, 0.0, inplace=True)
        return probability.sum(1) / probability.sign().sum(1).clamp_min(1)

    def paste(self, numbers: torch.Tensor, num_queries: int) -> tuple[list[dict], torch.Tensor]:
        """Decides which masks are pasted, from order, class, confidence, area and overlaps of the queries.

        Returns:
            segments: those that are not below the area limits.
            tables: (3, N + 1) int64. The rank of each query, N where it is not pasted; of each rank the query, -1 where
                it is not pasted, and the segment's id, 0 for none. The last entry is for no query.
        """
        order, query_class, confidence, area, overlap = numbers.split([num_queries] * 4 + [num_queries**2])
        is_thing = self.is_thing[query_class.long()]
        threshold = torch.where(is_thing, self.thing_threshold, self.stuff_threshold)
        candidates = (confidence >= threshold) & (area > 0)
        ranked, category = order.long().tolist(), query_class.long().tolist()
        candidate, thing, areas = candidates.tolist(), is_thing.tolist(), area.tolist()
        overlaps = overlap.view(num_queries, num_queries).numpy()
        covered = np.zeros(num_queries)
        pasted: list[tuple[int, int, dict]] = []
        stuff: dict[int, dict] = {}
        for rank, query in enumerate(ranked):
            free = areas[query] - covered[query]
            if not candidate[query] or free <= self.overlap_threshold * areas[query]:
                continue
            covered += overlaps[query]
            new = {"category_id": category[query], "isthing": thing[query], "area": 0}
            new["score"] = float(confidence[query])
            # Masks of one stuff class are one segment.
            segment = new if thing[query] else stuff.setdefault(category[query], new)
            segment["area"] += int(free)
            pasted.append((rank, query, segment))

        segments: list[dict] = []
        tables = np.array([[num_queries], [-1], [0]]).repeat(num_queries + 1, axis=1)
        for rank, query, segment in pasted:
            limit = self.thing_area_limit if segment["isthing"] else self.stuff_area_limit
            if "id" not in segment and segment["area"] >= limit:
                segment["id"] = len(segments) + 1
                segments.append(segment)
            tables[0, query], tables[1:, rank] = rank, (query, segment.get("id", 0))
        return segments, torch.from_numpy(tables)
