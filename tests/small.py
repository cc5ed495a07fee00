"""A model and options small enough to train for a few iterations in a test."""

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


def options(**changes):
    """SMALL_MODEL and some more as a flat list of names and values; "__" stands for a dot."""
    every = SMALL_MODEL | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for pair in every.items() for part in pair]
