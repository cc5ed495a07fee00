"""The results of an evaluation as files and as a table of all classes."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from tabulate import tabulate

from ..files import whole_file, write_json
from .panoptic import PanopticEvaluator
from .panoptic_quality import class_quality

logger = logging.getLogger(__name__)

COLUMNS = ("class", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN", "IoU")


class FiledEvaluators(DatasetEvaluators):
    """Runs several evaluators, and writes their results to a folder.

    `results.json` has the scores by task, in percent; `classes.csv` has a row for each class: PQ, SQ, and RQ in
    percent, the segments that are true positives, false positives, and false negatives, and the semantic IoU. What
    does not exist, such as the PQ of a class without objects, is left out of the one and empty in the other.

    Args:
        dataset_name: of which the metadata has the names of the classes.
        evaluators: those to run.
        folder: where to write.
    """

    def __init__(self, dataset_name: str, evaluators: Sequence[DatasetEvaluator], folder: Path):
        super().__init__(evaluators)
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder = folder

    def evaluate(self) -> dict:
        """Returns the finite scores of each task by name, and writes them, on rank 0."""
        results = {
            task: {name: float(score) for name, score in scores.items() if math.isfinite(score)}
            for task, scores in super().evaluate().items()
        }
        if not comm.is_main_process() or not results:
            return results
        write_json(self.folder / "results.json", results, indent=2)
        for evaluator in self._evaluators:
            if isinstance(evaluator, PanopticEvaluator):
                self._write_classes(evaluator, results.get("sem_seg", {}))
        return results

    def _write_classes(self, panoptic: PanopticEvaluator, semantic: dict[str, float]) -> None:
        things = set(self.metadata.thing_dataset_id_to_contiguous_id.values())
        rows: list[tuple] = []
        for index, name in enumerate(self.metadata.stuff_classes):
            counts = panoptic.counts_of_class[index]
            quality = class_quality(counts)
            scores = [100 * score for score in quality] if quality else [None] * 3
            kind = "thing" if index in things else "stuff"
            rows.append((name, kind, *scores, *map(int, counts[1:]), semantic.get(f"IoU-{name}")))
        file = self.folder / "classes.csv"
        with whole_file(file) as unfinished, open(unfinished, "w", newline="") as stream:
            csv.writer(stream).writerows([COLUMNS, *rows])
        found = sorted((row for row in rows if row[2] is not None), key=lambda row: -row[2])
        table = tabulate(found, COLUMNS, tablefmt="pipe", floatfmt=".1f")
        logger.info("classes that occur, best first (all are in %s):\n%s", file, table)
