"""Labels a folder of images with a model and writes them as a COCO panoptic dataset to train with.

`python -m kmax_d2.tools.pseudo_label --config-file FILE --weights FILE --input FOLDER --output DIR [NAME VALUE ...]`

The PNGs lie in DIR/panoptic_NAME and the JSON is DIR/annotations/panoptic_NAME.json, NAME being the input folder's:
`--input datasets/coco/unlabeled2017 --output datasets/coco` makes coco_2017_unlabeled_panoptic. Categories are those of
the config's dataset. The same command takes up what was interrupted.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..checkpoint.checkpointer import load_weights
from ..data.mapper import PanopticTestMapper
from ..data.panoptic_png import describe, make_folder, read_annotation, write, write_json, written_whole
from ..engine import launch, load_config
from ..speed import inference_model, require_precision, use_precision
from ..engine.setup import choose_device, prepare_datasets
from ..errors import UserError, exit_on_user_error
from ..parallel import parallel_map


class Images(Dataset):
    """Image files as the model's inputs; of one that cannot be read, the UserError.

    Args:
        files: the images.
        mapper: makes the model's input of a record.
    """

    def __init__(self, files: Sequence[Path], mapper: PanopticTestMapper):
        self.files = files
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Path, dict | UserError]:
        file = self.files[index]
        try:
            return file, self.mapper({"file_name": str(file)})
        except UserError as error:
            return file, error


def find_images(folder: Path) -> list[Path]:
    """The images of a folder, sorted. Raises UserError where there are none, or where two would share a PNG."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in known)
    if not files:
        raise UserError(f"no images in the folder {folder}")
    stem, count = Counter(file.stem for file in files).most_common(1)[0]
    if count > 1:
        raise UserError(f"{count} images in {folder} are called {stem} but for their suffix; rename them")
    return files


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of the command line."""
    cfg = load_config(args.config_file, args.opts)
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
    prepare_datasets(cfg)
    if not (cfg.DATASETS.TEST or cfg.DATASETS.TRAIN):
        raise UserError("no categories: name a dataset in DATASETS.TEST")
    require_precision(cfg.MODEL.KMAX.TEST.PRECISION)
    cfg.MODEL.KMAX.TEST.SEMANTIC_ON = cfg.MODEL.KMAX.TEST.INSTANCE_ON = False
    cfg.MODEL.KMAX.TEST.PANOPTIC_ON = True
    return cfg


def categories_of(cfg: CfgNode) -> list[dict]:
    """The JSON categories of the config's dataset, in the order of the contiguous classes."""
    metadata = MetadataCatalog.get([*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN][0])
    things = metadata.thing_dataset_id_to_contiguous_id
    ids = {**metadata.stuff_dataset_id_to_contiguous_id, **things}
    names, colors = metadata.stuff_classes, metadata.get("stuff_colors")
    return [
        {"id": id_, "name": names[index], "isthing": int(id_ in things)}
        | ({"color": list(colors[index])} if colors else {})
        for id_, index in sorted(ids.items(), key=lambda item: item[1])
    ]


def annotation_of(ids: torch.Tensor, segments: list[dict], categories: list[dict]) -> tuple:
    """The model's result (H, W) as an array, and its segments as in a COCO panoptic JSON."""
    id_map = ids.cpu().numpy()
    described = {segment["id"]: segment for segment in describe(id_map)}
    return id_map, [
        described[segment["id"]] | {"category_id": categories[segment["category_id"]]["id"], "iscrowd": 0}
        for segment in segments
        if segment["id"] in described
    ]


def label(args: argparse.Namespace, files: list[Path], folder: Path) -> None:
    """Writes a PNG with its segments inside for each image; each process takes every so many-th image."""
    cfg = setup(args)
    choose_device(cfg)
    categories = categories_of(cfg)
    model = build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    model = inference_model(model, cfg)
    own = files[comm.get_rank() :: comm.get_world_size()]
    # Every image has its own size, so that there is nothing to collate.
    loader = DataLoader(Images(own, PanopticTestMapper(cfg)), batch_size=None, num_workers=cfg.DATALOADER.NUM_WORKERS)
    main = comm.is_main_process()
    bar = tqdm(loader, desc="labelling", unit="image", disable=not main, mininterval=0.5, dynamic_ncols=True)
    for file, inputs in bar:
        if isinstance(inputs, UserError):
            tqdm.write(f"skipped: {inputs}")
            continue
        with use_precision(cfg.MODEL.KMAX.TEST.PRECISION, cfg.MODEL.DEVICE), torch.no_grad():
            ids, segments = model([inputs])[0]["panoptic_seg"]
        id_map, segments_info = annotation_of(ids, segments, categories)
        write(folder / f"{file.stem}.png", id_map, {"segments_info": segments_info})


