#!/usr/bin/env python
"""Makes what Detectron2's cityscapes_fine_panoptic reads and the downloads lack, by cityscapesscripts.

These are *_gtFine_labelTrainIds.png beside the polygons, and gtFine/cityscapes_panoptic_{train,val} with their JSONs.
*_labelIds.png and *_instanceIds.png, which the download has, are made of the polygons where they are missing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from kmax_d2.data.panoptic_png import is_whole, written_whole
from kmax_d2.data.parallel import parallel_map
from kmax_d2.data.prepare import find, make_folder, make_panoptic, parse_args, write_json
from kmax_d2.data.segment_ids import rgb2id
from kmax_d2.errors import UserError, exit_on_user_error

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
def polygons_of(file: Path):
    """What cityscapesscripts says of broken polygons, by printing or by any exception, as a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except (Exception, SystemExit) as error:
        reason = said.getvalue().strip().splitlines()[0:1] or [repr(error)]
        raise UserError(f"cannot draw the polygons {file}: {reason[0]}") from error


def draw_instances(polygons: str, file: str) -> None:
    """Draws the instance ids as json2instanceImg does, which saves 32 bits; new versions of Pillow refuse that."""
    annotation = Annotation()
    annotation.fromJsonFile(polygons)
    createInstanceImage(annotation, "ids").convert("I;16").save(file)


def make_label_images(polygons: Path) -> Path:
    """Makes the label images of one annotation that are not there whole; gives that of the instances."""
    made = {}
    kinds: dict[str, Callable[[str, str], None]] = {
        "labelIds": json2labelImg,
        "labelTrainIds": functools.partial(json2labelImg, encoding="trainIds"),
        "instanceIds": draw_instances,
    }
    for kind, draw in kinds.items():
        made[kind] = file = polygons.with_name(polygons.name.replace(POLYGONS, f"_{kind}.png"))
        if not is_whole(file):
            with written_whole(file) as unfinished, polygons_of(polygons):
                draw(str(polygons), str(unfinished))
    return made["instanceIds"]


def make(instances: Path) -> tuple[np.ndarray, dict]:
    """The panoptic id map (H, W) of an instance image, and the JSON's entries, as cityscapesscripts makes them."""
    # It converts whole folders, one file after the other; a folder of one file each lets them go in parallel.
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
    """The JSON's entries of one image; its files are made where they are not there, the PNG in the folder `target`."""
    instances = make_label_images(polygons)
    file = target / polygons.name.replace(POLYGONS, "_panoptic.png")
    return make_panoptic(file, lambda: make(instances))


def categories() -> list[dict]:
    """The JSON's categories, as cityscapesscripts writes them."""
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
    args = parse_args(__doc__, "cityscapes", ["train", "val"], arguments)
    ground_truth = args.root / "gtFine"
    files = {split: find(ground_truth / split, f"*/*_gtFine{POLYGONS}", "annotations") for split in args.splits}
    for split in args.splits:
        target = make_folder(ground_truth / f"cityscapes_panoptic_{split}")
        entries = parallel_map(functools.partial(convert, target=target), files[split], split, args.workers)
        write_json(target.with_suffix(".json"), entries, categories())


if __name__ == "__main__":
    exit_on_user_error(main)
