"""Every option, from the config to the object that it changes. Each is given a value that no default has."""

import re

import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from layouts.coco import miniature_coco
from small import options
from timm.layers import DropPath
from torch import nn

from kmax_d2.data import PanopticTestMapper, PanopticTrainMapper
from kmax_d2.data.augmentation import ResizeToFit
from kmax_d2.data.color import ColorPolicy
from kmax_d2.engine import Trainer, load_config
from kmax_d2.engine.optimizer import build_lr_scheduler, build_optimizer
from kmax_d2.engine.setup import prepare_datasets


def small_model(**changes):
    """The small model from options; "KMAX__" stands for "MODEL.KMAX."."""
    changes = {re.sub("^KMAX__", "MODEL__KMAX__", name): value for name, value in changes.items()}
    return build_model(load_config("", options(**{"MODEL__KMAX__NORM": "BN"} | changes)))


def size_of(entry, axis=0):
    """A function of a model: the size of an entry of its state dict along an axis."""
    return lambda model: model.state_dict()[entry].shape[axis]


def count(model, prefix):
    """The number of modules directly below a prefix of the state dict's names, such as the blocks of a stage."""
    return len({name.removeprefix(prefix).split(".")[0] for name in model.state_dict() if name.startswith(prefix)})


def counts(prefix, indices=range(4)):
    """A function of a model: the counts below prefixes that differ in an index."""
    return lambda model: [count(model, prefix.format(index)) for index in indices]


def channels(model):
    """The channels of the backbone's maps from stage1 on."""
    return [model.backbone.output_shape()[f"stage{index}"].channels for index in range(1, 6)]


def maps(model):
    return model.pixel_decoder.output_shape()


def drop_rates(module):
    return [m.drop_prob for m in module.modules() if isinstance(m, DropPath)]


MAXS = {"MODEL__BACKBONE__NAME": "KMaXMaXS", "KMAX__MAXS__BLOCKS": [1, 1, 1, 1], "KMAX__MAXS__WIDTHS": [8, 8, 16, 16]}
CONVNEXT = {
    "MODEL__BACKBONE__NAME": "KMaXConvNeXt",
    "KMAX__CONVNEXT__DEPTHS": [1, 1, 1, 1],
    "KMAX__CONVNEXT__WIDTHS": [8, 16, 24, 32],
}
DEEP_MAXS = MAXS | {"KMAX__MAXS__BLOCKS": [1, 1, 1, 2]}
DECODER = "transformer_decoder."
LAYER = DECODER + "layers.0."


def stem_widths(model):
    return [size_of(f"backbone.stem.conv{index}.conv.weight")(model) for index in (1, 2, 3)]


def kinds(model):
    return [["bottleneck", "axial"][count(model, f"pixel_decoder.stages.{index}.0.width") > 0] for index in range(4)]


def dilation(model):
    return max(layer.dilation[0] for layer in model.pixel_decoder.modules() if isinstance(layer, nn.Conv2d))


def low_level(model):
    return [size_of(f"semantic_head.low_level.{index}.conv.weight")(model) for index in (0, 1)]


def pq_weights(model):
    return {model.criterion.weights[f"loss_pq_{part}"] for part in ("class", "mask")}


