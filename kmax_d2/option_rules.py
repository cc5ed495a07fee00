"""What each option may be: its range or choices, beside the type of its default."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from .data import MAPPER_REGISTRY
from .errors import UserError
from .speed import COMPILE_MODES, PRECISIONS


class Rule(NamedTuple):
    """A test of an option's value, what the value must be in words, and the names to choose from, if any."""

    holds: Callable[[Any], bool]
    wanted: str
    choices: Sequence[str] = ()


def number(low: float, high: float = math.inf, *, above: bool = False, whole: bool = False) -> Rule:
    """Returns the rule of a finite number from `low`, or `above` it, to `high`."""
    start = "above" if above else "from" if high < math.inf else "of at least"
    wanted = f"a {'whole ' * whole}number {start} {low:.10g}" + (f" to {high:.10g}" if high < math.inf else "")

    def holds(value: Any) -> bool:
        fits = type(value) is int or (type(value) is float and not whole and math.isfinite(value))
        return fits and low <= value <= high and not (above and value == low)

    return Rule(holds, wanted)


def one_of(*choices: str) -> Rule:
    """Returns the rule of a text that is one of several."""
    names = ", ".join(choice or '""' for choice in choices)
    return Rule(lambda value: value in choices, f"one of {names}" if len(choices) > 1 else names, choices)


def each(rule: Rule, *lengths: int) -> Rule:
    """Returns the rule of a list whose values follow another rule; without `lengths`, of any length."""

    def holds(values: Any) -> bool:
        fits = isinstance(values, (list, tuple)) and (not lengths or len(values) in lengths)
        return fits and all(map(rule.holds, values))

    wanted = "a list" + (f" of {' or '.join(map(str, lengths))} values" if lengths else "")
    return Rule(holds, f"{wanted}, each {rule.wanted}")


def _has_device(name: Any) -> bool:
    """Returns whether a device exists; "cuda" always does, because the CPU takes its place."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        return False
    if device.type == "cuda":
        return (device.index or 0) < max(1, torch.cuda.device_count())
    backend: Any = getattr(torch.backends, device.type, None) or getattr(torch, device.type, None)
    return device.type in ("cpu", "meta") or getattr(backend, "is_available", bool)()


def _is_model(name: Any) -> bool:
    """Returns whether a meta-architecture is this project's or the user's, not one of Detectron2's."""
    return name in META_ARCH_REGISTRY and not str(META_ARCH_REGISTRY.get(name).__module__).startswith("detectron2.")


def _are_expected(values: Any) -> bool:
    """Returns whether values are the expected results that Detectron2 compares with."""
    return isinstance(values, (list, tuple)) and all(
        isinstance(row, (list, tuple)) and [type(x) in (int, float) for x in row] == [False, False, True, True]
        for row in values
    )


