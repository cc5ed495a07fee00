"""Pictures: colors, geometry, and that they show what the model says."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from small import options

from kmax_d2 import visualization
from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.data.segment_ids import rgb2id
from kmax_d2.engine import ready_config

STAR = next(index for index, category in enumerate(shapes.CATEGORIES) if category["name"] == "star")
SKY = next(index for index, category in enumerate(shapes.CATEGORIES) if category["name"] == "sky")


@pytest.fixture(scope="module")
def metadata():
    return MetadataCatalog.get("shapes_val")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(
        ready_config("shapes/quickstart", options(MODEL__KMAX__TRANSFORMER_DECODER__DECODERS=[2, 2, 2]))
    ).eval()


@pytest.fixture
def gray():
    return np.full((130, 160, 3), 100, dtype=np.uint8)


def two_stars_in_the_sky():
    ids = np.ones((130, 160), dtype=np.int32)
    ids[30:100, 10:60] = 2
    ids[30:100, 90:150] = 3
    segments = [{"id": 1, "category_id": SKY, "isthing": False}]
    segments += [{"id": number, "category_id": STAR, "isthing": True} for number in (2, 3)]
    return ids, segments


def test_overlay_has_the_classes_colors_and_tells_instances_apart(gray, metadata):
    ids, segments = two_stars_in_the_sky()
    picture = visualization.draw_panoptic(gray, ids, segments, metadata)
    assert picture.shape == (390, 480, 3) and picture.dtype == np.uint8
    sky, left, right = (picture[3 * y + 1, 3 * x + 1].astype(int) for y, x in ((5, 5), (90, 15), (90, 145)))
    for pixel, category in ((sky, SKY), (right, STAR)):  # the larger star comes first
        expected = 0.4 * 100 + 0.6 * np.array(shapes.CATEGORIES[category]["color"])
        assert np.abs(pixel - expected).max() <= 2
    assert np.abs(left - right).max() > 30


def test_overlay_is_the_same_every_time_and_leaves_its_arguments(gray, metadata):
    ids, segments = two_stars_in_the_sky()
    first = visualization.draw_panoptic(gray, torch.from_numpy(ids), segments, metadata)
    np.random.seed(7)
    assert np.array_equal(visualization.draw_panoptic(gray, ids, segments, metadata), first)
    assert segments == two_stars_in_the_sky()[1]
    assert (gray == 100).all()


def test_twenty_instances_have_twenty_colors(metadata):
    ids = np.repeat(np.arange(1, 21), 20)[None].repeat(400, 0)
    segments = [{"id": number, "category_id": STAR, "isthing": True} for number in range(1, 21)]
    picture = visualization.draw_panoptic(np.zeros((400, 400, 3), np.uint8), ids, segments, metadata)
    assert len({tuple(pixel) for pixel in picture[20, 10::20]}) == 20


def test_stuff_label_lies_inside_its_mask(gray, metadata):
    ids = np.ones((130, 160), dtype=np.int32)
    ids[:100, 30:] = 0  # an L, whose median pixel is not in it
    labelled = visualization.draw_panoptic(gray, ids, two_stars_in_the_sky()[1][:1], metadata)
    assert (labelled[:290, 100:] == 100).all()
    assert labelled.min() < 30  # the label's black box


@pytest.mark.parametrize("corner", [(slice(0, 12), slice(0, 12)), (slice(-12, None), slice(-12, None))])
def test_labels_stay_in_the_image(gray, metadata, corner):
    ids = np.zeros((130, 160), dtype=np.int32)
    ids[corner] = 2
    segments = [{"id": 2, "category_id": STAR, "isthing": True, "score": 0.99}]
    picture = visualization.draw_panoptic(gray, ids, segments, metadata)
    rows, columns = np.nonzero((picture < 40).all(-1))  # the label's black box
    assert np.ptp(columns) > 50 and np.ptp(rows) > 10
    # None of the box is cut off: it is as large as in the middle.
    ids = np.roll(ids, (65, 80), (0, 1))
    middle = np.nonzero((visualization.draw_panoptic(gray, ids, segments, metadata) < 40).all(-1))
    assert abs(np.ptp(middle[0]) - np.ptp(rows)) <= 2 and abs(np.ptp(middle[1]) - np.ptp(columns)) <= 2


@pytest.mark.parametrize("segments", [[], [{"id": 1, "category_id": SKY, "isthing": False}]])
def test_no_segments_leave_the_image(gray, metadata, segments):
    picture = visualization.draw_panoptic(gray, torch.zeros(130, 160, dtype=torch.int32), segments, metadata)
    assert np.array_equal(picture, visualization.enlarged(gray))


@pytest.mark.parametrize(
    ("size", "expected"), [((384, 400), (384, 400)), ((300, 500), (600, 1000)), ((1, 3000), (1, 3000))]
)
def test_only_small_images_are_enlarged(metadata, size, expected):
    image = np.zeros((*size, 3), dtype=np.uint8)
    assert visualization.draw_panoptic(image, np.zeros(size), [], metadata).shape[:2] == expected


@pytest.mark.parametrize("number", [2, 16, 128])
def test_palette_is_distinct_and_steady(number):
    palette = visualization.cluster_palette(number).astype(int)
    assert palette.shape == (number, 3)
    assert np.array_equal(palette, visualization.cluster_palette(256)[:number])
    distance = np.abs(palette[:, None] - palette[None]).sum(-1) + 1000 * np.eye(number)
    assert distance.min() >= (90 if number <= 16 else 30)


def test_one_color_for_each_cluster(gray):
    assignment = np.array([[0, 1], [2, 0]])
    picture = visualization.draw_assignment(gray, assignment)
    assert picture.shape == gray.shape and picture.dtype == np.uint8
    assert np.array_equal(picture[0, 0], picture[-1, -1])
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 3)}) == 3
    expected = 0.75 * visualization.cluster_palette(4)[1] + 0.25 * 100
    assert np.abs(picture[0, -1] - expected).max() <= 0.5
    # Each position holds for the pixels that are nearest to it.
    assert (picture[:65, :80] == picture[0, 0]).all() and (picture[:65, 80:] == picture[0, -1]).all()


def test_assignments_are_the_largest_logits(model):
    image = torch.randint(0, 256, (3, 65, 49), dtype=torch.uint8)
    found = visualization.assignments(model, image)
    result = model.predict(image[None], auxiliary=True)
    assert [array.shape for array in found] == [(3, 2)] * 2 + [(5, 4)] * 2 + [(9, 7)] * 2 + [(17, 13)]
    for array, prediction in zip(found, [*result["auxiliary"], result], strict=True):
        assert np.array_equal(array, prediction["mask_logits"][0].numpy().argmax(0))


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_stride_follows_from_the_sizes(stride):
    for size in ((129, 129), (1281, 853), (36, 33), (800, 40)):
        assert visualization._stride(size, [(side - 1) // stride + 1 for side in size]) == stride


def test_page_holds_every_panel_at_one_size():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    red, green, blue = (np.full((size, 2 * size, 3), c, np.uint8) for size, c in zip((60, 60, 30), colors, strict=True))
    sheet = visualization.page([("red", red), ("green", green), ("blue", blue)], columns=2)
    assert sheet.dtype == np.uint8
    corners = []
    for color in colors:
        rows, columns = np.nonzero((sheet == color).all(-1))
        assert len(rows) == 60 * 120
        assert (np.ptp(rows), np.ptp(columns)) == (59, 119)
        corners.append((rows.min(), columns.min()))
    assert corners[0][0] == corners[1][0] and corners[0][1] == corners[2][1]
    assert corners[0][1] < corners[1][1] and corners[0][0] < corners[2][0]
    top, left = corners[0]
    assert (sheet[:top, left : left + 120] < 100).any()  # the title
    assert (sheet[-5:] == 255).all() and (sheet[:, -5:] == 255).all()


@pytest.fixture
def record(tmp_path):
    shapes.write_split(tmp_path, "val", 1, 3)
    images, pngs, json_file = (str(tmp_path / name) for name in ("val", "panoptic_val", "panoptic_val.json"))
    return coco_panoptic.load(json_file, images, pngs)[0]


DECODERS = [f"decoder {number} (stride {stride})" for number, stride in enumerate((32, 32, 16, 16, 8, 8), start=1)]


@pytest.mark.parametrize("training", [True, False])
def test_result_page(model, metadata, record, monkeypatch, training):
    """Of a record with its ground truth, and of an image alone."""
    monkeypatch.setattr(visualization, "page", lambda panels: panels)  # before it becomes one picture
    record = record if training else {"file_name": record["file_name"]}
    model.train(training)
    try:
        panels = visualization.result_page(model, record, metadata)
        assert all(module.training == training for module in model.modules())
    finally:
        model.eval()
    first = (
        ["input", "ground truth", "prediction"] if training else ["input", "prediction", "final clusters (stride 4)"]
    )
    assert [title for title, _ in panels] == [*first, *DECODERS]
    assert len({image.shape for _, image in panels}) == 1


def test_result_page_shows_the_ground_truth(model, metadata, record):
    """The second panel is the overlay of the record's own masks."""
    sheet = visualization.result_page(model, record, metadata)
    image, ids = (np.asarray(Image.open(record[name])) for name in ("file_name", "pan_seg_file_name"))
    expected = visualization.draw_panoptic(image, rgb2id(ids), record["segments_info"], metadata)
    height, width = expected.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet[: height + 80], (height, 1, 3))
    column = expected[:, width // 4][:, None]
    assert (windows[..., :, :, :] == column).all((-1, -2, -3)).any()
