"""Instance AP and semantic IoU by cityscapesscripts, image by image beside the model.

cityscapesscripts is imported only where Cityscapes is evaluated. Its functions for one image and for the end are called
as its own scripts call them.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from PIL import Image

from ..errors import UserError
from . import files
from .background import Background
from .rle import encode_masks
from .semantic import largest_class


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What cityscapesscripts prints before it ends the process, as a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except SystemExit as error:
        raise UserError(f"cityscapesscripts: {said.getvalue().strip()}") from error


def require_cityscapesscripts() -> None:
    """Raises UserError where cityscapesscripts is not installed."""
    try:
        import cityscapesscripts  # noqa: F401
    except ImportError as error:
        raise UserError("evaluating Cityscapes needs cityscapesscripts: run `pip install cityscapesscripts`") from error


class CityscapesEvaluator(DatasetEvaluator):
    """What the two evaluators share.

    Args:
        dataset_name: with "gt_dir", the folder of the cities, in its metadata; without, predictions are only written.
        folder: where predictions are kept as the server takes them, and a zip file of them beside it; None keeps none.
    """

    kind = ""  # of the ground truth's files

    def __init__(self, dataset_name: str, folder: Path | None = None):
        require_cityscapesscripts()
        metadata = MetadataCatalog.get(dataset_name)
        self.names = metadata.stuff_classes
        self.truth_folder = metadata.get("gt_dir")
        self.folder = folder

    def reset(self) -> None:
        self.background = Background(self.collect)
        files.start(self.folder)

    def collect(self, result: object) -> None:
        """Takes the result of one image."""
        raise NotImplementedError

    def truth_of(self, image_file: str) -> str | None:
        """The ground truth's file for that of an image; None where there is none."""
        if self.truth_folder is None:
            return None
        file = Path(image_file)
        name = file.name.replace("_leftImg8bit", f"_gtFine_{self.kind}")
        return str(Path(self.truth_folder) / file.parent.name / name)

    def gather(self, counted: object) -> list | None:
        """What every rank has counted, on rank 0, once predictions are written; None elsewhere and without truth."""
        everyone = comm.gather(counted)
        if not comm.is_main_process():
            return None
        if self.folder is not None:
            files.archive(self.folder.with_suffix(".zip"), self.folder)
        return None if self.truth_folder is None else everyone


def match_instances(
    name: str, rles: list[dict], classes: list[str], scores: list[float], truth: str | None, folder: Path | None
) -> dict:
    """Writes one image's instances and matches them with the true ones as cityscapesscripts does.

    Args:
        name: of the image, without suffix.
        rles, classes, scores: of each instance, mask, class name and confidence.
        truth: the file of true instance ids; without it nothing is matched.
        folder: for the text file and the masks; None for one that is deleted.
    """
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script
    from cityscapesscripts.helpers.labels import name2label

    with files.target(folder) as target:
        lines = []
        for index, (rle, category, score) in enumerate(zip(rles, classes, scores, strict=True)):
            mask = f"{name}_{index}_{category.replace(' ', '_')}.png"
            Image.fromarray(mask_util.decode(rle) * 255).save(target / mask)
            lines.append(f"{mask} {name2label[category].id} {score}\n")
        text = target / f"{name}_pred.txt"
        text.write_text("".join(lines))
        if truth is None:
            return {}
        args = instance_arguments()
        args.predictionPath = str(target.absolute())
        with _told():
            instances = script.instances2dict([truth])
            return script.matchGtWithPreds([str(text.absolute())], [truth], instances, args)


def instance_arguments() -> object:
    """The options of cityscapesscripts' instance evaluation, its defaults."""
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script

    args = copy.copy(script.args)
    args.quiet = True
    script.setInstanceLabels(args)
    return args


