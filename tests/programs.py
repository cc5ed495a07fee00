"""The programs, run in a process of their own, and those outside of the package as modules."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from kmax_d2 import errors

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "demo.py"
TRAIN_NET = ROOT / "train_net.py"


def run(*arguments, timeout=300, **environment):
    """Runs Python in the repository with arguments, such as a program and its own; returns the finished process."""
    return subprocess.run(**_process(arguments, environment), capture_output=True, timeout=timeout)


def start(*arguments, **environment):
    """Starts what :func:`run` runs; returns the process, whose output is in pipes."""
    return subprocess.Popen(**_process(arguments, environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _process(arguments, environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return {"args": [sys.executable, *map(str, arguments)], "env": environment, "cwd": ROOT, "text": True}


def load(file):
    """Imports a program without running it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_line(function, *args):
    """The line that ends a program if this call fails, or None; an error that would show a traceback is raised."""
    try:
        function(*args)
    except SystemExit as error:
        return error.code if isinstance(error.code, str) else f"status {error.code}"
    except Exception as error:
        line = errors._one_line(error)
        if not line:
            raise
        assert "\n" not in line and len(line) < 2000
        return line
    return None
