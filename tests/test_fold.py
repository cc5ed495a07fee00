"""The folded copy against the model that it was made of; test_forward.py compares it with the official values."""

import copy

import pytest
import torch
from scenes import build_model, picture
from test_forward import TOLERANCE
from torch import nn

from kmax_d2.speed import fold_batch_norms


@pytest.fixture
def small_model():
    return build_model().eval()


def predict(model):
    return model.predict(picture(65, 97)[None], auxiliary=True)


def assert_equal(ours, theirs):
    for name in ("class_logits", "mask_logits", "pixel_feature"):
        largest = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=TOLERANCE * largest)


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("norm", ["BN", "naiveSyncBN", "SyncBN", "FrozenBN"])
def test_every_norm_and_form(norm, standard):
    model = build_model(MODEL__KMAX__NORM=norm, MODEL__KMAX__RESNET__STANDARD=standard).eval()
    assert_equal(predict(fold_batch_norms(model)), predict(model))


def test_the_model_stays_as_it_was(small_model):
    before = copy.deepcopy(small_model.state_dict())
    small_model.train()
    predict(fold_batch_norms(small_model))
    after = small_model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert small_model.training
    assert all(parameter.requires_grad for parameter in small_model.parameters())


def test_no_batch_norm_is_left_where_it_costs(small_model):
    folded = fold_batch_norms(small_model)
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    maps = [name for name in left if name.startswith(("backbone", "pixel_decoder")) and "norm_" not in name]
    assert maps == []


def test_input_is_left_alone(small_model):
    """Activations that write over their input must not reach what the caller holds, nor the maps that others read."""
    folded = fold_batch_norms(small_model)
    image = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        features = folded.backbone(image)
        kept = {name: value.clone() for name, value in features.items()}
        maps = folded.pixel_decoder(features)
        kept_maps = [value.clone() for value in maps]
        folded.transformer_decoder(maps, True)
    assert all(torch.equal(kept[name], features[name]) for name in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept_maps, maps, strict=True))


def test_weights_of_another_type_are_what_autocast_makes_of_them(small_model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = predict(fold_batch_norms(small_model))
        predicted = predict(fold_batch_norms(small_model, torch.bfloat16))
    for name in ("class_logits", "mask_logits", "pixel_feature"):
        assert torch.equal(predicted[name], expected[name])
