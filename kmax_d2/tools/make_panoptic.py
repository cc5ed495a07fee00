"""Turns the labels of annotation tools into a dataset in COCO panoptic format; the originals stay as they are.

python -m kmax_d2.tools.make_panoptic SOURCE --output DIR [--stuff MASKS] [--val SHARE]

SOURCE is a COCO instance JSON, a YOLO folder with its data.yaml, a folder of LabelMe files, a CVAT for images XML, a
Pascal VOC folder, or a folder of PNGs of classes or of class · 1000 + instance. Where labels overlap, the smaller one
is on top. A pixel without label is void. A later run goes on where an earlier one has stopped.
"""

from collections.abc import Sequence

from ..command_line import ConfigParser, run_program, whole

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
PARSER.add_argument(
    "--workers", type=whole("--workers", 0, 1024), default=0, metavar="N", help="processes (default: one per core)"
)

PARSER.parse_if_main(__name__)

import hashlib
import os
import pickle
import random
from collections import defaultdict
from functools import partial
from pathlib import Path

from ..data import panoptic_png
from ..data.labels import find_format, masks
from ..data.labels.paint import BAD, Item, Labels, Shape, Size, paint
from ..errors import UserError, did_you_mean
from ..files import own_folder
from ..images import read_size
from ..parallel import parallel_map


def add_stuff(labels: Labels, folder: Path, classes: Path | None) -> None:
    """Lays the classes of PNGs that the labels lack under these, in place; of the others, the PNGs say nothing."""
    known = {category["name"] for category in labels.categories}
    names, files = masks.read_names(classes, folder), masks.mask_files(folder)
    stuff = {value: None if name in known else name for value, name in names.items()}
    first = 1 + max(category["id"] for category in labels.categories)
    for id_, name in enumerate(filter(None, stuff.values()), start=first):
        labels.categories.append({"id": id_, "name": name, "isthing": 0})
    for item in labels.items:
        file = files.get(item.image.stem, folder / f"{item.image.stem}.png")
        item.objects.append((str(file), partial(masks.draw, file, stuff, True)))


def choose_things(categories: list[dict], names: Sequence[str]) -> None:
    """Sets "isthing" of categories in place. Raises UserError for an unknown name."""
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
        items = sorted(items, key=lambda item: item.image)
        val = random.Random(seed).sample(range(len(items)), min(len(items), max(1, round(share * len(items)))))
        for number, item in enumerate(items):
            item.split = "val" if number in val else "train"
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
    files = [item.image, *(part for _, drawn in item.objects for part in drawn.args if isinstance(part, Path))]
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
    known = {category["name"]: category for category in categories}
    things = {name for name, category in known.items() if category["isthing"]}
    shapes, faults = draw_all(item, size, {*known, *void})
    ids, painted = paint(shapes, size, things, void)
    segments = []
    for segment in panoptic_png.describe(ids):
        if shape := segment["id"] and painted[segment["id"]]:
            crowd = int(shape.crowd and shape.name in things)
            segments.append(segment | {"category_id": known[shape.name]["id"], "iscrowd": crowd})
    entry = {"stamp": stamp, "faults": faults}
    if segments and (skip or not faults):
        entry["image"] = {"file_name": name.as_posix(), "height": size[0], "width": size[1]}
        entry["annotation"] = {"file_name": png.as_posix(), "segments_info": segments}
        panoptic_png.write(target / png, ids, entry)
    return entry


def draw_all(item: Item, size: Size, names: set[str]) -> tuple[list[Shape], list[str]]:
    """Returns the shapes of an item's objects, of classes with these names, and a line for each object that is bad."""
    shapes: list[Shape] = []
    faults = []
    for where, draw in item.objects:
        try:
            drawn = draw(size)
        except BAD as error:
            reason = str(error) if isinstance(error, UserError) else f"malformed ({error!r})"
            faults.append(f"{where}: {reason}")
            continue
        for shape in drawn:
            if shape.name not in names:
                faults.append(f"{where}: there is no class {shape.name}")
            elif not shape.mask.any():
                faults.append(f"{where}: no pixel of it is inside the image")
            else:
                shapes.append(shape)
    return shapes, faults


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    source = Path(args.source)
    images, classes = (Path(name) if name else None for name in (args.images, args.classes))
    if source.resolve() in Path(args.output).resolve().parents:
        raise UserError("--output is inside of SOURCE: choose another folder")
    format_, read = find_format(source)
    labels = read(images, classes)
    if args.stuff:
        add_stuff(labels, Path(args.stuff), classes)
    categories = [category for category in labels.categories if category["name"] not in args.void]
    if args.things is not None:
        choose_things(categories, args.things)
    print(f"{source}: {format_}, {len(labels.items)} images, {len(categories)} classes")
    for item in labels.items:
        item.image = Path(os.path.abspath(item.image))
    output, faults, converted = own_folder(Path(args.output)), labels.faults, []
    for split, items in split_items(labels.items, args.val, args.seed).items():
        names = {item.image.with_suffix("") for item in items}
        if len(names) < len(items):
            raise UserError(f"{source} has several images, or labels of one image, with the same name")
        root = Path(os.path.commonpath([name.parent for name in names]))
        target = output / (f"panoptic_{split}" if split else "panoptic")
        options = {"categories": categories, "void": args.void, "skip": args.skip_broken}
        one = partial(convert, root=root, target=target, **options)
        entries = parallel_map(one, items, target.name, args.workers)
        faults += [fault for entry in entries for fault in entry["faults"]]
        converted.append((root, target, entries))
    for fault in faults:
        print(f"bad label: {' '.join(fault.split())}")
    if faults and not args.skip_broken:
        raise UserError(f"{len(faults)} labels are bad: mend them, or leave them out with --skip-broken")
    for root, target, entries in converted:
        used = [entry for entry in entries if "annotation" in entry]
        for number, entry in enumerate(used, start=1):
            entry["image"]["id"] = entry["annotation"]["image_id"] = number
        panoptic_png.write_json(target.with_suffix(".json"), used, categories)
        unused = len(entries) - len(used)
        left_out = f" ({unused} images without labels are left out)" if unused else ""
        option = "--test-data" if target.name.endswith(("_val", "_test")) else "--train-data"
        print(f"  {option} {root} {target} {target.with_suffix('.json')}{left_out}")
    if not any("annotation" in entry for *_, entries in converted for entry in entries):
        raise UserError(f"no image of {source} has a usable label")


if __name__ == "__main__":
    run_program(main)
