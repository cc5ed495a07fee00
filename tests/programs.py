"""The programs outside of the package, as modules."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "demo.py"
TRAIN_NET = ROOT / "train_net.py"


def load(file):
    """Imports a program without running it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
