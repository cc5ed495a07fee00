"""The whole model, small, as Detectron2 users build and call it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from kmax_d2 import add_kmax_config
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError
from kmax_d2.modeling import (
    PIXEL_DECODER_REGISTRY,
    SEMANTIC_HEAD_REGISTRY,
    TRANSFORMER_DECODER_REGISTRY,
    KMaXDeepLab,
    KMaXPixelDecoder,
    KMaXTransformerDecoder,
)
from kmax_d2.modeling.backbones import KMaXResNet
from kmax_d2.modeling.kmax_decoder import KMaXDecoderLayer
from kmax_d2.modeling.kmeans import KMeansCrossAttention
from kmax_d2.modeling.postprocess import resize_nearest
from kmax_d2.modeling.semantic_head import ASPPSemanticHead

NUM_CLASSES = 6
THINGS = {0, 2, 3}
QUERIES = 16
DATASET = "kmax_d2_tests_six_classes"
MetadataCatalog.get(DATASET).set(thing_dataset_id_to_contiguous_id={10 + index: index for index in THINGS})
# What sets the Cityscapes models apart.
CITYSCAPES = (
    *("MODEL.KMAX.PIXEL_DECODER.IN_FEATURES", ["stage5", "stage4", "stage3", "stage2", "stage1"]),
    *("MODEL.KMAX.PIXEL_DECODER.WIDTHS", [64, 32, 16, 8, 8]),
    *("MODEL.KMAX.PIXEL_DECODER.BLOCKS", [1, 1, 1, 1, 1]),
    *("MODEL.KMAX.PIXEL_DECODER.KINDS", ["axial", "axial", "bottleneck", "bottleneck", "bottleneck"]),
    *("MODEL.KMAX.SEMANTIC_HEAD.NAME", "PointwiseSemanticHead"),
    *("MODEL.KMAX.LOSS.SEMANTIC_HARD_SHARE", 0.2),
    *("MODEL.KMAX.LOSS.SMALL_INSTANCE_WEIGHT", 3.0),
)
SIZES = [(64, 48), (65, 65), (33, 33), (17, 17), (50, 71), (97, 40), (16, 100)]


def build(*options):
    """A small model from config options, everything random that training starts at zero."""
    cfg = get_cfg()
    add_kmax_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu"),
            *("DATASETS.TEST", (DATASET,)),
            *("INPUT.CROP_SIZE", [65, 65]),
            *("MODEL.KMAX.NUM_CLASSES", NUM_CLASSES),
            *("MODEL.KMAX.NORM", "BN"),
            *("MODEL.KMAX.RESNET.BLOCKS", [1, 1, 1, 1]),
            *("MODEL.KMAX.RESNET.WIDTHS", [8, 16, 32, 64]),
            *("MODEL.KMAX.RESNET.STEM_WIDTH", 8),
            *("MODEL.KMAX.PIXEL_DECODER.WIDTHS", [64, 32, 16, 8]),
            *("MODEL.KMAX.PIXEL_DECODER.BLOCKS", [1, 1, 1, 1]),
            *("MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES", QUERIES),
            *("MODEL.KMAX.TRANSFORMER_DECODER.CHANNELS", 32),
            *("MODEL.KMAX.TRANSFORMER_DECODER.FFN_CHANNELS", 64),
            *("MODEL.KMAX.TRANSFORMER_DECODER.KEY_CHANNELS", 32),
            *("MODEL.KMAX.TRANSFORMER_DECODER.FEATURE_CHANNELS", 16),
            *("MODEL.KMAX.SEMANTIC_HEAD.CHANNELS", 32),
            *("MODEL.KMAX.LOSS.NUM_SAMPLES", 64),
            *options,
        ]
    )
    torch.manual_seed(1)  # no pixel of a test lies so near to two clusters that rounding could move it
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def build_sure(*options):
    """A small model in inference mode whose random predictions are decided enough to give segments."""
    model = build(
        *("MODEL.KMAX.TEST.THING_THRESHOLD", 0.3),
        *("MODEL.KMAX.TEST.STUFF_THRESHOLD", 0.3),
        *("MODEL.KMAX.TEST.OVERLAP_THRESHOLD", 0.5),
        *("MODEL.KMAX.TEST.THING_AREA_LIMIT", 4),
        *("MODEL.KMAX.TEST.STUFF_AREA_LIMIT", 8),
        *options,
    )
    # Running statistics that fit, and by them clear masks and classes.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    torch.manual_seed(3)  # gives segments of things and of stuff
    with torch.no_grad():
        for _ in range(5):
            model([sample(65, 65, seed) for seed in range(2)])
        predictor = model.transformer_decoder.predictor
        predictor.mask_norm.weight.fill_(8.0)
        predictor.class_head.weight.mul_(100)
        predictor.class_head.bias[-1] = -8.0
    return model.eval()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def picture(height, width, seed=0):
    """A colourful smooth image (3, H, W), uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)[0]
    return (smooth * 255).to(torch.uint8)


