"""Official variable names, layouts and class order against the models' state dicts."""

from collections import Counter

import deterministic
import numpy as np
import pytest
import reference
import torch

from kmax_d2.checkpoint.deeplab2 import deeplab2_to_state_dict, state_dict_name

CONFIGS = {
    "coco_r50": "coco/r50",
    "coco_maxs": "coco/maxs",
    "coco_convnext_t": "coco/convnext_t",
    "coco_convnext_s": "coco/convnext_s",
    "coco_convnext_l": "coco/convnext_l",
    "cityscapes_r50": "cityscapes/r50",
    "cityscapes_maxs": "cityscapes/maxs",
    "cityscapes_convnext_b": "cityscapes/convnext_b",
    "ade20k_r50": "ade20k/r50_641",
}


def own_shapes(config):
    """Names and shapes of our entries that a checkpoint can hold."""
    entries = reference.outline(config).state_dict()
    return {name: tuple(v.shape) for name, v in entries.items() if not name.endswith("num_batches_tracked")}


def variables(tag):
    """Arrays of the right shapes whose memory is never touched."""
    return {name: np.empty(shape, np.float32) for name, shape in reference.shapes(f"variables_{tag}").items()}


@pytest.mark.parametrize("tag", CONFIGS)
def test_every_variable_is_one_entry_and_every_entry_a_variable(tag):
    official = variables(tag)
    assert [name for name, count in Counter(map(state_dict_name, official)).items() if count > 1] == []
    state_dict = deeplab2_to_state_dict(official)
    assert {name: tuple(v.shape) for name, v in state_dict.items()} == own_shapes(CONFIGS[tag])


@pytest.mark.parametrize(
    ("tag", "official", "ours"),
    [
        ("coco_r50", "encoder/_stem/_conv/kernel", "backbone.stem.conv.weight"),
        ("coco_r50", "encoder/_stem/_batch_norm/moving_variance", "backbone.stem.norm.running_var"),
        ("coco_r50", "transformer_decoder/cluster_centers", "transformer_decoder.centers"),
        ("coco_maxs", "encoder/_stem/_conv3_bn/_conv/kernel", "backbone.stem.conv3.conv.weight"),
        (
            "coco_maxs",
            "encoder/_stage5/_block1/_attention/_width_axis/qkv_kernel",
            "backbone.stage5.0.width_attention.qkv.weight",
        ),
        ("coco_convnext_t", "encoder/stages/2/layer_with_weights-8/layer_scale", "backbone.stages.2.blocks.8.gamma"),
        (
            "coco_convnext_t",
            "encoder/downsample_layers/0/layer_with_weights-1/gamma",
            "backbone.stem.1.weight",
        ),
        (
            "coco_convnext_t",
            "encoder/downsample_layers/3/layer_with_weights-1/kernel",
            "backbone.stages.3.downsample.1.weight",
        ),
    ],
)
def test_name(tag, official, ours):
    assert official in reference.shapes(f"variables_{tag}")
    assert state_dict_name(official) == ours


def converted(tag, official):
    """One variable's array and our tensor of it."""
    array = deterministic.checkpoint_value(official, reference.shapes(f"variables_{tag}")[official])
    return array, deeplab2_to_state_dict({official: array})[state_dict_name(official)]


