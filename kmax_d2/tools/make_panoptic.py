"""Turns the labels of annotation tools into a dataset in COCO panoptic format; the originals stay as they are.

python -m kmax_d2.tools.make_panoptic SOURCE --output DIR [--stuff MASKS] [--val SHARE]

SOURCE is a COCO instance JSON, a YOLO folder with its data.yaml, a folder of LabelMe files, a CVAT for images XML, a
Pascal VOC folder, or a folder of PNGs of classes or of class · 1000 + instance. Where labels overlap, the smaller one
is on top. A pixel without label is void. A later run goes on where an earlier one has stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..command_line import ConfigParser, run_program

PARSER = ConfigParser(__doc__, config_file=None, options=None)
PARSER.add_argument("source", metavar="SOURCE", help="file or folder of labels")
PARSER.add_argument("--output", required=True, metavar="DIR", help="for the dataset")
PARSER.add_argument("--images", metavar="DIR", help="image folder, unless it is where the labels say or beside them")
PARSER.add_argument("--stuff", metavar="MASKS", help="folder of class PNGs for what is below the labels of SOURCE")
PARSER.add_argument("--classes", metavar="FILE", help="class names of PNG values (default: classes.txt beside them)")
text = 'classes that have instances; "all", or nothing for none (default: as the format has it; of class PNGs none)'
PARSER.add_argument("--things", nargs="*", metavar="NAME", help=text)
PARSER.add_argument(
    "--void", nargs="*", default=["__ignore__", "_background_", "void"], metavar="NAME", help="void classes"
)
PARSER.add_argument("--val", type=float, default=0.0, metavar="SHARE", help="of the images for validation, such as 0.1")
PARSER.add_argument("--seed", type=int, default=0, metavar="N", help="for choosing them (%(default)s)")
PARSER.add_argument("--skip-broken", action="store_true", help="leave out bad labels instead of ending")
PARSER.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")

if __name__ == "__main__":
    PARSER.parse()  # answers --help and mistakes before the slow imports

import argparse
import hashlib
import os
import pickle
import random
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from ..data import labels, panoptic_png
from ..data.labels.masks import draw, mask_files, read_names
from ..data.labels.paint import BAD, Item, Shape, reason
from ..errors import UserError, did_you_mean
from ..files import own_folder
from ..images import read_size
from ..parallel import parallel_map


def add_stuff(found: labels.Labels, masks: Path, classes: Path | None) -> None:
    """Lays the classes of PNGs that the labels lack under these, in place; of the others, the PNGs say nothing."""
    known = {category["name"] for category in found.categories}
    names, files = read_names(classes, masks), mask_files(masks)
    first = 1 + max(category["id"] for category in found.categories)
    new = enumerate((name for name in names.values() if name not in known), start=first)
    found.categories += [{"id": id_, "name": name, "isthing": 0} for id_, name in new]
    stuff = {value: None if name in known else name for value, name in names.items()}
    for item in found.items:
        file = files.get(item.image.stem, masks / f"{item.image.stem}.png")
        item.objects.append((str(file), partial(draw, file, stuff, True)))


def choose_things(categories: list[dict], names: Sequence[str] | None) -> None:
    """Sets "isthing" of categories in place; None leaves it. Raises UserError for an unknown name."""
    if names is None:
        return
    known = [category["name"] for category in categories]
    for name in names:
        if name not in (*known, "all"):
            raise UserError(f"--things: no class {name}{did_you_mean(name, known)}")
    for category in categories:
        category["isthing"] = int("all" in names or category["name"] in names)


def split_items(items: list[Item], share: float, seed: int) -> dict[str, list[Item]]:
    """Returns the items of each split: the format's own, or with a share, of which val has that, at least one image."""
    if not 0 <= share < 1:
        raise UserError(f"--val {share} is not a share from 0 to 1")
    if share:
        shuffled = sorted(items, key=lambda item: str(item.image))
        random.Random(seed).shuffle(shuffled)
        count = max(1, round(share * len(items)))
        val = {id(item) for item in shuffled[:count]}
        for item in items:
            item.split = "val" if id(item) in val else "train"
    splits = defaultdict(list)
    for item in items:
        splits[item.split].append(item)
    return splits