def sample(height, width, seed=0, cell=16):
    """A training input with one mask for each cell of a grid, but for every third cell's void."""
    rows, columns = torch.arange(height) // cell, torch.arange(width) // cell
    ids = rows[:, None] * (columns[-1] + 1) + columns
    count = int(ids.max()) + 1
    return {
        "image": picture(height, width, seed),
        "segment_ids": ids.where(ids % 3 != 2, -1),
        "segment_classes": torch.arange(count) % NUM_CLASSES,
    }


@pytest.fixture(scope="module")
def sure_model():
    return build_sure()


@pytest.fixture(params=[(), CITYSCAPES], ids=["coco", "cityscapes"])
def training_model(request):
    return build(*request.param).train()


def assert_same_results(first, second):
    """Equal but for the few pixels that rounding moves: batches of other sizes are summed in another order."""
    few = 0.002 * first["panoptic_seg"][0].numel()
    assert (first["panoptic_seg"][0] != second["panoptic_seg"][0]).sum() <= few
    described = [[(s["category_id"], s["isthing"]) for s in result["panoptic_seg"][1]] for result in (first, second)]
    assert described[0] == described[1]
    assert (first["sem_seg"] != second["sem_seg"]).any(0).sum() <= few
    assert torch.equal(first["instances"].pred_classes, second["instances"].pred_classes)
    assert (first["instances"].pred_masks != second["instances"].pred_masks).flatten(1).sum(1).max() <= few
    torch.testing.assert_close(first["instances"].scores, second["instances"].scores, rtol=1e-3, atol=1e-3)


# --- results ---


@torch.no_grad()
def test_results_are_what_detectron2_users_expect(sure_model):
    (result,) = sure_model([{"image": picture(65, 65, seed=2)}])
    assert set(result) == {"panoptic_seg", "sem_seg", "instances"}
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


@pytest.mark.parametrize("size", [(65, 65), (50, 41)])
@torch.no_grad()
def test_semantic_class_is_that_of_the_query_with_the_largest_logit(sure_model, size):
    image = torch.full((3, 65, 65), 127.5)  # the value that padding has after scaling
    image[:, : size[0], : size[1]] = picture(*size)
    (result,) = sure_model([{"image": picture(*size)}])
    raw = sure_model.predict(image[None])
    logits = F.interpolate(raw["mask_logits"], (65, 65), mode="bilinear", align_corners=True)[0]
    two = logits.topk(2, dim=0).values
    clear = (two[0] - two[1] > 1e-3)[: size[0], : size[1]]
    assert clear.float().mean() > 0.9
    expected = raw["class_logits"][0, :, :-1].argmax(1)[logits.argmax(0)][: size[0], : size[1]]
    semantic = result["sem_seg"]
    assert semantic.shape == (NUM_CLASSES, *size)
    assert (semantic.sum(0) == 1).all()
    assert len(expected.unique()) >= 2
    assert torch.equal(semantic.argmax(0)[clear], expected[clear])


@torch.no_grad()
def test_instances_are_the_masks_of_thing_queries():
    model = build_sure("MODEL.KMAX.TEST.INSTANCE", "query")
    image = picture(65, 65)
    (result,) = model([{"image": image}])
    raw = model.predict(image[None])
    confidence, category = raw["class_logits"][0].softmax(1)[:, :-1].max(1)
    small = raw["mask_logits"][0].softmax(0)
    full = F.interpolate(raw["mask_logits"], (65, 65), mode="bilinear", align_corners=True)[0].softmax(0)
    expected = []
    for query in range(QUERIES):
        inside = small[query] > 0.4
        if category[query].item() in THINGS and inside.any():
            expected.append((confidence[query].item() * small[query][inside].mean().item(), query))
    expected.sort(reverse=True)
    instances = result["instances"]
    assert instances.scores.tolist() == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert instances.pred_classes.tolist() == [category[query].item() for _, query in expected]
    for mask, (_, query) in zip(instances.pred_masks, expected, strict=True):
        differs = mask != (full[query] > 0.4)
        assert not differs[(full[query] - 0.4).abs() > 1e-4].any()


