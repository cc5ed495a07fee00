"""Builds the evaluators of a dataset by its `evaluator_type`."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import verify_results

from ..data.datasets.coco_panoptic import things_of
from ..errors import UserError, optional_package
from ..files import own_folder
from .cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from .instance import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .result_files import FiledEvaluators
from .semantic import SemanticEvaluator

EVALUATOR_TYPES = ("coco_panoptic_seg", "cityscapes_panoptic_seg", "ade20k_panoptic_seg")


def require_evaluation(cfg: CfgNode, dataset_name: str) -> None:
    """Raises UserError if the results that the config asks for cannot be evaluated on a dataset, before there are any.

    No evaluator serves the dataset, its package is missing, there is neither ground truth nor a folder to save to, or
    that folder has other files.
    """
    metadata, test = MetadataCatalog.get(dataset_name), cfg.MODEL.KMAX.TEST
    kind = metadata.get("evaluator_type")
    if kind not in EVALUATOR_TYPES:
        raise UserError(f"there is no evaluator for {dataset_name}, whose evaluator_type is {kind}")
    if test.SAVE_PREDICTIONS:
        own_folder(Path(test.SAVE_PREDICTIONS) / dataset_name)
    elif metadata.get("panoptic_json") is None:
        raise UserError(f"{dataset_name} has no ground truth: --save-predictions DIR writes what its server takes")
    if kind == "cityscapes_panoptic_seg" and (test.INSTANCE_ON or test.SEMANTIC_ON):
        optional_package("cityscapesscripts", "cityscapes")


def evaluated_dataset(cfg: CfgNode) -> str:
    """Returns the name of a config's test dataset, the first of several. Raises UserError if it has no ground truth."""
    name = next(iter(cfg.DATASETS.TEST), None)
    if name is None or MetadataCatalog.get(name).get("panoptic_json") is None:
        raise UserError(f"{name or 'the config'} has no ground truth: set DATASETS.TEST, or use --test-data")
    return name


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> FiledEvaluators:
    """Builds the evaluators of the results that the config asks for, all from one forward pass.

    Raises UserError as :func:`require_evaluation` does.

    Args:
        cfg: MODEL.KMAX.TEST says which results are on, and where to save predictions, if at all.
        dataset_name: a panoptic dataset. Without ground truth ("panoptic_json" in its metadata) its predictions are
            only saved.
        output_dir: where the evaluators write; see :class:`~kmax_d2.evaluation.result_files.FiledEvaluators`.
    """
    require_evaluation(cfg, dataset_name)
    metadata, test = MetadataCatalog.get(dataset_name), cfg.MODEL.KMAX.TEST
    kind = metadata.evaluator_type
    saved = Path(test.SAVE_PREDICTIONS) / dataset_name if test.SAVE_PREDICTIONS else None
    has_truth = metadata.get("panoptic_json") is not None
    evaluators = []
    cityscapes = kind == "cityscapes_panoptic_seg"
    if test.PANOPTIC_ON:
        evaluators.append(PanopticEvaluator(dataset_name, saved, submission_name(dataset_name)))
    if cityscapes and test.INSTANCE_ON:
        evaluators.append(CityscapesInstanceEvaluator(dataset_name, saved and saved / "instance"))
    elif test.INSTANCE_ON and has_truth and things_of(metadata):
        evaluators.append(InstanceEvaluator(dataset_name, output_dir))
    if cityscapes and test.SEMANTIC_ON:
        evaluators.append(CityscapesSemanticEvaluator(dataset_name, saved and saved / "semantic"))
    elif test.SEMANTIC_ON and has_truth:
        evaluators.append(SemanticEvaluator(dataset_name))
    return FiledEvaluators(dataset_name, evaluators, Path(output_dir))


def verify(cfg: CfgNode, results: dict) -> None:
    """Compares results with TEST.EXPECTED_RESULTS as Detectron2 does, which ends the process if they differ.

    Of several test sets, a task is "NAME/TASK", or that of the first one. Raises UserError for a task without results.
    """
    names = cfg.DATASETS.TEST
    if not cfg.TEST.EXPECTED_RESULTS:
        return
    if len(names) > 1:
        tasks = {f"{name}/{task}": scores for name, of_set in results.items() for task, scores in of_set.items()}
        results = results.get(names[0], {}) | tasks
    for task, *_ in cfg.TEST.EXPECTED_RESULTS:
        if task not in results:
            raise UserError(f"TEST.EXPECTED_RESULTS has the task {task}, but there are {', '.join(results) or 'none'}")
    verify_results(cfg, results)


def submission_name(dataset_name: str) -> str:
    """Returns the name, without suffix, under which a server expects the panoptic results.

    COCO's expects `panoptic_<test set>_<algorithm>_results`, with the test set's name as in its JSON file; Cityscapes'
    script looks for the name of the ground truth's JSON file, `cityscapes_panoptic_<split>`.
    """
    metadata = MetadataCatalog.get(dataset_name)
    json_file = metadata.get("panoptic_json")
    stem = Path(json_file).stem if json_file else metadata.server_name
    if metadata.evaluator_type == "cityscapes_panoptic_seg":
        return stem
    return f"panoptic_{stem.removeprefix('panoptic_')}_kmax_results"