def convert(item: Item, root: Path, target: Path, categories: list[dict], void: Sequence[str], skip: bool) -> dict:
    """Writes an image's PNG below `target`, unless an earlier run has; returns the JSON's entries and the faults.

    An image without segments has no entries, nor has one with faults unless these are to be skipped.
    """
    name = item.image.relative_to(root)
    png = name.with_suffix(".png")
    files = [item.image, *(part for _, function in item.objects for part in function.args if isinstance(part, Path))]
    times = [file.stat().st_mtime_ns for file in files if file.is_file()]
    stamp = hashlib.sha1(pickle.dumps((item, categories, void, times))).hexdigest()
    entry = panoptic_png.read_annotation(target / png)
    if entry and entry.get("stamp") == stamp and (skip or not entry["faults"]):
        return entry
    try:
        size = read_size(str(item.image))
        if item.size not in (None, size):
            raise UserError(f"{item.image} is {size[1]}×{size[0]}, its labels say {item.size[1]}×{item.size[0]}")
    except UserError as error:
        return {"faults": [str(error)]}
    shapes, faults = draw_all(item, size, {*(category["name"] for category in categories), *void})
    ids, segments = segments_of(shapes, size, categories, void)
    image = {"file_name": name.as_posix(), "height": size[0], "width": size[1]}
    entry = {"stamp": stamp, "faults": faults, "image": image}
    if segments and (skip or not faults):
        entry["annotation"] = {"file_name": png.as_posix(), "segments_info": segments}
        panoptic_png.write(target / png, ids, entry)
    return entry


def draw_all(item: Item, size: tuple[int, int], names: set[str]) -> tuple[list[Shape], list[str]]:
    """Returns the shapes of an item's objects, of classes with these names, and a line for each object that is bad."""
    shapes: list[Shape] = []
    faults = []
    for where, draw_object in item.objects:
        try:
            drawn = draw_object(size)
            for shape in drawn:
                if shape.name not in names:
                    raise UserError(f"no class {shape.name}")
                if not shape.mask.any():
                    raise UserError("no pixel of it is inside the image")
            shapes += drawn
        except BAD as error:
            faults.append(f"{where}: {reason(error)}")
    return shapes, faults


def segments_of(
    shapes: list[Shape], size: tuple[int, int], categories: list[dict], void: Sequence[str]
) -> tuple[np.ndarray, list[dict]]:
    """Returns the id map (H, W) of shapes, and its "segments_info"."""
    known = {category["name"]: category for category in categories}
    things = {name for name, category in known.items() if category["isthing"]}
    ids, painted = labels.paint(shapes, size, things, void)
    segments = []
    for segment in panoptic_png.describe(ids):
        if segment["id"]:
            shape = painted[segment["id"]]
            crowd = int(shape.crowd and shape.name in things)
            segments.append(segment | {"category_id": known[shape.name]["id"], "iscrowd": crowd})
    return ids, segments


def write_split(name: str, items: list[Item], categories: list[dict], args: argparse.Namespace) -> list[str]:
    """Converts the images of a split and writes its JSON, unless labels are bad; returns the faults."""
    root = Path(os.path.commonpath([item.image.parent for item in items]))
    target = Path(args.output) / (f"panoptic_{name}" if name else "panoptic")
    counts = Counter(item.image.with_suffix("") for item in items)
    twice = [f"{image}: several images, or labels of one image, of this name" for image, n in counts.items() if n > 1]
    if twice:
        return twice
    convert_item = partial(
        convert, root=root, target=target, categories=categories, void=args.void, skip=args.skip_broken
    )
    entries = parallel_map(convert_item, items, target.name, args.workers)
    faults = [fault for entry in entries for fault in entry["faults"]]
    used = [entry for entry in entries if "annotation" in entry]
    if faults and not args.skip_broken:
        return faults
    if not used:
        raise UserError(f"no image of {args.source} has a usable label")
    for number, entry in enumerate(used, start=1):
        entry["image"]["id"] = entry["annotation"]["image_id"] = number
    panoptic_png.write_json(target.with_suffix(".json"), used, categories)
    without = sum("image" in entry and "annotation" not in entry for entry in entries)
    if without:
        print(f"{without} images without labels are left out")
    option = "--test-data" if name in ("val", "test") else "--train-data"
    print(f"  {option} {root} {target} {target.with_suffix('.json')}")
    return faults


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    images, classes = (Path(name) if name else None for name in (args.images, args.classes))
    format_, read = labels.find_format(Path(args.source))
    found = read(images, classes)
    if args.stuff:
        add_stuff(found, Path(args.stuff), classes)
    categories = [category for category in found.categories if category["name"] not in args.void]
    choose_things(categories, args.things)
    print(f"{args.source}: {format_}, {len(found.items)} images, {len(categories)} classes")
    for item in found.items:
        item.image = Path(os.path.abspath(item.image))
    splits = split_items(found.items, args.val, args.seed)
    own_folder(Path(args.output))
    faults = found.faults
    for name, items in splits.items():
        faults += write_split(name, items, categories, args)
    for fault in faults:
        print(f"bad label: {' '.join(fault.split())}")
    if faults and not args.skip_broken:
        raise UserError(f"{len(faults)} labels are bad: mend them, or leave them out with --skip-broken")
    if not splits:
        raise UserError(f"{args.source} has no images")


if __name__ == "__main__":
    run_program(main)
