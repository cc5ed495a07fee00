"""The result for one image."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Instances

from ..data import panoptic_png
from ..data.datasets.coco_panoptic import categories_of
from ..errors import UserError, did_you_mean, optional_package
from ..files import require_own, write_png
from ..modeling.postprocess import ModelOutput
from ..visualization import cluster_panels, draw_instances, draw_panoptic, draw_semantic, page

if TYPE_CHECKING:
    from .predictor import Predictor

KINDS = ("panoptic", "instances", "semantic", "clusters")


class Segment(NamedTuple):
    """A segment of a panoptic result.

    Attributes:
        id: its value in the id map, from 1.
        class_id, class_name: its contiguous class.
        is_thing: whether it is one instance, and not stuff.
        score: confidence in its class, from 0 to 1.
        area: in pixels.
        box: (left, top, right, bottom) in pixels; right and bottom are just outside.
    """

    id: int
    class_id: int
    class_name: str
    is_thing: bool
    score: float
    area: int
    box: tuple[int, int, int, int]


class Panoptic(NamedTuple):
    """A panoptic result: `ids` (H, W) int32, 0 for void, and the list of `segments`."""

    ids: np.ndarray
    segments: list[Segment]


class Result:
    """What a model finds in an image. Except for the panoptic part, it is computed when it is first read.

    Attributes:
        image: (H, W, 3), uint8, RGB.
        source: the path or address of the image, else "".
    """

    def __init__(
        self, predictor: Predictor, image: np.ndarray, source: str, inputs: torch.Tensor, results: ModelOutput
    ):
        self.image, self.source = image, source
        self._predictor, self._inputs, self._results = predictor, inputs, results
        ids, segments = results["panoptic_seg"]
        self._segments = segments
        id_map = ids.cpu().numpy()
        shapes = {each["id"]: each for each in panoptic_png.describe(id_map)}
        self.panoptic = Panoptic(id_map, [self._segment(segment, shapes[segment["id"]]) for segment in segments])

    def _segment(self, segment: dict, shape: dict) -> Segment:
        x, y, width, height = shape["bbox"]
        class_id = segment["category_id"]
        name, is_thing = self._predictor.class_names[class_id], bool(segment["isthing"])
        box = (x, y, x + width, y + height)
        return Segment(segment["id"], class_id, name, is_thing, segment["score"], shape["area"], box)

    @functools.cached_property
    def semantic(self) -> np.ndarray:
        """The class of each pixel (H, W), int64."""
        return self._results["semantic"].cpu().numpy()

    @functools.cached_property
    def instances(self) -> Instances:
        """Detectron2's instances with masks, boxes, scores, and classes, on the CPU."""
        return self._results["instances"].to("cpu")

    @functools.cached_property
    def clusters(self) -> list[np.ndarray]:
        """The cluster of each position (h, w), for each decoder in turn and then the final predictor (Fig. 4).

        The network runs once more for it, so that a result does not hold the maps of all decoders.
        """
        return self._predictor.assignments(self._inputs)

    def draw(self, kind: str = "panoptic") -> np.ndarray:
        """Draws the result over the image: (f H, f W, 3), uint8, RGB; f is 1 except for small images.

        Args:
            kind: "panoptic", "instances", "semantic", or "clusters", a page of all decoders' clusters.

        Raises:
            UserError: there is no such kind.
        """
        metadata = self._predictor.metadata
        if kind == "panoptic":
            return draw_panoptic(self.image, self.panoptic.ids, self._segments, metadata)
        if kind == "semantic":
            return draw_semantic(self.image, self.semantic, metadata)
        if kind == "instances":
            return draw_instances(self.image, self.instances, metadata)
        if kind == "clusters":
            return page(cluster_panels(self.image, self.clusters, self._inputs.shape[-2:]))
        raise UserError(f"no picture {kind}{did_you_mean(kind, KINDS) or '.'} There are {', '.join(KINDS)}")

    def save(self, file: str | Path, kind: str = "panoptic", overwrite: bool = False) -> None:
        """Writes :meth:`draw` as a PNG. Raises UserError if that fails, or if a file that is not ours is in the way."""
        require_own([Path(file)], overwrite)
        write_png(Path(file), self.draw(kind))

    def to_coco(self) -> dict[str, Any]:
        """Returns the annotation of COCO's panoptic format, with the dataset's category ids; its PNG is `panoptic.ids`.

        "segments_info" has "id", "category_id", "area", "bbox" [x, y, width, height], "iscrowd", and "score".
        """
        ids = [category["id"] for category in categories_of(self._predictor.metadata)]
        return {
            "file_name": f"{Path(self.source).stem}.png",
            "segments_info": [
                {
                    **{"id": s.id, "category_id": ids[s.class_id], "area": s.area, "iscrowd": 0, "score": s.score},
                    "bbox": [s.box[0], s.box[1], s.box[2] - s.box[0], s.box[3] - s.box[1]],
                }
                for s in self.panoptic.segments
            ],
        }

    def to_supervision(self) -> Any:
        """Returns the segments as `supervision.Detections`. Raises UserError if that package is not installed."""
        supervision = optional_package("supervision", "supervision")
        segments = self.panoptic.segments
        return supervision.Detections(
            xyxy=np.array([s.box for s in segments], dtype=np.float32).reshape(-1, 4),
            mask=self.panoptic.ids == np.array([s.id for s in segments], dtype=np.int32).reshape(-1, 1, 1),
            confidence=np.array([s.score for s in segments], dtype=np.float32),
            class_id=np.array([s.class_id for s in segments], dtype=np.int64),
            data={"class_name": np.array([s.class_name for s in segments])},
        )
