"""The small model of the tests, and options with which it trains for a few iterations in a second."""

from detectron2.modeling import build_model
from torch import nn

from kmax_d2.engine import load_config

SMALL_MODEL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.KMAX.RESNET.BLOCKS": [1, 1, 1, 1],
    "MODEL.KMAX.RESNET.WIDTHS": [8, 8, 16, 16],
    "MODEL.KMAX.RESNET.STEM_WIDTH": 8,
    "MODEL.KMAX.PIXEL_DECODER.WIDTHS": [16, 16, 8, 8],
    "MODEL.KMAX.PIXEL_DECODER.BLOCKS": [1, 1, 1, 1],
    "MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES": 12,
    "MODEL.KMAX.TRANSFORMER_DECODER.CHANNELS": 16,
    "MODEL.KMAX.TRANSFORMER_DECODER.FFN_CHANNELS": 32,
    "MODEL.KMAX.TRANSFORMER_DECODER.KEY_CHANNELS": 16,
    "MODEL.KMAX.TRANSFORMER_DECODER.FEATURE_CHANNELS": 8,
    "MODEL.KMAX.SEMANTIC_HEAD.CHANNELS": 16,
    "MODEL.KMAX.SEMANTIC_HEAD.LOW_LEVEL_CHANNELS": [8, 8],
    "MODEL.KMAX.LOSS.NUM_SAMPLES": 64,
    "INPUT.CROP_SIZE": [65, 65],
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.WARMUP_ITERS": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "SEED": 1,
}
# The model alone, as a flat list of names and values.
SMALL_KMAX = [part for name, value in SMALL_MODEL.items() if name.startswith("MODEL.KMAX") for part in (name, value)]
# What distinguishes the Cityscapes models: five maps, another semantic head, and weighted hard pixels in its loss.
CITYSCAPES = {
    "MODEL__KMAX__PIXEL_DECODER__IN_FEATURES": ["stage5", "stage4", "stage3", "stage2", "stage1"],
    "MODEL__KMAX__PIXEL_DECODER__WIDTHS": [16, 16, 8, 8, 8],
    "MODEL__KMAX__PIXEL_DECODER__BLOCKS": [1, 1, 1, 1, 1],
    "MODEL__KMAX__PIXEL_DECODER__KINDS": ["axial", "axial", "bottleneck", "bottleneck", "bottleneck"],
    "MODEL__KMAX__SEMANTIC_HEAD__NAME": "PointwiseSemanticHead",
    "MODEL__KMAX__LOSS__SEMANTIC_HARD_SHARE": 0.2,
    "MODEL__KMAX__LOSS__SMALL_INSTANCE_WEIGHT": 3.0,
}


def options(**changes):
    """Returns SMALL_MODEL and more options as a flat list of names and values; "__" stands for a dot."""
    every = SMALL_MODEL | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for pair in every.items() for part in pair]


def build(config="", **changes):
    """Builds the small model on the CPU, in training mode, with plain batch norms and initial values.

    Args:
        config: a config such as "coco/base" to start from; empty for the defaults.
        changes: more options, as for :func:`options`.
    """
    return build_model(load_config(config, options(**{"MODEL__KMAX__NORM": "BN"} | changes)))


def randomize_norms(module):
    """Sets batch norms' gains, biases and running statistics to values that all matter; returns the module."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module


def plain_norm(norm, x, training=False):
    """Batch norm of x (..., channels) from its formula, by the statistics of the batch in training."""
    mean, variance = norm.running_mean, norm.running_var
    if training:
        rows = x.flatten(0, -2)
        mean, variance = rows.mean(0), rows.var(0, unbiased=False)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
