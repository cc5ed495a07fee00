"""Configs, training and its parts."""

from .launch import launch
from .setup import argument_parser, load_config, setup
from .trainer import Trainer

__all__ = ["Trainer", "argument_parser", "launch", "load_config", "setup"]
