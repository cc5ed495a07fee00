"""Panoptic quality by panopticapi, image by image beside the model."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.panoptic_evaluation import _print_panoptic_results
from detectron2.utils import comm
from panopticapi.evaluation import PQStat, pq_compute_single_core
from panopticapi.utils import id2rgb
from PIL import Image

from ..data.datasets.coco_panoptic import read_json
from ..errors import UserError
from . import files
from .background import Background

logger = logging.getLogger(__name__)

PARTS = {"All": None, "Things": True, "Stuff": False}
SUFFIX = {"All": "", "Things": "_th", "Stuff": "_st"}


def evaluate_image(
    ids: np.ndarray, prediction: dict, truth: dict | None, truth_folder: str, folder: Path | None, categories: dict
) -> tuple[dict, PQStat | None]:
    """Writes one image's PNG and counts its matches as panopticapi does.

    Args:
        ids: (H, W) predicted segment ids.
        prediction, truth: its entries of the two JSONs; without truth nothing is counted.
        truth_folder: of the true PNG.
        folder: for the PNG; None for one that is deleted.
        categories: the true JSON's, by id.

    Returns:
        `prediction`, and for each category the sum of IoUs and the true and false positives and false negatives.
    """
    with files.target(folder) as target:
        Image.fromarray(id2rgb(ids.astype(np.uint32))).save(target / prediction["file_name"])
        if truth is None:
            return prediction, None
        with contextlib.redirect_stdout(io.StringIO()):
            return prediction, pq_compute_single_core(0, [(truth, prediction)], truth_folder, str(target), categories)


class PanopticEvaluator(DatasetEvaluator):
    """As Detectron2's COCOPanopticEvaluator, but no more predictions are in memory than there are processes for.

    All ranks count their own images, on all cores; the sums do not depend on how many there are.

    Args:
        dataset_name: with "panoptic_json" and "panoptic_root" in its metadata; without, predictions are only written.
        folder: for COCO's result format, `<name>.json`, `<name>/` and `<name>.zip`; None keeps nothing.
        name: of these.
    """

    def __init__(self, dataset_name: str, folder: Path | None = None, name: str = ""):
        metadata = MetadataCatalog.get(dataset_name)
        self.dataset_id = {
            contiguous: id_
            for ids in (metadata.thing_dataset_id_to_contiguous_id, metadata.stuff_dataset_id_to_contiguous_id)
            for id_, contiguous in ids.items()
        }
        self.json_file, self.root = metadata.get("panoptic_json"), metadata.get("panoptic_root", "")
        self.names = metadata.stuff_classes
        self.folder, self.name = folder, name
        self.truth: dict | None = None
        if self.json_file is not None:
            content = read_json(self.json_file)
            self.categories = {category["id"]: category for category in content["categories"]}
            self.truth = {annotation["image_id"]: annotation for annotation in content["annotations"]}
            self._check()

    def _check(self) -> None:
        needed = {"id", "category_id", "area", "iscrowd"}
        for annotation in self.truth.values():
            for segment in annotation["segments_info"]:
                if not needed <= segment.keys():
                    missing = " and no ".join(sorted(needed - segment.keys()))
                    raise UserError(
                        f"{self.json_file}: a segment of {annotation['file_name']} has no {missing}, which PQ needs"
                    )

    def reset(self) -> None:
        self.predictions: list[dict] = []
        self.counts: dict[object, PQStat] = {}
        self.background = Background(self._collect)
        if self.folder is not None:
            files.start(self.folder / self.name)

    def _collect(self, result: tuple[dict, PQStat | None]) -> None:
        prediction, counts = result
        if counts is not None:
            self.counts[prediction["image_id"]] = counts
        if self.folder is not None:
            segments = [{key: segment[key] for key in ("id", "category_id")} for segment in prediction["segments_info"]]
            self.predictions.append(prediction | {"segments_info": segments})

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Detectron2's interface; an output's "panoptic_seg" is an id map (H, W), 0 for void, and its segments."""
        for record, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            prediction = {
                "image_id": record["image_id"],
                "file_name": f"{Path(record['file_name']).stem}.png",
                "segments_info": [
                    {"id": segment["id"], "category_id": self.dataset_id[segment["category_id"]]}
                    for segment in segments
                ],
            }
            truth = None
            if self.truth is not None:
                truth = self.truth.get(record["image_id"])
                if truth is None:
                    raise UserError(f"{self.json_file} has no annotation for the image {record['file_name']}")
            folder = None if self.folder is None else self.folder / self.name
            categories = {} if truth is None else self.categories
            largest = max((segment["id"] for segment in segments), default=0)
            self.background.submit(
                evaluate_image, files.narrow(ids, largest), prediction, truth, self.root, folder, categories
            )

    def evaluate(self) -> dict | None:
        """ "panoptic_seg" with PQ, SQ and RQ of all classes, things (_th) and stuff (_st), in percent; rank 0 only.

        A mean over no class is nan. Raises UserError where an annotated image has no prediction.
        """
        self.background.finish()
        everyone = comm.gather((self.predictions, self.counts))
        if not comm.is_main_process():
            return None
        if self.folder is not None:
            self._write([prediction for predictions, _ in everyone for prediction in predictions])
        if self.truth is None:
            logger.info("there is no ground truth: predictions are only written")
            return None
        counts = dict(itertools.chain.from_iterable(counts.items() for _, counts in everyone))
        total = PQStat()
        for image_id, truth in self.truth.items():
            if image_id not in counts:
                raise UserError(f"no prediction for the image {image_id} ({truth['file_name']}) of {self.json_file}")
            total += counts[image_id]
        averages = {part: self._average(total, isthing) for part, isthing in PARTS.items()}
        _print_panoptic_results(averages)
        result = {
            f"{key.upper()}{SUFFIX[part]}": 100 * averages[part][key] for part in PARTS for key in ("pq", "sq", "rq")
        }
        return {"panoptic_seg": result}

    def _average(self, total: PQStat, isthing: bool | None) -> dict:
        try:
            return total.pq_average(self.categories, isthing)[0]
        except ZeroDivisionError:  # panopticapi's, where there is no such class
            return {"pq": float("nan"), "sq": float("nan"), "rq": float("nan"), "n": 0}

    def _write(self, predictions: list[dict]) -> None:
        predictions.sort(key=lambda prediction: prediction["image_id"])
        names = [prediction["file_name"] for prediction in predictions]
        if len(set(names)) < len(names):
            raise UserError(
                f"two images have the name {max(names, key=names.count)}, so that one's prediction is lost; "
                "give the images names of their own to save predictions"
            )
        json_file = self.folder / f"{self.name}.json"
        categories = [{"id": id_, "name": self.names[index]} for index, id_ in sorted(self.dataset_id.items())]
        json_file.write_text(json.dumps({"annotations": predictions, "categories": categories}))
        archived = self.folder / f"{self.name}.zip"
        files.archive(archived, json_file, self.folder / self.name)
        logger.info("predictions of %d images are in %s", len(predictions), archived)
