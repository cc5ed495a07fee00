"""The datasets below $DETECTRON2_DATASETS that Detectron2 itself lacks."""

import importlib
import json
import os

import layouts
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from kmax_d2.data import datasets
from kmax_d2.data.check import registered
from kmax_d2.data.datasets import coconut
from kmax_d2.data.datasets.ade20k import CATEGORIES
from kmax_d2.engine import load_config
from kmax_d2.engine.setup import prepare_datasets
from kmax_d2.errors import UserError
from kmax_d2.modeling.build import thing_mask

# In Mask2Former's layout and COCO's: dataset, image folder, PNG folder, JSON file.
ADE = "ADEChallengeData2016"
LAYOUT = {
    f"ade20k_panoptic_{split}": (f"{ADE}/images/{images}", f"{ADE}/{name}", f"{ADE}/{name}.json")
    for split, images in (("train", "training"), ("val", "validation"))
    for name in [f"ade20k_panoptic_{split}"]
} | {
    "coco_2017_unlabeled_panoptic": (
        "coco/unlabeled2017",
        "coco/panoptic_unlabeled2017",
        "coco/annotations/panoptic_unlabeled2017.json",
    ),
}
COCONUT = {
    f"{name}_panoptic": (f"coco/{folders[-1]}", f"coco/{name}", f"coco/annotations/{name}.json")
    for name, folders in coconut.IMAGES.items()
}


# --- ADE20K's classes ---


def test_ade20k_has_100_things_and_50_stuff_classes():
    assert [category["id"] for category in CATEGORIES] == list(range(150))
    assert sum(category["isthing"] for category in CATEGORIES) == 100
    assert len({category["name"] for category in CATEGORIES}) == 150


def test_ade20k_classes():
    """Among them those that differ in one word."""
    things = "7 bed, 12 person, 32 fence, 42 column, 53 stairs, 58 screen door, 93 pole, 121 step, 130 screen"
    stuff = "0 wall, 34 rock, 59 stairway, 63 blind, 77 bar, 94 land, 99 buffet, 141 crt screen, 145 shower"
    for isthing, classes in ((1, f"{things}, 143 monitor, 149 flag"), (0, stuff)):
        for index, name in (item.split(" ", 1) for item in classes.split(", ")):
            assert CATEGORIES[int(index)] == {"id": int(index), "name": name, "isthing": isthing}


# --- the catalogs ---


