"""The public PyTorch re-implementation's state dicts: names, values and the options that their weights need."""

from collections import Counter

import deterministic
import numpy as np
import pytest
import reference
import torch
from detectron2.modeling import build_model

from kmax_d2.checkpoint.pytorch_port import check_port_options, is_port, port_to_state_dict, state_dict_name
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError

TOLERANCE = 5e-5  # of an array's largest magnitude
DILATION = ("MODEL.KMAX.PIXEL_DECODER.DILATION", "1")
CONFIGS = {
    "coco_r50": "coco/r50_standard",
    "coco_convnext_t": "coco/convnext_t",
    "coco_convnext_b": "coco/convnext_b",
    "cityscapes_r50": "cityscapes/r50_standard",
    "cityscapes_convnext_l": "cityscapes/convnext_l",
    "ade20k_r50": "ade20k/r50_641",
}


def empty_model(config, *options):
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        return build_model(load_config(config, ["MODEL.DEVICE", "meta", "MODEL.KMAX.NORM", "BN", *options]))


@pytest.mark.parametrize("tag", CONFIGS)
def test_every_entry_has_one_of_ours_and_every_one_of_ours_an_entry(tag):
    entries = {name: torch.empty(shape, device="meta") for name, shape in reference.shapes(f"state_dict_{tag}").items()}
    own = empty_model(CONFIGS[tag]).state_dict()
    # Counts of batches are on both sides and nothing reads them.
    own = {name: tuple(value.shape) for name, value in own.items() if not name.endswith("num_batches_tracked")}
    names = Counter(state_dict_name(name) for name in entries)
    assert [name for name, count in names.items() if count > 1] == []
    state_dict = port_to_state_dict(entries)
    assert sorted(set(state_dict) - set(own)) == []
    assert sorted(set(own) - set(state_dict)) == []
    assert {name: tuple(value.shape) for name, value in state_dict.items()} == own
    counts = [name for name in entries if name.endswith("num_batches_tracked")]
    assert len(state_dict) == len(entries) - len(counts)


@pytest.mark.parametrize("tag", ["coco_r50", "coco_convnext_t"])
def test_same_function(tag):
    expected = reference.load(f"state_dict_{tag}")
    entries = {
        name: torch.from_numpy(deterministic.state_dict_value(name, shape))
        for name, shape in reference.shapes(f"state_dict_{tag}").items()
    }
    model = reference.load_all(reference.build(CONFIGS[tag], *DILATION), port_to_state_dict(entries))
    result = model.predict(reference.channels_first(expected.pop("image"))[None], auxiliary=True)
    computed = {"class_logits": result["class_logits"][0], "mask_logits": result["mask_logits"][0].permute(1, 2, 0)}
    for index, prediction in enumerate(result["auxiliary"]):
        computed[f"aux/{index}/class_logits"] = prediction["class_logits"][0]
    assert set(computed) == set(expected)
    for name, value in expected.items():
        assert np.abs(computed[name].numpy() - value).max() < TOLERANCE * np.abs(value).max(), name


@pytest.mark.parametrize(("config", "tag"), [("coconut/r50", "coco_r50"), ("coconut/convnext_l", "coco_convnext_b")])
def test_coconuts_published_checkpoints_have_all_of_its_models_weights(config, tag):
    """The large model has the same names as the base model, and wider layers in the backbone."""
    shapes = reference.shapes(f"state_dict_{tag}")
    state_dict = port_to_state_dict({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    own = {name: value.shape for name, value in empty_model(config).state_dict().items() if name in state_dict}
    assert len(own) == len(state_dict) and {name.split(".")[0] for name in own} >= {"backbone"}
    other = {name for name, shape in own.items() if shape != state_dict[name].shape}
    assert not other if tag == "coco_r50" else len(other) > 100


def test_values_are_not_copied():
    qkv = "sem_seg_head.pixel_decoder._stages.0._blocks.0._attention._width_axis.qkv_transform.conv.weight"
    for name, shape in [(qkv, (8, 4, 1)), ("sem_seg_head.predictor._cluster_centers.weight", (4, 3))]:
        tensor = torch.rand(shape)
        (ours,) = port_to_state_dict({name: tensor}).values()
        assert ours.data_ptr() == tensor.data_ptr()


def test_detection():
    assert is_port(reference.shapes("state_dict_cityscapes_convnext_l"))
    assert not is_port(name.replace("/", ".") for name in reference.shapes("variables_coco_r50"))
    assert not is_port(["backbone.stem.conv1.weight", "sem_seg_head.predictor.query_feat.weight"])  # Mask2Former's


@pytest.mark.parametrize(
    ("config", "options", "missing"),
    [
        ("coco/r50_standard", (), []),
        ("cityscapes/r50_standard", (), []),
        ("coco/convnext_t", DILATION, []),
        ("cityscapes/convnext_t", DILATION, []),
        ("coconut/r50", (), []),
        ("coconut/convnext_l", (), []),
        ("coco/convnext_t", (), ["MODEL.KMAX.PIXEL_DECODER.DILATION 1"]),
        ("coco/r50", DILATION, ["MODEL.KMAX.RESNET.STANDARD True"]),
        (
            "cityscapes/r50",
            (),
            [
                "MODEL.KMAX.PIXEL_DECODER.DILATION 1",
                "MODEL.KMAX.RESNET.STANDARD True",
                "MODEL.KMAX.PIXEL_DECODER.IN_FEATURES \"['stage5', 'stage4', 'stage3', 'stage1', 'stage2']\"",
            ],
        ),
    ],
)
def test_options_that_do_not_fit(config, options, missing):
    model = empty_model(config, *options)
    if not missing:
        check_port_options(model)
        return
    with pytest.raises(UserError) as error:
        check_port_options(model)
    assert str(error.value).endswith(f"set {', '.join(missing)}")
    # What the message says, as one would type it, mends it.
    typed = [part.strip('"') for option in missing for part in option.split(" ", 1)]
    check_port_options(empty_model(config, *options, *typed))
