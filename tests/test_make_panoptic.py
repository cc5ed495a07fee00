"""Labels of every format come back as the panoptic data that they were written from; bad ones are named."""

import json

import cv2
import label_formats
import numpy as np
import pytest
from PIL import Image

from kmax_d2.data.check import unregistered
from kmax_d2.data.datasets import shapes
from kmax_d2.errors import UserError
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


@pytest.fixture
def folder(tmp_path):
    """For labels."""
    (tmp_path / "labels").mkdir()
    return tmp_path / "labels"


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
            count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4 if parts else 8)
            split = name in THINGS and (parts or classes)
            of_segment = [labels == label for label in range(1, count)] if split else [mask]
            found[file.stem] |= {(name, part.tobytes()) for part in of_segment}
    return found


FORMATS = {
    "COCO": label_formats.to_coco,
    "COCO polygons": lambda source, folder: label_formats.to_coco(source, folder, polygons=True),
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
def test_round_trip(source, folder, tmp_path, format_):
    labels = FORMATS[format_](source, folder)
    _, *samples = label_formats.panoptic(*source)
    things = {name for *_, of_image in samples for _, name in of_image} & set(THINGS)
    options = ["--classes", folder / "names.txt"] if format_ == "VOC" else []
    options += [] if format_ in ("YOLO", "LabelMe", "LabelMe masks") else ["--images", source[0]]
    split = "_train" if format_ == "YOLO" else ""
    made = source[0], *run(labels, tmp_path / "out", "--things", *things, *options, split=split)
    expected = segments(source, parts=format_ == "YOLO", classes=format_ == "classes")
    assert segments(made) == expected and sum(map(len, expected.values())) > 10
    dataset = unregistered(*map(str, made))
    assert dataset.faults + [fault for findings in dataset.check(workers=1) for fault in findings.faults] == []


def test_coco_polygons_and_crowds(source, tmp_path):
    """Polygons are as pycocotools fills them; a crowd is below the others, and is one."""
    file = label_formats.to_coco(source, tmp_path)
    content = json.loads(file.read_text())
    box = [5, 5, 60, 5, 60, 60, 5, 60]
    whole = {"size": [144, 144], "counts": [0, 144 * 144]}
    image = content["images"][0] | {"height": 144, "width": 144}
    Image.new("RGB", (144, 144)).save(tmp_path / image["file_name"])
    annotation = {"image_id": image["id"], "category_id": 1, "iscrowd": 0}
    content["images"] = [image]
    content["annotations"] = [
        annotation | {"id": 1, "segmentation": [[20, 20, 30, 20, 30, 30, 20, 30], box]},
        annotation | {"id": 2, "segmentation": whole, "iscrowd": 1},
        annotation | {"id": 3, "segmentation": [[20, 20, 24, 20, 24, 24, 20, 24]]},
    ]
    file.write_text(json.dumps(content))
    made = json.loads(run(file, tmp_path / "out")[1].read_text())
    (annotation,) = made["annotations"]
    areas = sorted((segment["iscrowd"], segment["area"]) for segment in annotation["segments_info"])
    assert areas == [(0, 16), (0, 55 * 55 - 16), (1, 144 * 144 - 55 * 55)]
    assert made["categories"][0] == {"id": 1, "name": "circle", "isthing": 1}


def test_stuff_below_instances(source, tmp_path):
    """Of the class PNGs, only what the labels have no class for is taken; a thing without label stays void."""
    content = json.loads(source[2].read_text())
    for annotation in content["annotations"]:
        annotation["segments_info"] = [s for s in annotation["segments_info"] if s["category_id"] <= 5]
    content["categories"] = content["categories"][:5]
    (tmp_path / "things.json").write_text(json.dumps(content))
    instances = label_formats.to_coco((*source[:2], tmp_path / "things.json"), tmp_path)
    (tmp_path / "masks").mkdir()
    masks = label_formats.to_pngs(source, tmp_path / "masks", [], instances=False)
    made = source[0], *run(instances, tmp_path / "out", "--stuff", masks, "--images", source[0])
    assert segments(made) == segments(source)
    categories = json.loads(made[2].read_text())["categories"]
    assert [category["isthing"] for category in categories] == 5 * [1] + 4 * [0]


def test_splits_follow_from_the_seed_and_a_later_run_goes_on(source, tmp_path, capsys):
    labels = label_formats.to_coco(source, tmp_path)

    def val(name, *options):
        run(labels, tmp_path / name, "--images", source[0], "--val", "0.4", *options)
        splits = [json.loads((tmp_path / name / f"panoptic_{split}.json").read_text()) for split in ("train", "val")]
        names = [[image["file_name"] for image in split["images"]] for split in splits]
        assert [len(part) for part in names] == [2, 1] and len({*names[0], *names[1]}) == 3
        return names[1]

    assert val("a") == val("b") and len({*val("a"), *val("c", "--seed", "1"), *val("d", "--seed", "2")}) > 1
    pngs = sorted((tmp_path / "a").rglob("*.png"))
    before = [(png.read_bytes(), png.stat().st_mtime_ns) for png in pngs]
    pngs[0].write_bytes(before[0][0][:-20])
    val("a")
    after = [(png.read_bytes(), png.stat().st_mtime_ns) for png in pngs]
    assert after[1:] == before[1:] and after[0][0] == before[0][0]
    val("a", "--things")  # which changes what the PNGs say
    assert pngs[1].stat().st_mtime_ns != before[1][1]
    assert "--test-data" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not empty and was not made by kmax_d2"):
        run(labels, tmp_path, "--images", source[0])


# --- bad labels ---


def change_text(pattern, *replace):
    def spoil(folder):
        (file,) = folder.glob(pattern)
        text = file.read_text()
        assert replace[0] in text
        file.write_text(text.replace(*replace, 1))

    return spoil


def write(pattern, text):
    return lambda folder: next(iter(sorted(folder.glob(pattern)))).write_text(text)


def resize(pattern):
    def spoil(folder):
        file = next(iter(sorted(folder.glob(pattern))))
        Image.open(file).resize((9, 9), Image.Resampling.NEAREST).save(file)

    return spoil


def prepend(pattern, line):
    def spoil(folder):
        file = next(iter(sorted(folder.glob(pattern))))
        file.write_text(f"{line}\n{file.read_text()}")

    return spoil


def change_coco(**values):
    def spoil(folder):
        file = folder / "instances.json"
        content = json.loads(file.read_text())
        content["annotations"][0] |= values
        file.write_text(json.dumps(content))

    return spoil


BAD = {
    "COCO: two points": ("COCO", change_coco(segmentation=[[1, 2, 3, 4]]), "annotation 1: a polygon of 2 points"),
    "COCO: class": ("COCO", change_coco(category_id=77), "annotation 1: the class 77 is none"),
    "COCO: image": ("COCO", change_coco(image_id=99), "annotation 1: no image has the id 99"),
    "COCO: no mask": ("COCO", change_coco(segmentation=[]), "annotation 1: a box without a mask"),
    "COCO: mask": ("COCO", change_coco(segmentation={"size": [3, 3], "counts": [9]}), "annotation 1: its mask is 3×3"),
    "COCO: counts": ("COCO", change_text("instances.json", '"counts": "', '"counts": "~~~'), "annotation 1: malformed"),
    "COCO: size": ("COCO", change_text("instances.json", '"height": 1', '"height": 9'), "its labels say"),
    "YOLO: two points": ("YOLO", prepend("labels/train/*.txt", "0 .1 .1 .5 .5"), "line 1: a polygon of 2 points"),
    "YOLO: class": ("YOLO", prepend("labels/train/*.txt", "9 .1 .1 .5 .5 .1 .5"), "line 1: the class 9 is not"),
    "YOLO: pixels": ("YOLO", prepend("labels/train/*.txt", "1 10 10 50 50 10 50"), "line 1: coordinates outside"),
    "YOLO: text": ("YOLO", prepend("labels/train/*.txt", "circle .1 .1 .5 .5 .1 .5"), "line 1: malformed"),
    "YOLO: empty": ("YOLO", write("labels/train/*.txt", ""), "0000.txt: an empty file"),
    "LabelMe: empty": ("LabelMe", write("*.json", ""), "0000.json: an empty file"),
    "LabelMe: broken": ("LabelMe", write("*.json", "{"), "0000.json: not a LabelMe file"),
    "LabelMe: line": ("LabelMe", change_text("0001.json", '"polygon"', '"line"'), "0001.json, object 0 ("),
    "LabelMe: no image": ("LabelMe", change_text("0001.json", "0001.jpg", "no.jpg"), "no.jpg: No such file"),
    "LabelMe: size": ("LabelMe", change_text("0001.json", '"imageHeight": 1', '"imageHeight": 9'), "its labels say"),
    "CVAT: class": ("CVAT", change_text("annotations.xml", 'label="grass" p', 'label="ufo" p'), "no class ufo"),
    "CVAT: points": ("CVAT", change_text("annotations.xml", 'points="', 'points="x,'), "): malformed"),
    "CVAT: image": ("CVAT", change_text("annotations.xml", "0001.jpg", "no.jpg"), "no.jpg: No such file"),
    "PNG: class": ("classes", change_text("classes.txt", "7 grass", "77 grass"), "there is no class of the value 7"),
    "PNG: size": ("classes", resize("*.png"), "0000.png: it is 9×9, its image"),
    "PNG: broken": ("ids", write("*.png", "x"), "0000.png: cannot read it"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_labels_are_a_line_each_and_can_be_skipped(source, folder, tmp_path, capsys, bad):
    format_, spoil, line = BAD[bad]
    labels = FORMATS[format_](source, folder)
    spoil(folder)
    options = [] if format_ in ("YOLO", "LabelMe") else ["--images", source[0]]
    split = "_train" if format_ == "YOLO" else ""
    with pytest.raises(UserError, match=r"\d+ labels are bad: mend them, or leave them out with --skip-broken"):
        run(labels, tmp_path / "out", *options, split=split)
    assert not (tmp_path / f"out/panoptic{split}.json").exists()
    lines = [row for row in capsys.readouterr().out.splitlines() if row.startswith("bad label: ")]
    assert any(line in row for row in lines)
    _, json_file = run(labels, tmp_path / "out", *options, "--skip-broken", split=split)
    content = json.loads(json_file.read_text())
    assert len(content["images"]) in (2, 3)
    assert [row for row in capsys.readouterr().out.splitlines() if row.startswith("bad label: ")] == lines


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xml", "<annotations", "cannot read .*a.xml"),
        ("data.yaml", "names: [", "cannot read .*data.yaml"),
        ("a.json", "{", "labels are bad"),
        ("a.json", '{"images": [], "annotations": []}', "a.json has no valid categories"),
        ("a.txt", "", "is in no known format: COCO instances, YOLO"),
    ],
)
def test_sources_that_cannot_be_read(folder, tmp_path, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "out")
    with pytest.raises(UserError, match="--output is inside of SOURCE"):
        run(folder, folder / "out")
    with pytest.raises(UserError, match="no file or folder"):
        run(tmp_path / "none", tmp_path / "out")