FACTOR, POSITIVE, SHARE = number(0), number(0, above=True), number(0, 1)
TEXT = Rule(lambda value: isinstance(value, str), "a text")
NATURAL, COUNT = number(0, whole=True), number(1, whole=True)
COUNTS = each(COUNT)
ANY = Rule(lambda value: True, "")  # only its type counts
# What every option of kmax_d2, and every one of Detectron2 that something reads, may be, beside its default's type.
_NAMES_BY_RULE = {
    ANY: """CUDNN_BENCHMARK DATALOADER.ASPECT_RATIO_GROUPING DATALOADER.FILTER_EMPTY_ANNOTATIONS DATALOADER.REPEAT_SQRT
        INPUT.FIT_CROP INPUT.COLOR_POLICY INPUT.COPY_PASTE INPUT.SKIP_BROKEN MODEL.BACKBONE.NAME MODEL.WEIGHTS
        MODEL.KMAX.CHECKPOINT_BLOCKS MODEL.KMAX.RESNET.STANDARD MODEL.KMAX.TIMM.NAME MODEL.KMAX.TIMM.PRETRAINED
        MODEL.KMAX.PIXEL_DECODER.NAME MODEL.KMAX.SEMANTIC_HEAD.NAME MODEL.KMAX.TRANSFORMER_DECODER.NAME
        MODEL.KMAX.LOSS.NAME MODEL.KMAX.TEST.MERGING
        MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION MODEL.KMAX.TEST.PAD_TO_CROP MODEL.KMAX.TEST.MERGE_AT_CROP
        MODEL.KMAX.TEST.PANOPTIC_ON MODEL.KMAX.TEST.SEMANTIC_ON MODEL.KMAX.TEST.INSTANCE_ON
        MODEL.KMAX.TEST.SAVE_PREDICTIONS SOLVER.AMP.ENABLED SOLVER.BEST_METRIC SOLVER.CLIP_GRADIENTS.ENABLED
        SOLVER.EMA.ENABLED SOLVER.EMA.WARMUP TEST.PRECISE_BN.ENABLED""",
    NATURAL: """DATALOADER.NUM_WORKERS INPUT.SCALE_STEPS MODEL.KMAX.NUM_CLASSES
        MODEL.KMAX.LOSS.SMALL_INSTANCE_AREA MODEL.KMAX.TEST.STUFF_AREA_LIMIT MODEL.KMAX.TEST.THING_AREA_LIMIT
        MODEL.KMAX.TRANSFORMER_DECODER.TRAINING_QUERIES SOLVER.KEEP_CHECKPOINTS SOLVER.PATIENCE
        SOLVER.REFERENCE_WORLD_SIZE SOLVER.WARMUP_ITERS TEST.EVAL_PERIOD TEST.PICTURES""",
    COUNT: """MODEL.KMAX.LOSS.NUM_SAMPLES MODEL.KMAX.PIXEL_DECODER.DILATION MODEL.KMAX.RESNET.STEM_WIDTH
        MODEL.KMAX.SEMANTIC_HEAD.CHANNELS MODEL.KMAX.TEST.MAX_INSTANCES MODEL.KMAX.TRANSFORMER_DECODER.CHANNELS
        MODEL.KMAX.TRANSFORMER_DECODER.FEATURE_CHANNELS MODEL.KMAX.TRANSFORMER_DECODER.FFN_CHANNELS
        MODEL.KMAX.TRANSFORMER_DECODER.KEY_CHANNELS MODEL.KMAX.TRANSFORMER_DECODER.NUM_HEADS
        MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES SOLVER.ACCUMULATE SOLVER.CHECKPOINT_PERIOD
        SOLVER.IMS_PER_BATCH SOLVER.MAX_ITER TEST.PRECISE_BN.NUM_ITER""",
    FACTOR: """INPUT.COLOR_LEVEL MODEL.KMAX.LOSS.INSTANCE_WEIGHT MODEL.KMAX.LOSS.MASK_ID_WEIGHT
        MODEL.KMAX.LOSS.PQ_WEIGHT MODEL.KMAX.LOSS.SEMANTIC_WEIGHT MODEL.KMAX.LOSS.SMALL_INSTANCE_WEIGHT
        MODEL.KMAX.TEST.CLASS_POWER MODEL.KMAX.TEST.MASK_POWER SOLVER.BACKBONE_MULTIPLIER""",
    number(0, 100): "SOLVER.POLY_POWER",
    Rule(_are_expected, "a list of [task, metric, value, tolerance]"): "TEST.EXPECTED_RESULTS",
    POSITIVE: """MODEL.KMAX.LOSS.INSTANCE_TEMPERATURE MODEL.KMAX.LOSS.SEMANTIC_TEMPERATURE
        SOLVER.CLIP_GRADIENTS.CLIP_VALUE SOLVER.CLIP_GRADIENTS.NORM_TYPE""",
    SHARE: """DATALOADER.REPEAT_THRESHOLD MODEL.KMAX.CONVNEXT.DROP_PATH MODEL.KMAX.LOSS.MIN_PQ_WEIGHT
        MODEL.KMAX.LOSS.SEMANTIC_HARD_SHARE MODEL.KMAX.TEST.OVERLAP_THRESHOLD MODEL.KMAX.TEST.STUFF_THRESHOLD
        MODEL.KMAX.TEST.THING_THRESHOLD MODEL.KMAX.TRANSFORMER_DECODER.DROP_PATH SOLVER.BASE_LR
        SOLVER.WEIGHT_DECAY""",
    number(0, 1, above=True): "DATALOADER.RANDOM_SUBSET_RATIO SOLVER.ADAM_EPS SOLVER.LAYER_DECAY",
    number(0, 0.999999999): "SOLVER.EMA.DECAY",
    number(1 / 3, 1): "MODEL.KMAX.TEST.PIXEL_THRESHOLD",
    Rule(lambda value: value == 2, "2"): "VERSION",
    number(-1, 2**31 - 1, whole=True): "INPUT.MAX_SIZE_TEST INPUT.MIN_SIZE_TEST SEED",
    COUNTS: """MODEL.KMAX.CONVNEXT.DEPTHS MODEL.KMAX.CONVNEXT.WIDTHS MODEL.KMAX.MAXS.BLOCKS MODEL.KMAX.MAXS.STEM_WIDTHS
        MODEL.KMAX.MAXS.WIDTHS MODEL.KMAX.PIXEL_DECODER.BLOCKS MODEL.KMAX.PIXEL_DECODER.WIDTHS MODEL.KMAX.RESNET.BLOCKS
        MODEL.KMAX.RESNET.WIDTHS""",
    each(number(1, 2**15, whole=True), 2): "INPUT.CROP_SIZE",
    each(COUNT, 2): "MODEL.KMAX.SEMANTIC_HEAD.LOW_LEVEL_CHANNELS",
    each(NATURAL): "MODEL.KMAX.TRANSFORMER_DECODER.DECODERS",
    each(SHARE): "MODEL.KMAX.MAXS.DROP_PATH",
    each(number(0, 255), 3): "MODEL.PIXEL_MEAN",
    each(POSITIVE, 3): "MODEL.PIXEL_STD",
    each(number(0.01, 100), 2): "INPUT.SCALE_RANGE",
    each(TEXT): "DATASETS.TRAIN DATASETS.TEST MODEL.KMAX.PIXEL_DECODER.IN_FEATURES MODEL.KMAX.PIXEL_DECODER.KINDS",
    each(one_of("backbone", "pixel_decoder", "transformer_decoder", "semantic_head")): "SOLVER.FREEZE",
    each(one_of("wandb", "mlflow")): "SOLVER.TRACKERS",
    each(TEXT, 0, 3): "DATASETS.OWN_TRAIN DATASETS.OWN_TEST",
    Rule(bool, "a folder"): "OUTPUT_DIR",
    Rule(_has_device, "a device of this machine, such as cpu, cuda, or cuda:0"): "MODEL.DEVICE",
    Rule(_is_model, "KMaXDeepLab or a model of your own", ("KMaXDeepLab",)): "MODEL.META_ARCHITECTURE",
    Rule(lambda name: name in MAPPER_REGISTRY, "a registered mapper"): "INPUT.DATASET_MAPPER_NAME",
    one_of("", "highest", "high", "medium"): "FLOAT32_PRECISION",
    one_of("RGB"): "INPUT.FORMAT",
    one_of("none", "horizontal", "vertical"): "INPUT.RANDOM_FLIP",
    one_of("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"): "DATALOADER.SAMPLER_TRAIN",
    one_of("bfloat16", "float16", "float32"): "SOLVER.AMP.PRECISION",
    one_of("value", "norm"): "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    one_of("SyncBN", "BN", "naiveSyncBN", "FrozenBN"): "MODEL.KMAX.NORM",
    one_of("", *COMPILE_MODES): "MODEL.KMAX.COMPILE",
    one_of(*PRECISIONS): "MODEL.KMAX.TEST.PRECISION",
    one_of("query", "marginal"): "MODEL.KMAX.TEST.SEMANTIC",
    one_of("query", "panoptic"): "MODEL.KMAX.TEST.INSTANCE",
}
RULES = {name: rule for rule, names in _NAMES_BY_RULE.items() for name in names.split()}


