"""Writes an HTML page that shows what is wrong with a model: by class, size, and score, and in pictures.

python -m kmax_d2.tools.report --config-file FILE [--weights FILE] --output DIR [--compare FILE] [NAME VALUE ...]

DIR/report.html has everything in it and opens in any browser. The dataset is the config's, or --test-data. With
--compare, a second model stands beside the first, with the difference by class and a 95% interval of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..command_line import ConfigParser, run_program

PARSER = ConfigParser(__doc__, weights=True, data=True, overwrite=True)
PARSER.add_argument("--output", required=True, type=Path, metavar="DIR", help="for report.html")
PARSER.add_argument("--compare", metavar="FILE", help="weights of a second model")
PARSER.add_argument("--compare-config", metavar="FILE", help="its config, unless it is the same")
PARSER.add_argument("--pictures", type=int, default=20, metavar="N", help="of images and of errors (%(default)s)")

if __name__ == "__main__":
    PARSER.parse()  # answers --help and mistakes before the slow imports

import heapq

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from ..data import panoptic_png
from ..data.mapper import read_image
from ..engine import Trainer
from ..errors import UserError
from ..evaluation import evaluated_dataset
from ..evaluation.analysis import errors_of, image_quality, pair_image
from ..evaluation.output import compact
from ..evaluation.panoptic_quality import Pair
from ..evaluation.pool import EvaluationPool
from ..evaluation.report_page import Picture, Study, report_page
from ..files import require_own, whole_file
from ..inference.predictor import Predictor, predictor_config
from ..visualization import draw_panoptic

SIDE = 384  # pixels of the short side of a picture, at which labels are readable
OUTLINE = (255, 0, 255)


def pair_all(predict: Predictor, dataset: str) -> list[list[Pair]]:
    """Predicts the images of a dataset, one after the other, and returns the paired segments of each."""
    images: list[list[Pair]] = []
    pool = EvaluationPool(images.append)
    for (record,) in tqdm(Trainer.build_test_loader(predict.cfg, dataset), "predicting", unit="image"):
        ids, segments = predict_segments(predict, record)
        pool.submit(pair_image, ids, segments, {key: record[key] for key in ("pan_seg_file_name", "segments_info")})
    pool.finish()
    return images


def predict_segments(predict: Predictor, inputs: dict) -> tuple[np.ndarray, list[dict]]:
    """Returns segment ids (H, W), 0 for void, and the segments with contiguous classes."""
    ids, segments = predict.segment([inputs])[0]["panoptic_seg"]
    return compact(ids, max((segment["id"] for segment in segments), default=0)), segments


def draw(record: dict, dataset: str, models: Sequence[Predictor], error: Pair | None = None) -> list[np.ndarray]:
    """Draws the image, the truth, and the predictions, each (H, W, 3) uint8, with an outline of an error's segment."""
    metadata, image = MetadataCatalog.get(dataset), read_image(record)
    scale = min(1, SIDE / min(image.shape[:2]))
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    truth = [s | {"isthing": s["category_id"] in things} for s in record["segments_info"] if not s.get("iscrowd")]
    maps = [(panoptic_png.read(record["pan_seg_file_name"]), truth)]
    maps += [predict_segments(model, model.mapper(record)) for model in models]
    resized = [cv2.resize(ids.astype(np.int32), size, interpolation=cv2.INTER_NEAREST) for ids, _ in maps]
    pictures = [small]
    for ids, (_, segments) in zip(resized, maps, strict=True):
        pictures.append(draw_panoptic(small, ids, segments, metadata))
    pictures[0] = cv2.resize(small, pictures[1].shape[1::-1], interpolation=cv2.INTER_CUBIC)
    if error:
        mask = resized[0] == error.true["id"] if error.true else resized[1] == error.predicted["id"]
        mask = cv2.resize(mask.astype(np.uint8), pictures[0].shape[1::-1], interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        pictures = [cv2.drawContours(picture.copy(), contours, -1, OUTLINE, 3) for picture in pictures]
    return pictures


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


def describe_error(pair: Pair, names: Sequence[str]) -> str:
    """Returns what is wrong with a segment, in words."""
    true, predicted = (s and names[s["category_id"]] for s in (pair.true, pair.predicted))
    if pair.true is None:
        return f"invented {predicted}, score {pair.predicted['score']:.2f}"
    return f"{true} taken for {predicted}, IoU {pair.iou:.2f}" if predicted else f"missed {true}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    file = args.output / "report.html"
    require_own([file], args.overwrite)
    cfgs = configs(args)
    dataset = evaluated_dataset(cfgs[0])
    models = [Predictor(cfg) for cfg in cfgs]
    studies = [Study(model.cfg.MODEL.WEIGHTS, pair_all(model, dataset)) for model in models]
    records, names = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset).stuff_classes
    qualities = [image_quality(pairs) for pairs in studies[0].images]
    worst = heapq.nsmallest(args.pictures, range(len(records)), key=qualities.__getitem__)
    errors = [(index, error) for index, pairs in enumerate(studies[0].images) for error in errors_of(pairs)]
    largest = heapq.nlargest(args.pictures, errors, key=lambda error: (error[1].true or error[1].predicted)["area"])
    chosen = [(index, None) for index in worst] + largest
    pictures = []
    for index, error in tqdm(chosen, "drawing", unit="picture"):
        what = describe_error(error, names) if error else f"PQ {100 * qualities[index]:.1f}"
        title = f"{Path(records[index]['file_name']).name}: {what}"
        pictures.append(Picture(title, draw(records[index], dataset, models, error)))
    page = report_page(args.config_file, dataset, studies, pictures[: len(worst)], pictures[len(worst) :])
    with whole_file(file) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    print(f"{file}: {len(records)} images, {file.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    run_program(main)