class CityscapesInstanceEvaluator(CityscapesEvaluator):
    """AP of Cityscapes' instance task."""

    kind = "instanceIds"

    def reset(self) -> None:
        super().reset()
        self.matches: dict[str, dict] = {}

    def collect(self, result: dict) -> None:
        self.matches |= result

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Detectron2's interface; an output's "instances" has masks, scores and contiguous classes."""
        for record, output in zip(inputs, outputs, strict=True):
            found = output["instances"]
            self.background.submit(
                match_instances,
                Path(record["file_name"]).stem,
                encode_masks(found.pred_masks),
                [self.names[category] for category in found.pred_classes.tolist()],
                found.scores.tolist(),
                self.truth_of(record["file_name"]),
                self.folder,
            )

    def evaluate(self) -> dict | None:
        """ "segm" with AP, AP50 and each class's AP, in percent; rank 0 only. A class without instances has nan."""
        self.background.finish()
        everyone = self.gather(self.matches)
        if everyone is None:
            return None
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script

        matches = {file: match for matches in everyone for file, match in matches.items()}
        args = instance_arguments()
        # Equal confidences are ranked in the order of the images.
        ap = script.evaluateMatches(dict(sorted(matches.items())), args)
        averages = script.computeAverages(ap, args)
        result = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
        result |= {f"AP-{name}": averages["classes"][name]["ap"] for name in args.instLabels}
        return {"segm": {key: 100 * float(value) for key, value in result.items()}}


def count_pixels(
    classes: np.ndarray, name: str, truth: str | None, folder: Path | None
) -> tuple[np.ndarray, dict] | None:
    """Writes one image's map of label ids and counts its pixels as cityscapesscripts does.

    Args:
        classes: (H, W) contiguous classes.
        name: of the image, without suffix.
        truth: the file of true label ids; without it nothing is counted.
        folder: for the PNG; None for one that is deleted.

    Returns:
        The confusion matrix and the statistics of instances.
    """
    import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as script
    from cityscapesscripts.helpers.labels import trainId2label

    ids = np.array([trainId2label[index].id for index in range(classes.max() + 1)], dtype=np.uint8)
    with files.target(folder) as target:
        file = target / f"{name}_pred.png"
        Image.fromarray(ids[classes]).save(file)
        if truth is None:
            return None
        matrix, statistics = script.generateMatrix(script.args), script.generateInstanceStats(script.args)
        with _told():
            script.evaluatePair(str(file), truth, matrix, statistics, {}, script.args)
    return matrix, statistics


class CityscapesSemanticEvaluator(CityscapesEvaluator):
    """IoU of Cityscapes' pixel-level task."""

    kind = "labelIds"

    def reset(self) -> None:
        super().reset()
        self.matrix: np.ndarray | int = 0
        self.instances: Counter = Counter()

    def collect(self, result: tuple[np.ndarray, dict] | None) -> None:
        if result is None:
            return
        matrix, statistics = result
        self.matrix = self.matrix + matrix
        for group, members in statistics.items():
            for member, numbers in members.items():
                for number in ("tp", "fn", "tpWeighted", "fnWeighted"):
                    self.instances[group, member, number] += numbers[number]

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Detectron2's interface; an output's "sem_seg" (K, H, W) has the class as its largest entry."""
        for record, output in zip(inputs, outputs, strict=True):
            file = record["file_name"]
            classes = files.narrow(largest_class(output["sem_seg"]), len(self.names))
            self.background.submit(count_pixels, classes, Path(file).stem, self.truth_of(file), self.folder)

    def evaluate(self) -> dict | None:
        """ "sem_seg" with mIoU (also IoU), iIoU, those of the categories (_sup), and each class's IoU, in percent.

        Rank 0 only.
        """
        self.background.finish()
        everyone = self.gather((self.matrix, self.instances))
        if everyone is None:
            return None
        import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as script
        from cityscapesscripts.helpers.labels import category2labels, id2label

        args = script.args
        matrix = script.generateMatrix(args) + sum(matrix for matrix, _ in everyone)
        statistics = script.generateInstanceStats(args)
        for _, instances in everyone:
            for (group, member, number), value in instances.items():
                statistics[group][member][number] += value
        labels = {id2label[label].name: label for label in args.evalLabels}
        scores = {
            "IoU": {name: script.getIouScoreForLabel(label, matrix, args) for name, label in labels.items()},
            "iIoU": {
                name: script.getInstanceIouScoreForLabel(label, matrix, statistics, args)
                for name, label in labels.items()
            },
            "IoU_sup": {name: script.getIouScoreForCategory(name, matrix, args) for name in category2labels},
            "iIoU_sup": {
                name: script.getInstanceIouScoreForCategory(name, matrix, statistics, args) for name in category2labels
            },
        }
        averages = {kind: script.getScoreAverage(of_kind, args) for kind, of_kind in scores.items()}
        result = {"mIoU": averages["IoU"]} | averages
        result |= {f"IoU-{name}": scores["IoU"][name] for name in self.names}
        return {"sem_seg": {key: 100 * float(value) for key, value in result.items()}}
