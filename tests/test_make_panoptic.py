"""Labels of every format come back as the panoptic data that they were written from; bad ones are named."""

import cv2
import label_formats
import numpy as np
import pytest
from PIL import Image

from kmax_d2.data.check import unregistered
from kmax_d2.data.datasets import shapes
from kmax_d2.tools.make_panoptic import main

THINGS = [category["name"] for category in shapes.CATEGORIES if category["isthing"]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three images, a part of the first void."""
    folder = tmp_path_factory.mktemp("source")
    shapes.write_split(folder, "val", 3, 5)
    png = folder / "panoptic_val/0000.png"
    colors = np.array(Image.open(png))
    colors[:20, :30] = 0
    Image.fromarray(colors).save(png)
    return folder / "val", folder / "panoptic_val", folder / "panoptic_val.json"


def run(labels, output, *options, split=""):
    """Runs the tool in this process; returns the folder of PNGs and the JSON of a split."""
    main([str(labels), "--output", str(output), "--workers", "1", *map(str, options)])
    return output / f"panoptic{split}", output / f"panoptic{split}.json"


def segments(files, parts=False, classes=False):
    """Each image's set of (class, pixels): of segments, of the connected parts of things, or of those of classes."""
    _, *samples = label_formats.panoptic(*files)
    found = {}
    for file, _, ids, of_image in samples:
        masks = [(name, ids == id_) for id_, name in of_image]
        if classes:
            names = {name for name, _ in masks}
            masks = [(name, np.any([mask for other, mask in masks if other == name], axis=0)) for name in names]
        found[file.stem] = set()
        for name, mask in masks:
            count, labels = cv2.connectedComponents(mask.astype(np.uint8))
            split = name in THINGS and (parts or classes)
            of_segment = [labels == label for label in range(1, count)] if split else [mask]
            found[file.stem] |= {(name, part.tobytes()) for part in of_segment}
    return found


FORMATS = {
    "COCO": label_formats.to_coco,
    "YOLO": label_formats.to_yolo,
    "LabelMe": label_formats.to_labelme,
    "LabelMe masks": lambda source, folder: label_formats.to_labelme(source, folder, masks=True),
    "CVAT": label_formats.to_cvat,
    "CVAT masks": lambda source, folder: label_formats.to_cvat(source, folder, masks=True),
    "VOC": label_formats.to_voc,
    "ids": lambda source, folder: label_formats.to_pngs(source, folder, THINGS),
    "classes": lambda source, folder: label_formats.to_pngs(source, folder, THINGS, instances=False),
}


@pytest.mark.parametrize("format_", FORMATS)
def test_round_trip(source, tmp_path, format_):
    labels = FORMATS[format_](source, tmp_path)
    _, *samples = label_formats.panoptic(*source)
    things = {name for *_, of_image in samples for _, name in of_image} & set(THINGS)
    options = ["--classes", tmp_path / "names.txt"] if format_ == "VOC" else []
    options += [] if format_ in ("YOLO", "LabelMe", "LabelMe masks") else ["--images", source[0]]
    split = "_train" if format_ == "YOLO" else ""
    made = source[0], *run(labels, tmp_path / "out", "--things", *things, *options, split=split)
    expected = segments(source, parts=format_ == "YOLO", classes=format_ == "classes")
    assert segments(made) == expected and sum(map(len, expected.values())) > 10
    dataset = unregistered(*map(str, made))
    assert dataset.faults + [fault for findings in dataset.check(workers=1) for fault in findings.faults] == []