# Option, value, other options that it needs, what to read off the model, and what that must be (the value if absent).
OF_THE_MODEL = [
    ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], {}, lambda m: m.pixel_mean.flatten().tolist()),
    ("MODEL.PIXEL_STD", [4.0, 5.0, 6.0], {}, lambda m: m.pixel_std.flatten().tolist()),
    ("INPUT.CROP_SIZE", [97, 129], {}, lambda m: list(m.test_size)),
    ("KMAX.NUM_CLASSES", 7, {}, size_of(DECODER + "predictor.class_head.weight"), 8),
    ("KMAX.NORM", "naiveSyncBN", {}, lambda m: isinstance(m.backbone.stem.norm, NaiveSyncBatchNorm), True),
    ("KMAX.RESNET.BLOCKS", [2, 1, 3, 1], {}, counts("backbone.stage{}.", range(2, 6))),
    ("KMAX.RESNET.WIDTHS", [4, 6, 8, 10], {}, lambda m: channels(m)[1:], [16, 24, 32, 40]),
    ("KMAX.RESNET.STEM_WIDTH", 12, {}, lambda m: channels(m)[0]),
    ("KMAX.RESNET.STANDARD", True, {}, lambda m: m.backbone.output_shape()["stage1"].stride, 4),
    ("KMAX.MAXS.BLOCKS", [2, 1, 3, 1], MAXS, counts("backbone.stage{}.", range(2, 6))),
    ("KMAX.MAXS.WIDTHS", [4, 6, 8, 16], MAXS, lambda m: channels(m)[1:], [16, 24, 32, 64]),
    ("KMAX.MAXS.STEM_WIDTHS", [4, 6, 10], MAXS, stem_widths),
    ("KMAX.MAXS.DROP_PATH", [0.1, 0.2, 0.3, 0.4], DEEP_MAXS, lambda m: drop_rates(m.backbone)[1:]),
    ("KMAX.CONVNEXT.DEPTHS", [2, 1, 3, 1], CONVNEXT, counts("backbone.stages.{}.blocks.")),
    ("KMAX.CONVNEXT.WIDTHS", [4, 6, 8, 10], CONVNEXT, lambda m: channels(m)[1:]),
    ("KMAX.CONVNEXT.DROP_PATH", 0.5, CONVNEXT, lambda m: max(drop_rates(m.backbone))),
    ("KMAX.PIXEL_DECODER.WIDTHS", [32, 24, 12, 4], {}, lambda m: [s.channels // 4 for s in maps(m)]),
    ("KMAX.PIXEL_DECODER.BLOCKS", [2, 1, 3, 1], {}, counts("pixel_decoder.stages.{}.")),
    ("KMAX.PIXEL_DECODER.KINDS", ["bottleneck", "axial", "axial", "bottleneck"], {}, kinds),
    ("KMAX.PIXEL_DECODER.DILATION", 3, {}, dilation),
    ("KMAX.TRANSFORMER_DECODER.NUM_QUERIES", 9, {}, size_of(DECODER + "centers")),
    ("KMAX.TRANSFORMER_DECODER.TRAINING_QUERIES", 5, {}, lambda m: m.transformer_decoder.training_queries),
    ("KMAX.TRANSFORMER_DECODER.DECODERS", [2, 0, 1], {}, lambda m: m.transformer_decoder.map_of_layer, [0, 0, 2]),
    ("KMAX.TRANSFORMER_DECODER.CHANNELS", 24, {}, size_of(DECODER + "centers", 1)),
    ("KMAX.TRANSFORMER_DECODER.FFN_CHANNELS", 40, {}, size_of(LAYER + "ffn.expand.linear.weight")),
    # Queries, keys and 16 channels of values in one projection.
    ("KMAX.TRANSFORMER_DECODER.KEY_CHANNELS", 24, {}, size_of(LAYER + "attention.qkv.linear.weight"), 2 * 24 + 16),
    ("KMAX.TRANSFORMER_DECODER.NUM_HEADS", 4, {}, size_of(LAYER + "attention.norm_logits.weight")),
    ("KMAX.TRANSFORMER_DECODER.FEATURE_CHANNELS", 20, {}, size_of(LAYER + "predictor.pixel_projection.weight")),
    ("KMAX.TRANSFORMER_DECODER.DROP_PATH", 0.4, {}, lambda m: set(drop_rates(m.transformer_decoder)), {0.4}),
    ("KMAX.SEMANTIC_HEAD.CHANNELS", 24, {}, size_of("semantic_head.classifier.weight", 1)),
    ("KMAX.SEMANTIC_HEAD.LOW_LEVEL_CHANNELS", [6, 10], {}, low_level),
    ("KMAX.LOSS.PQ_WEIGHT", 1.5, {}, pq_weights, {1.5}),
    ("KMAX.LOSS.MASK_ID_WEIGHT", 2.5, {}, lambda m: m.criterion.weights["loss_mask_id"]),
    ("KMAX.LOSS.INSTANCE_WEIGHT", 3.5, {}, lambda m: m.criterion.weights["loss_instance"]),
    ("KMAX.LOSS.SEMANTIC_WEIGHT", 4.5, {}, lambda m: m.criterion.weights["loss_semantic"]),
    ("KMAX.LOSS.SEMANTIC_WEIGHT", 0.0, {}, lambda m: m.semantic_head, None),
    *[
        (f"KMAX.LOSS.{name}", value, {}, lambda m, name=name: getattr(m.criterion, name.lower()))
        for name, value in {
            "NUM_SAMPLES": 77,
            "INSTANCE_TEMPERATURE": 0.7,
            "SEMANTIC_TEMPERATURE": 0.8,
            "SEMANTIC_HARD_SHARE": 0.3,
            "SMALL_INSTANCE_AREA": 88,
            "SMALL_INSTANCE_WEIGHT": 6.0,
            "MIN_PQ_WEIGHT": 0.01,
        }.items()
    ],
    *[
        (f"KMAX.TEST.{name}", value, {}, lambda m, name=name: getattr(m.merging, name.lower()))
        for name, value in {
            "PIXEL_THRESHOLD": 0.45,
            "THING_THRESHOLD": 0.55,
            "STUFF_THRESHOLD": 0.65,
            "OVERLAP_THRESHOLD": 0.75,
            "CLASS_POWER": 0.9,
            "MASK_POWER": 0.85,
            "THING_AREA_LIMIT": 11,
            "STUFF_AREA_LIMIT": 22,
        }.items()
    ],
    ("KMAX.TEST.PAD_TO_CROP", False, {}, lambda m: m.test_size, None),
    ("KMAX.TEST.MERGE_AT_CROP", False, {}, lambda m: (m.merging.thing_area_limit, m.merging.stuff_area_limit), (0, 0)),
    *[
        (f"KMAX.TEST.{name}", value, {}, lambda m, name=name: getattr(m.postprocessor, name.lower()))
        for name, value in {"SEMANTIC": "marginal", "INSTANCE": "panoptic", "MAX_INSTANCES": 33}.items()
    ],
]


@pytest.mark.parametrize("case", OF_THE_MODEL, ids=lambda case: f"{case[0]}={case[1]}")
def test_of_the_model(case):
    option, value, others, read, *expected = case
    assert read(small_model(**others | {option.replace(".", "__"): value})) == (expected[0] if expected else value)


def test_in_features():
    features = ["stage5", "stage4", "stage3", "stage2", "stage1"]
    blocks = ["axial"] * 2 + ["bottleneck"] * 3
    parts = {"IN_FEATURES": features, "WIDTHS": [16, 16, 8, 8, 8], "BLOCKS": [1] * 5, "KINDS": blocks}
    model = small_model(**{f"KMAX__PIXEL_DECODER__{name}": value for name, value in parts.items()})
    assert [shape.stride for shape in maps(model)] == [32, 16, 8, 4, 2]


@pytest.mark.parametrize(
    ("option", "key"),
    [("PANOPTIC_ON", "panoptic_seg"), ("SEMANTIC_ON", "sem_seg"), ("INSTANCE_ON", "instances")],
)
def test_results_that_are_off_are_left_out(option, key):
    model = small_model(KMAX__NUM_CLASSES=3, **{f"KMAX__TEST__{option}": False}).eval()
    with torch.no_grad():
        result = model([{"image": torch.zeros(3, 40, 40, dtype=torch.uint8)}])[0]
    assert [name for name in ("panoptic_seg", "sem_seg", "instances") if name not in result] == [key]


def augmentation(kind, mapper=PanopticTrainMapper, **changes):
    """The mapper's augmentation of a kind, or None."""
    augmentations = mapper(load_config("", options(**changes))).augmentations.augs
    return next((augmentation for augmentation in augmentations if isinstance(augmentation, kind)), None)


def test_of_the_mappers():
    resize = augmentation(ResizeToFit, INPUT__CROP_SIZE=[97, 129], INPUT__SCALE_RANGE=[0.6, 0.9], INPUT__SCALE_STEPS=4)
    assert (resize.size, tuple(resize.scale_range), resize.scale_steps) == ((97, 129), (0.6, 0.9), 4)
    for mapper in (PanopticTrainMapper, PanopticTestMapper):
        assert augmentation(ResizeToFit, mapper, INPUT__FIT_CROP=False).size is None
        assert augmentation(ResizeToFit, mapper, INPUT__FIT_CROP=True).size == (65, 65)
    assert augmentation(ColorPolicy, INPUT__COLOR_LEVEL=0.3).level == 0.3
    assert augmentation(ColorPolicy, INPUT__COLOR_POLICY=False) is None


@pytest.mark.parametrize("grouping", [False, True])
def test_aspect_ratio_grouping(tmp_path, grouping):
    miniature_coco(tmp_path)
    root = tmp_path / "coco"
    data = [root / "train2017", root / "panoptic_train2017", root / "annotations/panoptic_train2017.json"]
    changes = {"DATASETS__OWN_TRAIN": [str(part) for part in data]}
    if grouping:
        changes["DATALOADER__ASPECT_RATIO_GROUPING"] = True
    cfg = load_config("", options(**changes))
    prepare_datasets(cfg)
    assert isinstance(Trainer.build_train_loader(cfg), AspectRatioGroupedDataset) == grouping


def test_of_the_optimizer():
    changes = {"BASE_LR": 0.02, "WEIGHT_DECAY": 0.03, "ADAM_EPS": 1e-5, "BACKBONE_MULTIPLIER": 0.25}
    cfg = load_config("", options(MODEL__KMAX__NORM="BN", **{f"SOLVER__{n}": value for n, value in changes.items()}))
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    assert {group["eps"] for group in groups} == {1e-5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.03}
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rate[id(model.backbone.stem.conv.weight)] == 0.02 * 0.25
    assert rate[id(model.transformer_decoder.centers)] == 0.02


def test_of_the_schedule():
    cfg = load_config("", ["SOLVER.MAX_ITER", 100, "SOLVER.WARMUP_ITERS", 10, "SOLVER.POLY_POWER", 2.0])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[5] == pytest.approx(0.5)
    assert rates[60] == pytest.approx((1 - 0.6) ** 2)