def _entry(file: Path, folder: Path) -> dict | None:
    """What the PNG of an image tells: its size and segments; None where there is no whole one."""
    png = folder / f"{file.stem}.png"
    annotation = read_annotation(png)
    if annotation is None:
        return None
    with Image.open(png) as image:
        width, height = image.size
    return annotation | {"width": width, "height": height}


def remember_model(cfg: CfgNode, folder: Path) -> None:
    """Keeps by which model the labels are made. Raises UserError where the folder's are another's."""
    model = yaml.safe_load(cfg.MODEL.dump())
    del model["DEVICE"], model["KMAX"]["COMPILE"]
    weights = Path(model.pop("WEIGHTS"))
    found = weights.stat() if weights.is_file() else None
    told = {
        "weights": {"bytes": found.st_size, "changed": found.st_mtime} if found else str(weights),
        "model": model,
        "input": yaml.safe_load(cfg.INPUT.dump()),
        "categories": categories_of(cfg),
    }
    file = folder / "model.yaml"
    if file.is_file() and any(folder.glob("*.png")):
        if yaml.safe_load(file.read_text()) != told:
            raise UserError(
                f"{folder} holds labels of another model or of other options: delete it or take another --output"
            )
        return
    with written_whole(file) as unfinished:
        unfinished.write_text(yaml.safe_dump(told))


def entries_of(labelled: dict[Path, dict]) -> list[dict]:
    """The JSON's "image" and "annotation" of every image with a segment; ids are the files' numbers if all have one."""
    numbers = [int(file.stem) for file in labelled if file.stem.isdecimal()]
    numbered = len(set(numbers)) == len(labelled)
    entries = []
    for number, (file, entry) in enumerate(labelled.items(), start=1):
        image_id = int(file.stem) if numbered else number
        image = {"id": image_id, "file_name": file.name, "height": entry["height"], "width": entry["width"]}
        annotation = {"image_id": image_id, "file_name": f"{file.stem}.png", "segments_info": entry["segments_info"]}
        if entry["segments_info"]:
            entries.append({"image": image, "annotation": annotation})
    return entries


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config file or name, such as coco/r50")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint, the same as the option MODEL.WEIGHTS")
    parser.add_argument("--input", required=True, type=Path, metavar="FOLDER", help="the images")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="of panoptic_NAME and annotations")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes (%(default)s), a GPU each")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="NAME VALUE", help="config options to change")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    files = find_images(args.input)
    cfg = setup(args)
    name = f"panoptic_{args.input.resolve().name}"
    folder = make_folder(args.output / name)
    remember_model(cfg, folder)
    look = functools.partial(_entry, folder=folder)
    entries = dict(zip(files, parallel_map(look, files, "looking for labels"), strict=True))
    missing = [file for file, entry in entries.items() if entry is None]
    if missing:
        # Processes meet at the end alone, where one may have to wait for the others.
        launch(label, args.num_gpus, dist_url="auto", timeout=timedelta(days=7), args=(args, missing, folder))
        entries |= dict(zip(missing, parallel_map(look, missing, "gathering labels"), strict=True))
    labelled = {file: entry for file, entry in entries.items() if entry is not None}
    written = entries_of(labelled)
    broken, empty = len(files) - len(labelled), len(labelled) - len(written)
    if not written:
        raise UserError(f"not one of the {len(files)} images in {args.input} got a label; is the model trained?")
    write_json(make_folder(args.output / "annotations") / f"{name}.json", written, categories_of(cfg))
    print(f"left out: {broken} images that cannot be read, {empty} in which the model finds nothing")


if __name__ == "__main__":
    exit_on_user_error(main)