@pytest.mark.parametrize("size", [(65, 65), (50, 71)])
@torch.no_grad()
def test_boxes_bound_their_masks_tightly(sure_model, size):
    (result,) = sure_model([{"image": picture(*size), "height": 90, "width": 60}])
    instances = result["instances"]
    assert len(instances) >= 2
    for mask, box in zip(instances.pred_masks, instances.pred_boxes.tensor.tolist(), strict=True):
        rows, columns = mask.nonzero().unbind(1)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@torch.no_grad()
def test_most_confident_instances_are_kept(sure_model):
    few = copy.copy(sure_model)
    few.max_instances = 2
    image = picture(65, 65)
    instances, best = (model([{"image": image}])[0]["instances"] for model in (sure_model, few))
    assert len(instances) > 2
    assert torch.equal(best.scores, instances.scores[:2])
    assert torch.equal(best.pred_masks, instances.pred_masks[:2])


@pytest.mark.parametrize("wanted", ["PANOPTIC", "SEMANTIC", "INSTANCE"])
def test_outputs_can_be_left_out(wanted):
    others = {"PANOPTIC", "SEMANTIC", "INSTANCE"} - {wanted}
    model = build(*itertools.chain(*((f"MODEL.KMAX.TEST.{name}_ON", False) for name in others))).eval()
    key = {"PANOPTIC": "panoptic_seg", "SEMANTIC": "sem_seg", "INSTANCE": "instances"}[wanted]
    with torch.no_grad():
        assert set(model([{"image": picture(65, 65)}])[0]) == {key}


# --- sizes and batches at test ---


