"""The whole network against the official one's values, stage by stage."""

import copy

import numpy as np
import pytest
import reference
import torch

from kmax_d2.checkpoint import deeplab2_to_state_dict
from kmax_d2.speed import fold_batch_norms

TOLERANCE = 5e-5  # of an array's largest magnitude
MODELS = {  # the config of each reference
    "coco_r50": "coco/r50",
    "coco_maxs": "coco/maxs",
    "coco_convnext_t": "coco/convnext_t",
    "cityscapes_r50": "cityscapes/r50",
}
# Contiguous class of each official one: things, stuff, void.
OFFICIAL_ORDER = {"coco": list(range(134)), "cityscapes": [*range(11, 19), *range(11), 19]}
AUXILIARY = [f"aux/{index}/{kind}_logits" for index in range(6) for kind in ("mask", "class")]
FINAL = ["class_logits", "mask_logits", "pixel_feature", "semantic_logits"]


def stages(tag):
    """Names of a reference's arrays. Only on Cityscapes the encoder's finest map is read."""
    finest = 1 if tag.startswith("cityscapes") else 2
    encoder = [f"encoder/stage{index}" for index in range(finest, 6)]
    pixel_decoder = [f"pixel_decoder/decoder_stage{index}" for index in range(1, 6 - finest)]
    return [*encoder, *pixel_decoder, "pixel_decoder/decoder_output", *AUXILIARY, *FINAL]


def compute(model, image, dataset):
    """Every stage's output by the reference's names, with its order of classes and without the batch axis."""
    image = (reference.channels_first(image)[None].float() - 127.5) / 127.5
    with torch.no_grad():
        features = model.backbone(image)
        maps = model.pixel_decoder(features)
        final, auxiliary = model.transformer_decoder(maps, True)
        semantic = model.semantic_head(features)
    if dataset == "coco":
        semantic = semantic.roll(1, dims=1)  # void is the reference's first semantic channel and our last
    arrays = {f"encoder/{name}": value for name, value in features.items()}
    arrays |= {f"pixel_decoder/decoder_stage{index}": value for index, value in enumerate(maps[:-1], start=1)}
    arrays |= {"pixel_decoder/decoder_output": maps[-1], "semantic_logits": semantic}
    arrays |= {"pixel_feature": final.pixel_feature, "mask_logits": final.mask_logits}
    arrays["class_logits"] = final.class_logits[..., OFFICIAL_ORDER[dataset]]
    for index, prediction in enumerate(auxiliary):
        arrays[f"aux/{index}/mask_logits"] = prediction.mask_logits
        arrays[f"aux/{index}/class_logits"] = prediction.class_logits[..., OFFICIAL_ORDER[dataset]]
    return {name: value[0] for name, value in arrays.items()}


def thinning(name, expected):
    """n, where the file holds every n-th channel of an array, to be small."""
    if name.startswith(("encoder/", "pixel_decoder/")) or name in ("pixel_feature", "semantic_logits"):
        return int(expected["channel_step"])
    return int(expected.get("mask_step", 1)) if name == "mask_logits" else 1


def error_of(ours, theirs, step=1):
    """The largest error of ours, (C, h, w) or (N, K + 1), against theirs, (h, w, C) or (N, K + 1)."""
    if ours.ndim == 3:
        ours = ours.permute(1, 2, 0)[..., ::step]
    assert tuple(ours.shape) == theirs.shape
    return np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max()


def official_model(tag, request):
    """The model of one of MODELS, with the reference's weights."""
    if tag == "coco_r50":
        return request.getfixturevalue("coco_model")
    model = reference.build(MODELS[tag])
    things = model.merging.is_thing.tolist()
    reference.load_all(model, deeplab2_to_state_dict(reference.official_variables(tag), things))
    return model


@pytest.mark.parametrize("tag", MODELS)
def test_every_stage(tag, request):
    """Of the plain model, and of the copy whose batch norms are folded, at one tolerance."""
    expected = reference.load(f"forward_{tag}")
    assert set(stages(tag)) == set(expected) - {"image", "channel_step", "mask_step"}
    model = official_model(tag, request)
    for ours in (model, fold_batch_norms(model)):
        computed = compute(ours, expected["image"], tag.split("_")[0])
        errors = {name: error_of(computed[name], expected[name], thinning(name, expected)) for name in stages(tag)}
        assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


@pytest.fixture(scope="module")
def expected():
    return reference.load("forward_coco_r50")


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        ("coco/r50", 56.580),
        ("coco/maxs", 74.416),
        ("coco/convnext_b", 121.513),
        ("coco/convnext_l", 231.837),
        ("cityscapes/r50", 56.401),
        ("cityscapes/maxs", 74.239),
        ("cityscapes/convnext_b", 121.337),
        ("cityscapes/convnext_l", 231.662),
    ],
)
def test_number_of_parameters(config, millions):
    """Those of the paper's tables, which leave the auxiliary head out."""
    parameters = dict(reference.outline(config).named_parameters())
    count = sum(value.numel() for name, value in parameters.items() if not name.startswith("semantic_head."))
    assert round(count / 1e6, 3) == millions


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_predict(coco_model, expected, dtype):
    """Also of a model in training, which stays as it was."""
    statistics = copy.deepcopy(dict(coco_model.named_buffers()))
    coco_model.train()
    try:
        result = coco_model.predict(reference.channels_first(expected["image"])[None].to(dtype), auxiliary=True)
        assert all(module.training for module in coco_model.modules())
    finally:
        coco_model.eval()
    for name, buffer in coco_model.named_buffers():
        assert torch.equal(buffer, statistics[name]), name
    auxiliary = result.pop("auxiliary")
    assert set(result) == {"class_logits", "mask_logits", "pixel_feature"}
    computed = result | {
        f"aux/{i}/{kind}_logits": x[f"{kind}_logits"] for i, x in enumerate(auxiliary) for kind in ("mask", "class")
    }
    errors = {name: error_of(x[0], expected[name], thinning(name, expected)) for name, x in computed.items()}
    assert len(errors) == 3 + 2 * 6
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}
