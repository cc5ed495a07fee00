"""Evaluates panoptic, instance, and semantic results of one model in one pass."""

from .build import build_evaluator, evaluated_dataset, require_evaluation, verify

__all__ = ["build_evaluator", "evaluated_dataset", "require_evaluation", "verify"]
