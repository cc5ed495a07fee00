"""The whole network against the official one's values, stage by stage."""

import copy

import numpy as np
import pytest
import reference
import torch

TOLERANCE = 5e-5  # of an array's largest magnitude
ENCODER = [f"encoder/stage{stage}" for stage in (2, 3, 4, 5)]
PIXEL_DECODER = [f"pixel_decoder/decoder_{name}" for name in ("stage1", "stage2", "stage3", "output")]
AUXILIARY = [f"aux/{index}/{kind}_logits" for index in range(6) for kind in ("mask", "class")]
FINAL = ["class_logits", "mask_logits", "pixel_feature", "semantic_logits"]


@pytest.fixture(scope="module")
def expected():
    return reference.load("forward_coco_r50")


@pytest.fixture(scope="module")
def computed(coco_model, expected):
    """Every stage's output, by the reference's names and without the batch axis."""
    image = (reference.channels_first(expected["image"])[None].float() - 127.5) / 127.5
    with torch.no_grad():
        features = coco_model.backbone(image)
        maps = coco_model.pixel_decoder(features)
        final, auxiliary = coco_model.transformer_decoder(maps, True)
        # Void is the reference's first semantic channel and our last.
        semantic = coco_model.semantic_head(features).roll(1, dims=1)
    arrays = {f"encoder/{name}": value for name, value in features.items()}
    arrays |= dict(zip(PIXEL_DECODER, maps, strict=True))
    for index, prediction in enumerate(auxiliary):
        arrays[f"aux/{index}/mask_logits"] = prediction.mask_logits
        arrays[f"aux/{index}/class_logits"] = prediction.class_logits
    arrays |= dict(zip(FINAL, (final.class_logits, final.mask_logits, final.pixel_feature, semantic), strict=True))
    return {name: value[0] for name, value in arrays.items()}


def assert_agrees(ours, theirs, step=1):
    """Compares (C, h, w) or (N, K + 1) of ours with (h, w, C) or (N, K + 1) of theirs."""
    if ours.ndim == 3:
        ours = ours.permute(1, 2, 0)[..., ::step]
    assert tuple(ours.shape) == theirs.shape
    error = np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max()
    assert error < TOLERANCE


@pytest.mark.parametrize("name", ENCODER + PIXEL_DECODER + AUXILIARY + FINAL)
def test_stage(computed, expected, name):
    # To keep the file small, only every eighth channel of the wide maps is in it.
    thinned = name.startswith(("encoder/", "pixel_decoder/")) or name in ("pixel_feature", "semantic_logits")
    assert_agrees(computed[name], expected[name], int(expected["channel_step"]) if thinned else 1)


def test_every_reference_is_compared(computed, expected):
    assert set(computed) == set(expected) - {"image", "channel_step"}


def test_number_of_parameters(coco_model):
    count = sum(
        parameter.numel() for name, parameter in coco_model.named_parameters() if not name.startswith("semantic_head.")
    )
    assert round(count / 1e6, 3) == 56.580


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_predict(coco_model, expected, dtype):
    image = reference.channels_first(expected["image"])[None].to(dtype)
    result = coco_model.predict(image)
    assert set(result) == {"class_logits", "mask_logits", "pixel_feature"}
    assert_agrees(result["class_logits"][0], expected["class_logits"])
    assert_agrees(result["mask_logits"][0], expected["mask_logits"])
    assert_agrees(result["pixel_feature"][0], expected["pixel_feature"], int(expected["channel_step"]))


def test_predict_leaves_a_training_model_as_it_was(coco_model, expected):
    statistics = copy.deepcopy(dict(coco_model.named_buffers()))
    coco_model.train()
    try:
        result = coco_model.predict(reference.channels_first(expected["image"])[None], auxiliary=True)
        assert all(module.training for module in coco_model.modules())
    finally:
        coco_model.eval()
    for name, buffer in coco_model.named_buffers():
        assert torch.equal(buffer, statistics[name]), name
    assert_agrees(result["mask_logits"][0], expected["mask_logits"])
    for index, prediction in enumerate(result["auxiliary"]):
        assert_agrees(prediction["class_logits"][0], expected[f"aux/{index}/class_logits"])
        assert_agrees(prediction["mask_logits"][0], expected[f"aux/{index}/mask_logits"])