def test_layouts():
    """A convolution is (out, in, height, width) here, a depthwise one (channels, 1, height, width)."""
    array, tensor = converted("coco_r50", "encoder/_stem/_conv/kernel")
    assert tensor[5, 2, 1, 3] == array[1, 3, 2, 5]
    array, tensor = converted(
        "coco_r50", "pixel_space_head/conv_block/_conv1_bn_act/_depthwise/_depthwise_conv/depthwise_kernel"
    )
    assert tensor[7, 0, 1, 3] == array[1, 3, 7, 0]
    array, tensor = converted("coco_convnext_t", "encoder/stages/0/layer_with_weights-0/depthwise_conv/kernel")
    assert tensor[7, 0, 1, 3] == array[1, 3, 0, 7]
    array, tensor = converted("coco_convnext_t", "encoder/stages/0/layer_with_weights-0/pointwise_conv1/kernel")
    assert torch.equal(tensor, torch.from_numpy(array).T)
    # A norm over several axes is over the flattened ones.
    array, tensor = converted(
        "coco_r50", "pixel_decoder/_stages/0/_block1/_attention/_height_axis/_batch_norm_similarity/gamma"
    )
    assert array.ndim > 1
    assert torch.equal(tensor, torch.from_numpy(np.ravel(array)))


@pytest.mark.parametrize("tag", ["coco_maxs", "coco_convnext_t"])
def test_nothing_large_is_copied(tag):
    official = variables(tag)
    state_dict = deeplab2_to_state_dict(official, [True] * 80 + [False] * 53)
    copied = {
        name for name, array in official.items() if not np.shares_memory(state_dict[state_dict_name(name)], array)
    }
    assert all("class_head" in name or "semantic_last_layer" in name for name in copied)


def test_part_of_a_checkpoint():
    """A pre-trained encoder's has no heads, which tell the number of classes."""
    official = {name: array for name, array in variables("coco_maxs").items() if name.startswith("encoder/")}
    state_dict = deeplab2_to_state_dict(official, [True, False])
    assert len(state_dict) == len(official)
    assert all(name.startswith("backbone.") for name in state_dict)


# Contiguous class by row of the official class heads: things, stuff, void.
CITYSCAPES_ORDER = [*range(11, 19), *range(11), 19]


@pytest.mark.parametrize("head", ["transformer_class_head", "transformer_decoder/_kmax_decoder/3/_block1_transformer/"])
def test_class_heads_come_to_contiguous_order(head):
    official = {
        name: deterministic.checkpoint_value(name, shape)
        for name, shape in reference.shapes("variables_cityscapes_r50").items()
        if name.startswith(head) and "class_head" in name
    }
    is_thing = [index >= 11 for index in range(19)]
    state_dict = deeplab2_to_state_dict(official, is_thing)
    unchanged = deeplab2_to_state_dict(official)
    assert len(state_dict) == 2  # kernel and bias
    for name, array in official.items():
        rows = np.moveaxis(array.reshape(array.shape[-2:] if array.ndim > 1 else -1), -1, 0)
        tensor = state_dict[state_dict_name(name)]
        assert torch.equal(tensor[CITYSCAPES_ORDER], torch.from_numpy(rows.copy()))
        assert torch.equal(unchanged[state_dict_name(name)], torch.from_numpy(rows.copy()))


def test_class_heads_of_another_number_of_classes_stay():
    name = "transformer_class_head/_conv/bias"
    array = np.arange(20, dtype=np.float32)
    state_dict = deeplab2_to_state_dict({name: array}, [False, True, True])
    assert torch.equal(state_dict[state_dict_name(name)], torch.from_numpy(array))


@pytest.mark.parametrize(
    ("logits", "expected"), [(20, [*range(1, 20), 0]), (19, list(range(19)))], ids=["void first", "without void"]
)
def test_semantic_head(logits, expected):
    """Its classes are in contiguous order there too; void, if it has one, goes from the first channel to the last."""
    official = {
        "transformer_class_head/_conv/bias": np.zeros(20, np.float32),
        "semantic_last_layer/bias": np.arange(logits, dtype=np.float32),
        "semantic_last_layer/kernel": np.arange(logits, dtype=np.float32).reshape(1, 1, 1, -1),
    }
    state_dict = deeplab2_to_state_dict(official, [index % 2 == 0 for index in range(19)])
    assert state_dict["semantic_head.classifier.bias"].tolist() == expected
    assert state_dict["semantic_head.classifier.weight"].flatten().tolist() == expected
