"""Mapillary Vistas 1.2 and 2.0: text for image ids, 65 and 124 classes, crowds, and images of several sizes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from kmax_d2.data.segment_ids import id2rgb

VERSIONS = {"v1.2": ("panoptic_2018.json", 65, 37), "v2.0": ("panoptic_2020.json", 124, 70)}  # JSON, classes, things
SIZES = [(48, 64), (60, 80), (64, 48), (38, 50)]  # height and width


def miniature_mapillary(folder):
    """Writes `mapillary_vistas/` with annotations of both versions, of testing only images."""
    root = Path(folder) / "mapillary_vistas"
    random = np.random.default_rng(2)
    for part, count in (("training", 4), ("validation", 2), ("testing", 1)):
        (root / part / "images").mkdir(parents=True)
        names = [f"{part[:2]}-_{number}aBcDeFgHiJkLmNoPq"[:22] for number in range(count)]
        for name, size in zip(names, SIZES, strict=False):
            Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(root / part / f"images/{name}.jpg")
        for version in VERSIONS if part != "testing" else ():
            _annotate(root / part / version / "panoptic", version, names, random)


def _annotate(folder, version, names, random):
    folder.mkdir(parents=True)
    json_file, num_classes, num_things = VERSIONS[version]
    content = {"images": [], "annotations": [], "categories": _categories(num_classes, num_things)}
    for name, (height, width) in zip(names, SIZES, strict=False):
        ids, classes = np.zeros((height, width), np.int32), {}
        regions = [(slice(0, 14), slice(None), num_classes), (slice(14, height - 4), slice(None), num_things + 4)]
        regions += [(slice(16, 30), slice(left, left + 12), 1 + left // 5) for left in range(2, width - 12, 15)]
        for rows, columns, category in regions:
            id_ = int(random.integers(1, 2**24))
            ids[rows, columns], classes[id_] = id_, category
        Image.fromarray(id2rgb(ids)).save(folder / f"{name}.png")
        size = {"height": height, "width": width}
        content["images"].append({"id": name, "file_name": f"{name}.jpg", **size})
        segments = [_segment(ids == id_, id_, category, id_ == max(classes)) for id_, category in classes.items()]
        content["annotations"].append({"image_id": name, "file_name": f"{name}.png", "segments_info": segments})
    (folder / json_file).write_text(json.dumps(content))


def _segment(mask, id_, category, crowd):
    (top, left), (bottom, right) = (np.argwhere(mask).min(0).tolist(), np.argwhere(mask).max(0).tolist())
    box = [left, top, right - left + 1, bottom - top + 1]
    return {"id": id_, "category_id": category, "iscrowd": int(crowd), "area": int(mask.sum()), "bbox": box}


def _categories(num_classes, num_things):
    """As published, each thing class among the stuff classes has a color, and ids count from 1."""
    return [
        {
            **{"id": index + 1, "name": f"Class {index + 1}", "isthing": int(index < num_things)},
            **{"supercategory": f"group--class-{index + 1}", "color": [index, 255 - index, 7 * index % 256]},
        }
        for index in range(num_classes)
    ]
