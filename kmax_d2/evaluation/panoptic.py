"""Evaluates panoptic quality image by image, while the model goes on."""

import itertools
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate

from ..data import panoptic_png
from ..data.datasets.coco_panoptic import categories_of, read_json, things_of
from ..data.segment_ids import id2rgb
from ..errors import UserError
from .output import archive, compact, empty_folder
from .panoptic_quality import SCORES, count_overlaps, count_pairs, pair_segments, quality_row
from .pool import EvaluationPool

logger = logging.getLogger(__name__)


def evaluate_image(
    ids: np.ndarray, prediction: dict, truth: dict | None, truth_folder: str, folder: Path | None
) -> tuple[dict, dict[int, np.ndarray], int]:
    """Writes predicted ids (H, W) if there is a folder, and matches an image's segments with the true ones if known.

    Takes the image's entries in the two JSON files; returns `prediction`, what :func:`count_pairs` counts, and the
    number of true segments without pixels or with another "area".
    """
    if folder is not None:
        Image.fromarray(id2rgb(ids)).save(folder / prediction["file_name"])
    if truth is None:
        return prediction, {}, 0
    true_ids = panoptic_png.read(str(Path(truth_folder, truth["file_name"])), ids.shape)
    overlaps = count_overlaps(ids, true_ids)
    areas: Counter = Counter()
    for (true_id, _), size in overlaps.items():
        areas[true_id] += size
    wrong = sum(s.get("area") not in (None, areas[s["id"]]) or not areas[s["id"]] for s in truth["segments_info"])
    return prediction, count_pairs(pair_segments(overlaps, prediction["segments_info"], truth["segments_info"])), wrong


