"""A folder of images becomes a dataset whose labels are the model's own, on the shipped quickstart model."""

import json
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import kmax_d2
from kmax_d2 import model_zoo
from kmax_d2.checkpoint import load_weights
from kmax_d2.data import PanopticTestMapper, PanopticTrainMapper
from kmax_d2.data.check import unregistered
from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.data.segment_ids import rgb2id
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError
from kmax_d2.tools.pseudo_label import main

CONFIG = "shapes/quickstart"
WEIGHTS = str(Path(kmax_d2.__file__).parent / "assets" / "quickstart.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn images in "unlabeled", one of which is no image; one is PNG, and gray."""
    folder = tmp_path_factory.mktemp("pseudo_label")
    shapes.write_split(folder, "unlabeled", 4, 11)
    images = folder / "unlabeled"
    Image.open(images / "0003.jpg").convert("L").save(images / "0003.png")
    (images / "0003.jpg").unlink()
    (images / "0009.jpg").write_bytes((images / "0000.jpg").read_bytes()[:500])
    (images / "notes.txt").write_text("no image")
    return folder


def command(folder, output):
    arguments = ["--config-file", CONFIG, "--weights", WEIGHTS, "--input", str(folder / "unlabeled")]
    return [*arguments, "--output", str(folder / output)]


def run(folder, output="made", *options):
    main([*command(folder, output), "DATALOADER.NUM_WORKERS", "0", *options])
    return paths(folder, output)


def paths(folder, output):
    """(images, PNGs, JSON)"""
    made = folder / output
    return folder / "unlabeled", made / "panoptic_unlabeled", made / "annotations" / "panoptic_unlabeled.json"


@pytest.fixture(scope="module")
def made(folder):
    return run(folder)


def test_labels_are_the_models_own(made):
    images, pngs, json_file = made
    cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu", "MODEL.KMAX.NORM", "BN"])
    model = build_model(cfg).eval()
    load_weights(model, WEIGHTS)
    content = json.loads(json_file.read_text())
    entries = {image["file_name"]: image for image in content["images"]}
    annotations = {annotation["image_id"]: annotation for annotation in content["annotations"]}
    assert list(entries) == ["0000.jpg", "0001.jpg", "0002.jpg", "0003.png"]
    for name, image in entries.items():
        with torch.no_grad():
            ids, segments = model([PanopticTestMapper(cfg)({"file_name": str(images / name)})])[0]["panoptic_seg"]
        assert (image["height"], image["width"]) == tuple(ids.shape)
        annotation = annotations[image["id"]]
        written = rgb2id(np.asarray(Image.open(pngs / f"{Path(name).stem}.png")))
        assert annotation["file_name"] == f"{Path(name).stem}.png" and np.array_equal(written, ids.numpy())
        assert {segment["id"]: segment["category_id"] for segment in annotation["segments_info"]} == {
            segment["id"]: shapes.CATEGORIES[segment["category_id"]]["id"] for segment in segments
        }
        assert len(segments) >= 2
    for key in ("id", "isthing"):
        assert [category[key] for category in content["categories"]] == [c[key] for c in shapes.CATEGORIES]


def test_labels_are_a_sound_dataset_to_train_with(made):
    images, pngs, json_file = map(str, made)
    dataset = unregistered(images, pngs, json_file)
    assert dataset.faults == []
    assert [findings.faults for findings in dataset.check(workers=1)] == [[]] * 4
    assert dataset.metadata.stuff_classes == MetadataCatalog.get("shapes_train").stuff_classes
    records = coco_panoptic.load(json_file, images, pngs)
    assert len(PanopticTrainMapper(load_config(CONFIG))(records[0])["segment_classes"]) >= 2


def test_broken_images_are_named_and_left_out(folder, capsys):
    run(folder)
    output = capsys.readouterr().out
    assert "skipped: cannot read the image" in output
    assert "unlabeled/0009.jpg" in output
    assert "left out: 1 images that cannot be read, 0 in which the model finds nothing" in output


def test_interrupted_run_goes_on(folder):
    _, pngs, json_file = run(folder, "interrupted")
    files = sorted(pngs.glob("*.png"))
    before, content = [file.read_bytes() for file in files], json_file.read_text()
    files[0].unlink()
    files[1].write_bytes(before[1][:200])
    json_file.unlink()
    kept = [file.stat().st_mtime_ns for file in files[2:]]
    run(folder, "interrupted")
    assert [file.read_bytes() for file in files] == before
    assert [file.stat().st_mtime_ns for file in files[2:]] == kept
    assert json_file.read_text() == content


def test_another_models_labels_are_not_mixed_in(folder, made):
    with pytest.raises(UserError, match=r"panoptic_unlabeled holds labels from another model or other options"):
        run(folder, "made", "MODEL.KMAX.TEST.PIXEL_THRESHOLD", "0.5")


def test_model_that_finds_nothing_gives_no_dataset(folder):
    with pytest.raises(UserError, match=r"none of the 5 images in .*unlabeled got a label"):
        run(folder, "nothing", "MODEL.KMAX.TEST.PIXEL_THRESHOLD", "1.0")


def test_processes_share_the_images(folder, made):
    arguments = [*command(folder, "shared"), "--num-gpus", 2, "DATALOADER.NUM_WORKERS", 0]
    done = programs.run("-m", "kmax_d2.tools.pseudo_label", *arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    _, pngs, json_file = paths(folder, "shared")
    assert json_file.read_text() == made[2].read_text()
    for file in sorted(made[1].glob("*.png")):
        assert (pngs / file.name).read_bytes() == file.read_bytes()


def test_ids_are_the_numbers_of_coco_files(tmp_path):
    shapes.write_split(tmp_path, "unlabeled", 1, 11)
    (tmp_path / "unlabeled/0000.jpg").rename(tmp_path / "unlabeled/000000000042.jpg")
    _, pngs, json_file = run(tmp_path)
    content = json.loads(json_file.read_text())
    assert content["images"][0]["id"] == content["annotations"][0]["image_id"] == 42
    assert (pngs / "000000000042.png").is_file()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images in the folder"),
        (["a.jpg", "a.png"], "2 images in .* are named a except for their suffix"),
    ],
)
def test_folders_that_give_no_dataset(tmp_path, names, message):
    (tmp_path / "unlabeled").mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "unlabeled" / name)
    with pytest.raises(UserError, match=message):
        run(tmp_path)
    with pytest.raises(UserError, match=r"no folder .*elsewhere"):
        main([*command(tmp_path / "elsewhere", "made")])


