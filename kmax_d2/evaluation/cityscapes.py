"""Evaluates instance AP and semantic IoU with cityscapesscripts, image by image, while the model goes on.

cityscapesscripts is imported only to evaluate Cityscapes. Its functions are called as its own scripts call them.
"""

import contextlib
import copy
import io
import itertools
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from PIL import Image

from ..errors import UserError
from .output import archive, compact, empty_folder
from .pool import EvaluationPool
from .rle import encode_masks
from .semantic import class_map


@contextlib.contextmanager
def _errors_of_script() -> Iterator[None]:
    """Turns what cityscapesscripts prints before it ends the process into a UserError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except SystemExit as error:
        raise UserError(f"cityscapesscripts: {printed.getvalue().strip()}") from error
    except AttributeError as error:
        if "in1d" not in str(error):
            raise
        raise UserError("this cityscapesscripts needs an older NumPy: run `pip install 'numpy<2.4'`") from error


class CityscapesEvaluator(DatasetEvaluator):
    """The common part of the two evaluators.

    Args:
        dataset_name: with "gt_dir", the folder of the cities, in its metadata; without, predictions are only written.
        folder: where to keep predictions as the server takes them, with a zip file beside it; None keeps none.
    """

    truth_suffix = ""  # of the ground truth's files

    def __init__(self, dataset_name: str, folder: Path | None = None):
        metadata = MetadataCatalog.get(dataset_name)
        self.names = metadata.stuff_classes
        self.truth_folder = metadata.get("gt_dir")
        self.folder = folder

    def reset(self) -> None:
        """Forgets all predictions, those in the folder too."""
        self.results: list = []  # of each image, from another process
        self.pool = EvaluationPool(self.results.append)
        empty_folder(self.folder)

    def truth_of(self, image_file: str) -> str | None:
        """Returns the ground truth's file of an image; None without ground truth."""
        if self.truth_folder is None:
            return None
        file = Path(image_file)
        name = file.name.replace("_leftImg8bit", f"_gtFine_{self.truth_suffix}")
        return str(Path(self.truth_folder) / file.parent.name / name)

    def gather(self) -> list | None:
        """Archives predictions and returns all images' results on rank 0; else, or without ground truth, None."""
        self.pool.finish()
        everyone = comm.gather(self.results)
        if not comm.is_main_process():
            return None
        if self.folder is not None:
            archive(self.folder.with_suffix(".zip"), self.folder)
        return None if self.truth_folder is None else list(itertools.chain.from_iterable(everyone))


def match_instances(
    name: str, rles: list[dict], classes: list[str], scores: list[float], truth: str | None, folder: Path | None
) -> dict:
    """Writes an image's instances, a text file and masks, and returns cityscapesscripts' matches with the true ones.

    Each instance has a mask, a class name, and a confidence. `name` is the image's, without suffix; `truth` the file of
    true instance ids, without which nothing is matched; `folder` keeps what is written.
    """
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script
    from cityscapesscripts.helpers.labels import name2label

    with contextlib.nullcontext(folder) if folder else TemporaryDirectory(prefix="kmax_d2_") as kept:
        target, lines = Path(kept), []
        for index, (rle, category, score) in enumerate(zip(rles, classes, scores, strict=True)):
            mask = f"{name}_{index}_{category.replace(' ', '_')}.png"
            Image.fromarray(mask_util.decode(rle) * 255).save(target / mask)
            lines.append(f"{mask} {name2label[category].id} {score}\n")
        text = target / f"{name}_pred.txt"
        text.write_text("".join(lines))
        if truth is None:
            return {}
        args = instance_options()
        args.predictionPath = str(target.absolute())
        with _errors_of_script():
            instances = script.instances2dict([truth])
            return script.matchGtWithPreds([str(text.absolute())], [truth], instances, args)


def instance_options() -> Namespace:
    """Returns the default options of cityscapesscripts' instance evaluation."""
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script

    args = copy.copy(script.args)
    args.quiet = True
    script.setInstanceLabels(args)
    return args


