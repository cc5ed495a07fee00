"""What the small model gives at test, as Detectron2 users build and call it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from scenes import NUM_CLASSES, QUERIES, SIZES, THINGS, build_decisive, build_model, picture
from small import CITYSCAPES

from kmax_d2.modeling.postprocess import resize_nearest


@pytest.fixture(scope="module")
def decisive():
    return build_decisive()


def assert_same_results(first, second):
    """Equal except for the few pixels that rounding moves: batches of other sizes are summed in another order."""
    few = 0.002 * first["panoptic_seg"][0].numel()
    assert (first["panoptic_seg"][0] != second["panoptic_seg"][0]).sum() <= few
    described = [[(s["category_id"], s["isthing"]) for s in result["panoptic_seg"][1]] for result in (first, second)]
    assert described[0] == described[1]
    assert (first["semantic"] != second["semantic"]).sum() <= few
    assert torch.equal(first["instances"].pred_classes, second["instances"].pred_classes)
    assert (first["instances"].pred_masks != second["instances"].pred_masks).flatten(1).sum(1).max() <= few
    # A pixel more or less counts in the score of a small mask.
    torch.testing.assert_close(first["instances"].scores, second["instances"].scores, rtol=0, atol=0.02)


# --- results ---


@torch.no_grad()
def test_results_are_what_detectron2_users_expect(decisive):
    (result,) = decisive([{"image": picture(65, 65)}])
    assert set(result) == {"panoptic_seg", "semantic", "sem_seg", "instances"}
    segment_ids, segments = result["panoptic_seg"]
    assert segment_ids.dtype == torch.int32
    assert segment_ids.shape == (65, 65)
    assert len(segments) >= 3
    assert {s["isthing"] for s in segments} == {False, True}
    for segment in segments:
        assert {"id", "category_id", "isthing", "area", "score"} <= set(segment)
        assert segment["isthing"] == (segment["category_id"] in THINGS)
        assert segment["area"] == (segment_ids == segment["id"]).sum() > 0
    assert set(segment_ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
    instances = result["instances"]
    assert isinstance(instances, Instances)
    assert instances.image_size == (65, 65)
    assert isinstance(instances.pred_boxes, Boxes)
    assert len(instances) >= 2
    assert set(instances.pred_classes.tolist()) <= THINGS
    scores = instances.scores.tolist()
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0 and max(scores) <= 1


@torch.no_grad()
def test_one_hot_classes_are_computed_when_read(decisive):
    (result,) = decisive([{"image": picture(50, 65)}])
    assert "sem_seg" in result
    one_hot, classes = result["sem_seg"], result["semantic"]
    assert classes.dtype == torch.int64
    assert one_hot.dtype == torch.uint8
    assert torch.equal(one_hot, F.one_hot(classes, NUM_CLASSES).permute(2, 0, 1).byte())
    assert set(result) == {"panoptic_seg", "semantic", "sem_seg", "instances"}
    with pytest.raises(KeyError, match="proposals"):
        result["proposals"]


@pytest.mark.parametrize(
    ("wanted", "key"), [("PANOPTIC", "panoptic_seg"), ("SEMANTIC", "semantic"), ("INSTANCE", "instances")]
)
def test_outputs_can_be_left_out(wanted, key):
    others = {"PANOPTIC", "SEMANTIC", "INSTANCE"} - {wanted}
    model = build_model(**{f"MODEL__KMAX__TEST__{name}_ON": False for name in others}).eval()
    with torch.no_grad():
        (result,) = model([{"image": picture(65, 65)}])
    assert set(result) - {"sem_seg"} == {key}
    assert ("sem_seg" in result) == (key == "semantic")


# --- sizes and batches at test ---


@pytest.fixture(scope="module", params=list(itertools.product([True, False], [True, False])), ids=str)
def any_model(request):
    """Both kinds of merging with both kinds of padding."""
    at_crop, pad = request.param
    return build_decisive(MODEL__KMAX__TEST__MERGE_AT_CROP=at_crop, MODEL__KMAX__TEST__PAD_TO_CROP=pad)


@pytest.mark.parametrize("original", [None, (130, 77), (20, 31)])
@torch.no_grad()
def test_results_have_the_original_size(any_model, original):
    inputs = [{"image": picture(*size)} for size in SIZES]
    if original is not None:
        inputs = [x | {"height": original[0], "width": original[1]} for x in inputs]
    found = 0
    for x, result, real in zip(inputs, any_model(inputs), SIZES, strict=True):
        size = original or real
        segment_ids, segments = result["panoptic_seg"]
        assert x["image"].shape[-2:] == real
        assert segment_ids.shape == size
        assert result["semantic"].shape == size
        assert result["semantic"].min() >= 0 and result["semantic"].max() < NUM_CLASSES
        assert result["instances"].image_size == size
        assert result["instances"].pred_masks.shape[1:] == size
        assert set(segment_ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
        for segment in segments:
            assert segment["area"] == (segment_ids == segment["id"]).sum()
        found += len(segments)
    assert found >= 2 * len(SIZES)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1)])
@torch.no_grad()
def test_images_of_a_pixel_or_a_line(any_model, size):
    torch.full((10**5,), torch.nan)  # in memory that is free again
    whole, half = any_model([{"image": picture(*size)}, {"image": picture(*size), "height": 1, "width": 1}])
    assert whole["semantic"].shape == whole["panoptic_seg"][0].shape == size
    assert half["semantic"].shape == half["panoptic_seg"][0].shape == (1, 1)
    assert whole["semantic"].min() >= 0 and whole["semantic"].max() < NUM_CLASSES
    if size == (1, 1):
        assert torch.equal(whole["panoptic_seg"][0], half["panoptic_seg"][0])
        assert torch.equal(whole["semantic"], half["semantic"])


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbors(any_model):
    sizes = [(65, 65), (50, 40), (64, 90), (65, 65)]
    inputs = [{"image": picture(*size, seed=seed)} for seed, size in enumerate(sizes)]
    together = any_model(inputs)
    for x, result in zip(inputs, together, strict=True):
        assert_same_results(any_model([x])[0], result)
    assert not torch.equal(together[0]["panoptic_seg"][0], together[3]["panoptic_seg"][0])


@torch.no_grad()
def test_merging_at_crop_resizes_ids_by_nearest(decisive):
    image = picture(50, 40)
    (plain,) = decisive([{"image": image}])
    (double,) = decisive([{"image": image, "height": 100, "width": 80}])
    ids = plain["panoptic_seg"][0]
    assert torch.equal(double["panoptic_seg"][0], ids.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert [4 * s["area"] for s in plain["panoptic_seg"][1]] == [s["area"] for s in double["panoptic_seg"][1]]


@pytest.mark.parametrize(("at_crop", "limit", "found"), [(True, 600, True), (True, 4226, False), (False, 4226, True)])
@torch.no_grad()
def test_area_limits_count_the_padded_crop(at_crop, limit, found):
    """The image has 400 pixels in a crop of 4225; merging at the original size has no limits."""
    model = build_decisive(
        MODEL__KMAX__TEST__MERGE_AT_CROP=at_crop,
        MODEL__KMAX__TEST__THING_AREA_LIMIT=limit,
        MODEL__KMAX__TEST__STUFF_AREA_LIMIT=limit,
    )
    segment_ids, segments = model([{"image": picture(20, 20)}])[0]["panoptic_seg"]
    assert segment_ids.any() == (len(segments) > 0) == found
    assert sum(segment["area"] for segment in segments) <= 400


@pytest.mark.parametrize("size", [(13, 29), (33, 40), (50, 37), (20, 10)])
def test_labels_are_resized_by_nearest_pixel_centers(size):
    labels = torch.arange(30 * 40).view(30, 40)
    expected = F.interpolate(labels[None, None, :20, :33].double(), size, mode="nearest-exact")[0, 0].long()
    assert torch.equal(resize_nearest(labels, (20, 33), size), expected)


# --- predict ---


@pytest.mark.parametrize("size", SIZES)
def test_predict_of_any_size(decisive, size):
    height, width = size
    padded = tuple(-(-(side - 1) // 32) * 32 + 1 for side in size)
    image = torch.full((2, 3, *padded), 127.5)
    image[0, :, :height, :width] = picture(*size, seed=1)
    image[1, :, :height, :width] = picture(*size, seed=2)
    result = decisive.predict(image[:, :, :height, :width], auxiliary=True)
    whole = decisive.predict(image, auxiliary=True)
    assert len(result["auxiliary"]) == 6
    strides = [4, 32, 32, 16, 16, 8, 8]
    predictions = zip([result, *result["auxiliary"]], [whole, *whole["auxiliary"]], strides, strict=True)
    for ours, expected, stride in predictions:
        h, w = (height - 1) // stride + 1, (width - 1) // stride + 1
        assert ours["class_logits"].shape == (2, QUERIES, NUM_CLASSES + 1)
        assert ours["mask_logits"].shape == (2, QUERIES, h, w)
        torch.testing.assert_close(ours["class_logits"], expected["class_logits"])
        torch.testing.assert_close(ours["mask_logits"], expected["mask_logits"][..., :h, :w])
        torch.testing.assert_close(ours["pixel_feature"], expected["pixel_feature"][..., :h, :w])


@torch.no_grad()
def test_last_map_at_stride_2():
    model = build_model(**CITYSCAPES).eval()
    assert model.predict(picture(65, 97)[None])["mask_logits"].shape == (1, QUERIES, 33, 49)
    assert model([{"image": picture(50, 41)}])[0]["panoptic_seg"][0].shape == (50, 41)


def test_drop_query_predicts_with_all_queries():
    plain = build_model().eval()
    model = build_model(MODEL__KMAX__TRANSFORMER_DECODER__TRAINING_QUERIES=5).eval()
    model.load_state_dict(plain.state_dict())
    image = picture(65, 65)[None]
    ours, theirs = (m.predict(image, auxiliary=True) for m in (model, plain))
    for first, second in zip([ours, *ours["auxiliary"]], [theirs, *theirs["auxiliary"]], strict=True):
        assert first["mask_logits"].shape[1] == QUERIES
        assert torch.equal(first["mask_logits"], second["mask_logits"])
        assert torch.equal(first["class_logits"], second["class_logits"])
