"""kMaX-DeepLab (k-means Mask Transformer, ECCV 2022) for Detectron2. Importing it registers everything."""

from . import data, model_zoo, modeling
from .config import add_kmax_config

__version__ = "0.1.0"

__all__ = ["add_kmax_config", "data", "model_zoo", "modeling"]
