"""Tiles: what was cut is joined again."""

import itertools
from collections import Counter

import cv2
import numpy as np
import pytest
from layouts.coco import COCO_SAMPLE

import kmax_d2.inference.tiles as tiles
from kmax_d2.data.datasets import shapes
from kmax_d2.errors import UserError
from kmax_d2.evaluation.panoptic_quality import match_segments, panoptic_quality
from kmax_d2.inference import load

STUFF = 5  # the classes of lower numbers are things


def truth(seed=0, size=(300, 430), things=40):
    """A map of contiguous segment ids, and the segments: stuff of two classes in four quadrants, and rectangles."""
    rng = np.random.default_rng(seed)
    ids = np.full(size, 1, np.int32)
    ids[: size[0] // 2, : size[1] // 2] = ids[size[0] // 2 :, size[1] // 2 :] = 2
    ids[rng.random(size) < 0.02] = 0
    segments = [{"id": i, "category_id": STUFF + i, "isthing": False, "score": 0.5} for i in (1, 2)]
    for number in range(3, 3 + things):
        y, x, height, width = *rng.integers(0, size), *rng.integers(20, 150, 2)
        if (ids[y : y + height, x : x + width] > 2).any():
            continue  # parts of a covered thing may never meet in an overlap
        ids[y : y + height, x : x + width] = number
        segments.append({"id": number, "category_id": int(rng.integers(2)), "isthing": True, "score": 0.5})
    return ids, [segment for segment in segments if (ids == segment["id"]).any()]


def cut(ids, segments):
    """What a perfect model finds in a tile: ids of its own for the segments."""
    present = [segment for segment in segments if (ids == segment["id"]).any()]
    own = np.zeros_like(ids)
    for number, segment in enumerate(present, start=1):
        own[ids == segment["id"]] = number
    areas = np.bincount(own.ravel())
    return own, [s | {"id": i, "area": int(areas[i])} for i, s in enumerate(present, start=1)]


def quality(found, true):
    counts = match_segments(found[0], found[1], *true)
    return panoptic_quality(counts, counts)["pq"]


def joined(ids, segments, size, overlap, change=lambda part: part):
    joiner = tiles.TileJoiner(*ids.shape)
    for top, above in tiles._spans(ids.shape[0], size, overlap):
        for left, before in tiles._spans(ids.shape[1], size, overlap):
            part, of_part = cut(change(ids[top : top + size, left : left + size].copy()), segments)
            joiner.add(top, left, (above, before), part, of_part)
    return joiner


@pytest.mark.parametrize("size", [64, 101, 299, 500])
def test_a_perfect_model_finds_in_tiles_what_it_finds_in_the_whole(size):
    for seed in range(3):
        ids, segments = truth(seed)
        found, of_found = joined(ids, segments, size, size // 4).finish()
        assert np.array_equal(found > 0, ids > 0)
        assert quality((found, of_found), (ids, segments)) == pytest.approx(1)
        areas = np.bincount(found.ravel())
        assert all(s["area"] == areas[s["id"]] and s["score"] == pytest.approx(0.5) for s in of_found)


def test_borders_of_tiles_may_be_wrong():
    """Void within an eighth of a tile from its border; without the overlap, this would leave a grid."""
    ids, segments = truth(1)

    def without_borders(part):
        inside = np.zeros_like(part)
        inside[12:-12, 12:-12] = part[12:-12, 12:-12]
        return inside

    found = joined(ids, segments, 100, 40, without_borders).finish()
    assert np.array_equal(found[0][12:-12, 12:-12] > 0, ids[12:-12, 12:-12] > 0)
    assert quality(found, (ids, segments)) > 0.8


def test_things_stay_apart_unless_they_agree_in_class_and_overlap():
    joiner = tiles.TileJoiner(10, 30)
    left, right = np.zeros((2, 10, 20), np.int32)
    left[:4, 8:], right[:4, :12] = 1, 1  # one thing
    left[5:7, 8:], right[7:9, :12] = 2, 2  # two neighbors
    left[9, 8:], right[9, :12] = 3, 3  # of two classes
    categories = {1: (0, 0), 2: (1, 1), 3: (2, 3)}
    for tile, (ids, begin) in enumerate([(left, 0), (right, 10)]):
        segments = [
            {"id": i, "category_id": categories[i][tile], "isthing": True, "area": 24, "score": 1.0 - tile / 2}
            for i in (1, 2, 3)
        ]
        joiner.add(0, begin, (0, 10 * tile), ids, segments)
    found, segments = joiner.finish()
    assert [(s["category_id"], s["area"]) for s in segments] == [(0, 56), (1, 24), (2, 7), (1, 24), (3, 7)]
    assert segments[0]["score"] == pytest.approx(0.75)
    assert np.array_equal(joiner.finish(thing_limit=25)[0] > 0, found == 1)


@pytest.mark.parametrize(("length", "size", "overlap"), [(100, 100, 25), (30, 100, 25), (101, 100, 25), (999, 64, 0)])
def test_tiles_cover_everything(length, size, overlap):
    spans = tiles._spans(length, size, overlap)
    assert spans[0] == (0, 0) and (len(spans) == 1 or spans[-1][0] == length - size)
    for (before, _), (begin, shared) in itertools.pairwise(spans):
        assert shared == before + size - begin >= overlap and begin > before


@pytest.fixture(scope="module")
def predict():
    return load("shapes/quickstart", device="cpu")


def test_one_tile_is_the_whole(predict):
    image, _, _ = shapes.draw(1, 0)
    whole, tiled = predict(image), predict.tiled(image, 160)
    assert np.array_equal(whole.panoptic.ids, tiled.panoptic.ids) and whole.panoptic.segments == tiled.panoptic.segments
    assert np.array_equal(whole.semantic, tiled.semantic)


def test_an_image_larger_than_those_of_the_training(predict, monkeypatch):
    monkeypatch.setattr(shapes, "SIZES", ((260, 260),))
    monkeypatch.setattr(shapes, "NUM_THINGS", (5, 8))
    counts = Counter()
    for index in range(4):
        image, ids, segments = shapes.draw(1, index)
        image, ids = cv2.resize(image, (175, 175)), cv2.resize(ids, (175, 175), interpolation=cv2.INTER_NEAREST)
        tiled = predict.tiled(image, 97)
        things = [segment for segment in tiled.panoptic.segments if segment.is_thing]
        stuff = [segment.class_id for segment in tiled.panoptic.segments if not segment.is_thing]
        assert len(stuff) == len(set(stuff)) > 0
        assert len(tiled.instances) == len(things) and tiled.semantic.shape == (175, 175)
        for thing, mask, box in zip(things, tiled.instances.pred_masks, tiled.instances.pred_boxes, strict=True):
            assert int(mask.sum()) == thing.area and tuple(box.int().tolist()) == thing.box
        found = [{"id": s.id, "category_id": s.class_id} for s in tiled.panoptic.segments]
        true = [{"id": s["id"], "category_id": s["category_id"] - 1} for s in segments]
        for category, of_image in match_segments(tiled.panoptic.ids, found, ids, true).items():
            counts[category] = counts[category] + of_image
    assert panoptic_quality(counts, counts)["pq"] > 0.6


def test_a_photograph_in_tiles_is_as_in_the_whole():
    predict = load("camvid/street", device="cpu")
    for photo in COCO_SAMPLE.glob("*.jpg"):
        whole, tiled = predict(photo), predict.tiled(photo, 160)
        assert (whole.semantic == tiled.semantic).mean() > 0.9
        found, true = ([{"id": s.id, "category_id": s.class_id} for s in r.panoptic.segments] for r in (tiled, whole))
        counts = match_segments(tiled.panoptic.ids, found, whole.panoptic.ids, true)
        assert panoptic_quality(counts, counts)["pq"] > 0.6


@pytest.mark.parametrize(("size", "overlap"), [(0, None), (-5, None), (100, 51), (100, -1)])
def test_impossible_tiles(predict, size, overlap):
    with pytest.raises(UserError, match="tiles have at least 64 pixels"):
        predict.tiled(np.zeros((8, 8, 3), np.uint8), size, overlap)
