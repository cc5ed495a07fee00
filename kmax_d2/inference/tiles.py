"""Very large images: segmented tile by tile, with the segments of neighboring tiles joined."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances
from torch import nn
from tqdm import tqdm

from ..data.augmentation import ResizeToFit
from ..data.mapper import PanopticTestMapper
from ..errors import UserError
from ..modeling.postprocess import ModelOutput

if TYPE_CHECKING:
    from .predictor import Predictor

LEAST_SIZE = 64  # of a tile, in pixels
STRIDE = 32  # of the coarsest map
JOINED_IOU = 0.5  # of two things of one class in the overlap of their tiles, above which they are one


class TileJoiner:
    """Joins the segmentations of overlapping tiles, which come row by row, to that of an image of height × width.

    In an overlap, each tile counts up to the middle, and the other one where the first has void. Things of one class
    that mostly agree in an overlap are one segment; stuff of one class is one.
    """

    def __init__(self, height: int, width: int):
        self._ids = np.zeros((height, width), np.int32)  # of the segments of all tiles
        self._segments: list[dict] = [{"area": 0, "score": 0.0}]  # by these ids
        self._joined = [0]  # the first of those that each of them is one with
        self._stuff: dict[int, int] = {}  # the first of each class

    def add(self, top: int, left: int, overlap: tuple[int, int], ids: np.ndarray, segments: list[dict]) -> None:
        """Adds a tile.

        Args:
            top, left: of its first pixel in the image.
            overlap: how many of its rows and columns are also in the tiles above and to the left.
            ids, segments: (h, w) and a list, as in the model's "panoptic_seg".
        """
        table = np.zeros(1 + int(ids.max()), np.int32)
        for segment in segments:
            table[segment["id"]] = id_ = len(self._segments)
            self._segments.append(segment)
            self._joined.append(id_ if segment["isthing"] else self._stuff.setdefault(segment["category_id"], id_))
        new, old = table[ids], self._ids[top : top + ids.shape[0], left : left + ids.shape[1]]
        self._join(old[: overlap[0]], new[: overlap[0]])
        self._join(old[:, : overlap[1]], new[:, : overlap[1]])
        own = np.zeros(new.shape, bool)
        own[overlap[0] // 2 :, overlap[1] // 2 :] = True
        first, second = np.where(own, new, old), np.where(own, old, new)
        old[:] = np.where(first > 0, first, second)

    def _join(self, old: np.ndarray, new: np.ndarray) -> None:
        """Joins the things that agree in an overlap. Pixels where a tile has void say nothing."""
        known, joined = (old > 0) & (new > 0), np.array(self._joined)
        pairs, counts = np.unique(np.stack([joined[old[known]], new[known]]), axis=1, return_counts=True)
        areas = [np.bincount(ids, counts, len(joined)) for ids in pairs]
        for (a, b), both in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            one, other = self._segments[a], self._segments[b]
            same = one["isthing"] and one["category_id"] == other["category_id"]
            if same and both > JOINED_IOU * (areas[0][a] + areas[1][b] - both):
                first, second = self._joined[a], self._joined[b]
                self._joined = [first if each == second else each for each in self._joined]

    def finish(self, thing_limit: float = 0, stuff_limit: float = 0) -> tuple[np.ndarray, list[dict]]:
        """Returns ids (H, W) int32 and segments; those with fewer pixels than a limit become void."""
        joined, count = np.array(self._joined, np.int32), len(self._joined)
        ids = joined[self._ids]
        pixels = np.bincount(ids.ravel(), minlength=count)
        area, score = (np.array([segment[key] for segment in self._segments]) for key in ("area", "score"))
        scores = np.bincount(joined, area * score) / np.bincount(joined, area).clip(1)
        table = np.zeros(count, np.int32)
        segments: list[dict] = []
        for id_, segment in enumerate(self._segments[1:], start=1):
            if pixels[id_] >= max(1, thing_limit if segment["isthing"] else stuff_limit):
                table[id_] = len(segments) + 1
                new = {"id": len(segments) + 1, "area": int(pixels[id_]), "score": float(scores[id_])}
                segments.append(segment | new)
        return table[ids], segments


def segment_tiles(predictor: Predictor, image: np.ndarray, size: int, overlap: int | None = None) -> ModelOutput:
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
    of_tiles, mapper = copy.copy(predictor), PanopticTestMapper(size=None)
    of_tiles.model = _without_limits(predictor.model)
    mapper.augmentations = T.AugmentationList([ResizeToFit(None, (scale, scale))])
    joiner, classes = TileJoiner(height, width), torch.zeros(height, width, dtype=torch.int16)
    step = STRIDE / scale  # so that the network's coarsest map is that of the whole image
    rows, columns = (_spans(side, size, overlap, step) for side in (height, width))
    places = list(itertools.product(rows, columns))
    for (top, above), (left, before) in tqdm(places, "tiles", leave=False, disable=None):
        tile = image[top : top + size, left : left + size]
        results = of_tiles.segment([mapper.inputs(tile)])[0]
        ids, segments = results["panoptic_seg"]
        joiner.add(top, left, (above, before), ids.cpu().numpy(), segments)
        if "semantic" in results:
            own = results["semantic"][above // 2 :, before // 2 :]
            classes[top + above // 2 : top + size, left + before // 2 : left + size] = own
    merging = predictor.model.merging
    ids, segments = joiner.finish(merging.thing_area_limit / scale**2, merging.stuff_area_limit / scale**2)
    panoptic = torch.from_numpy(ids), segments
    parts = {
        "panoptic_seg": lambda _: panoptic,
        "semantic": lambda _: classes.long(),
        "instances": lambda _: _things(*panoptic),
    }
    return ModelOutput(parts)


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
