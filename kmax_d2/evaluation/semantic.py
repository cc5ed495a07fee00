"""Evaluates semantic mIoU on the classes of a panoptic dataset's segments, crowds included, or on semantic PNGs."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from ..data import panoptic_png
from ..data.datasets.coco_panoptic import register_records
from ..images import read_rgb
from .output import compact
from .pool import EvaluationPool


def segment_classes(file_name: str, segments: list[dict], ignore_label: int) -> np.ndarray:
    """Reads the (H, W) contiguous classes of a panoptic PNG; pixels without a segment get `ignore_label`."""
    ids = panoptic_png.read(file_name)
    classes = {segment["id"]: segment["category_id"] for segment in segments}
    present, inverse = np.unique(ids, return_inverse=True)
    return np.array([classes.get(id_, ignore_label) for id_ in present.tolist()])[inverse].reshape(ids.shape)


def annotated_classes(file_name: str, ignore_label: int) -> np.ndarray:
    """Reads the (H, W) contiguous classes of an ADE20K semantic PNG, in which 0 is void and classes count from 1."""
    labels = read_rgb(file_name, "semantic PNG")[..., 0].astype(np.int64)
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

    `truths` has for each image's file name a function that reads its true classes (H, W).
    """

    def __init__(self, dataset_name: str, truths: dict[str, Callable[[], np.ndarray]]):
        metadata = MetadataCatalog.get(dataset_name)
        name = f"{dataset_name}_semantic"  # Detectron2's evaluator looks for semantic PNGs in the records
        register_records(name, list, stuff_classes=metadata.stuff_classes, ignore_label=metadata.ignore_label)
        super().__init__(name)
        self._compute_boundary_iou = False
        self._truths = truths

    def reset(self) -> None:
        """Forgets all counts."""
        super().reset()
        self._pool = EvaluationPool(self._collect)

    def _collect(self, matrix: np.ndarray) -> None:
        self._conf_matrix += matrix

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Submits images; :func:`class_map` says what an output has."""
        for record, output in zip(inputs, outputs, strict=True):
            classes = compact(class_map(output), self._num_classes)
            truth = self._truths[record["file_name"]]
            self._pool.submit(confusion, classes, truth, self._num_classes, self._ignore_label)

    def evaluate(self) -> dict | None:
        """Returns "sem_seg": mIoU, fwIoU, mACC, pACC, and each class's IoU and accuracy, in percent; on rank 0."""
        self._pool.finish()
        results = super().evaluate()
        return results and {"sem_seg": {name: float(value) for name, value in results["sem_seg"].items()}}


def semantic_evaluator(dataset_name: str) -> SemanticEvaluator:
    """Builds the evaluator of mIoU on a panoptic dataset's segments, over all of its classes."""
    label = MetadataCatalog.get(dataset_name).ignore_label
    truths: dict[str, Callable[[], np.ndarray]] = {
        record["file_name"]: partial(segment_classes, record["pan_seg_file_name"], record["segments_info"], label)
        for record in DatasetCatalog.get(dataset_name)
    }
    return SemanticEvaluator(dataset_name, truths)


def scene_parsing_evaluator(dataset_name: str) -> SemanticEvaluator:
    """Builds the evaluator of mIoU on ADE20K's semantic annotations if they are on disk, or else on the segments.

    Thing pixels without an instance are void in the panoptic annotations, and count only in the semantic ones.
    """
    metadata = MetadataCatalog.get(dataset_name)
    images = Path(metadata.image_root)
    folder = images.parents[1] / "annotations" / images.name
    if not folder.is_dir():
        return semantic_evaluator(dataset_name)
    files = [record["file_name"] for record in DatasetCatalog.get(dataset_name)]
    read, label = annotated_classes, metadata.ignore_label
    return SemanticEvaluator(dataset_name, {f: partial(read, f"{folder / Path(f).stem}.png", label) for f in files})
