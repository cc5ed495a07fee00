"""COCO, its test and unlabeled images, and COCONut: two real images with crowds, at a third of their size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from kmax_d2.data.segment_ids import rgb2id

COCO_SAMPLE = Path(__file__).parents[1] / "data" / "coco_sample"
CONTENT = json.loads((COCO_SAMPLE / "panoptic.json").read_text())
CATEGORIES = [{key: value for key, value in c.items() if key != "color"} for c in COCO_CATEGORIES]
THINGS = {category["id"] for category in CATEGORIES if category["isthing"]}


def miniature_coco(folder):
    """Writes `coco/`: panoptic and instance annotations of two splits, and lists of the test images."""
    root = Path(folder) / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017", "test2017"):
        _copy(CONTENT["images"], root / split)
    listed = {"info": {}, "licenses": CONTENT["licenses"], "images": CONTENT["images"]}
    things = [{key: value for key, value in c.items() if key != "isthing"} for c in CATEGORIES if c["isthing"]]
    for split in ("train2017", "val2017"):
        _copy(CONTENT["annotations"], root / f"panoptic_{split}")
        _write(root / f"annotations/panoptic_{split}.json", {"info": {}, **CONTENT, "categories": CATEGORIES})
        instances = listed | {"annotations": _instances(CONTENT), "categories": things}
        _write(root / f"annotations/instances_{split}.json", instances)
    for split in ("test", "test-dev"):
        _write(root / f"annotations/image_info_{split}2017.json", listed | {"categories": CATEGORIES})


def miniature_coconut(folder):
    """Adds COCO's unlabeled images as pseudo_label labels them, COCONut S, B, and L, and its validation labels.

    The JSONs have no crowds, no boxes, and areas of floating point; L has images of Objects365.
    """
    root = Path(folder) / "coco"
    images, annotations, _ = _renamed(root, "unlabeled2017", "{:012d}", 400000)
    _copy(CONTENT["annotations"], root / "panoptic_unlabeled2017", annotations)
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    _write(root / "annotations/panoptic_unlabeled2017.json", content)
    relabeled = _relabeled(CONTENT["annotations"])
    parts = [(CONTENT["images"], relabeled, CONTENT["annotations"])]
    _coconut(root, "coconut_s", parts)
    parts.append(_renamed(root, None, "{:012d}", 400000))
    _coconut(root, "coconut_b", parts)
    parts.append(_renamed(root, "objects365", "objects365_v2_{:08d}", 900000000))
    _coconut(root, "coconut_l", parts)
    _coconut(root, "relabeled_coco_val", parts[:1])


def _coconut(root, name, parts):
    """Writes a JSON and its PNGs from (images, annotations, annotations of the same PNGs in COCO) of several parts."""
    for _, annotations, originals in parts:
        _copy(originals, root / name, annotations)
    content = {
        "images": [image for images, _, _ in parts for image in images],
        "annotations": [annotation for _, annotations, _ in parts for annotation in annotations],
        "categories": CATEGORIES,
    }
    _write(root / f"annotations/{name}.json", content)


def _renamed(root, folder, stem, first):
    """Returns (images, annotations, COCO's annotations) of COCO's images by other names, copied into a folder."""
    images, annotations = [], []
    for number, (image, annotation) in enumerate(zip(CONTENT["images"], CONTENT["annotations"], strict=True), first):
        images.append(image | {"id": number, "file_name": f"{stem.format(number)}.jpg"})
        annotations.append(annotation | {"image_id": number, "file_name": f"{stem.format(number)}.png"})
    if folder:
        _copy(CONTENT["images"], root / folder, images)
    return images, _relabeled(annotations), CONTENT["annotations"]


def _relabeled(annotations):
    """The annotations as COCONut writes them."""
    return [
        annotation
        | {
            "segments_info": [
                {
                    **{"id": segment["id"], "category_id": segment["category_id"], "area": float(segment["area"])},
                    "isthing": int(segment["category_id"] in THINGS),
                }
                for segment in annotation["segments_info"]
            ]
        }
        for annotation in annotations
    ]


def _instances(content):
    """The panoptic things as instances."""
    annotations = []
    for annotation in content["annotations"]:
        ids = rgb2id(np.asarray(Image.open(COCO_SAMPLE / annotation["file_name"])))
        for segment in annotation["segments_info"]:
            if segment["category_id"] in THINGS:
                rle = mask_util.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
                mask = {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
                number = {"id": len(annotations) + 1, "image_id": annotation["image_id"]}
                annotations.append(segment | number | mask)
    return annotations


def _copy(entries, folder, names=()):
    """Copies the files of entries into a folder, under the names of other entries if there are any."""
    folder.mkdir(exist_ok=True)
    for entry, named in zip(entries, names or entries, strict=True):
        shutil.copyfile(COCO_SAMPLE / entry["file_name"], folder / named["file_name"])


def _write(file, content):
    file.write_text(json.dumps(content))
