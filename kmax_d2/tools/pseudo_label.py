"""Labels a folder of images with a model and writes them as a COCO panoptic dataset to train with.

python -m kmax_d2.tools.pseudo_label --config-file FILE [--weights FILE] --input FOLDER --output DIR [NAME VALUE ...]

The PNGs go to DIR/panoptic_NAME and the JSON to DIR/annotations/panoptic_NAME.json, where NAME is the input folder's:
`--input datasets/coco/unlabeled2017 --output datasets/coco` makes coco_2017_unlabeled_panoptic. Categories are those of
the config's dataset, and weights are the published ones unless given. If interrupted, run the same command again: it
continues where it stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..command_line import ConfigParser, run_program, whole

PARSER = ConfigParser(__doc__, weights=True, overwrite=True)
PARSER.add_argument("--input", required=True, type=Path, metavar="FOLDER", help="the images")
PARSER.add_argument("--output", required=True, type=Path, metavar="DIR", help="for panoptic_NAME and annotations")
PARSER.add_argument(
    "--num-gpus",
    type=whole("--num-gpus", 1, 1024),
    default=1,
    metavar="N",
    help="processes, each on a GPU (%(default)s)",
)

PARSER.parse_if_main(__name__)

import functools
from collections import Counter
from datetime import timedelta
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.datasets.coco_panoptic import categories_of
from ..data.mapper import PanopticTestMapper
from ..data.panoptic_png import describe, read_annotation, write, write_json
from ..engine import launch
from ..engine.setup import dataset_metadata
from ..errors import UserError
from ..files import make_folder, require_own, write_text
from ..images import images_in
from ..inference import load
from ..inference.predictor import predictor_config
from ..parallel import parallel_map


def _read(file: Path, mapper: PanopticTestMapper) -> tuple[Path, dict | UserError]:
    try:
        return file, mapper({"file_name": str(file)})
    except UserError as error:
        return file, error


def label(args: argparse.Namespace, files: Sequence[Path], folder: Path) -> None:
    """Writes a PNG with its segments inside for each image; the processes divide the images among themselves."""
    predict = load(args.config_file, options=args.opts)
    cfg, categories = predict.cfg, categories_of(predict.metadata)
    share: Any = files[comm.get_rank() :: comm.get_world_size()]
    read = functools.partial(_read, mapper=predict.mapper)
    # Every image has its own size, so there are no batches.
    loader: DataLoader = DataLoader(share, batch_size=None, collate_fn=read, num_workers=cfg.DATALOADER.NUM_WORKERS)
    for file, inputs in tqdm(loader, "labeling", unit="image", disable=not comm.is_main_process(), mininterval=0.5):
        if isinstance(inputs, UserError):
            tqdm.write(f"skipped: {inputs}")
            continue
        ids, segments = predict.segment([inputs])[0]["panoptic_seg"]
        id_map = ids.cpu().numpy()
        category = {segment["id"]: categories[segment["category_id"]]["id"] for segment in segments}
        segments_info = [
            segment | {"category_id": category[segment["id"]], "iscrowd": 0}
            for segment in describe(id_map)
            if segment["id"] in category
        ]
        size = {"height": id_map.shape[0], "width": id_map.shape[1]}
        write(folder / f"{file.stem}.png", id_map, size | {"segments_info": segments_info})


def remember_model(cfg: CfgNode, folder: Path) -> None:
    """Records which model makes the labels. Raises UserError if another one made those in the folder."""
    model, inputs = (yaml.safe_load(part.dump()) for part in (cfg.MODEL, cfg.INPUT))
    del model["DEVICE"], model["KMAX"]["COMPILE"]
    weights = Path(cfg.MODEL.WEIGHTS)
    if weights.is_file():
        model["WEIGHTS"] = {"bytes": weights.stat().st_size, "changed": weights.stat().st_mtime}
    text = yaml.safe_dump({"model": model, "input": inputs, "categories": categories_of(dataset_metadata(cfg))})
    file = folder / "model.yaml"
    if not (file.is_file() and any(folder.glob("*.png"))):
        write_text(file, text)
    elif file.read_text() != text:
        raise UserError(
            f"{folder} holds labels from another model or other options: delete it, or choose another --output"
        )


def json_entries(labels: dict[Path, dict]) -> list[dict]:
    """Returns "image" and "annotation" of every image that has segments; ids are the file names if all are numbers."""
    numbers = {int(file.stem) for file in labels if file.stem.isdecimal()}
    entries = []
    for number, (file, label) in enumerate(labels.items(), start=1):
        id_, segments = int(file.stem) if len(numbers) == len(labels) else number, label["segments_info"]
        image = {"id": id_, "file_name": file.name, "height": label["height"], "width": label["width"]}
        annotation = {"image_id": id_, "file_name": f"{file.stem}.png", "segments_info": segments}
        entries += [{"image": image, "annotation": annotation}] if segments else []
    return entries


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    files = images_in(args.input)
    (stem, count), *_ = Counter(file.stem for file in files).most_common(1)
    if count > 1:
        raise UserError(f"{count} images in {args.input} are named {stem} except for their suffix; rename them")
    cfg = predictor_config(args.config_file, args.opts)
    categories, name = categories_of(dataset_metadata(cfg)), f"panoptic_{args.input.resolve().name}"
    folder, json_file = make_folder(args.output / name), args.output / "annotations" / f"{name}.json"
    pngs = [folder / f"{file.stem}.png" for file in files]
    found = parallel_map(read_annotation, pngs, "looking for labels")
    missing = [file for file, labels in zip(files, found, strict=True) if labels is None]
    require_own([json_file, *(png for png, labels in zip(pngs, found, strict=True) if labels is None)], args.overwrite)
    remember_model(cfg, folder)
    if missing:
        # The processes only meet at the end, where one may have to wait long for the others.
        launch(label, args.num_gpus, dist_url="auto", timeout=timedelta(days=7), args=(args, missing, folder))
        found = parallel_map(read_annotation, pngs, "collecting labels")
    labeled = {file: labels for file, labels in zip(files, found, strict=True) if labels is not None}
    entries = json_entries(labeled)
    if not entries:
        raise UserError(f"none of the {len(files)} images in {args.input} got a label; is the model trained?")
    write_json(json_file, entries, categories)
    broken, empty = len(files) - len(labeled), len(labeled) - len(entries)
    print(f"left out: {broken} images that cannot be read, {empty} in which the model finds nothing")


if __name__ == "__main__":
    run_program(main)
