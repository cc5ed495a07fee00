"""Semantic mIoU of a panoptic dataset: the classes of its segments, crowds included."""

from __future__ import annotations

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.evaluation import SemSegEvaluator
from panopticapi.utils import rgb2id


class SemanticGroundTruth:
    """Reads class maps from panoptic PNGs; called as Detectron2's evaluator calls its loading function.

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


def semantic_evaluator(dataset_name: str, output_dir: str) -> SemSegEvaluator:
    """Detectron2's semantic evaluator on the segments of a panoptic dataset, over all its classes."""
    name = f"{dataset_name}_semantic"
    metadata = MetadataCatalog.get(dataset_name)
    records = DatasetCatalog.get(dataset_name)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(
        name, lambda: [record | {"sem_seg_file_name": record["pan_seg_file_name"]} for record in records]
    )
    all_ids = {**metadata.thing_dataset_id_to_contiguous_id, **metadata.stuff_dataset_id_to_contiguous_id}
    MetadataCatalog.get(name).set(
        stuff_classes=metadata.stuff_classes,
        stuff_dataset_id_to_contiguous_id=all_ids,
        ignore_label=metadata.ignore_label,
    )
    loader = SemanticGroundTruth(records, metadata.ignore_label)
    return SemSegEvaluator(name, output_dir=output_dir, sem_seg_loading_fn=loader)
