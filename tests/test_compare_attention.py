"""The comparison of cross-attentions as a user runs it, shortened."""

import json

import programs
from detectron2.data import DatasetCatalog
from PIL import Image
from small import SMALL_KMAX

from kmax_d2.engine import load_config
from kmax_d2.tools.compare_attention import draw, make_config


def test_it_trains_both_draws_and_does_nothing_twice(tmp_path, shapes_cache):
    command = ["-m", "kmax_d2.tools.compare_attention", "--output", tmp_path, "--seeds", 1, *SMALL_KMAX]
    command += ["INPUT.CROP_SIZE", [65, 65], "SOLVER.MAX_ITER", 5, "TEST.EVAL_PERIOD", 2]
    first = programs.run(*command, KMAX_D2_CACHE=str(shapes_cache))
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {label: [list(curve) for curve in runs] for label, runs in results.items()} == {
        "k-means": [["2", "4", "5"]],
        "spatial softmax": [["2", "4", "5"]],
    }
    assert "iteration 5 of 5: total_loss" in first.stdout
    (tmp_path / "results.json").unlink()
    second = programs.run(*command, KMAX_D2_CACHE=str(shapes_cache))
    assert second.returncode == 0, second.stderr
    assert "iteration 5 of 5" not in second.stdout
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_the_variants_differ_in_the_attention_alone(tmp_path):
    kmeans = make_config("KMeansCrossAttention", 3, tmp_path, [])
    softmax = make_config("SoftmaxCrossAttention", 3, tmp_path, [])
    assert kmeans.SEED == softmax.SEED == 3
    assert kmeans.MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION == "KMeansCrossAttention"
    assert softmax.MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION == "SoftmaxCrossAttention"
    for cfg in (kmeans, softmax):
        cfg.defrost()
        cfg.MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION = ""
    assert kmeans == softmax
    quickstart = load_config("shapes/quickstart")
    assert kmeans.MODEL.KMAX.RESNET == quickstart.MODEL.KMAX.RESNET
    assert kmeans.SOLVER.BASE_LR == quickstart.SOLVER.BASE_LR
    assert all(name in DatasetCatalog for name in kmeans.DATASETS.TEST)


def test_drawing(tmp_path):
    draw({"a": [{1: 10.0, 2: 20.0}, {1: 20.0, 2: 40.0}], "b": [{1: 5.0, 2: 6.0}, {1: 5.0, 2: 6.0}]}, tmp_path / "x.png")
    picture = Image.open(tmp_path / "x.png").convert("RGB")
    colors = {color for _, color in picture.getcolors(maxcolors=2**24)}
    assert picture.width > 600
    assert {(31, 119, 180), (255, 127, 14)} <= colors  # a line of each variant
