"""The scripts in datasets/ on miniatures of the official layouts."""

import json
import shutil

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic
from layouts import load_script
from PIL import Image

from kmax_d2.data import panoptic_png
from kmax_d2.data.check import unregistered
from kmax_d2.data.datasets import ade20k, coco_panoptic, shapes
from kmax_d2.data.segment_ids import rgb2id
from kmax_d2.errors import UserError
from kmax_d2.files import MARK


def faults(images, pngs, json_file):
    dataset = unregistered(str(images), str(pngs), str(json_file))
    return dataset.faults + [fault for findings in dataset.check(workers=1) for fault in findings.faults]


def read_ids(file):
    return rgb2id(np.asarray(Image.open(file)))


def assert_restartable(main, folder, json_file):
    """A second run creates what is missing or truncated, and nothing else."""
    files = sorted(folder.glob("*.png"))
    assert len(files) >= 3
    before, content = [file.read_bytes() for file in files], json.loads(json_file.read_text())
    files[0].unlink()
    files[1].write_bytes(before[1][:-20])
    made = [file.stat().st_mtime_ns for file in files[2:]]
    json_file.unlink(missing_ok=True)
    main()
    assert [file.read_bytes() for file in files] == before
    assert [file.stat().st_mtime_ns for file in files[2:]] == made
    assert json.loads(json_file.read_text()) == content
    assert sorted(folder.iterdir()) == files


def ade_id(category, instance=0):
    return 1000 * (category + 1) + instance


@pytest.fixture
def ade():
    return load_script("prepare_ade20k_panoptic")


@pytest.fixture
def ade_root(tmp_path):
    """Three images per split: wall (0) and floor (3) with two beds (7) and a fan (139), one of the last things."""
    for split, folder in (("train", "training"), ("val", "validation")):
        for kind in ("images", "annotations", "annotations_instance"):
            (tmp_path / kind / folder).mkdir(parents=True)
        for number in range(1, 4):
            semantic = np.zeros((8, 12), np.uint8)
            semantic[:4], semantic[4:7] = 0 + 1, 3 + 1
            semantic[2:5, 2:8] = 7 + 1
            semantic[0, 0] = 139 + 1
            instances = np.zeros((8, 12, 3), np.uint8)
            instances[2:5, 2:5] = 1, 1, 0
            instances[2:5, 5:8] = 1, 2, 0
            instances[0, 0] = 93, 3, 0
            name = f"ADE_{split}_{number:08d}"
            Image.fromarray(semantic).save(tmp_path / "annotations" / folder / f"{name}.png")
            Image.fromarray(instances).save(tmp_path / "annotations_instance" / folder / f"{name}.png")
            Image.fromarray(instances * 20).save(tmp_path / "images" / folder / f"{name}.jpg")
    return tmp_path


def test_ade20k_classes(ade):
    """The instance annotations number the things in the order of all classes; their list is public."""
    assert len(ade.THINGS) == 100 and len(ade.STUFF) == 50
    names = [ade20k.CATEGORIES[index]["name"] for index in ade.THINGS[:12]]
    assert ", ".join(names) == "bed, window, cabinet, person, door, table, curtain, chair, car, painting, sofa, shelf"
    assert ade.THINGS[92] == 139


def test_ade20k_ids(ade):
    """Instances cover stuff; a thing without an instance is void."""
    semantic = np.array([[0, 1, 1, 8, 8, 4]], np.uint8)
    instances = np.array([[[0, 0], [0, 0], [1, 5], [1, 5], [0, 0], [100, 6]]], np.uint8)
    expected = [0, ade_id(0), ade_id(7, 5), ade_id(7, 5), 0, ade_id(int(ade.THINGS[-1]), 6)]
    assert ade.panoptic_ids(semantic, instances).tolist() == [expected]
    with pytest.raises(UserError, match="an instance has a class outside 1 to 100"):
        ade.panoptic_ids(semantic, np.full((1, 6, 2), (101, 1), np.uint8))
    with pytest.raises(UserError, match="6×1 and 5×1 differ"):
        ade.panoptic_ids(semantic, instances[:, 1:])


