"""From images to results in one call."""

from .predictor import Predictor, load
from .result import Panoptic, Result, Segment

__all__ = ["Panoptic", "Predictor", "Result", "Segment", "load"]
