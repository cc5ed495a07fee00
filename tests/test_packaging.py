"""What the package imports is declared, and the oldest versions that it claims are those that are tested."""

import ast
import itertools
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import programs
import pytest
from runs import write_own_data
from small import options

ROOT = Path(__file__).parents[1]
# Not on PyPI; comes with PyTorch where there is a GPU, and is imported only there.
UNDECLARED = {"detectron2", "triton"}


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture
def project():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(texts):
    """Oldest version, or None, by name of each requirement."""
    found = {}
    for text in texts:
        name, version = re.match(r"([\w.-]+)(?:\[\w+\])?(?:>=([\w.]+))?", text).groups()
        found[normalized(name)] = version
    return found


def imported():
    """The top-level modules that the package imports."""
    for file in (ROOT / "kmax_d2").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            yield from (name.partition(".")[0] for name in names)


def test_every_imported_package_is_declared(project):
    extras = [extra for name, extra in project["optional-dependencies"].items() if name not in ("dev", "docs")]
    declared = requirements([*project["dependencies"], *itertools.chain(*extras)])
    distributions = packages_distributions()
    missing = set()
    for module in set(imported()) - sys.stdlib_module_names - UNDECLARED - {"kmax_d2"}:
        if not {normalized(name) for name in distributions.get(module, [module])} & declared.keys():
            missing.add(module)
    assert missing == set()


def test_the_oldest_versions_are_tested(project):
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = {normalized(name): version for name, version in (line.split("==") for line in lines if "==" in line)}
    for name, oldest in requirements(project["dependencies"]).items():
        assert pinned[name].startswith(oldest), name


ELSEWHERE = """
import multiprocessing, os, sys
sys.modules["resource"] = None  # importing it fails
for name in ("fork", "setpgrp", "sched_getaffinity"):
    delattr(os, name)
from kmax_d2.engine import Trainer, ready_config
from kmax_d2.engine.writers import peak_memory
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.platform = "darwin"
    cfg = ready_config("", sys.argv[1:])
    results = Trainer(cfg).train()
    print(peak_memory(), *results)
"""


def test_it_trains_without_what_windows_and_macos_lack(tmp_path):
    """Processes are spawned there, not forked."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    own_data = write_own_data(tmp_path)
    own = {"DATASETS__OWN_TRAIN": own_data["train"], "DATASETS__OWN_TEST": own_data["val"], "OUTPUT_DIR": tmp_path}
    own |= {f"MODEL__KMAX__TEST__{part}_ON": False for part in ("SEMANTIC", "INSTANCE")}  # each has processes
    done = programs.run(tmp_path / "elsewhere.py", *options(SOLVER__MAX_ITER=2, DATALOADER__NUM_WORKERS=1, **own))
    assert done.stdout.splitlines()[-1] == "0.0 panoptic_seg", done.stderr
