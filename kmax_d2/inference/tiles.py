"""Very large images: segmented tile by tile, with the segments of neighboring tiles joined."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Instances
from torch import nn
from tqdm import tqdm

from ..data.mapper import PanopticTestMapper
from ..data.segment_ids import NUM_IDS
from ..errors import UserError
from ..modeling.postprocess import Results

if TYPE_CHECKING:
    from .predictor import Predictor

LEAST_SIZE = 64  # of a tile, in pixels
STRIDE = 32  # of the coarsest map
JOINED_IOU = 0.5  # of two things of one class in the overlap of their tiles, above which they are one

Segmentation = tuple[np.ndarray, list[dict]]  # ids (H, W), 0 for void, and "id", "category_id", "isthing" and "score"


class TileJoiner:
    """Collects the segmentations of overlapping tiles, given row by row.

    In an overlap, each tile counts up to the middle, and the other one where the first is void. Things of one class
    that mostly agree in an overlap are one segment; stuff of one class is one.

    Args:
        height, width: of the whole image, in pixels.
    """

    def __init__(self, height: int, width: int):
        self.ids = np.zeros((height, width), np.int32)
        self.parts: list[dict] = [{}]  # by id; 0 is void
        self.parent = [0]
        self._stuff: dict[int, int] = {}

    def add(self, top: int, left: int, overlap: tuple[int, int], ids: np.ndarray, segments: list[dict]) -> None:
        """Adds a tile, whose first rows and columns are `overlap` those of the tiles above and to the left."""
        table = np.zeros(1 + int(ids.max()), np.int32)
        for segment in segments:
            known = None if segment["isthing"] else self._stuff.get(segment["category_id"])
            if known is None:
                known = len(self.parts)
                self.parts.append(segment | {"area": 0, "score": 0.0})
                self.parent.append(known)
                if not segment["isthing"]:
                    self._stuff[segment["category_id"]] = known
            table[segment["id"]] = known
            area = int((ids == segment["id"]).sum())
            part = self.parts[known]
            part["area"], part["score"] = part["area"] + area, part["score"] + area * segment["score"]
        new, old = table[ids], self.ids[top : top + ids.shape[0], left : left + ids.shape[1]]
        for strip in (np.s_[: overlap[0]], np.s_[:, : overlap[1]]):
            self._join(old[strip], new[strip])
        own = np.zeros(new.shape, bool)
        own[overlap[0] // 2 :, overlap[1] // 2 :] = True
        first, second = np.where(own, new, old), np.where(own, old, new)
        old[:] = np.where(first > 0, first, second)

    def _join(self, old: np.ndarray, new: np.ndarray) -> None:
        """Makes one of the things that agree in an overlap; where either tile has void says nothing."""
        roots = np.array([self._root(index) for index in range(len(self.parts))])
        known = (old > 0) & (new > 0)
        pairs, counts = np.unique(roots[old[known]].astype(np.int64) * NUM_IDS + new[known], return_counts=True)
        first, second = np.divmod(pairs, NUM_IDS)
        areas = [np.bincount(side, counts, len(roots)) for side in (first, second)]
        for a, b, both in zip(first.tolist(), second.tolist(), counts.tolist(), strict=True):
            one, other = self.parts[a], self.parts[b]
            same = one["isthing"] and one["category_id"] == other["category_id"]
            if same and both > JOINED_IOU * (areas[0][a] + areas[1][b] - both):
                self.parent[self._root(b)] = self._root(a)

    def _root(self, index: int) -> int:
        while self.parent[index] != index:
            index = self.parent[index]
        return index

    def finish(self, thing_limit: float = 0, stuff_limit: float = 0) -> Segmentation:
        """Returns ids (H, W) and the segments of all tiles; those with fewer pixels than a limit become void."""
        roots = np.array([self._root(index) for index in range(len(self.parts))])
        pixels = np.bincount(roots[self.ids.ravel()], minlength=len(roots))
        table = np.zeros(len(roots), np.int32)
        segments: list[dict] = []
        for root in range(1, len(roots)):
            parts = [part for part, of in zip(self.parts, roots.tolist(), strict=True) if of == root]
            if not parts or pixels[root] < max(1, thing_limit if parts[0]["isthing"] else stuff_limit):
                continue
            score = sum(part["score"] for part in parts) / sum(part["area"] for part in parts)
            segments.append(parts[0] | {"id": len(segments) + 1, "area": int(pixels[root]), "score": score})
            table[root] = len(segments)
        return table[roots][self.ids], segments


def segment_tiles(predictor: Predictor, image: np.ndarray, size: int, overlap: int | None = None) -> Results:
    """Segments an image in square tiles, so that memory beyond the image and its results is that of one tile.

    If the config resizes images (INPUT.FIT_CROP), tiles are shrunk to the crop if they are larger, and enlarged as the
    whole image would be if that is smaller. Limits on the area of segments hold for the joined ones.

    Args:
        predictor: segments the tiles.
        image: (H, W, 3), uint8, RGB.
        size: side of the tiles in pixels.
        overlap: least pixels that neighbors share; a quarter of the size by default.

    Returns:
        what the model gives for a whole image; its instances are the things of the panoptic result.

    Raises:
        UserError: size or overlap is out of range.
    """
    overlap = size // 4 if overlap is None else overlap
    if size < LEAST_SIZE or not 0 <= overlap <= size // 2:
        raise UserError(f"tiles have at least {LEAST_SIZE} pixels and overlap by up to half, not {size} and {overlap}")
    height, width = image.shape[:2]
    sides, crop, scale = (min(size, height), min(size, width)), predictor.cfg.INPUT.CROP_SIZE, 1.0
    if predictor.cfg.INPUT.FIT_CROP:
        of_whole, of_tile = (min(crop[0] / y, crop[1] / x) for y, x in ((height, width), sides))
        scale = max(of_whole, min(1.0, of_tile))
    mapper = PanopticTestMapper(size=(round(scale * sides[0]), round(scale * sides[1])))
    of_tiles = type(predictor)(predictor.cfg, _without_limits(predictor.model))
    joiner, classes = TileJoiner(height, width), torch.zeros(height, width, dtype=torch.int16)
    step = STRIDE / scale  # so that the network's coarsest map is that of the whole image
    rows, columns = (_spans(side, size, overlap, step) for side in (height, width))
    for (top, above), (left, before) in tqdm(
        list(itertools.product(rows, columns)), "tiles", leave=False, disable=None
    ):
        tile = image[top : top + size, left : left + size]
        results = of_tiles.segment([mapper.inputs(tile)])[0]
        ids, segments = results["panoptic_seg"]
        joiner.add(top, left, (above, before), ids.cpu().numpy(), segments)
        if "semantic" in results:
            own = results["semantic"][above // 2 :, before // 2 :]
            classes[top + above // 2 : top + size, left + before // 2 : left + size] = own
    merging = predictor.model.merging
    limits = (merging.thing_area_limit / scale**2, merging.stuff_area_limit / scale**2)
    ids, segments = joiner.finish(*limits)
    panoptic = torch.from_numpy(ids), segments
    return Results(
        {"panoptic_seg": lambda: panoptic, "semantic": classes.long, "instances": lambda: _things(*panoptic)}
    )


def _spans(length: int, size: int, overlap: int, step: float = 1.0) -> list[tuple[int, int]]:
    """Returns for each tile along an axis where it begins, and how many pixels it shares with the one before.

    Tiles begin at multiples of `step` pixels, evenly spaced; the last one may be smaller by less than that.
    """
    last = max(0, math.ceil((length - size) / step))
    gaps = math.ceil(last / max(1, (size - overlap) // step))
    begins = [round(round(index * last / max(1, gaps)) * step) for index in range(gaps + 1)]
    return [(begin, max(0, before + size - begin)) for before, begin in zip([-size, *begins], begins, strict=False)]


def _without_limits(model: nn.Module) -> Any:
    """Returns a model of the same parts that keeps small segments, which may be large with those of the next tile."""
    free: Any = copy.copy(model)
    free._modules = dict(model._modules)
    free.postprocessor = copy.copy(free.postprocessor)
    free.postprocessor.merging = replace(free.merging, thing_area_limit=0, stuff_area_limit=0)
    return free


def _things(ids: torch.Tensor, segments: list[dict]) -> Instances:
    """The things of a panoptic result as instances."""
    things = [segment for segment in segments if segment["isthing"]]
    masks = ids == torch.tensor([thing["id"] for thing in things], dtype=ids.dtype)[:, None, None]
    instances = Instances(tuple(ids.shape), pred_masks=masks, pred_boxes=BitMasks(masks).get_bounding_boxes())
    instances.scores = torch.tensor([thing["score"] for thing in things])
    instances.pred_classes = torch.tensor([thing["category_id"] for thing in things], dtype=torch.int64)
    return instances
