"""The evaluators of a dataset, by its `evaluator_type`."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluators

from ..errors import UserError
from .instance import instance_evaluator
from .semantic import semantic_evaluator


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluators:
    """Detectron2's evaluators for the results that the config asks for, which all look at the same forward pass.

    Args:
        cfg: the config; MODEL.KMAX.TEST says which results are on.
        dataset_name: a dataset in COCO panoptic format.
        output_dir: where predictions are written.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind != "coco_panoptic_seg":
        raise UserError(f"there is no evaluator for {dataset_name}, whose evaluator_type is {kind}")
    test = cfg.MODEL.KMAX.TEST
    evaluators = []
    if test.PANOPTIC_ON:
        evaluators.append(COCOPanopticEvaluator(dataset_name, output_dir))
    if test.INSTANCE_ON:
        evaluators.append(instance_evaluator(dataset_name, output_dir))
    if test.SEMANTIC_ON:
        evaluators.append(semantic_evaluator(dataset_name, output_dir))
    return DatasetEvaluators(evaluators)
