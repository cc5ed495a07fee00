"""Datasets, augmentations and mappers; importing this package registers them."""

from . import datasets
from .loading import WithPasteSource
from .mapper import MAPPER_REGISTRY, PanopticTestMapper, PanopticTrainMapper

__all__ = ["MAPPER_REGISTRY", "PanopticTestMapper", "PanopticTrainMapper", "WithPasteSource", "datasets"]