@pytest.fixture(scope="module", params=list(itertools.product([True, False], [True, False])), ids=str)
def any_model(request):
    """Both ways of merging, both ways of padding."""
    at_crop, pad = request.param
    return build_sure("MODEL.KMAX.TEST.MERGE_AT_CROP", at_crop, "MODEL.KMAX.TEST.PAD_TO_CROP", pad)


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
        assert result["sem_seg"].shape == (NUM_CLASSES, *size)
        assert (result["sem_seg"].sum(0) == 1).all()
        assert result["instances"].image_size == size
        assert result["instances"].pred_masks.shape[1:] == size
        assert set(segment_ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
        for segment in segments:
            assert segment["area"] == (segment_ids == segment["id"]).sum()
        found += len(segments)
    assert found >= 2 * len(SIZES)


@torch.no_grad()
def test_an_image_does_not_feel_its_neighbours(any_model):
    sizes = [(65, 65), (50, 40), (64, 90), (65, 65)]
    inputs = [{"image": picture(*size, seed=seed)} for seed, size in enumerate(sizes)]
    together = any_model(inputs)
    for x, result in zip(inputs, together, strict=True):
        assert_same_results(any_model([x])[0], result)
    assert not torch.equal(together[0]["panoptic_seg"][0], together[3]["panoptic_seg"][0])


@torch.no_grad()
def test_merging_at_crop_resizes_ids_by_nearest(sure_model):
    image = picture(50, 40)
    plain, double = sure_model([{"image": image}, {"image": image, "height": 100, "width": 80}])
    ids = plain["panoptic_seg"][0]
    assert torch.equal(double["panoptic_seg"][0], ids.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert [4 * s["area"] for s in plain["panoptic_seg"][1]] == [s["area"] for s in double["panoptic_seg"][1]]


@pytest.mark.parametrize(("at_crop", "limit", "found"), [(True, 600, True), (True, 4226, False), (False, 4226, True)])
@torch.no_grad()
def test_area_limits_count_the_padded_crop(at_crop, limit, found):
    """Of an image of 400 pixels in a crop of 4225; merging at the original size has no limits."""
    model = build_sure(
        *("MODEL.KMAX.TEST.MERGE_AT_CROP", at_crop),
        *("MODEL.KMAX.TEST.THING_AREA_LIMIT", limit),
        *("MODEL.KMAX.TEST.STUFF_AREA_LIMIT", limit),
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
def test_predict_of_any_size(sure_model, size):
    height, width = size
    padded = tuple(-(-(side - 1) // 32) * 32 + 1 for side in size)
    image = torch.full((2, 3, *padded), 127.5)
    image[0, :, :height, :width] = picture(*size, seed=1)
    image[1, :, :height, :width] = picture(*size, seed=2)
    result = sure_model.predict(image[:, :, :height, :width], auxiliary=True)
    whole = sure_model.predict(image, auxiliary=True)
    assert len(result["auxiliary"]) == 6
    strides = [4, 32, 32, 16, 16, 8, 8]
    for ours, all_of_it, stride in zip(
        [result, *result["auxiliary"]], [whole, *whole["auxiliary"]], strides, strict=True
    ):
        h, w = (height - 1) // stride + 1, (width - 1) // stride + 1
        assert ours["class_logits"].shape == (2, QUERIES, NUM_CLASSES + 1)
        assert ours["mask_logits"].shape == (2, QUERIES, h, w)
        torch.testing.assert_close(ours["class_logits"], all_of_it["class_logits"])
        torch.testing.assert_close(ours["mask_logits"], all_of_it["mask_logits"][..., :h, :w])
        torch.testing.assert_close(ours["pixel_feature"], all_of_it["pixel_feature"][..., :h, :w])


def test_bgr_model_of_bgr_images_is_the_rgb_model_of_rgb_images(sure_model):
    bgr_model = build_sure("INPUT.FORMAT", "BGR")
    bgr_model.load_state_dict(sure_model.state_dict())
    image = picture(65, 65)
    with torch.no_grad():
        (expected,) = sure_model([{"image": image}])
        assert_same_results(bgr_model([{"image": image.flip(0)}])[0], expected)
        other = bgr_model([{"image": image}])[0]
    assert not torch.equal(other["panoptic_seg"][0], expected["panoptic_seg"][0])
    # The raw network takes RGB in any case.
    raw = [model.predict(image[None])["mask_logits"] for model in (sure_model, bgr_model)]
    assert torch.equal(*raw)


# --- training ---


@pytest.mark.parametrize("sizes", [[size] for size in SIZES] + [[(65, 65), (50, 71)], [(17, 17), (33, 64)]], ids=str)
def test_training_on_any_size(training_model, sizes):
    losses = training_model([sample(*size, seed=seed) for seed, size in enumerate(sizes)])
    assert len(losses) == 4 * 7 + 1
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in training_model.parameters())


@pytest.mark.parametrize("training_model", [()], indirect=True)
def test_one_image_in_training_leaves_the_pooled_norm_in_order(training_model):
    """One pooled pixel has no variance: it must neither crash nor pull the running variance to zero."""
    training_model([sample(65, 65)])
    norm = training_model.semantic_head.aspp.pool.norm
    before = norm.running_var.clone()
    for _ in range(20):
        training_model([sample(65, 65)])
    assert torch.equal(norm.running_var, before)
    assert (before == 1).all()
    training_model([sample(65, 65, seed) for seed in range(2)])
    assert not torch.equal(norm.running_var, before)


def test_batch_without_a_mask(training_model):
    empty = {
        "image": picture(65, 65),
        "segment_ids": torch.full((65, 65), -1),
        "segment_classes": torch.zeros(0, dtype=torch.int64),
    }
    losses = training_model([empty])
    for name, value in losses.items():
        assert torch.isfinite(value)
        assert value == 0 or name.startswith("loss_pq_class")
    sum(losses.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in training_model.parameters())
    # Next to an image with masks it changes nothing but the mean.
    losses = training_model([empty, sample(65, 65)])
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())


def test_more_masks_than_queries(training_model):
    crowded = sample(65, 65, cell=8)
    assert len(crowded["segment_ids"].unique()) - 1 > 2 * QUERIES
    losses = training_model([crowded, sample(65, 65)])
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())


# Nothing can be learned here: a constant on all queries or positions under a softmax, or on all values under a norm.
NO_EFFECT = (
    "mask_norm.bias",
    "norm_logits.bias",
    "predictor.pixel_projection.bias",
    "cross_attention.norm.bias",
    "height_attention.norm_values.bias",
)


@pytest.mark.parametrize("options", [(), CITYSCAPES], ids=["coco", "cityscapes"])
def test_gradients_reach_every_parameter(options):
    model = build("MODEL.KMAX.TRANSFORMER_DECODER.DROP_PATH", 0.0, *options).train()
    without_dropout(model)
    sum(model([sample(129, 97, seed) for seed in range(2)]).values()).backward()
    largest = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        largest[name] = parameter.grad.abs().max().item()
    for ending in NO_EFFECT:
        assert any(name.endswith(ending) for name in largest)
    dead = {name: value for name, value in largest.items() if not name.endswith(NO_EFFECT) and value < 1e-5}
    assert dead == {}
    assert max(value for name, value in largest.items() if name.endswith(NO_EFFECT)) < 1e-5


def test_gradient_of_a_decoder_is_its_slope():
    """Of everything that a decoder gives, along one direction in the centers and one in the pixels."""
    options = {"ffn_channels": 32, "key_channels": 16, "num_heads": 8, "feature_channels": 8, "drop_path": 0.0}
    layer = KMaXDecoderLayer(8, 16, 5, cross_attention="KMeansCrossAttention", norm="BN", **options).eval()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    layer.predictor.class_head.weight.data.mul_(30)
    centers, pixels = torch.randn(1, 4, 16), torch.randn(1, 8, 3, 3)
    weights = []

    def given(centers, pixels):
        updated, prediction = layer(centers, pixels, True)
        outputs = (updated, *prediction)
        if not weights:
            weights.extend(torch.randn_like(output) for output in outputs)
        return torch.stack([(weight * output).sum() for weight, output in zip(weights, outputs, strict=True)])

    def slopes(function, x):
        direction, step = torch.randn_like(x), 1e-3
        jacobian = torch.autograd.functional.jacobian(function, x).flatten(1)
        with torch.no_grad():
            numeric = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
        return jacobian @ direction.flatten(), numeric

    for function, x in ((lambda c: given(c, pixels), centers), (lambda p: given(centers, p), pixels)):
        exact, numeric = slopes(function, x)
        assert (exact.abs() > 0.1).sum() == 3  # classes do not look at pixels, nor features at centers
        torch.testing.assert_close(exact, numeric, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["KMeansCrossAttention", "SoftmaxCrossAttention", "SharedSoftmaxCrossAttention"])
def test_one_image_learns_what_two_equal_ones_do(name):
    """Their batch statistics are the same, and so must the gradients be."""
    model = build(
        *("MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION", name),
        *("MODEL.KMAX.TRANSFORMER_DECODER.DROP_PATH", 0.0),
        *("MODEL.KMAX.LOSS.SEMANTIC_WEIGHT", 0.0),  # its pooled pixel is alone in a batch of one
        *("MODEL.KMAX.LOSS.NUM_SAMPLES", 1000),
    ).train()
    gradients = []
    for count in (1, 2):
        model.zero_grad()
        sum(model([sample(65, 65)] * count).values()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    alone, together = gradients
    for name, gradient in together.items():
        error = (alone[name] - gradient).abs().max()
        assert error <= 1e-4 + 0.02 * gradient.abs().max(), name


def test_a_step_along_the_gradient_lowers_the_loss():
    model = build("MODEL.KMAX.TRANSFORMER_DECODER.DROP_PATH", 0.0, "MODEL.KMAX.LOSS.NUM_SAMPLES", 1000).train()
    without_dropout(model)
    inputs = [sample(65, 65, seed) for seed in range(2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    for _ in range(12):
        total = sum(model(inputs).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.93 * totals[0]


def seen_by_criterion(model):
    """A list that each training step of the model appends its final and auxiliary predictions to, as one list."""
    seen = []
    model.criterion.register_forward_pre_hook(lambda _, inputs: seen.append([inputs[0], *inputs[1]]))
    return seen


def test_hardest_pixels_of_the_whole_model():
    """Its semantic term against the same from the inputs: every pixel of stride 32, of small things three times."""
    model = build(*CITYSCAPES, "MODEL.KMAX.LOSS.SMALL_INSTANCE_AREA", 100).train()
    logits = []
    model.semantic_head.register_forward_hook(lambda _, inputs, output: logits.append(output))
    inputs = [sample(97, 129, 0), sample(97, 97, 1)]
    value = model(inputs)["loss_semantic"]
    assert logits[0].shape == (2, NUM_CLASSES, 4, 5)
    expected = []
    for x, image in zip(inputs, logits[0], strict=True):
        ids = x["segment_ids"]
        terms = [0.0] * 20
        for index, (row, column) in enumerate(itertools.product(range(4), range(5))):
            if 32 * column >= ids.shape[1] or ids[32 * row, 32 * column] < 0:
                continue
            segment = ids[32 * row, 32 * column]
            category = x["segment_classes"][segment].item()
            small = category in THINGS and (ids == segment).sum() < 100
            terms[index] = (3 if small else 1) * -image[:, row, column].log_softmax(0)[category].item()
        expected.append(sum(sorted(terms)[-4:]) / 4)
    assert value.item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_last_stage_at_stride_2():
    model = build(*CITYSCAPES).eval()
    with torch.no_grad():
        assert model.predict(picture(65, 97)[None])["mask_logits"].shape == (1, QUERIES, 33, 49)
        assert model([{"image": picture(50, 41)}])[0]["panoptic_seg"][0].shape == (50, 41)
    seen = seen_by_criterion(model.train())
    model([sample(65, 97)])
    assert seen[0][0].mask_logits.shape[-2:] == (33, 49)


# --- drop query ---


def test_drop_query_trains_a_random_part_of_the_queries():
    options = ("MODEL.KMAX.TRANSFORMER_DECODER.DROP_PATH", 0.0, "MODEL.KMAX.LOSS.NUM_SAMPLES", 1000)
    model = build(*options, "MODEL.KMAX.TRANSFORMER_DECODER.TRAINING_QUERIES", 5).train()
    small = build(*options, "MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES", 5).train()
    for module in (model, small):
        without_dropout(module)
    centers = model.transformer_decoder.centers
    seen, seen_by_small = seen_by_criterion(model), seen_by_criterion(small)
    inputs = [sample(65, 65, seed) for seed in range(2)]  # of more masks than five
    draws = set()
    for iteration in range(3):
        model.zero_grad()
        losses = model(inputs)
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) and value > 0 for value in losses.values())
        drawn = (centers.grad.abs().sum(1) > 0).nonzero()[:, 0]
        assert len(drawn) == 5
        draws.add(tuple(drawn.tolist()))
        # The same as with a model that has no other queries, but for their order.
        small.load_state_dict(model.state_dict() | {"transformer_decoder.centers": centers[drawn]})
        small(inputs)
        assert len(seen[iteration]) == 7
        for ours, theirs in zip(seen[iteration], seen_by_small[iteration], strict=True):
            orders = [prediction.class_logits[0, :, 0].argsort() for prediction in (ours, theirs)]
            for name in ("class_logits", "mask_logits"):
                first, second = (
                    getattr(prediction, name)[:, order]
                    for prediction, order in zip((ours, theirs), orders, strict=True)
                )
                assert first.shape[1] == 5
                torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    assert len(draws) > 1


def test_drop_query_tests_all_queries():
    plain = build().eval()
    model = build("MODEL.KMAX.TRANSFORMER_DECODER.TRAINING_QUERIES", 5).eval()
    model.load_state_dict(plain.state_dict())
    image = picture(65, 65)[None]
    ours, theirs = (m.predict(image, auxiliary=True) for m in (model, plain))
    for first, second in zip([ours, *ours["auxiliary"]], [theirs, *theirs["auxiliary"]], strict=True):
        assert first["mask_logits"].shape[1] == QUERIES
        assert torch.equal(first["mask_logits"], second["mask_logits"])
        assert torch.equal(first["class_logits"], second["class_logits"])


def test_drop_query_of_the_paper():
    options = load_config("coco/convnext_l_256q").MODEL.KMAX.TRANSFORMER_DECODER
    assert (options.NUM_QUERIES, options.TRAINING_QUERIES) == (256, 128)


@pytest.mark.parametrize("count", [-1, QUERIES + 1])
def test_drop_query_of_a_number_that_cannot_be(count):
    with pytest.raises((ValueError, UserError), match=f"{count} of {QUERIES} queries"):
        build("MODEL.KMAX.TRANSFORMER_DECODER.TRAINING_QUERIES", count)


def test_semantic_head_is_left_out_without_its_weight():
    model = build("MODEL.KMAX.LOSS.SEMANTIC_WEIGHT", 0.0).train()
    assert model.semantic_head is None
    assert "loss_semantic" not in model([sample(65, 65)])


# --- replacing parts ---


class Counting:
    """Counts its forward passes."""

    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


@META_ARCH_REGISTRY.register()
class CountingKMaXDeepLab(Counting, KMaXDeepLab):
    pass


@BACKBONE_REGISTRY.register()
class CountingKMaXResNet(Counting, KMaXResNet):
    pass


@PIXEL_DECODER_REGISTRY.register()
class CountingKMaXPixelDecoder(Counting, KMaXPixelDecoder):
    pass


@TRANSFORMER_DECODER_REGISTRY.register()
class CountingKMaXTransformerDecoder(Counting, KMaXTransformerDecoder):
    pass


@SEMANTIC_HEAD_REGISTRY.register()
class CountingSemanticHead(Counting, ASPPSemanticHead):
    pass


@pytest.mark.parametrize(
    ("option", "name", "part"),
    [
        ("MODEL.META_ARCHITECTURE", "CountingKMaXDeepLab", ""),
        ("MODEL.BACKBONE.NAME", "CountingKMaXResNet", "backbone"),
        ("MODEL.KMAX.PIXEL_DECODER.NAME", "CountingKMaXPixelDecoder", "pixel_decoder"),
        ("MODEL.KMAX.TRANSFORMER_DECODER.NAME", "CountingKMaXTransformerDecoder", "transformer_decoder"),
        ("MODEL.KMAX.SEMANTIC_HEAD.NAME", "CountingSemanticHead", "semantic_head"),
    ],
)
def test_parts_are_replaced_by_name(option, name, part):
    model = build(option, name).train()
    module = model.get_submodule(part)
    assert type(module).__name__ == name
    model([sample(65, 65)])
    assert module.calls == 1
    # The same network otherwise, down to the names in its checkpoints.
    assert set(model.state_dict()) == set(build().state_dict())


@pytest.mark.parametrize(
    ("option", "name", "near"),
    [
        ("MODEL.BACKBONE.NAME", "KMaxResNet", "KMaXResNet"),
        ("MODEL.KMAX.PIXEL_DECODER.NAME", "KMaxPixelDecoder", "KMaXPixelDecoder"),
        ("MODEL.KMAX.TRANSFORMER_DECODER.NAME", "TransformerDecoder", "KMaXTransformerDecoder"),
        ("MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION", "kmeans_cross_attention", "KMeansCrossAttention"),
        ("MODEL.KMAX.SEMANTIC_HEAD.NAME", "PointSemanticHead", "PointwiseSemanticHead"),
    ],
)
def test_part_of_an_unknown_name(option, name, near):
    with pytest.raises(UserError) as raised:
        build(option, name)
    before, meant = str(raised.value).split(" - ")
    wrong, known = before.split(", but there are ")
    assert wrong == f"{option} is {name}"
    assert near in known.split(", ")
    assert meant == f"did you mean {near}?"


def test_training_under_autocast_is_close_to_float32():
    options = ("MODEL.KMAX.TRANSFORMER_DECODER.DROP_PATH", 0.0, "MODEL.KMAX.LOSS.NUM_SAMPLES", 1000)
    model = build(*options).train()
    without_dropout(model)
    inputs = [sample(65, 65, seed) for seed in range(2)]
    expected = model(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs)
    assert all(value.dtype == torch.float32 for value in losses.values())
    # Single terms may differ more: rounding moves some pixels to other clusters.
    assert sum(losses.values()).item() == pytest.approx(sum(expected.values()).item(), rel=0.03)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("norm", ["SyncBN", "naiveSyncBN", "BN"])
def test_every_norm_runs_on_one_cpu(norm):
    model = build("MODEL.KMAX.NORM", norm).train()
    assert all(torch.isfinite(value) for value in model([sample(65, 65)]).values())
    model.eval()
    with torch.no_grad():
        model([{"image": picture(65, 65)}])


def test_every_decoder_has_its_kmeans_step():
    steps = [module for module in build().modules() if isinstance(module, KMeansCrossAttention)]
    assert len(steps) == 6
