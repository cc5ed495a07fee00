"""The programs, run in a process of their own, and those outside of the package as modules."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "demo.py"
TRAIN_NET = ROOT / "train_net.py"


def run(*arguments, timeout=300, **environment):
    """Runs Python in the repository with arguments, such as a program and its own; returns the finished process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)


def load(file):
    """Imports a program without running it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
