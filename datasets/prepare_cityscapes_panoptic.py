#!/usr/bin/env python
"""Creates with cityscapesscripts the files that Detectron2's cityscapes_fine_panoptic needs beyond the downloads.

These are *_gtFine_labelTrainIds.png beside the polygons, and gtFine/cityscapes_panoptic_{train,val} with their JSONs.
*_labelIds.png and *_instanceIds.png, part of the download, are recreated from the polygons if they are missing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from prepare_common import convert_split, find, is_whole, make_panoptic, parse_args

from kmax_d2.command_line import run_program
from kmax_d2.data.segment_ids import rgb2id
from kmax_d2.errors import UserError
from kmax_d2.files import whole_file

try:
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.helpers.labels import labels
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import json2labelImg
except ImportError as missing:
    raise SystemExit(f"error: {missing}: run `pip install 'kmax_d2[cityscapes]'` first") from missing

POLYGONS = "_polygons.json"


@contextlib.contextmanager
def polygons_of(file: Path) -> Iterator[None]:
    """Turns what cityscapesscripts prints or raises for broken polygons into a UserError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except (Exception, SystemExit) as error:
        reason = printed.getvalue().strip().splitlines()[0:1] or [repr(error)]
        raise UserError(f"cannot draw the polygons {file}: {reason[0]}") from error


def draw_instances(polygons: str, file: str) -> None:
    """Draws instance ids as json2instanceImg does, but with 16 bits: new versions of Pillow refuse to save its 32."""
    annotation = Annotation()
    annotation.fromJsonFile(polygons)
    createInstanceImage(annotation, "ids").convert("I;16").save(file)


def make_label_images(polygons: Path) -> Path:
    """Creates the missing or truncated label images of one annotation; returns that of the instances."""
    made = {}
    kinds: dict[str, Callable[[str, str], None]] = {
        "labelIds": json2labelImg,
        "labelTrainIds": functools.partial(json2labelImg, encoding="trainIds"),
        "instanceIds": draw_instances,
    }
    for kind, draw in kinds.items():
        made[kind] = file = polygons.with_name(polygons.name.replace(POLYGONS, f"_{kind}.png"))
        if not is_whole(file):
            with whole_file(file) as unfinished, polygons_of(polygons):
                draw(str(polygons), str(unfinished))
    return made["instanceIds"]


def make(instances: Path) -> tuple[np.ndarray, dict]:
    """Returns the id map (H, W) of an instance image and the JSON's entries, both from cityscapesscripts."""
    # It converts whole folders, one file at a time; one folder per file lets files be converted in parallel.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        city = Path(scratch) / "one" / "city"
        city.mkdir(parents=True)
        (city / instances.name).symlink_to(instances.resolve())
        convert2panoptic(scratch, scratch, setNames=["one"])
        content = json.loads(Path(scratch, "cityscapes_panoptic_one.json").read_text())
        annotation = content["annotations"][0]
        ids = rgb2id(np.asarray(Image.open(Path(scratch, "cityscapes_panoptic_one", annotation["file_name"]))))
    return ids, {"image": content["images"][0], "annotation": annotation}


def convert(polygons: Path, target: Path) -> dict:
    """Returns the JSON's entries of one image, after creating its files if needed, the PNG in the folder `target`."""
    instances = make_label_images(polygons)
    file = target / polygons.name.replace(POLYGONS, "_panoptic.png")
    return make_panoptic(file, lambda: make(instances))


def categories() -> list[dict]:
    """Returns the JSON's categories, as cityscapesscripts writes them."""
    return [
        {
            "id": label.id,
            "name": label.name,
            "color": label.color,
            "supercategory": label.category,
            "isthing": int(label.hasInstances),
        }
        for label in labels
        if not label.ignoreInEval
    ]


def main(arguments: list[str] | None = None) -> None:
    """Converts the splits that a command line names."""
    args = parse_args(__doc__, "cityscapes", ["train", "val"], arguments)
    ground_truth = args.root / "gtFine"
    files = {split: find(ground_truth / split, f"*/*_gtFine{POLYGONS}", "annotations") for split in args.splits}
    for split in args.splits:
        target = ground_truth / f"cityscapes_panoptic_{split}"
        convert_split(convert, files[split], target, categories(), args.workers)


if __name__ == "__main__":
    run_program(main)