def check_relations(cfg: CfgNode) -> None:
    """Raises UserError for options that do not go together."""
    solver, decoder, scales = cfg.SOLVER, cfg.MODEL.KMAX.TRANSFORMER_DECODER, cfg.INPUT.SCALE_RANGE
    if solver.PATIENCE and not (cfg.TEST.EVAL_PERIOD and solver.BEST_METRIC):
        raise UserError("SOLVER.PATIENCE counts evaluations: set TEST.EVAL_PERIOD and SOLVER.BEST_METRIC")
    if scales[0] > scales[1]:
        raise UserError("INPUT.SCALE_RANGE is in the wrong order, but must be (smallest, largest)")
    if solver.IMS_PER_BATCH % solver.ACCUMULATE:
        raise UserError("SOLVER.IMS_PER_BATCH, the images of a step, must be a multiple of SOLVER.ACCUMULATE")
    stages = ("IN_FEATURES", "WIDTHS", "BLOCKS", "KINDS")
    if len({len(cfg.MODEL.KMAX.PIXEL_DECODER[name]) for name in stages}) > 1:
        raise UserError(
            "IN_FEATURES, WIDTHS, BLOCKS, and KINDS of MODEL.KMAX.PIXEL_DECODER must have one value for each stage"
        )
    if decoder.KEY_CHANNELS % decoder.NUM_HEADS or decoder.CHANNELS % decoder.NUM_HEADS:
        raise UserError("MODEL.KMAX.TRANSFORMER_DECODER.NUM_HEADS must divide KEY_CHANNELS and CHANNELS")
