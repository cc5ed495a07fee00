"""The results of an evaluation as files and as a table of all classes."""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from tabulate import tabulate

from ..data.datasets.coco_panoptic import things_of
from ..files import whole_file, write_json
from .panoptic import PanopticEvaluator
from .panoptic_quality import SCORES, quality_row

logger = logging.getLogger(__name__)


class FiledEvaluators(DatasetEvaluators):
    """Runs several evaluators of a dataset, and writes their results to a folder.

    `results.json` has the scores by task, in percent, `classes.csv` the panoptic scores, the counts of segments, and
    the semantic IoU of each class. What does not exist, such as the PQ of a class without objects, is left out.
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
        if results:  # else this is another rank, or there is no ground truth
            write_json(self.folder / "results.json", results, indent=2)
        if "panoptic_seg" in results:
            panoptic = next(evaluator for evaluator in self._evaluators if isinstance(evaluator, PanopticEvaluator))
            self._write_classes(panoptic, results.get("sem_seg", {}))
        return results

    def _write_classes(self, panoptic: PanopticEvaluator, semantic: dict[str, float]) -> None:
        things, names = things_of(self.metadata), self.metadata.stuff_classes
        rows = [
            (name, "thing" if index in things else "stuff", *scores, semantic.get(f"IoU-{name}"))
            for index, name in enumerate(names)
            for scores in [quality_row(panoptic.counts_of_class, [index])]
        ]
        columns = ["class", "kind", *SCORES, "IoU"]
        file = self.folder / "classes.csv"
        with whole_file(file) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([columns, *rows])
        found = sorted((row for row in rows if row[2] is not None), key=lambda row: -row[2])
        table = tabulate(found, columns, tablefmt="pipe", floatfmt=".1f")
        logger.info("classes that occur, best first, also in %s:\n%s", file, table)
