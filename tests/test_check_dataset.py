"""Every fault of a dataset is found, counted and named, and a sound dataset has none."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic
from PIL import Image

from kmax_d2.data.check import check_sample, registered, unregistered
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
    return str(folder / "val"), str(folder / "panoptic_val"), str(folder / "panoptic_val.json")


def run(folder, *options):
    """The command's exit status."""
    images, pngs, json_file = paths(folder)
    try:
        main(["--images", images, "--panoptic", pngs, "--json", json_file, "--output", str(folder / "out"), *options])
    except SystemExit as exit_:
        return exit_.code
    return 0


def rewrite(folder, change):
    file = folder / "panoptic_val.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def in_json(change):
    return lambda folder: rewrite(folder, change)


def in_segment(**values):
    return in_json(lambda content: content["annotations"][1]["segments_info"][0].update(values))


def lacking(part, key):
    def change(content):
        entry = content[part][1] if part != "segments" else content["annotations"][1]["segments_info"][0]
        del entry[key]

    return in_json(change)


def repeated(part, *changes):
    """Appends a copy of an entry; `changes` are pairs of a key and another value."""
    return in_json(lambda content: content[part].append(content[part][1] | dict(changes)))


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:700])


def absent(name):
    return lambda folder: (folder / name).unlink()


def deep_image(folder):
    Image.fromarray(np.zeros((10, 10), np.uint16)).save(folder / "val/0001.jpg", format="PNG")


def smaller_png(folder):
    file = folder / "panoptic_val/0001.png"
    colors = np.asarray(Image.open(file))
    Image.fromarray(colors[:-1]).save(file)
    # With the new areas, only the size is wrong.
    areas = {segment["id"]: segment["area"] for segment in describe(rgb2id(colors[:-1]))}
    rewrite(folder, lambda c: [s.update(area=areas[s["id"]]) for s in c["annotations"][1]["segments_info"]])


def strange_pixel(folder):
    file = folder / "panoptic_val/0001.png"
    ids = rgb2id(np.asarray(Image.open(file)))
    area = int((ids == ids[0, 0]).sum())
    first = int(ids[0, 0])
    ids[0, 0] = 77
    Image.fromarray(id2rgb(ids)).save(file)

    def change(content):
        for segment in content["annotations"][1]["segments_info"]:
            if segment["id"] == first:
                segment["area"] = area - 1

    rewrite(folder, change)


def without_segments(content):
    content["annotations"][1]["segments_info"] = []


def without_annotation(content):
    del content["annotations"][1]


def without_image(content):
    del content["images"][1]


def one_more_segment(content):
    content["annotations"][1]["segments_info"].append({"id": 99, "category_id": 1, "iscrowd": 0})


def same_segment_twice(content):
    segments = content["annotations"][1]["segments_info"]
    segments.append(segments[0])


def repeated_category(content):
    content["categories"].append(content["categories"][1])


