"""Writes an HTML page that shows what is wrong with a model: by class, size, and score, and in pictures.

python -m kmax_d2.tools.report --config-file FILE [--weights FILE] --output DIR [--compare FILE] [NAME VALUE ...]

DIR/report.html has everything in it and opens in any browser. The dataset is the config's, or --test-data. With
--compare, a second model stands beside the first, with the difference by class and a 95% interval of it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..command_line import ConfigParser, run_program, whole

PARSER = ConfigParser(__doc__, weights=True, data=True, overwrite=True)
PARSER.add_argument("--output", required=True, type=Path, metavar="DIR", help="for report.html")
PARSER.add_argument("--compare", metavar="FILE", help="weights of a second model")
PARSER.add_argument("--compare-config", metavar="FILE", help="its config, unless it is the same")
PARSER.add_argument(
    "--pictures", type=whole("--pictures", 0), default=20, metavar="N", help="of images and of errors (%(default)s)"
)

PARSER.parse_if_main(__name__)

import heapq

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from ..data import panoptic_png
from ..data.datasets.coco_panoptic import things_of
from ..data.mapper import read_image
from ..engine import Trainer
from ..errors import UserError
from ..evaluation import evaluated_dataset
from ..evaluation.analysis import pair_image
from ..evaluation.output import compact
from ..evaluation.panoptic_quality import Pair, count_pairs, quality_row
from ..evaluation.pool import EvaluationPool
from ..evaluation.report_page import report_page
from ..files import require_own, write_text
from ..inference.predictor import Predictor, predictor_config
from ..visualization import draw_panoptic

SIDE = 384  # pixels of the short side of a picture, at which labels are readable
PAGE_SCALE = 0.75  # of pictures on the page
OUTLINE = (255, 0, 255)


def configs(args: argparse.Namespace) -> list[CfgNode]:
    """Returns the configs of one or two models. Raises UserError if they have different datasets."""
    if args.compare_config and not args.compare:
        raise UserError("--compare-config needs --compare, the weights of the second model")
    found = [predictor_config(args.config_file, args.opts)]
    if args.compare:
        second = args.compare_config or args.config_file
        found.append(predictor_config(second, [*args.opts, "MODEL.WEIGHTS", args.compare]))
        if len({evaluated_dataset(cfg) for cfg in found}) > 1:
            raise UserError(f"{args.config_file} and {second} have different test datasets")
    return found


def segment(predict: Predictor, inputs: dict) -> tuple[np.ndarray, list[dict]]:
    """Returns segment ids (H, W), 0 for void, and the segments with contiguous classes."""
    ids, segments = predict.segment([inputs])[0]["panoptic_seg"]
    return compact(ids, max((segment["id"] for segment in segments), default=0)), segments


def pair_all(predict: Predictor, dataset: str) -> list[list[Pair]]:
    """Predicts the images of a dataset, one after the other, and returns the paired segments of each."""
    images: list[list[Pair]] = []
    pool = EvaluationPool(images.append)
    for (record,) in tqdm(Trainer.build_test_loader(predict.cfg, dataset), "predicting", unit="image"):
        truth = record["pan_seg_file_name"], record["segments_info"]
        pool.submit(pair_image, *segment(predict, record), *truth)
    pool.finish()
    return images


def draw(record: dict, models: Sequence[Predictor], error: Pair | None) -> list[np.ndarray]:
    """Draws the image, the truth, and the predictions, each (H, W, 3) uint8, RGB; an error's segment is outlined."""
    image, metadata = read_image(record), models[0].metadata
    scale = SIDE / min(image.shape[:2])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    things = things_of(metadata)  # which the records of Cityscapes do not say
    truth = [s | {"isthing": s["category_id"] in things} for s in record["segments_info"] if not s.get("iscrowd")]
    maps = [(panoptic_png.read(record["pan_seg_file_name"]), truth)]
    maps += [segment(model, model.mapper(record)) for model in models]
    resized = [cv2.resize(ids.astype(np.int32), size, interpolation=cv2.INTER_NEAREST) for ids, _ in maps]
    pictures = [image]
    for ids, (_, segments) in zip(resized, maps, strict=True):
        pictures.append(draw_panoptic(image, ids, segments, metadata))
    if error:
        mask = resized[0] == error.true["id"] if error.true else resized[1] == error.predicted["id"]
        outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        pictures = [cv2.drawContours(np.ascontiguousarray(picture), outline, -1, OUTLINE, 3) for picture in pictures]
    return [cv2.resize(p, None, fx=PAGE_SCALE, fy=PAGE_SCALE, interpolation=cv2.INTER_AREA) for p in pictures]


def describe(error: Pair, names: Sequence[str]) -> str:
    """Returns what is wrong with a segment, in words."""
    true, predicted = (s and names[s["category_id"]] for s in (error.true, error.predicted))
    if error.true is None:
        return f"invented {predicted}, score {error.predicted['score']:.2f}"
    return f"{true} taken for {predicted}, IoU {error.iou:.2f}" if predicted else f"missed {true}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    file = args.output / "report.html"
    require_own([file], args.overwrite)
    cfgs = configs(args)
    dataset = evaluated_dataset(cfgs[0])
    models = [Predictor(cfg) for cfg in cfgs]
    found = [pair_all(model, dataset) for model in models]
    records = DatasetCatalog.get(dataset)
    counts = [count_pairs(pairs) for pairs in found[0]]
    qualities = [quality_row(of_image, of_image)[0] for of_image in counts]
    images = [index for index, quality in enumerate(qualities) if quality is not None]
    errors = [(index, pair) for index, pairs in enumerate(found[0]) for pair in pairs if pair.is_error]
    worst = heapq.nsmallest(args.pictures, images, key=qualities.__getitem__)
    largest = heapq.nlargest(args.pictures, errors, key=lambda error: (error[1].true or error[1].predicted)["area"])
    chosen: list[tuple[int, Pair | None, str]] = [(index, None, f"PQ {qualities[index]:.1f}") for index in worst]
    chosen += [(index, error, describe(error, models[0].class_names)) for index, error in largest]
    pictures = []
    for index, error, text in tqdm(chosen, "drawing", unit="picture"):
        title = f"{Path(records[index]['file_name']).name}: {text}"
        pictures.append((title, draw(records[index], models, error)))
    names = [f"{letter}: {cfg.MODEL.WEIGHTS}" for letter, cfg in zip("AB", cfgs, strict=False)]
    sections = {"Worst images": pictures[: len(worst)], "Largest errors": pictures[len(worst) :]}
    title = f"{args.config_file} on the {len(records)} images of {dataset}"
    page = report_page(title, models[0].metadata, dict(zip(names, found, strict=True)), sections)
    write_text(file, page)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    run_program(main)
