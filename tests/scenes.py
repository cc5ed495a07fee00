"""Pictures with masks on a grid, and the small model of the tests for their six classes."""

import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from small import SMALL_MODEL, build, randomize_norms
from torch import nn

NUM_CLASSES = 6
THINGS = {0, 2, 3}
QUERIES = SMALL_MODEL["MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES"]
DATASET = "kmax_d2_tests_six_classes"
MetadataCatalog.get(DATASET).set(thing_dataset_id_to_contiguous_id={10 + index: index for index in THINGS})
SIZES = [(64, 48), (65, 65), (33, 33), (17, 17), (50, 71), (97, 40), (16, 100)]
# Nothing random in a training step: no path is dropped, and the samples are all pixels.
DETERMINISTIC = {"MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH": 0.0, "MODEL__KMAX__LOSS__NUM_SAMPLES": 1000}
DECISIVE = {
    "MODEL__KMAX__TEST__THING_THRESHOLD": 0.3,
    "MODEL__KMAX__TEST__STUFF_THRESHOLD": 0.3,
    "MODEL__KMAX__TEST__OVERLAP_THRESHOLD": 0.5,
    "MODEL__KMAX__TEST__THING_AREA_LIMIT": 4,
    "MODEL__KMAX__TEST__STUFF_AREA_LIMIT": 8,
}


def build_model(seed=1, **changes):
    """Builds a small model of six classes, with nothing left at zero where training starts with zeros."""
    torch.manual_seed(seed)
    return randomize_norms(build(**{"DATASETS__TEST": (DATASET,), "MODEL__KMAX__NUM_CLASSES": NUM_CLASSES} | changes))


def build_decisive(**changes):
    """Builds a small model in inference mode whose random predictions give several segments in every picture."""
    model = build_model(seed=7, **DECISIVE | changes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    predictor = model.transformer_decoder.predictor
    with torch.no_grad():
        # Features and embeddings around zero: the best query changes from pixel to pixel.
        predictor.pixel_norm.bias.zero_()
        predictor.mask_embedding.norm.bias.zero_()
        torch.manual_seed(3)
        for _ in range(5):  # for running statistics that fit
            model([sample(65, 65, seed) for seed in range(2)])
        predictor.mask_norm.weight.fill_(8.0)
        predictor.class_head.weight.mul_(100)
        predictor.class_head.bias[-1] = -8.0
    return model.eval()


def without_dropout(model):
    """Turns off the dropout of the semantic head; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def picture(height, width, seed=0):
    """Draws a colorful smooth image (3, H, W), uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)[0]
    return (smooth * 255).to(torch.uint8)


def sample(height, width, seed=0, cell=16):
    """Draws a training input with a mask in each cell of a grid; every third cell is void."""
    rows, columns = torch.arange(height) // cell, torch.arange(width) // cell
    ids = rows[:, None] * (columns[-1] + 1) + columns
    return {
        "image": picture(height, width, seed),
        "segment_ids": ids.where(ids % 3 != 2, -1),
        "segment_classes": torch.arange(int(ids.max()) + 1) % NUM_CLASSES,
    }