def test_ade20k(ade, ade_root, capsys):
    ade.main(["--root", str(ade_root), "--workers", "1"])
    for split, folder in (("train", "training"), ("val", "validation")):
        images, pngs, json_file = (
            ade_root / "images" / folder,
            ade_root / f"ade20k_panoptic_{split}",
            ade_root / f"ade20k_panoptic_{split}.json",
        )
        assert faults(images, pngs, json_file) == []
        records = coco_panoptic.load(str(json_file), str(images), str(pngs))
        assert len(records) == 3
        assert {(s["category_id"], s["area"], s["isthing"]) for s in records[0]["segments_info"]} == {
            (0, 4 * 12 - 12 - 1, False),
            (3, 3 * 12 - 6, False),
            (7, 9, True),
            (139, 1, True),
        }
        ids = read_ids(records[0]["pan_seg_file_name"])
        assert ids[7].tolist() == [0] * 12
        assert ids[2].tolist() == [ade_id(0)] * 2 + [ade_id(7, 1)] * 3 + [ade_id(7, 2)] * 3 + [ade_id(0)] * 4


def test_ade20k_resumes(ade, ade_root):
    def main():
        ade.main(["--root", str(ade_root), "--splits", "val", "--workers", "2"])

    main()
    assert not (ade_root / "ade20k_panoptic_train").exists()
    assert_restartable(main, ade_root / "ade20k_panoptic_val", ade_root / "ade20k_panoptic_val.json")


def test_ade20k_without_its_inputs(ade, ade_root):
    arguments = ["--root", str(ade_root), "--workers", "1"]
    file = ade_root / "annotations_instance/training/ADE_train_00000002.png"
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read the image .*annotations_instance.*ADE_train_00000002\.png"):
        ade.main(arguments)
    shutil.rmtree(ade_root / "annotations_instance/validation")
    with pytest.raises(UserError, match=r"no instance annotations .*annotations_instance/validation/\*\.png"):
        ade.main(arguments)


def test_coco_semantic(monkeypatch, tmp_path):
    script = load_script("prepare_coco_semantic")
    coco = tmp_path / "coco"
    shapes.write_split(coco, "val2017", 3, 5)
    (coco / "annotations").mkdir()
    (coco / "panoptic_val2017.json").rename(coco / "annotations/panoptic_val2017.json")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    content = json.loads((coco / "annotations/panoptic_val2017.json").read_text())
    void = content["annotations"][1]["segments_info"].pop()["id"]
    (coco / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
    script.main(["--splits", "val", "--workers", "1"])
    for annotation in content["annotations"]:
        ids = read_ids(coco / "panoptic_val2017" / annotation["file_name"])
        classes = np.asarray(Image.open(coco / "panoptic_semseg_val2017" / annotation["file_name"]))
        assert classes.shape == ids.shape
        for segment in annotation["segments_info"]:
            assert (classes[ids == segment["id"]] == segment["category_id"] - 1).all()
        assert (classes == 255).any() == (annotation is content["annotations"][1])
    assert (classes_of_void := np.asarray(Image.open(coco / "panoptic_semseg_val2017/0001.png"))).dtype == np.uint8
    assert (classes_of_void[read_ids(coco / "panoptic_val2017/0001.png") == void] == 255).all()
    with pytest.raises(UserError, match=r"panoptic_train2017\.json: No such file"):
        script.main([])


def box(label, left, top, right, bottom):
    return {"label": label, "polygon": [[left, top], [right, top], [right, bottom], [left, bottom]]}


@pytest.fixture
def cityscapes():
    pytest.importorskip("cityscapesscripts")
    return load_script("prepare_cityscapes_panoptic")


@pytest.fixture
def cityscapes_root(tmp_path):
    """Three images of two cities: road, sky, two cars, a group of cars, and a region that is not evaluated."""
    for index, (city, name) in enumerate((("aachen", 1), ("aachen", 2), ("bonn", 7))):
        stem = f"{city}_{name:06d}_000019"
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / kind / "val" / city).mkdir(parents=True, exist_ok=True)
        objects = [
            box("sky", 0, 0, 63, 15),
            box("road", 0, 16, 63, 31),
            box("car", 4 + index, 10, 20, 20),
            box("car", 18, 12, 30, 20),
            box("cargroup", 40, 10, 60, 18),
            box("static", 0, 28, 10, 31),
        ]
        file = tmp_path / f"gtFine/val/{city}/{stem}_gtFine_polygons.json"
        file.write_text(json.dumps({"imgHeight": 32, "imgWidth": 64, "objects": objects}))
        image = np.full((32, 64, 3), 50 * index, np.uint8)
        Image.fromarray(image).save(tmp_path / f"leftImg8bit/val/{city}/{stem}_leftImg8bit.png")
    return tmp_path


