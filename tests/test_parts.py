"""Parts of the model that a config replaces by name, and configs that no model can be built from."""

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from scenes import QUERIES, build_model, picture, sample

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
from kmax_d2.modeling.kmeans import KMeansCrossAttention
from kmax_d2.modeling.semantic_head import ASPPSemanticHead


class Counting:
    """Counts its forward passes."""

    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


DECODER = "MODEL__KMAX__TRANSFORMER_DECODER__NAME"
PARTS = [
    (META_ARCH_REGISTRY, KMaXDeepLab, "MODEL__META_ARCHITECTURE", ""),
    (BACKBONE_REGISTRY, KMaXResNet, "MODEL__BACKBONE__NAME", "backbone"),
    (PIXEL_DECODER_REGISTRY, KMaXPixelDecoder, "MODEL__KMAX__PIXEL_DECODER__NAME", "pixel_decoder"),
    (TRANSFORMER_DECODER_REGISTRY, KMaXTransformerDecoder, DECODER, "transformer_decoder"),
    (SEMANTIC_HEAD_REGISTRY, ASPPSemanticHead, "MODEL__KMAX__SEMANTIC_HEAD__NAME", "semantic_head"),
]
for registry, kind, _, _ in PARTS:
    registry.register(type(f"Counting{kind.__name__}", (Counting, kind), {}))


@pytest.mark.parametrize(("_", "kind", "option", "part"), PARTS)
def test_parts_are_replaced_by_name(_, kind, option, part):
    name = f"Counting{kind.__name__}"
    model = build_model(**{option: name})
    module = model.get_submodule(part)
    assert type(module).__name__ == name
    model([sample(65, 65)])
    assert module.calls == 1
    # The same network otherwise, down to the names in its checkpoints.
    assert set(model.state_dict()) == set(build_model().state_dict())


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
        build_model(**{option.replace(".", "__"): name})
    before, meant = str(raised.value).split(" - ")
    wrong, known = before.split(", but there are ")
    assert wrong == f"{option} is {name}"
    assert near in known.split(", ")
    assert meant == f"did you mean {near}?"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("INPUT.FORMAT", "BGR", "INPUT.FORMAT is BGR, but must be RGB"),
        ("MODEL.KMAX.NUM_CLASSES", 0, "MODEL.KMAX.NUM_CLASSES is not set"),
        ("DATASETS.TEST", ("kmax_d2_tests_no_such_data",), "no dataset kmax_d2_tests_no_such_data "),
        ("DATASETS.TRAIN", ("kmax_d2_tests_no_such_data",), "no dataset kmax_d2_tests_no_such_data "),
        ("MODEL.KMAX.TRANSFORMER_DECODER.TRAINING_QUERIES", -1, "is -1, but must be a whole number of at least 0"),
        ("MODEL.KMAX.TRANSFORMER_DECODER.TRAINING_QUERIES", QUERIES + 1, f"{QUERIES + 1} of {QUERIES} queries"),
        ("MODEL.KMAX.TRANSFORMER_DECODER.TRAINING_QUERIES", 1, f"1 of {QUERIES} queries"),
        ("MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES", 1, "NUM_QUERIES is 1, but must be at least 2"),
        ("MODEL.KMAX.TRANSFORMER_DECODER.DECODERS", [1, 1, 1, 1, 1], "must be numbers of decoders on the 4 maps"),
        ("MODEL.KMAX.TRANSFORMER_DECODER.DECODERS", [0, 0], "one in all at least"),
        (
            "MODEL.KMAX.PIXEL_DECODER.IN_FEATURES",
            ["stage5", "stage4", "stage3", "stage0"],
            "no map stage0, of stride 1, but stage1",
        ),
        (
            "MODEL.KMAX.PIXEL_DECODER.KINDS",
            ["axial", "axial", "square", "square"],
            "KINDS is square, but there are",
        ),
        ("MODEL.KMAX.RESNET.BLOCKS", [1, 1, 1], "KMaXResNet has four stages"),
        ("MODEL.KMAX.TEST.PIXEL_THRESHOLD", 0.3, "PIXEL_THRESHOLD is 0.3, but must be a number from 0.3333"),
    ],
)
def test_config_that_no_model_can_be_built_from(option, value, message):
    with pytest.raises(UserError, match=message):
        build_model(**{option.replace(".", "__"): value})


@pytest.mark.parametrize("norm", ["SyncBN", "naiveSyncBN", "BN"])
def test_every_norm_runs_on_one_cpu(norm):
    model = build_model(MODEL__KMAX__NORM=norm)
    assert all(torch.isfinite(value) for value in model([sample(65, 65)]).values())
    with torch.no_grad():
        (result,) = model.eval()([{"image": picture(65, 65)}])
    assert result["panoptic_seg"][0].shape == (65, 65)


def test_every_decoder_has_its_kmeans_step():
    steps = [module for module in build_model().modules() if isinstance(module, KMeansCrossAttention)]
    assert len(steps) == 6
