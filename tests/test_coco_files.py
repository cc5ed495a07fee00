"""Results for other programs, read by them: panopticapi's format by our evaluator, instances by pycocotools."""

import json

import numpy as np
import programs
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kmax_d2.data import panoptic_png
from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.errors import UserError
from kmax_d2.evaluation.panoptic import PanopticEvaluator
from kmax_d2.inference import load
from kmax_d2.tools import check_dataset

FILES = ("a/0.png", "a/1.png", "b/0.png")  # of which two have one name


@pytest.fixture(scope="module")
def demo():
    return programs.load(programs.DEMO)


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    """Three images and one that is broken, and everything that the demo writes about them."""
    folder = tmp_path_factory.mktemp("coco")
    for number, name in enumerate(FILES):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(shapes.draw(1, number)[0]).save(folder / name)
    (folder / "a" / "2.png").write_bytes(b"broken")
    command = ["--input", folder / "a", folder / "b", "--output", folder / "out", "--config-file", "shapes/quickstart"]
    command += ["--save-json", folder / "all.json", "--save-instances", folder / "things.json"]
    command += ["--save-semantic", folder / "classes", "--opts", "MODEL.DEVICE", "cpu"]
    with pytest.raises(SystemExit) as status:
        demo.main([str(word) for word in command])
    assert status.value.code == 1
    return folder


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_panoptic_files_are_a_dataset_that_equals_itself(folder):
    assert names(folder / "all") == names(folder / "out") == names(folder / "classes") == ["0-2.png", "0.png", "1.png"]
    images = json.loads((folder / "all.json").read_text())["images"]
    assert [image["file_name"] for image in images] == list(FILES)
    check_dataset.main(
        [
            *("--images", str(folder), "--panoptic", str(folder / "all"), "--json", str(folder / "all.json")),
            *("--output", str(folder / "check")),
        ]
    )
    coco_panoptic.register("demo_itself", str(folder), str(folder / "all"), str(folder / "all.json"))
    evaluator = PanopticEvaluator("demo_itself")
    evaluator.reset()
    for record in DatasetCatalog.get("demo_itself"):
        ids = panoptic_png.read(record["pan_seg_file_name"])
        evaluator.process([record], [{"panoptic_seg": (torch.from_numpy(ids), record["segments_info"])}])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100
    assert MetadataCatalog.get("demo_itself").stuff_colors == [each["color"] for each in shapes.CATEGORIES]


def test_files_say_what_the_predictor_finds(folder):
    result = load("shapes/quickstart", device="cpu")(str(folder / "b" / "0.png"))
    assert np.array_equal(panoptic_png.read(str(folder / "all" / "0-2.png")), result.panoptic.ids)
    annotation = json.loads((folder / "all.json").read_text())["annotations"][2]
    assert annotation["file_name"] == "0-2.png" and annotation["image_id"] == 3
    for segment, entry in zip(result.panoptic.segments, annotation["segments_info"], strict=True):
        assert (entry["category_id"], entry["area"]) == (segment.class_id + 1, segment.area)
    assert np.array_equal(np.asarray(Image.open(folder / "classes" / "0-2.png")), result.semantic + 1)


def test_instances_are_read_by_pycocotools(folder):
    coco = COCO(str(folder / "things.json"))
    assert len(coco.imgs) == 3 and len(coco.anns) > 3
    found = load("shapes/quickstart", device="cpu")(str(folder / "a" / "1.png")).instances
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[2]))
    masks = np.stack([coco.annToMask(annotation) for annotation in annotations])
    assert np.array_equal(masks.astype(bool), found.pred_masks.numpy())
    evaluation = COCOeval(coco, coco.loadRes(list(coco.anns.values())), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.99


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--save-json {}/new.txt", "the name of {}/new.txt must end in .json"),
        ("--save-instances {}/users.json", "{}/users.json exists and was not made by kmax_d2"),
        ("--tile 16", "--tile must be at least 64 pixels, not 16"),
        ("--assignments --tile 64", "--assignments are those of a whole image"),
    ],
)
def test_what_cannot_work(demo, folder, arguments, line):
    (folder / "users.json").write_text("{}")
    words = ["--config-file", "shapes/quickstart", "--input", str(folder / "a" / "0.png")]
    words += arguments.replace("{}", str(folder)).split()
    with pytest.raises(UserError, match=line.replace("{}", str(folder))):
        demo.main(words)
    assert names(folder / "a") == ["0.png", "1.png", "2.png"] and (folder / "users.json").read_text() == "{}"
