"""Evaluates panoptic, instance, and semantic results of one model in one pass."""

from .build import build_evaluator

__all__ = ["build_evaluator"]