FAULTS = {
    "missing image": (absent("val/0001.jpg"), {"missing image": 1}, "val/0001.jpg"),
    "missing PNG": (absent("panoptic_val/0001.png"), {"missing PNG": 1}, "panoptic_val/0001.png"),
    "image cut off": (cut("val/0001.jpg"), {"broken image": 1}, "val/0001.jpg"),
    "PNG cut off": (cut("panoptic_val/0001.png"), {"broken PNG": 1}, "panoptic_val/0001.png"),
    "image of 16 bits": (deep_image, {"broken image": 1}, "val/0001.jpg has more than 8 bits"),
    "size in the JSON": (
        in_json(lambda content: content["images"][1].update(height=7)),
        {"size mismatch": 1},
        "val/0001.jpg is",
    ),
    "size of the PNG": (smaller_png, {"size mismatch": 1}, "panoptic_val/0001.png is"),
    "id that the JSON lacks": (
        strange_pixel,
        {"id without segment": 1},
        "0001.png: 1 pixels have ids that its JSON",
    ),
    "segment that the PNG lacks": (
        in_json(one_more_segment),
        {"segment without pixels": 1},
        "0001.png: no pixel of segment 99",
    ),
    "unknown category": (in_segment(category_id=50), {"unknown category": 1}, "0001.png: segment"),
    "id above 2^24": (
        in_segment(id=1 << 24),
        {"id out of range": 1, "id without segment": 1},
        "0001.png: segment id 16777216",
    ),
    "id 0": (in_segment(id=0), {"id out of range": 1, "id without segment": 1}, "0001.png: segment id 0"),
    "area": (in_segment(area=3), {"area mismatch": 1}, "pixels, the JSON says 3"),
    "segment twice": (in_json(same_segment_twice), {"duplicate": 1}, "0001.png: segment id"),
    "image twice": (repeated("images"), {"duplicate": 2}, "image id 1 is there 2 times"),
    "image file twice": (
        repeated("images", ("id", 9)),
        {"duplicate": 1, "image without annotation": 1},
        "image file 0001.jpg is there 2 times",
    ),
    "annotation twice": (repeated("annotations"), {"duplicate": 2}, "annotation of image 1 is there 2 times"),
    "category twice": (in_json(repeated_category), {"duplicate": 1}, "category id 2 is there 2 times"),
    "no segment": (in_json(without_segments), {"empty image": 1}, "0001.png has no segment"),
    "no annotation": (
        in_json(without_annotation),
        {"image without annotation": 1},
        "image 0001.jpg has no annotation",
    ),
    "no image": (in_json(without_image), {"annotation without image": 1}, "0001.png: no image has the id 1"),
    "image without height": (
        lacking("images", "height"),
        {"malformed entry": 1, "annotation without image": 1},
        "has no valid height",
    ),
    "annotation without segments": (
        lacking("annotations", "segments_info"),
        {"malformed entry": 1, "image without annotation": 1},
        "has no valid segments_info",
    ),
    "segment without category": (
        lacking("segments", "category_id"),
        {"malformed entry": 1, "id without segment": 1},
        "has no valid category_id",
    ),
    "segments that are no list": (
        in_json(lambda content: content["annotations"][1].update(segments_info=None)),
        {"malformed entry": 1, "image without annotation": 1},
        "has no valid segments_info",
    ),
    "segment id that is no number": (
        in_segment(id="7"),
        {"malformed entry": 1, "id without segment": 1},
        "has no valid id",
    ),
    "category without kind": (lacking("categories", "isthing"), {"malformed entry": 1}, "has no valid isthing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_counted_and_named(folder, capsys, fault):
    spoil, expected, line = FAULTS[fault]
    spoil(folder)
    assert run(folder, "--samples", "0") == 1
    output = capsys.readouterr().out.split("has faults:")[1]
    counts = dict(row.split(": ") for row in output.strip().splitlines() if not row.startswith(" "))
    if fault in ("no segment", "category without kind"):  # the pixels and segments of these are left over
        assert expected.items() <= {kind: int(count) for kind, count in counts.items()}.items()
    else:
        assert counts == {kind: str(count) for kind, count in expected.items()}
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
    rewrite(folder, lambda content: [annotation.update(segments_info=[]) for annotation in content["annotations"]])
    assert run(folder, "--samples", "0", "--examples", "2") == 1
    output = capsys.readouterr().out
    assert "empty image: 3" in output
    assert output.count("has no segment") == 2
    assert "  and 1 more" in output


def test_pages_follow_from_the_seed(folder):
    def page(*options):
        run(folder, *options)
        return (folder / "out/panoptic_val.png").read_bytes()

    assert page("--samples", "1") == page("--samples", "1")
    assert len({page("--samples", "1", "--seed", str(seed)) for seed in range(4)}) > 1


def test_json_that_cannot_be_read_is_one_line(folder):
    (folder / "panoptic_val.json").write_text("{")
    with pytest.raises(UserError, match=r"panoptic_val\.json is not valid JSON"):
        unregistered(*paths(folder))


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
    rewrite(folder, lambda content: [a["segments_info"][0].update(category_id=50) for a in content["annotations"]])
    kinds = [fault.kind for findings in registered(catalog).check(workers=1) for fault in findings.faults]
    assert kinds == ["unknown category"] * 3


def test_dataset_that_has_records_only(folder, catalog):
    images, pngs, json_file = paths(folder)
    records = coco_panoptic.load(json_file, images, pngs)
    DatasetCatalog.register(catalog, lambda: records)
    with pytest.raises(UserError, match=rf"{catalog} is not panoptic"):
        registered(catalog)
    MetadataCatalog.get(catalog).set(**coco_panoptic.metadata_of(shapes.CATEGORIES))
    dataset = registered(catalog)
    assert [findings.faults for findings in dataset.check(workers=1)] == [[], [], []]
    records[0]["segments_info"][0]["category_id"] = 9
    assert [fault.kind for fault in check_sample(registered(catalog).samples[0]).faults] == ["unknown category"]


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
