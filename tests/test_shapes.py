import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import cv2
import numpy as np
import pytest
from PIL import Image

from kmax_d2.data.datasets import shapes
from kmax_d2.data.segment_ids import rgb2id

THING_IDS = [category["id"] for category in shapes.THINGS]
STUFF_IDS = [category["id"] for category in shapes.STUFF]
FOLDER = f"shapes-v{shapes.VERSION}"


@pytest.fixture(scope="module")
def drawn():
    return [shapes.draw(7, index) for index in range(150)]


@pytest.fixture
def small_splits(monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": (3, 0), "val": (2, 1)})


def test_same_seed_and_index_draw_the_same():
    first, again = shapes.draw(3, 5), shapes.draw(3, 5)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert first[2] == again[2]


def test_drawing_is_that_of_its_version():
    """Fails if the drawings change: increase shapes.VERSION then, and renew the numbers here."""
    image, id_map, segments_info = shapes.draw(0, 0)
    assert shapes.VERSION == 3
    assert id_map.shape == (160, 129)
    # With room for a processor that rounds differently.
    assert image.mean() == pytest.approx(100.97, abs=0.05)
    areas = {segment["category_id"]: segment["area"] for segment in segments_info if segment["category_id"] != 4}
    assert areas == pytest.approx({1: 2197, 2: 1693, 6: 6967, 8: 7384}, rel=0.01)
    stars = sorted(segment["area"] for segment in segments_info if segment["category_id"] == 4)
    assert stars == pytest.approx([775, 1624], rel=0.01)


def test_drawing_does_not_depend_on_the_number_of_threads():
    before = cv2.getNumThreads()
    try:
        drawn = []
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            drawn.append([shapes.draw(5, index) for index in range(5)])
    finally:
        cv2.setNumThreads(before)
    for first, again in zip(*drawn, strict=True):
        np.testing.assert_array_equal(first[0], again[0])
        np.testing.assert_array_equal(first[1], again[1])


def test_splits_share_no_image():
    seeds = [seed for _, seed in shapes.SPLITS.values()]
    assert len(set(seeds)) == len(seeds)
    maps = {shapes.draw(seed, index)[1].tobytes() for seed in seeds for index in range(20)}
    assert len(maps) == 40


def test_segments_describe_the_id_map(drawn):
    for image, id_map, segments_info in drawn:
        assert image.dtype == np.uint8
        assert image.shape == (*id_map.shape, 3)
        assert id_map.dtype == np.int32
        assert min(id_map.shape) >= 129
        assert sorted(segment["id"] for segment in segments_info) == np.unique(id_map).tolist()
        assert sum(segment["area"] for segment in segments_info) == id_map.size
        for segment in segments_info:
            rows, columns = np.nonzero(id_map == segment["id"])
            x, y, w, h = segment["bbox"]
            assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert segment["area"] == len(rows) >= shapes.MIN_PIXELS
            assert segment["iscrowd"] == 0


def test_every_image_has_things_on_stuff(drawn):
    for _, _, segments_info in drawn:
        categories = [segment["category_id"] for segment in segments_info]
        assert 2 <= sum(category in THING_IDS for category in categories) <= 6
        stuff = [category for category in categories if category in STUFF_IDS]
        assert 2 <= len(stuff) == len(set(stuff)) <= 4


def test_categories():
    assert [category["id"] for category in shapes.CATEGORIES] == list(range(1, 10))
    assert len({tuple(category["color"]) for category in shapes.CATEGORIES}) == 9
    # the ids of six instances stay inside one byte of red
    assert all(category["color"][0] + 8 * (shapes.NUM_THINGS[1] - 1) < 256 for category in shapes.THINGS)


def test_color_does_not_give_a_thing_away(drawn):
    colors, classes = [], []
    for image, id_map, segments_info in drawn:
        for segment in segments_info:
            if segment["category_id"] in THING_IDS:
                pixels = image[id_map == segment["id"]].astype(np.float64)
                colors.append(np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)]))
                classes.append(segment["category_id"])
    colors, classes = np.array(colors), np.array(classes)
    assert np.bincount(classes)[THING_IDS].min() > 0.1 * len(classes)

    distance = ((colors[:, None] - colors) ** 2).sum(axis=-1)
    np.fill_diagonal(distance, np.inf)
    neighbors = classes[np.argsort(distance, axis=1)[:, :9]]
    votes = np.stack([(neighbors == thing).sum(axis=1) for thing in THING_IDS], axis=1)
    accuracy = np.mean(np.array(THING_IDS)[votes.argmax(axis=1)] == classes)
    assert accuracy < 0.35  # chance is 0.2


def test_written_split_reads_back(tmp_path):
    shapes.write_split(tmp_path, "val", 3, seed=1)
    content = json.loads((tmp_path / "panoptic_val.json").read_text())
    assert content["categories"] == shapes.CATEGORIES
    assert len(content["images"]) == len(content["annotations"]) == 3
    for index, (entry, annotation) in enumerate(zip(content["images"], content["annotations"], strict=True)):
        image, id_map, segments_info = shapes.draw(1, index)
        assert annotation["image_id"] == entry["id"]
        assert annotation["segments_info"] == segments_info
        assert (entry["height"], entry["width"]) == id_map.shape
        encoded = np.array(Image.open(tmp_path / "panoptic_val" / annotation["file_name"]))
        np.testing.assert_array_equal(rgb2id(encoded), id_map)
        stored = np.array(Image.open(tmp_path / "val" / entry["file_name"]))
        assert np.abs(stored.astype(int) - image).mean() < 10  # JPEG, and noise in each channel of its own


def test_split_that_stops_halfway_has_no_json(tmp_path, monkeypatch):
    shapes.write_split(tmp_path, "val", 2, seed=1)

    def draw_one(seed, index, draw=shapes.draw):
        if index:
            raise KeyboardInterrupt
        return draw(seed, index)

    monkeypatch.setattr(shapes, "draw", draw_one)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_split(tmp_path, "val", 2, seed=1)
    assert not (tmp_path / "panoptic_val.json").exists()


def test_prepare_draws_once(tmp_path, monkeypatch, small_splits):
    monkeypatch.setenv("KMAX_D2_CACHE", str(tmp_path))
    folder = shapes.prepare()
    assert folder == tmp_path / FOLDER
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    assert len(list((folder / "train").iterdir())) == 3

    monkeypatch.setattr(shapes, "draw", None)
    assert shapes.prepare() == folder
    assert shapes.prepare(tmp_path) == folder


@pytest.mark.parametrize("lost", ["panoptic_train.json", "val/0001.jpg", "panoptic_train/0000.png"])
def test_prepare_replaces_what_is_incomplete(tmp_path, small_splits, lost):
    folder = shapes.prepare(tmp_path)
    (folder / lost).unlink()
    assert shapes.prepare(tmp_path) == folder
    assert (folder / lost).is_file()
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


@pytest.mark.parametrize("broken", [False, True])
def test_prepare_side_by_side(tmp_path, monkeypatch, small_splits, broken):
    if broken:
        (tmp_path / FOLDER / "train").mkdir(parents=True)
    together = Barrier(2)

    def write_split(*args, write=shapes.write_split):
        write(*args)
        together.wait(timeout=30)

    monkeypatch.setattr(shapes, "write_split", write_split)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(shapes.prepare, [tmp_path, tmp_path]))
    assert folders == [tmp_path / FOLDER] * 2
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    assert len(list((folders[0] / "panoptic_val").iterdir())) == 2
