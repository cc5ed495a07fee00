"""The quickstart as a user runs it: shortened here, whole in the slow test."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small import SMALL_MODEL

ROOT = Path(__file__).parents[1]
KEYS = ["PQ", "PQ_th", "PQ_st", "AP", "mIoU", "seconds"]


def quickstart(output, cache, opts=(), timeout=300):
    command = [sys.executable, "-m", "kmax_d2.tools.quickstart", "--output", str(output), *map(str, opts)]
    environment = os.environ | {"KMAX_D2_CACHE": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)


def test_it_draws_trains_evaluates_and_leaves_results_and_pictures(tmp_path, monkeypatch, shapes_cache):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "out"
    output.mkdir()
    (output / "results.json").write_text("of an earlier run")
    parts = {name: value for name, value in SMALL_MODEL.items() if name.startswith("MODEL.KMAX")}
    opts = [part for pair in parts.items() for part in pair]
    run = quickstart(output, shapes_cache, [*opts, "INPUT.CROP_SIZE", [65, 65], "SOLVER.MAX_ITER", 3])
    assert run.returncode == 0, run.stderr
    results = json.loads((output / "results.json").read_text())
    assert list(results) == KEYS
    assert all(math.isfinite(results[name]) for name in ("PQ", "PQ_th", "PQ_st", "mIoU"))
    assert results["seconds"] > 0
    header = next(line for line in run.stdout.splitlines() if "PQ_th" in line)
    assert [name.strip() for name in header.strip("|").split("|")] == KEYS
    pictures = sorted((output / "pictures").glob("*.png"))
    assert len(pictures) == 8
    assert min(Image.open(pictures[0]).size) > 400
    assert (output / "model_final.pth").is_file()
    assert "3/3" in run.stderr
    assert "Traceback" not in run.stderr
    again = quickstart(output, shapes_cache, ["SOLVER.MAXITER", 3])
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1] == "error: no option SOLVER.MAXITER - did you mean SOLVER.MAX_ITER?"


@pytest.mark.slow
def test_it_learns_to_segment(tmp_path, shapes_cache):
    run = quickstart(tmp_path / "out", shapes_cache, timeout=1200)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["PQ"] > 50
    assert results["mIoU"] > 60
