"""Every fault of a dataset is found, counted and named, and a sound dataset has none."""

import functools
import itertools
import json
import operator
from collections import Counter

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic
from PIL import Image

from kmax_d2.data.check import registered, unregistered
from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.data.panoptic_png import describe
from kmax_d2.data.segment_ids import id2rgb, rgb2id
from kmax_d2.errors import UserError
from kmax_d2.tools.check_dataset import main


@pytest.fixture
def folder(tmp_path):
    shapes.write_split(tmp_path, "val", 3, 5)
    return tmp_path


def paths(folder):
    return [str(folder / name) for name in ("val", "panoptic_val", "panoptic_val.json")]


def run(folder, *options):
    """The command's exit status."""
    files = zip(("--images", "--panoptic", "--json"), paths(folder), strict=True)
    try:
        main([*itertools.chain(*files), "--output", str(folder / "out"), *options])
    except SystemExit as exit_:
        return exit_.code
    return 0


def change_json(change):
    """A function that changes the JSON of a folder."""

    def spoil(folder):
        file = folder / "panoptic_val.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return spoil


def entry(content, path):
    return functools.reduce(operator.getitem, path, content)


def at(*path, **values):
    return change_json(lambda content: entry(content, path).update(values))


def without(*path):
    return change_json(lambda content: entry(content, path[:-1]).pop(path[-1]))


def again(*path, **values):
    """Repeats an entry at the end of its list, with other values."""
    return change_json(lambda content: entry(content, path[:-1]).append(entry(content, path) | values))


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:700])


def flipped(name):
    """Damages a byte of a PNG's checksum, which decoders pass over."""

    def spoil(folder):
        content = bytearray((folder / name).read_bytes())
        content[content.index(b"IEND") - 5] ^= 1
        (folder / name).write_bytes(content)

    return spoil


def absent(name):
    return lambda folder: (folder / name).unlink()


def saved(name, mode):
    return lambda folder: Image.new(mode, (10, 10)).save(folder / name, format="PNG")


def smaller_png(folder):
    file = folder / "panoptic_val/0001.png"
    colors = np.asarray(Image.open(file))[:-1]
    Image.fromarray(colors).save(file)
    areas = {segment["id"]: segment["area"] for segment in describe(rgb2id(colors))}
    change_json(lambda c: [s.update(area=areas[s["id"]]) for s in entry(c, SEGMENTS)])(folder)  # only the size is wrong


def strange_pixel(folder):
    file = folder / "panoptic_val/0001.png"
    ids = rgb2id(np.asarray(Image.open(file)))
    first = int(ids[0, 0])
    ids[0, 0] = 77
    Image.fromarray(id2rgb(ids)).save(file)
    areas = {first: int((ids == first).sum())}
    change_json(lambda c: [s.update(area=areas.get(s["id"], s["area"])) for s in entry(c, SEGMENTS)])(folder)


