"""Datasets, augmentations and mappers; importing it registers them."""

from . import datasets
from .copy_paste import WithPartner
from .mapper import MAPPER_REGISTRY, PanopticTestMapper, PanopticTrainMapper, SkipBroken
from .records import training_records
from .sampler import skip_samples

__all__ = [
    "MAPPER_REGISTRY",
    "PanopticTestMapper",
    "PanopticTrainMapper",
    "SkipBroken",
    "WithPartner",
    "datasets",
    "skip_samples",
    "training_records",
]
