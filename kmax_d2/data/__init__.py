"""Datasets, augmentations and mappers; importing it registers them."""

from . import datasets
from .mapper import MAPPER_REGISTRY, PanopticTestMapper, PanopticTrainMapper

__all__ = ["MAPPER_REGISTRY", "PanopticTestMapper", "PanopticTrainMapper", "datasets"]
