"""Configs, ready models, and training."""

from .launch import launch
from .setup import load_config, load_model, load_predictor, ready_config, setup
from .trainer import Trainer

__all__ = ["Trainer", "launch", "load_config", "load_model", "load_predictor", "ready_config", "setup"]