def test_metadata_are_known_without_files():
    datasets.register_shared()
    for name, folders in LAYOUT.items():
        metadata = MetadataCatalog.get(name)
        roots = (metadata.image_root, metadata.panoptic_root, metadata.panoptic_json)
        for path, end in zip(roots, folders, strict=True):
            assert path.endswith(f"/{end}")
    ade20k, unlabeled = (MetadataCatalog.get(name) for name in ("ade20k_panoptic_val", "coco_2017_unlabeled_panoptic"))
    assert ade20k.evaluator_type == "ade20k_panoptic_seg"
    assert ade20k.stuff_classes[7] == "bed"
    assert len(ade20k.thing_dataset_id_to_contiguous_id) == 100
    assert len(ade20k.stuff_dataset_id_to_contiguous_id) == 50
    assert unlabeled.evaluator_type == "coco_panoptic_seg"
    labeled = MetadataCatalog.get("coco_2017_train_panoptic")
    for key in ("stuff_classes", "thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"):
        assert getattr(unlabeled, key) == getattr(labeled, key)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Datasets registered as by an import with $DETECTRON2_DATASETS set to a temporary folder."""

    with monkeypatch.context() as changed:
        changed.setenv("DETECTRON2_DATASETS", str(tmp_path))
        _register_again()
        yield
    _register_again()


def _register_again():
    layouts.forget()
    importlib.reload(datasets)
    datasets.register_shared()


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("name", [*LAYOUT, *COCONUT])
def test_a_missing_dataset(name, tmp_path):
    with pytest.raises(
        UserError, match=f"cannot read the panoptic annotations {tmp_path / (LAYOUT | COCONUT)[name][2]}"
    ):
        DatasetCatalog.get(name)


@pytest.mark.usefixtures("environment")
def test_the_classes_of_mapillary_vistas_are_those_of_its_json(tmp_path):
    for version, config in (("1.2", "mapillary/r50"), ("2.0", "mapillary/r50_v2")):
        count = 3 + (version == "2.0")
        with pytest.raises(UserError, match=rf"mapillary_vistas/training/v{version}/panoptic/panoptic_20"):
            prepare_datasets(load_config(config))
        for folder in ("training", "validation"):
            pngs = tmp_path / "mapillary_vistas" / folder / f"v{version}" / "panoptic"
            pngs.mkdir(parents=True)
            (tmp_path / "mapillary_vistas" / folder / "images").mkdir(exist_ok=True)
            Image.new("RGB", (6, 4)).save(tmp_path / "mapillary_vistas" / folder / "images/a.jpg")
            Image.new("RGB", (6, 4), (1, 0, 0)).save(pngs / "a.png")
            categories = [{"id": id_, "name": f"class {id_}", "isthing": id_ % 2} for id_ in range(1, 1 + count)]
            content = {
                "images": [{"id": "a", "file_name": "a.jpg", "height": 4, "width": 6}],
                "annotations": [
                    {"image_id": "a", "file_name": "a.png", "segments_info": [{"id": 1, "category_id": 2}]}
                ],
                "categories": categories,
            }
            (pngs / {"1.2": "panoptic_2018.json", "2.0": "panoptic_2020.json"}[version]).write_text(json.dumps(content))
        cfg = load_config(config)
        prepare_datasets(cfg)
        assert count == cfg.MODEL.KMAX.NUM_CLASSES and thing_mask(cfg)[:3] == [True, False, True]
        (record,) = DatasetCatalog.get(cfg.DATASETS.TEST[0])
        assert record["segments_info"][0] == {"id": 1, "category_id": 1, "isthing": False}
        assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).stuff_colors[0] == [128, 0, 0]
        assert registered(cfg.DATASETS.TEST[0]).faults == []


@pytest.mark.usefixtures("environment")
def test_coconuts_images_are_found_in_all_of_their_folders(tmp_path):
    for folder, name in (("train2017", "a"), ("unlabeled2017", "b")):
        (tmp_path / "coco" / folder).mkdir(parents=True)
        Image.new("RGB", (6, 4)).save(tmp_path / f"coco/{folder}/{name}.jpg")
    for folder in ("annotations", "coconut_b"):
        (tmp_path / "coco" / folder).mkdir()
    for name in "ab":
        Image.new("RGB", (6, 4), (1, 0, 0)).save(tmp_path / f"coco/coconut_b/{name}.png")
    content = {
        "images": [{"id": name, "file_name": f"{name}.jpg", "height": 4, "width": 6} for name in "ab"],
        "annotations": [
            {"image_id": name, "file_name": f"{name}.png", "segments_info": [{"id": 1, "category_id": 1}]}
            for name in "ab"
        ],
        "categories": COCO_CATEGORIES,
    }
    (tmp_path / "coco/annotations/coconut_b.json").write_text(json.dumps(content))
    found = [record["file_name"] for record in DatasetCatalog.get("coconut_b_panoptic")]
    assert found == [str(tmp_path / "coco" / file) for file in ("train2017/a.jpg", "unlabeled2017/b.jpg")]


@pytest.mark.usefixtures("environment")
def test_records_below_the_folder_of_the_environment(tmp_path):
    for name, (images, pngs, json_file) in (LAYOUT | COCONUT).items():
        categories = CATEGORIES if name.startswith("ade20k") else COCO_CATEGORIES
        for folder in (images, pngs, os.path.dirname(json_file)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for folder, file in ((images, "a.jpg"), (pngs, "a.png")):
            Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / folder / file)
        thing, stuff = (next(c["id"] for c in categories if bool(c["isthing"]) == wanted) for wanted in (True, False))
        segments = [{"id": 1, "category_id": thing, "iscrowd": 0}, {"id": 2, "category_id": stuff, "iscrowd": 0}]
        content = {
            "images": [{"id": 3, "file_name": "a.jpg", "height": 4, "width": 6}],
            "annotations": [{"image_id": 3, "file_name": "a.png", "segments_info": segments}],
            "categories": categories,
        }
        (tmp_path / json_file).write_text(json.dumps(content))
        (record,) = DatasetCatalog.get(name)
        assert record["file_name"] == str(tmp_path / images / "a.jpg")
        assert record["pan_seg_file_name"] == str(tmp_path / pngs / "a.png")
        classes = [(segment["category_id"], segment["isthing"]) for segment in record["segments_info"]]
        # The first thing and the first stuff class, contiguous.
        assert classes == ([(7, True), (0, False)] if name.startswith("ade20k") else [(0, True), (80, False)])


# --- the configs ---


@pytest.mark.parametrize(
    ("config", "things", "some"),
    [
        ("ade20k/r50_641", 100, {7: True, 12: True, 53: True, 0: False, 59: False, 141: False}),
        ("coco/convnext_l_unlabeled", 80, {0: True, 79: True, 80: False, 132: False}),
        ("cityscapes/r50", 8, {10: False, 11: True, 18: True}),
    ],
)
def test_things_of_a_config(config, things, some):
    cfg = load_config(config)
    prepare_datasets(cfg)  # checks that its datasets exist and agree in their classes
    known = thing_mask(cfg)
    assert len(known) == cfg.MODEL.KMAX.NUM_CLASSES
    assert sum(known) == things
    assert {index: known[index] for index in some} == some
