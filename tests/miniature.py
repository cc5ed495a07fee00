"""COCO, Cityscapes and ADE20K with two images per split, in their official layouts below one folder."""

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES, _get_builtin_metadata
from detectron2.data.datasets.cityscapes_panoptic import register_all_cityscapes_panoptic
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic
from PIL import Image

from kmax_d2.data.datasets import register_all
from kmax_d2.data.segment_ids import rgb2id

COCO_SAMPLE = Path(__file__).parent / "data" / "coco_sample"
SCRIPTS = str(Path(__file__).parents[1] / "datasets")


def load_script(name):
    """Imports a script of datasets/ with that folder on the search path, as in a run of the script."""
    if SCRIPTS not in sys.path:
        sys.path.insert(0, SCRIPTS)
    return importlib.import_module(name)


# --- COCO: two real images with crowds, at a third of their size ---


def miniature_coco(folder):
    """Writes `coco/` with the same images in train2017, val2017 and test2017; instances are the panoptic things."""
    root = Path(folder) / "coco"
    content = json.loads((COCO_SAMPLE / "panoptic.json").read_text())
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017", "test2017"):
        (root / split).mkdir()
        for image in content["images"]:
            os.link(COCO_SAMPLE / image["file_name"], root / split / image["file_name"])
    for split in ("train2017", "val2017"):
        (root / f"panoptic_{split}").mkdir()
        for annotation in content["annotations"]:
            os.link(COCO_SAMPLE / annotation["file_name"], root / f"panoptic_{split}" / annotation["file_name"])
        _write(root / f"annotations/panoptic_{split}.json", content | {"categories": COCO_CATEGORIES})
        instances = {"info": {}, "images": content["images"], "annotations": _instances(content), "categories": things}
        _write(root / f"annotations/instances_{split}.json", instances)
    listed = {"info": {}, "images": content["images"], "categories": things}
    for split in ("test", "test-dev"):
        _write(root / f"annotations/image_info_{split}2017.json", listed)


def _instances(content):
    things = {category["id"] for category in COCO_CATEGORIES if category["isthing"]}
    annotations = []
    for annotation in content["annotations"]:
        ids = rgb2id(np.asarray(Image.open(COCO_SAMPLE / annotation["file_name"])))
        for segment in annotation["segments_info"]:
            if segment["category_id"] in things:
                rle = mask_util.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
                mask = {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
                number = {"id": len(annotations) + 1, "image_id": annotation["image_id"]}
                annotations.append(segment | number | mask)
    return annotations


def _write(file, content):
    file.write_text(json.dumps(content))


def _prepare(name, root):
    """Runs the project's script for a dataset."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        load_script(f"prepare_{name}_panoptic").main(["--root", str(root), "--workers", "1"])


# --- Cityscapes: drawn scenes, whose polygons cityscapesscripts turns into ground truth ---


def miniature_cityscapes(folder):
    """Writes `cityscapes/` with gtFine (not of test) and leftImg8bit, and runs the project's script on it."""
    root = Path(folder) / "cityscapes"
    for split, cities in (("train", ("aachen", "bochum")), ("val", ("frankfurt", "munster")), ("test", ("berlin",))):
        for index, city in enumerate(cities):
            stem = f"{city}_{index:06d}_000019"
            objects = _scene(index)
            (root / "leftImg8bit" / split / city).mkdir(parents=True)
            _paint(objects).save(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
            if split == "test":
                continue
            (root / "gtFine" / split / city).mkdir(parents=True)
            file = root / "gtFine" / split / city / f"{stem}_gtFine_polygons.json"
            _write(file, {"imgHeight": 64, "imgWidth": 128, "objects": objects})
    _prepare("cityscapes", root)


def _scene(index):
    """Overlapping cars, people, a rider on a bicycle, a group of cars, and regions that are not evaluated."""
    shift = 7 * index
    boxes = [
        ("sky", 0, 0, 127, 24),
        ("building", 20 + shift, 6, 70, 30),
        ("vegetation", 71, 10, 127, 30),
        ("road", 0, 31, 127, 63),
        ("sidewalk", 0, 31, 30, 40),
        ("car", 34, 30 - index, 58, 44),
        ("car", 50 + shift, 32, 76, 48),
        ("cargroup", 84, 28, 106, 36),
        ("person", 4, 24, 13, 44),
        ("person", 17, 26, 25, 45),
        ("bicycle", 100 - shift, 44, 122 - shift, 56),
        ("rider", 104 - shift, 34, 114 - shift, 50),
        ("ego vehicle", 0, 58, 127, 63),
    ]
    return [
        {"label": label, "polygon": [[left, top], [right, top], [right, bottom], [left, bottom]]}
        for label, left, top, right, bottom in boxes
    ]


def _paint(objects):
    image = np.random.RandomState(0).randint(0, 60, (64, 128, 3)).astype(np.uint8)
    for number, item in enumerate(objects):
        (left, top), (right, bottom) = item["polygon"][0], item["polygon"][2]
        image[top : bottom + 1, left : right + 1] += np.array([13 * number, 190 - 15 * number, 90], np.uint8)
    return Image.fromarray(image)


# --- ADE20K: drawn scenes, whose panoptic annotations the project's script creates ---


def miniature_ade20k(folder):
    """Writes `ADEChallengeData2016/` with both kinds of annotations, and runs the project's script on it."""
    root = Path(folder) / "ADEChallengeData2016"
    for split, name in (("train", "training"), ("val", "validation")):
        for kind in ("images", "annotations", "annotations_instance"):
            (root / kind / name).mkdir(parents=True)
        for number in (1, 2):
            semantic = np.zeros((48, 64), np.uint8)  # void
            instances = np.zeros((48, 64, 3), np.uint8)
            semantic[:20], semantic[20:40] = 1, 4  # wall and floor
            for index, left in enumerate((3, 20, 40), start=1):
                region = slice(12 + 3 * number, 30), slice(left, left + 13)
                semantic[region] = 8  # beds
                instances[region] = 1, index, 0
            semantic[2:8, 50:60] = 13  # a person in no instance: void in the panoptic data
            stem = f"ADE_{split}_{number:08d}"
            Image.fromarray(semantic).save(root / f"annotations/{name}/{stem}.png")
            Image.fromarray(instances).save(root / f"annotations_instance/{name}/{stem}.png")
            picture = np.stack([12 * semantic, 40 * instances[..., 1], 100 + 2 * semantic], axis=-1)
            Image.fromarray(picture).save(root / f"images/{name}/{stem}.jpg")
    _prepare("ade20k", root)


# --- the catalogs ---


@contextlib.contextmanager
def registered(folder):
    """Registers COCO, Cityscapes and ADE20K below a folder, without the environment variable."""
    _register(str(folder))
    try:
        yield
    finally:
        _register(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))


def _register(root):
    coco = {f"coco_2017_{split}_panoptic": f"{split}2017" for split in ("train", "val")}
    cityscapes = [f"cityscapes_fine_panoptic_{split}" for split in ("train", "val")]
    for name in [*coco, *cityscapes]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    for name, split in coco.items():
        register_coco_panoptic(
            name,
            _get_builtin_metadata("coco_panoptic_standard"),
            os.path.join(root, "coco", split),
            os.path.join(root, "coco", f"panoptic_{split}"),
            os.path.join(root, "coco", "annotations", f"panoptic_{split}.json"),
            os.path.join(root, "coco", "annotations", f"instances_{split}.json"),
        )
    register_all_cityscapes_panoptic(root)
    register_all(root)