def test_weights_are_needed(folder):
    arguments = command(folder, "without")
    del arguments[2:4]
    with pytest.raises(UserError, match=r"no weights: set MODEL\.WEIGHTS"):
        main([*arguments, "MODEL.WEIGHTS", ""])


def test_published_weights_are_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(model_zoo.WEIGHTS, "coco/r50", "http://127.0.0.1:9/r50.tar.gz")
    shapes.write_split(tmp_path, "unlabeled", 1, 11)
    arguments = ["--config-file", "coco/r50", *command(tmp_path, "made")[4:], "MODEL.DEVICE", "cpu"]
    with pytest.raises(UserError, match=r"cannot download .*/r50\.tar\.gz"):
        main(arguments)


def test_annotations_of_the_user_are_kept(folder, made):
    _, pngs, json_file = made
    kept = json_file.read_text(), (pngs / "0000.png").read_bytes()
    run(folder)  # over its own
    json_file.write_text(json.dumps(json.loads(kept[0]) | {"info": {}}))
    with pytest.raises(UserError, match=r"panoptic_unlabeled\.json exists and was not made by kmax_d2"):
        run(folder)
    json_file.write_text(kept[0])
    Image.open(pngs / "0000.png").save(pngs / "0000.png", pnginfo=PngInfo())
    with pytest.raises(UserError, match=r"0000\.png exists and was not made by kmax_d2"):
        run(folder)
    main([*command(folder, "made"), "--overwrite", "DATALOADER.NUM_WORKERS", "0"])
    assert (pngs / "0000.png").read_bytes() == kept[1]