SEGMENTS = ("annotations", 1, "segments_info")
SEGMENT = (*SEGMENTS, 0)
# How a dataset is spoilt, the kinds of its faults, and a part of their lines.
FAULTS = {
    "missing image": (absent("val/0001.jpg"), ["missing image"], "val/0001.jpg: No such file"),
    "missing PNG": (absent("panoptic_val/0001.png"), ["missing PNG"], "panoptic_val/0001.png: No such file"),
    "image cut off": (cut("val/0001.jpg"), ["broken image"], "val/0001.jpg: image file is truncated"),
    "PNG cut off": (cut("panoptic_val/0001.png"), ["broken PNG"], "panoptic_val/0001.png: "),
    "checksum": (flipped("panoptic_val/0001.png"), ["broken PNG"], "panoptic_val/0001.png: broken PNG file"),
    "image of 16 bits": (saved("val/0001.jpg", "I;16"), ["broken image"], "val/0001.jpg has more than 8 bits"),
    "gray PNG": (saved("panoptic_val/0001.png", "L"), ["broken PNG"], "0001.png has no colors: its mode is L, not RGB"),
    "size in the JSON": (at("images", 1, height=7), ["size mismatch"], "val/0001.jpg is"),
    "size of the PNG": (smaller_png, ["size mismatch"], "panoptic_val/0001.png is"),
    "id that the JSON lacks": (strange_pixel, ["id without segment"], "0001.png: 1 pixels have ids that its JSON"),
    "segment that the PNG lacks": (again(*SEGMENT, id=99), ["segment without pixels"], "0001.png: no pixel of segment"),
    "unknown category": (at(*SEGMENT, category_id=50), ["unknown category"], "0001.png: segment"),
    "id above 2^24": (
        at(*SEGMENT, id=1 << 24),
        ["id out of range", "id without segment"],
        "0001.png: segment id 16777216",
    ),
    "id 0": (at(*SEGMENT, id=0), ["id out of range", "id without segment"], "0001.png: segment id 0"),
    "area": (at(*SEGMENT, area=3), ["area mismatch"], "pixels, the JSON says 3"),
    "segment twice": (again(*SEGMENT), ["duplicate"], "0001.png: segment id"),
    "image twice": (again("images", 1), ["duplicate", "duplicate"], "image id 1 is there 2 times"),
    "image file twice": (
        again("images", 1, id=9),
        ["duplicate", "image without annotation"],
        "image file 0001.jpg is there 2 times",
    ),
    "annotation twice": (again("annotations", 1), ["duplicate"] * 2, "annotation of image 1 is there 2 times"),
    "category twice": (again("categories", 1), ["duplicate"], "category id 2 is there 2 times"),
    "no segment": (at("annotations", 1, segments_info=[]), ["id without segment"], "1 images have no segment"),
    "no annotation": (without("annotations", 1), ["image without annotation"], "image 0001.jpg has no annotation"),
    "no image": (without("images", 1), ["annotation without image"], "0001.png: no image has the id 1"),
    "image without height": (
        without("images", 1, "height"),
        ["malformed entry", "annotation without image"],
        "has no valid height",
    ),
    "annotation without segments": (
        without("annotations", 1, "segments_info"),
        ["malformed entry", "image without annotation"],
        "has no valid segments_info",
    ),
    "segment without category": (
        without(*SEGMENT, "category_id"),
        ["malformed entry", "id without segment"],
        "has no valid category_id",
    ),
    "segments that are no list": (
        at("annotations", 1, segments_info=None),
        ["malformed entry", "image without annotation"],
        "has no valid segments_info",
    ),
    "segment id that is no number": (at(*SEGMENT, id="7"), ["malformed entry", "id without segment"], "no valid id"),
    "crowd that is no number": (
        at(*SEGMENT, iscrowd="no"),
        ["malformed entry", "id without segment"],
        "has no valid iscrowd",
    ),
    "no kind": (without("categories", 8, "isthing"), ["malformed entry", "unknown category"], "has no valid isthing"),
    "strange kind": (at("categories", 8, isthing="yes"), ["malformed entry", "unknown category"], "no valid isthing"),
    "strange color": (at("categories", 8, color=[1, 2, 256]), ["malformed entry", "unknown category"], "valid color"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_counted_and_named(folder, capsys, fault):
    spoil, expected, line = FAULTS[fault]
    at(*SEGMENT, category_id=9)(folder)  # so that sand is in the second image
    spoil(folder)
    assert run(folder, "--samples", "0") == 1
    output = capsys.readouterr().out.split("has faults:")[1]
    counts = dict(row.split(": ") for row in output.strip().splitlines() if not row.startswith((" ", "warning: ")))
    if "unknown category" in expected:  # other images may have it too
        assert counts.keys() == set(expected)
    else:
        assert counts == {kind: str(count) for kind, count in Counter(expected).items()}
    assert line in output


def test_sound_dataset(folder, capsys):
    assert run(folder, "--samples", "2") == 0
    output = capsys.readouterr().out
    assert "panoptic_val is sound" in output
    content = json.loads((folder / "panoptic_val.json").read_text())
    segments = [segment for annotation in content["annotations"] for segment in annotation["segments_info"]]
    assert f"panoptic_val: 3 images, {len(segments)} segments" in output
    pixels = sum(image["height"] * image["width"] for image in content["images"])
    rows = {
        row.split("|")[2].strip(): row for row in output.splitlines() if row.startswith("|") and row.count("|") == 9
    }
    for category in shapes.CATEGORIES:
        areas = [segment["area"] for segment in segments if segment["category_id"] == category["id"]]
        _, kind, _, count, crowds, share, median = (cell.strip() for cell in rows[category["name"]].split("|")[2:-1])
        assert (kind, int(count), int(crowds)) == ("thing" if category["isthing"] else "stuff", len(areas), 0)
        assert float(share) == pytest.approx(100 * sum(areas) / pixels, abs=0.006)
        assert float(median) == pytest.approx(np.median(areas) if areas else 0, abs=0.6)
    page = np.asarray(Image.open(folder / "out/panoptic_val.png"))
    assert 0.05 < (page == 255).all(-1).mean() < 0.5  # two pictures and the white between them


def test_examples_are_few_and_the_rest_is_counted(folder, capsys):
    for index in range(3):
        at("annotations", index, segments_info=[])(folder)
    assert run(folder, "--samples", "0", "--examples", "2") == 1
    output = capsys.readouterr().out
    assert "id without segment: 3" in output
    assert output.count("pixels have ids that its JSON lacks") == 2
    assert "  and 1 more" in output


def test_pages_follow_from_the_seed(folder):
    file = folder / "out/panoptic_val.png"

    def page(*options):
        run(folder, *options)
        return file.read_bytes()

    assert page("--samples", "1") == page("--samples", "1")
    assert len({page("--samples", "1", "--seed", str(seed)) for seed in range(4)}) > 1
    Image.new("RGB", (9, 9)).save(file)  # not from here
    with pytest.raises(UserError, match=r"out/panoptic_val\.png exists and was not made by kmax_d2"):
        run(folder)
    assert Image.open(file).size == (9, 9)
    assert run(folder, "--overwrite") == 0
    assert Image.open(file).size != (9, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[" * 100_000, "is not valid JSON"), ("7", "is not in COCO panoptic format")],
)
def test_json_that_cannot_be_read_is_one_line(folder, text, message):
    (folder / "panoptic_val.json").write_text(text)
    with pytest.raises(UserError, match=rf"panoptic_val\.json {message}"):
        unregistered(*paths(folder))


def test_exchanged_folders_are_one_line_for_each_image(folder, capsys):
    for image in (folder / "val").iterdir():
        Image.open(image).save(image.with_suffix(".png"))
    change_json(lambda c: [image.update(file_name=image["file_name"][:-3] + "png") for image in c["images"]])(folder)
    (folder / "val").rename(folder / "photos")
    (folder / "panoptic_val").rename(folder / "val")
    (folder / "photos").rename(folder / "panoptic_val")
    assert run(folder, "--samples", "0", "--examples", "9") == 1
    output = capsys.readouterr().out
    assert "id without segment: 3" in output and output.count("pixels have ids that its JSON lacks: ") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either the names"),
        (["shapes_val", "--config-file", "shapes/quickstart"], "give either the names"),
        (["--images", "a"], "all of --images, --panoptic, --json"),
        (["shapes_vla"], r"no dataset shapes_vla is registered - did you mean shapes_val\?"),
        (["coco_2017_val_panoptic"], r"panoptic_val2017\.json.*DETECTRON2_DATASETS"),
    ],
)
def test_arguments(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)


@pytest.fixture
def catalog():
    """A name in Detectron2's catalogs that is free again after the test."""
    name = "check_dataset_test"
    yield name
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def test_dataset_of_detectron2s_own_loader(folder, catalog):
    """Its loader stops at the first unknown category; here all are found."""
    metadata = coco_panoptic.metadata_of(shapes.CATEGORIES)
    images, pngs, json_file = paths(folder)
    register_coco_panoptic(catalog, metadata, images, pngs, json_file)
    assert all(not findings.faults for findings in registered(catalog).check(workers=1))
    for index in range(3):
        at("annotations", index, "segments_info", 0, category_id=50)(folder)
    kinds = [fault.kind for findings in registered(catalog).check(workers=1) for fault in findings.faults]
    assert kinds == ["unknown category"] * 3


def test_a_json_with_other_classes_than_the_registered_ones(folder, catalog):
    coco_panoptic.register(catalog, *paths(folder), categories=shapes.CATEGORIES)
    assert registered(catalog).faults == []
    at("categories", 0, name="square")(folder)
    at("categories", 8, isthing=1)(folder)
    again("categories", 0, id=12)(folder)
    lines = [fault.line for fault in registered(catalog).faults if fault.kind == "other category"]
    assert [line.split("} is ")[1] for line in lines] == [
        "thing circle of the registered dataset",
        "stuff sand of the registered dataset",
        "no category of the registered dataset",
    ]


def test_dataset_that_has_records_only(catalog):
    DatasetCatalog.register(catalog, lambda: [])
    with pytest.raises(UserError, match=rf"{catalog} cannot be checked: its metadata have no panoptic_json"):
        registered(catalog)


def test_processes_find_what_one_finds(folder):
    absent("val/0002.jpg")(folder)
    dataset = unregistered(*paths(folder))
    assert dataset.check(workers=2) == dataset.check(workers=1)


def test_rotated_jpeg_has_the_size_that_it_is_seen_in(folder):
    file = folder / "val/0001.jpg"
    image = Image.open(file)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    assert run(folder, "--samples", "0") == 0


def test_description_of_an_id_map():
    rng = np.random.default_rng(0)
    ids = np.kron(rng.integers(0, 5, (6, 7)) * 70000, np.ones((3, 2), np.int64))
    for segment in describe(ids):
        rows, columns = np.nonzero(ids == segment["id"])
        assert segment["area"] == len(rows)
        x, y, width, height = segment["bbox"]
        assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert [segment["id"] for segment in describe(ids)] == np.unique(ids).tolist()


def test_warnings_of_the_model(folder, capsys):
    queries = "MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES"
    limits = ["MODEL.KMAX.TEST.THING_AREA_LIMIT", "0", "MODEL.KMAX.TEST.STUFF_AREA_LIMIT", "0"]
    crop = ["INPUT.CROP_SIZE", "[145, 161]", "INPUT.FIT_CROP", "False"]
    content = json.loads((folder / "panoptic_val.json").read_text())
    segments = [annotation["segments_info"] for annotation in content["annotations"]]
    counts = list(map(len, segments))
    most = max(counts)
    run(folder, "--samples", "0", "--opts", *limits, *crop, queries, str(most))
    assert all(
        "queries" not in line and "AREA_LIMIT" not in line for line in capsys.readouterr().out.split("warning: ")[1:]
    )
    things = sorted(segment["area"] for segment in itertools.chain(*segments) if segment["category_id"] <= 5)
    limits[1] = str(things[2])
    assert run(folder, "--samples", "0", "--opts", *limits, *crop, queries, str(most - 1)) == 0
    lines = capsys.readouterr().out.split("warning: ")[1:]
    assert f"{counts.count(most)} images have more segments than the model's {most - 1} queries" in lines[0]
    assert f"2 things are smaller than MODEL.KMAX.TEST.THING_AREA_LIMIT, {things[2]} pixels" in lines[1]


def test_warnings_of_training_and_a_page_in_html(folder, tmp_path, capsys):
    """Sand is only in validation, one of whose images is a training image under another name."""
    shapes.write_split(tmp_path, "train", 2, 6)
    for split in ("train", "val"):
        file = tmp_path / f"panoptic_{split}.json"
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                if split == "train" and segment["category_id"] == 9:
                    segment["category_id"] = 8
        at(*SEGMENT, category_id=9)(tmp_path) if split == "val" else file.write_text(json.dumps(content))
    image = Image.open(folder / "val/0002.jpg")
    for name in ("val/0002.png", "train/0001.png"):
        image.save(folder / name)
    for split, index in (("val", 2), ("train", 1)):
        file = tmp_path / f"panoptic_{split}.json"
        content = json.loads(file.read_text())
        content["images"][index] |= {"file_name": f"000{index}.png", "height": image.height, "width": image.width}
        file.write_text(json.dumps(content))
    own = [str(tmp_path / name) for name in ("train", "panoptic_train", "panoptic_train.json")]
    for _ in range(2):  # the second time over its own pages
        with pytest.raises(SystemExit):  # the training image has the PNG of another
            main(["--train-data", *own, "--test-data", *paths(folder), "--output", str(tmp_path / "out"), "--html"])
    lines = capsys.readouterr().out.split("warning: ")[1:]
    assert any(line.startswith("classes with fewer than 10 examples for training: ") for line in lines)
    assert any(line.startswith("classes that only validation has: sand\n") for line in lines)
    assert any("1 images of validation are training images too: " in line and "val/0002.png" in line for line in lines)
    _, text = (page.read_text(encoding="utf-8") for page in sorted((tmp_path / "out").glob("*.html")))
    assert text.count("<img src=") == 3 and "is sound" in text and "<td>sand" in text and "<script" not in text
