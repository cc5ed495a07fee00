"""The quickstart as a user runs it: shortened here, whole in the slow test."""

import json
import math

import programs
import pytest
from PIL import Image
from small import SMALL_KMAX

from kmax_d2.parallel import num_cores

KEYS = ["PQ", "PQ_th", "PQ_st", "AP", "mIoU", "seconds"]


def quickstart(output, cache, *options, **others):
    command = ["-m", "kmax_d2.tools.quickstart", "--output", output, *options]
    return programs.run(*command, KMAX_D2_CACHE=str(cache), **others)


def test_it_draws_trains_evaluates_and_leaves_results_and_pictures(tmp_path, shapes_cache):
    output = tmp_path / "out"
    output.mkdir()
    run = quickstart(output, shapes_cache, *SMALL_KMAX, "INPUT.CROP_SIZE", [65, 65], "SOLVER.MAX_ITER", 3)
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
    assert "iteration 3 of 3: total_loss" in run.stdout
    assert "Traceback" not in run.stderr
    again = quickstart(output, shapes_cache, "SOLVER.MAXITER", 3)
    assert again.returncode == 1
    assert (output / "results.json").is_file(), "a mistake on the command line loses nothing"
    assert again.stderr.strip().splitlines()[-1] == "error: no option SOLVER.MAXITER - did you mean SOLVER.MAX_ITER?"


@pytest.mark.slow
def test_it_learns_to_segment(tmp_path, shapes_cache):
    run = quickstart(tmp_path / "out", shapes_cache, timeout=1200, OMP_NUM_THREADS=str(num_cores()))
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["PQ"] > 50
    assert results["mIoU"] > 60