class PanopticEvaluator(DatasetEvaluator):
    """Evaluates PQ as panopticapi does, with few predictions in memory.

    Every rank counts its own images on its cores; the sums do not depend on the number of ranks. Raises UserError if
    predictions of two images would have one file.

    Args:
        dataset_name: with "panoptic_json" and "panoptic_root" in its metadata; without, predictions are only written.
        folder: where to write COCO's result format, `<name>.json`, `<name>/`, and `<name>.zip`; None writes nothing.
        name: the name of these files.

    Attributes:
        counts_of_class: the sums of :func:`match_segments` by contiguous class, after the evaluation.
    """

    def __init__(self, dataset_name: str, folder: Path | None = None, name: str = ""):
        self.metadata = metadata = MetadataCatalog.get(dataset_name)
        self.categories = categories_of(metadata)
        self.id_of = [category["id"] for category in self.categories]
        kinds = (metadata.get(f"{k}_dataset_id_to_contiguous_id", {}) for k in ("stuff", "thing"))
        self.id_of_kind = [{index: id_ for id_, index in ids.items()} for ids in kinds]  # of stuff, of things
        self.json_file, self.root = metadata.get("panoptic_json"), metadata.get("panoptic_root", "")
        self.folder, self.name = folder, name
        self.png_folder = None if folder is None else folder / name
        self.truth: dict | None = None
        if self.json_file is not None:
            content = read_json(self.json_file)
            self.categories = content["categories"]
            self.is_thing = {category["id"]: category["isthing"] == 1 for category in self.categories}
            self.truth = {annotation["image_id"]: annotation for annotation in content["annotations"]}
            names = Counter(Path(image["file_name"]).stem for image in content["images"])
            if folder is not None and len(names) < names.total():
                (name, _), *_ = names.most_common(1)
                raise UserError(f"two images of {self.json_file} have the name {name}: to save predictions, rename one")

    def reset(self) -> None:
        """Forgets all predictions, those in the folder too."""
        self.predictions: list[dict] = []
        self.counts: dict[object, dict[int, np.ndarray]] = {}
        self.wrong_areas = 0
        self.pool = EvaluationPool(self._collect)
        empty_folder(self.png_folder)

    def _collect(self, result: tuple[dict, dict[int, np.ndarray], int]) -> None:
        prediction, counts, wrong = result
        self.wrong_areas += wrong
        self.counts[prediction["image_id"]] = counts
        if self.folder is not None:
            self.predictions.append(prediction)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Submits images; an output's "panoptic_seg" is an id map (H, W), 0 for void, and the list of its segments.

        As in Detectron2, the list may be None, with ids of category_id · label_divisor + instance, and -1 for void.
        """
        for record, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            ids = torch.as_tensor(ids)
            if segments is None:
                segments = self._encoded_segments(ids)
                ids = ids + 1
            prediction = {
                "image_id": record["image_id"],
                "file_name": f"{Path(record['file_name']).stem}.png",
                "segments_info": [{"id": s["id"], "category_id": self._category_id(s)} for s in segments],
            }
            truth = None if self.truth is None else self.truth.get(record["image_id"])
            if truth is None and self.truth is not None:
                raise UserError(f"{self.json_file} has no annotation for the image {record['file_name']}")
            compact_ids = compact(ids, max((segment["id"] for segment in segments), default=0))
            self.pool.submit(evaluate_image, compact_ids, prediction, truth, self.root, self.png_folder)

    def _encoded_segments(self, ids: torch.Tensor) -> list[dict]:
        """Returns the segments of a map of category_id · label_divisor + instance, whose ids are by 1 larger."""
        labels, things = ids.unique().tolist(), things_of(self.metadata)
        categories = {label: label // self.metadata.label_divisor for label in labels if label != -1}
        return [{"id": label + 1, "category_id": c, "isthing": c in things} for label, c in categories.items()]

    def _category_id(self, segment: dict) -> int:
        """Returns the JSON's category of a segment; things and stuff may be numbered separately."""
        category, ids = segment["category_id"], self.id_of_kind[bool(segment.get("isthing"))]
        return ids[category] if category in ids else self.id_of[category]

    def evaluate(self) -> dict | None:
        """Returns "panoptic_seg": PQ, SQ, and RQ of all classes, things (_th), and stuff (_st), in percent; on rank 0.

        Things or stuff of which no class occurs are left out. Raises UserError where an annotated image has no
        prediction.
        """
        self.pool.finish()
        everyone = comm.gather((self.predictions, self.counts, self.wrong_areas))
        if not comm.is_main_process():
            return None
        if self.folder is not None:
            self._write(self.folder, [prediction for predictions, *_ in everyone for prediction in predictions])
        if self.truth is None:
            logger.info("there is no ground truth: predictions are only written")
            return None
        if wrong := sum(of_rank[2] for of_rank in everyone):
            logger.warning(
                f"{wrong} segments of {self.json_file} have no pixels or another area than in their PNGs: PQ is of the "
                "PNGs' areas, other programs may trust the JSON (python -m kmax_d2.tools.check_dataset lists them)"
            )
        counts = dict(itertools.chain.from_iterable(counts.items() for _, counts, _ in everyone))
        total: dict[int, np.ndarray] = {}
        for image_id, truth in self.truth.items():
            if image_id not in counts:
                raise UserError(f"no prediction for the image {image_id} ({truth['file_name']}) of {self.json_file}")
            for category, of_image in counts[image_id].items():
                total[category] = total.get(category, 0) + of_image
        if unknown := total.keys() - self.is_thing.keys():
            raise UserError(f"{self.json_file} has no category {min(unknown)}, which the model predicts")
        things, stuff = ([c for c in self.is_thing if self.is_thing[c] == wanted] for wanted in (True, False))
        categories_of_part = {"": self.is_thing, "_th": things, "_st": stuff}
        rows = {suffix: quality_row(total, categories) for suffix, categories in categories_of_part.items()}
        table = [(part, *row) for part, row in zip(("all", "things", "stuff"), rows.values(), strict=True)]
        logger.info(
            "panoptic quality:\n%s", tabulate(table, ["", *SCORES], tablefmt="pipe", floatfmt=".3f", missingval="-")
        )
        self.counts_of_class = {c: total.get(id_, np.zeros(4)) for c, id_ in enumerate(self.id_of)}
        scores = {f"{key}{suffix}": x for suffix, row in rows.items() for key, x in zip(SCORES[:3], row, strict=False)}
        return {"panoptic_seg": {name: score for name, score in scores.items() if score is not None}}

    def _write(self, folder: Path, predictions: list[dict]) -> None:
        predictions.sort(key=lambda prediction: prediction["image_id"])
        json_file, archived = folder / f"{self.name}.json", folder / f"{self.name}.zip"
        categories = [{key: category[key] for key in ("id", "name")} for category in self.categories]
        json_file.write_text(json.dumps({"annotations": predictions, "categories": categories}))
        archive(archived, json_file, folder / self.name)
        logger.info("predictions for %d images are in %s", len(predictions), archived)
