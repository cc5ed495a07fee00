"""Official variable names against the model's state dict."""

from collections import Counter

import deterministic
import numpy as np
import pytest
import reference
import torch

from kmax_d2.checkpoint.official import official_to_state_dict, state_dict_name


@pytest.fixture(scope="module")
def own(coco_model):
    """Our entries that a checkpoint can hold."""
    return {name: v for name, v in coco_model.state_dict().items() if not name.endswith("num_batches_tracked")}


def test_every_variable_has_one_entry_and_every_entry_a_variable(own):
    names = Counter(state_dict_name(name) for name in reference.official_variables())
    assert [name for name, count in names.items() if count > 1] == []
    assert sorted(set(names) - set(own)) == []
    assert sorted(set(own) - set(names)) == []


def test_shapes(own, official_state_dict):
    assert {k: tuple(v.shape) for k, v in official_state_dict.items()} == {k: tuple(v.shape) for k, v in own.items()}


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("encoder/_stem/_conv/kernel", "backbone.stem.conv.weight"),
        ("encoder/_stem/_batch_norm/moving_variance", "backbone.stem.norm.running_var"),
        ("transformer_decoder/cluster_centers", "transformer_decoder.centers"),
    ],
)
def test_name(official, ours):
    assert official in reference.official_variables()
    assert state_dict_name(official) == ours


def test_layouts():
    """A convolution is (out, in, height, width) here, a depthwise one (channels, 1, height, width)."""
    names = {state_dict_name(name): name for name in reference.official_variables()}
    shapes = reference.official_variables()

    def both(ours):
        array = deterministic.checkpoint_value(names[ours], shapes[names[ours]])
        return array, official_to_state_dict({names[ours]: array})[ours]

    array, tensor = both("backbone.stem.conv.weight")
    assert tensor[5, 2, 1, 3] == array[1, 3, 2, 5]
    array, tensor = both("transformer_decoder.predictor.pixel_head.depthwise.conv.weight")
    assert tensor[7, 0, 1, 3] == array[1, 3, 7, 0]
    array, tensor = both("semantic_head.classifier.bias")
    assert tensor[-1] == array[0]  # void
    assert torch.equal(tensor[:-1], torch.from_numpy(array[1:]))
    # A norm over several axes is over the flattened ones.
    array, tensor = both("pixel_decoder.stages.0.0.height_attention.norm_logits.weight")
    assert array.ndim > 1
    assert torch.equal(tensor, torch.from_numpy(np.ravel(array)))
