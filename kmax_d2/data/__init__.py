"""Datasets, augmentations and mappers; importing this package registers them."""

from . import datasets
from .loading import SkipBroken, WithPasteSource, build_seeded_loader, seed_by, skip_samples, training_records
from .mapper import MAPPER_REGISTRY, PanopticTestMapper, PanopticTrainMapper

__all__ = [
    "MAPPER_REGISTRY",
    "PanopticTestMapper",
    "PanopticTrainMapper",
    "SkipBroken",
    "WithPasteSource",
    "build_seeded_loader",
    "datasets",
    "seed_by",
    "skip_samples",
    "training_records",
]
