"""Semantic mIoU: classes of a panoptic dataset's segments, crowds included, or of semantic PNGs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.evaluation import SemSegEvaluator
from panopticapi.utils import rgb2id
from PIL import Image

from . import files
from .background import Background


class SemanticGroundTruth:
    """Reads class maps from panoptic PNGs.

    Args:
        records: the dataset's records.
        ignore_label: class of pixels without a segment.
    """

    def __init__(self, records: list[dict], ignore_label: int):
        self.segments = {record["pan_seg_file_name"]: record["segments_info"] for record in records}
        self.ignore_label = ignore_label

    def __call__(self, file_name: str, dtype: type = int) -> np.ndarray:
        """(H, W) contiguous classes of the PNG's pixels."""
        ids = rgb2id(detection_utils.read_image(file_name, "RGB"))
        classes = {segment["id"]: segment["category_id"] for segment in self.segments[file_name]}
        present, inverse = np.unique(ids, return_inverse=True)
        table = np.array([classes.get(int(id_), self.ignore_label) for id_ in present], dtype=dtype)
        return table[inverse].reshape(ids.shape)


class SceneParsingGroundTruth:
    """Reads ADE20K's semantic annotations, in which 0 is void and the classes count from 1.

    Args:
        ignore_label: class of void.
    """

    def __init__(self, ignore_label: int):
        self.ignore_label = ignore_label

    def __call__(self, file_name: str, dtype: type = int) -> np.ndarray:
        """(H, W) contiguous classes of the PNG's pixels."""
        labels = np.asarray(Image.open(file_name)).astype(dtype)
        return np.where(labels == 0, self.ignore_label, labels - 1)


def confusion(
    classes: np.ndarray, read: Callable[[str], np.ndarray], file_name: str, num_classes: int, ignore_label: int
) -> np.ndarray:
    """(K + 1, K + 1) numbers of pixels by predicted and true class, void last.

    Args:
        classes: (H, W) predicted.
        read: gives the true ones of `file_name`.
        num_classes: K.
        ignore_label: of true void.
    """
    truth = read(file_name)
    truth[truth == ignore_label] = num_classes
    pairs = (num_classes + 1) * classes.astype(np.int64) + truth
    return np.bincount(pairs.ravel(), minlength=(num_classes + 1) ** 2).reshape(num_classes + 1, -1)


def largest_class(sem_seg: torch.Tensor) -> torch.Tensor:
    """(H, W), the argmax of (K, H, W) over the classes, several times as fast on a CPU where K is many."""
    best = sem_seg[0].clone()
    classes = torch.zeros_like(best, dtype=torch.int16)
    for index, scores in enumerate(sem_seg[1:], start=1):
        classes.masked_fill_(scores > best, index)
        torch.maximum(best, scores, out=best)
    return classes


class SemanticEvaluator(SemSegEvaluator):
    """Detectron2's semantic evaluator, which counts beside the model and keeps no predictions.

    Args:
        dataset_name: with a "sem_seg_file_name" in each record.
        truths: for each image's file name what reads its ground truth.
    """

    def __init__(self, dataset_name: str, truths: dict[str, Callable[[str], np.ndarray]]):
        super().__init__(dataset_name)
        self._compute_boundary_iou = False
        self._truths = truths

    def reset(self) -> None:
        super().reset()
        self._background = Background(self._collect)

    def _collect(self, matrix: np.ndarray) -> None:
        self._conf_matrix += matrix

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Detectron2's interface; an output's "sem_seg" (K, H, W) has the class as its largest entry."""
        for record, output in zip(inputs, outputs, strict=True):
            file_name = record["file_name"]
            self._background.submit(
                confusion,
                files.narrow(largest_class(output["sem_seg"]), self._num_classes),
                self._truths[file_name],
                self.input_file_to_gt_file[file_name],
                self._num_classes,
                self._ignore_label,
            )

    def evaluate(self) -> dict | None:
        """ "sem_seg" with mIoU, fwIoU, mACC, pACC and each class's IoU and accuracy, in percent; rank 0 only."""
        self._background.finish()
        return super().evaluate()


def semantic_evaluator(dataset_name: str) -> SemanticEvaluator:
    """mIoU on the segments of a panoptic dataset, over all its classes."""
    records = DatasetCatalog.get(dataset_name)
    label = MetadataCatalog.get(dataset_name).ignore_label
    truths = {record["file_name"]: SemanticGroundTruth([record], label) for record in records}
    pngs = {record["file_name"]: record["pan_seg_file_name"] for record in records}
    return _on(dataset_name, records, pngs, truths)


def scene_parsing_evaluator(dataset_name: str) -> SemanticEvaluator:
    """mIoU on ADE20K's own semantic annotations, where they are on disk; else on the segments.

    The panoptic data have void where a thing is in no instance: its pixels count only in the semantic annotations.
    """
    records = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    images = Path(metadata.image_root)
    folder = images.parents[1] / "annotations" / images.name
    if not folder.is_dir():
        return semantic_evaluator(dataset_name)
    pngs = {record["file_name"]: str(folder / f"{Path(record['file_name']).stem}.png") for record in records}
    read = SceneParsingGroundTruth(metadata.ignore_label)
    return _on(dataset_name, records, pngs, dict.fromkeys(pngs, read))


def _on(dataset_name: str, records: list[dict], pngs: dict[str, str], truths: dict[str, Callable]) -> SemanticEvaluator:
    """The evaluator with these PNGs as ground truth, by a dataset registered for it."""
    name = f"{dataset_name}_semantic"
    metadata = MetadataCatalog.get(dataset_name)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(
        name, lambda: [record | {"sem_seg_file_name": pngs[record["file_name"]]} for record in records]
    )
    MetadataCatalog.get(name).set(stuff_classes=metadata.stuff_classes, ignore_label=metadata.ignore_label)
    return SemanticEvaluator(name, truths)