class CityscapesInstanceEvaluator(CityscapesEvaluator):
    """Evaluates AP of Cityscapes' instance-level task."""

    truth_suffix = "instanceIds"

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Submits images; an output's "instances" has masks, scores, and contiguous classes."""
        for record, output in zip(inputs, outputs, strict=True):
            file, found = record["file_name"], output["instances"]
            classes = [self.names[category] for category in found.pred_classes.tolist()]
            instances = encode_masks(found.pred_masks), classes, found.scores.tolist()
            self.pool.submit(match_instances, Path(file).stem, *instances, self.truth_of(file), self.folder)

    def evaluate(self) -> dict | None:
        """Returns "segm": AP, AP50, and each class's AP, in percent, nan for a class without instances; on rank 0."""
        if (results := self.gather()) is None:
            return None
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script

        matches = {file: match for of_image in results for file, match in of_image.items()}
        args = instance_options()
        # Instances of equal confidence are ranked in the order of the images.
        averages = script.computeAverages(script.evaluateMatches(dict(sorted(matches.items())), args), args)
        result = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
        result |= {f"AP-{name}": averages["classes"][name]["ap"] for name in args.instLabels}
        return {"segm": {key: 100 * float(value) for key, value in result.items()}}


def count_pixels(
    classes: np.ndarray, name: str, truth: str | None, folder: Path | None
) -> tuple[np.ndarray, dict] | None:
    """Writes the label ids of contiguous classes (H, W); returns cityscapesscripts' confusion matrix and statistics.

    The statistics are those of instances; the other arguments are as for :func:`match_instances`.
    """
    import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as script
    from cityscapesscripts.helpers.labels import trainId2label

    ids = np.array([trainId2label[index].id for index in range(classes.max() + 1)], dtype=np.uint8)
    with contextlib.nullcontext(folder) if folder else TemporaryDirectory(prefix="kmax_d2_") as target:
        file = Path(target) / f"{name}_pred.png"
        Image.fromarray(ids[classes]).save(file)
        if truth is None:
            return None
        matrix, statistics = script.generateMatrix(script.args), script.generateInstanceStats(script.args)
        with _errors_of_script():
            script.evaluatePair(str(file), truth, matrix, statistics, {}, script.args)
    return matrix, statistics


class CityscapesSemanticEvaluator(CityscapesEvaluator):
    """Evaluates IoU of Cityscapes' pixel-level task."""

    truth_suffix = "labelIds"

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Submits images; :func:`~kmax_d2.evaluation.semantic.class_map` says what an output has."""
        for record, output in zip(inputs, outputs, strict=True):
            file = record["file_name"]
            classes = compact(class_map(output), len(self.names))
            self.pool.submit(count_pixels, classes, Path(file).stem, self.truth_of(file), self.folder)

    def evaluate(self) -> dict | None:
        """Returns "sem_seg": mIoU (and IoU), iIoU, both of categories (_sup), each class's IoU; percent, on rank 0."""
        if (results := self.gather()) is None:
            return None
        import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as script
        from cityscapesscripts.helpers.labels import category2labels, id2label

        args = script.args
        matrix, statistics = script.generateMatrix(args), script.generateInstanceStats(args)
        for of_image, instances in results:
            matrix += of_image
            for group, members in instances.items():
                for member, numbers in members.items():
                    for number in ("tp", "fn", "tpWeighted", "fnWeighted"):
                        statistics[group][member][number] += numbers[number]
        counts = matrix, statistics, args
        labels = {id2label[label].name: label for label in args.evalLabels}
        scores = {
            "IoU": {name: script.getIouScoreForLabel(label, matrix, args) for name, label in labels.items()},
            "iIoU": {name: script.getInstanceIouScoreForLabel(label, *counts) for name, label in labels.items()},
            "IoU_sup": {name: script.getIouScoreForCategory(name, matrix, args) for name in category2labels},
            "iIoU_sup": {name: script.getInstanceIouScoreForCategory(name, *counts) for name in category2labels},
        }
        averages = {kind: script.getScoreAverage(of_kind, args) for kind, of_kind in scores.items()}
        result = {"mIoU": averages["IoU"]} | averages
        result |= {f"IoU-{name}": scores["IoU"][name] for name in self.names}
        return {"sem_seg": {key: 100 * float(value) for key, value in result.items()}}