def test_cityscapes_is_what_cityscapesscripts_makes(cityscapes, cityscapes_root, tmp_path_factory, capsys):
    cityscapes.main(["--root", str(cityscapes_root), "--splits", "val", "--workers", "2"])
    own, official = cityscapes_root / "gtFine", tmp_path_factory.mktemp("official")
    cityscapes.convert2panoptic(str(own), str(official), setNames=["val"])
    name = "cityscapes_panoptic_val"
    content, expected = (json.loads((folder / f"{name}.json").read_text()) for folder in (own, official))
    assert content == expected | {"info": {"description": MARK}}
    files = sorted((official / name).iterdir())
    assert [file.name for file in files] == sorted(file.name for file in (own / name).iterdir())
    for file in files:
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(own / name / file.name)))
    ids = read_ids(own / name / "bonn_000007_000019_gtFine_panoptic.png")
    assert [ids[0, 0], ids[25, 40], ids[15, 8], ids[15, 25], ids[15, 50], ids[30, 5]] == [23, 7, 26000, 26001, 26, 0]
    train_ids = np.asarray(Image.open(own / "val/bonn/bonn_000007_000019_gtFine_labelTrainIds.png"))
    assert [train_ids[0, 0], train_ids[25, 40], train_ids[15, 8], train_ids[30, 5]] == [10, 0, 13, 255]


def test_cityscapes_is_what_detectron2_reads(cityscapes, cityscapes_root):
    cityscapes.main(["--root", str(cityscapes_root), "--splits", "val", "--workers", "1"])
    images, ground_truth = cityscapes_root / "leftImg8bit/val", cityscapes_root / "gtFine"
    pngs, json_file = ground_truth / "cityscapes_panoptic_val", ground_truth / "cityscapes_panoptic_val.json"
    metadata = MetadataCatalog.get("cityscapes_fine_panoptic_val").as_dict()
    records = load_cityscapes_panoptic(str(images), str(pngs), str(json_file), metadata)
    assert len(records) == 3
    segments = {segment["id"]: segment for segment in records[2]["segments_info"]}
    assert {id_: s["category_id"] for id_, s in segments.items()} == {23: 10, 7: 0, 26: 13, 26000: 13, 26001: 13}
    assert [id_ for id_, segment in segments.items() if segment["iscrowd"]] == [26]
    assert faults(images, pngs, json_file) == []


def test_cityscapes_resumes(cityscapes, cityscapes_root):
    def main():
        cityscapes.main(["--root", str(cityscapes_root), "--splits", "val", "--workers", "1"])

    main()
    ground_truth = cityscapes_root / "gtFine"
    files = sorted((ground_truth / "val").rglob("*.png"))
    assert len(files) == 9
    files[0].unlink()
    before = {file: file.stat().st_mtime_ns for file in files[1:]}
    assert_restartable(main, ground_truth / "cityscapes_panoptic_val", ground_truth / "cityscapes_panoptic_val.json")
    assert {file: file.stat().st_mtime_ns for file in files[1:]} == before
    assert files[0].is_file()


@pytest.mark.parametrize(
    "polygons", ["{", '{"imgHeight": 8, "imgWidth": 8, "objects": [{"label": "ufo", "polygon": []}]}']
)
def test_cityscapes_with_broken_polygons(cityscapes, cityscapes_root, polygons):
    file = cityscapes_root / "gtFine/val/bonn/bonn_000007_000019_gtFine_polygons.json"
    file.write_text(polygons)
    with pytest.raises(UserError, match=r"cannot draw the polygons .*bonn_000007_000019_gtFine_polygons\.json: .*"):
        cityscapes.main(["--root", str(cityscapes_root), "--splits", "val", "--workers", "2"])
    assert not list(file.parent.glob("*.part*"))


def test_cityscapes_without_its_inputs(cityscapes, cityscapes_root):
    with pytest.raises(UserError, match=r"no annotations .*gtFine/train/\*/\*_gtFine_polygons\.json"):
        cityscapes.main(["--root", str(cityscapes_root)])


def test_png_and_its_annotation(tmp_path):
    file = tmp_path / "x.png"
    ids = np.array([[0, 1], [256, (1 << 24) - 1]])
    panoptic_png.write(file, ids, {"segments_info": [{"id": 1, "name": "Straße"}]})
    np.testing.assert_array_equal(read_ids(file), ids)
    assert panoptic_png.read_annotation(file) == {"segments_info": [{"id": 1, "name": "Straße"}]}
    content = file.read_bytes()
    for length in range(len(content) - 4):  # the last four bytes are the checksum of an empty chunk
        file.write_bytes(content[:length])
        assert panoptic_png.read_annotation(file) is None
        assert not load_script("prepare_common").is_whole(file)
    Image.new("RGB", (2, 2)).save(file)
    assert panoptic_png.read_annotation(file) is None
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
