"""Evaluates semantic mIoU on the classes of a panoptic dataset's segments, crowds included, or on semantic PNGs."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from ..data import panoptic_png
from ..data.datasets.coco_panoptic import IGNORE_LABEL, register_records
from ..images import read_rgb
from .output import compact
from .pool import EvaluationPool


def segment_classes(file_name: str, segments: list[dict], ignore_label: int, size: tuple[int, ...] = ()) -> np.ndarray:
    """Reads the (H, W) contiguous classes of a panoptic PNG; pixels without a segment get `ignore_label`."""
    ids = panoptic_png.read(file_name, size)
    classes = {segment["id"]: segment["category_id"] for segment in segments}
    present, inverse = np.unique(ids, return_inverse=True)
    return np.array([classes.get(id_, ignore_label) for id_ in present.tolist()])[inverse].reshape(ids.shape)


def annotated_classes(file_name: str, ignore_label: int, size: tuple[int, ...] = ()) -> np.ndarray:
    """Reads the (H, W) contiguous classes of an ADE20K semantic PNG, in which 0 is void and classes count from 1."""
    labels = read_rgb(file_name, "semantic PNG", size=size)[..., 0].astype(np.int64)
    return np.where(labels == 0, ignore_label, labels - 1)


def confusion(
    classes: np.ndarray, read_truth: Callable[[], np.ndarray], num_classes: int, ignore_label: int
) -> np.ndarray:
    """Counts the pixels of one image by predicted and true class, K + 1 of each; void, `ignore_label`, is the last."""
    truth = read_truth()
    truth[truth == ignore_label] = num_classes
    pairs = (num_classes + 1) * classes.astype(np.int64) + truth
    return np.bincount(pairs.ravel(), minlength=(num_classes + 1) ** 2).reshape(num_classes + 1, -1)


def class_map(output: Mapping) -> torch.Tensor:
    """Returns a model's (H, W) classes: its "semantic", or else the argmax of Detectron2's "sem_seg" (K, H, W)."""
    return output["semantic"] if "semantic" in output else output["sem_seg"].argmax(0)


class SemanticEvaluator(SemSegEvaluator):
    """Detectron2's semantic evaluator, except that it counts while the model goes on and keeps no predictions.

    The truth is in the segments of the records or, if they are on disk, in ADE20K's semantic annotations: thing pixels
    without an instance are void in its panoptic ones.
    """

    def __init__(self, dataset_name: str):
        metadata = MetadataCatalog.get(dataset_name)
        name = f"{dataset_name}_semantic"  # Detectron2's evaluator looks for semantic PNGs in the records
        label = metadata.get("ignore_label", IGNORE_LABEL)
        register_records(name, list, stuff_classes=metadata.stuff_classes, ignore_label=label)
        super().__init__(name)
        self._compute_boundary_iou = False
        self._annotations: Path | None = None
        if metadata.evaluator_type == "ade20k_panoptic_seg":
            images = Path(metadata.image_root)
            folder = images.parents[1] / "annotations" / images.name
            self._annotations = folder if folder.is_dir() else None

    def reset(self) -> None:
        """Forgets all counts."""
        super().reset()
        self._pool = EvaluationPool(self._collect)

    def _collect(self, matrix: np.ndarray) -> None:
        self._conf_matrix += matrix

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Submits images; an input has its record's keys, and :func:`class_map` says what an output has."""
        label = self._ignore_label
        for record, output in zip(inputs, outputs, strict=True):
            classes = compact(class_map(output), self._num_classes)
            truth = record["pan_seg_file_name"], record["segments_info"], label
            read_truth = partial(segment_classes, *truth, classes.shape)
            if self._annotations:
                file = self._annotations / f"{Path(record['file_name']).stem}.png"
                read_truth = partial(annotated_classes, str(file), label, classes.shape)
            self._pool.submit(confusion, classes, read_truth, self._num_classes, label)

    def evaluate(self) -> dict | None:
        """Returns "sem_seg": mIoU, fwIoU, mACC, pACC, and each class's IoU and accuracy, in percent; on rank 0."""
        self._pool.finish()
        with np.errstate(invalid="ignore"):  # of classes that do not occur
            results = super().evaluate()
        if results and not self._conf_matrix[:, :-1].any():  # the truth is all void
            return {"sem_seg": {}}
        return results and {"sem_seg": {name: float(value) for name, value in results["sem_seg"].items()}}
