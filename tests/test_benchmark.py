"""The benchmark's rows, its made-up prediction and its command line."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from kmax_d2.data.datasets import shapes
from kmax_d2.errors import UserError
from kmax_d2.tools.benchmark import (
    Stopwatch,
    _with_rest,
    argument_parser,
    benchmark,
    made_up_prediction,
    peak_bytes,
    plot,
    prepare,
)


def run(mode, *more):
    line = [mode, "--config-file", "shapes/quickstart", "--size", "65", "97", "--device", "cpu", "--threads", "1"]
    line += ["--repeats", "2", "--no-memory", *more]
    args = argument_parser().parse_intermixed_args(line)
    return {row.name: row for row in benchmark(prepare(args), args)}


AXIAL = "pixel_decoder.axial_attention"


@pytest.mark.parametrize(
    ("mode", "stages"),
    [
        ("inference", {"backbone", "pixel_decoder", "kmax_decoders", "final_predictor", "merging", AXIAL}),
        ("training", {"backbone", "pixel_decoder", "kmax_decoders", "semantic_head", "losses", "backward"}),
        ("merging", set()),
    ],
)
def test_rows(mode, stages):
    rows = run(mode)
    assert set(rows) == stages | {"ResNet-50 body", "total"}
    for row in rows.values():
        assert row.seconds > 0
        assert row.ratio == pytest.approx(row.seconds / rows["ResNet-50 body"].seconds)
    parts = sum(rows[name].seconds for name in stages - {AXIAL})
    assert parts <= 1.3 * rows["total"].seconds
    if mode == "inference":
        assert parts == pytest.approx(rows["total"].seconds, rel=0.3)
        assert rows[AXIAL].seconds < rows["pixel_decoder"].seconds


def test_mapper_against_detectron2s():
    assert set(run("mapper")) == {"plain Detectron2 mapper", "total"}


def test_mapper_of_own_data(tmp_path):
    shapes.write_split(tmp_path, "val", 2, 5)
    data = [str(tmp_path / name) for name in ("val", "panoptic_val", "panoptic_val.json")]
    line = ["mapper", "--config-file", "coco/r50", "--size", "65", "97", "--device", "cpu", "--threads", "1"]
    args = argument_parser().parse_intermixed_args([*line, "--repeats", "2", "--train-data", *data])
    rows = benchmark(prepare(args), args)
    assert [row.name for row in rows] == ["plain Detectron2 mapper", "total"]
    assert all(row.peak_bytes > 0 for row in rows)


def test_bfloat16():
    assert run("inference", "--precision", "bfloat16")["total"].seconds > 0


def test_made_up_prediction_is_a_dozen_confident_masks():
    shapes = torch.Size((1, 20, 6)), torch.Size((1, 20, 17, 25))
    class_logits, mask_logits = made_up_prediction(*shapes, torch.device("cpu"))
    says_something = class_logits[0].softmax(1)[:, :-1].amax(1) > 0.9
    assert says_something.sum() == 12
    owners = mask_logits[0].softmax(0).amax(0)
    assert (owners > 0.9).float().mean() > 0.9


class _Task:
    """A module-level builder, as a fresh process needs it."""

    def __init__(self, megabytes):
        self.megabytes = megabytes

    def __call__(self, cfg, args, watch):
        return lambda: torch.ones(self.megabytes, 2**18)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_peak_is_that_of_the_task_alone():
    args = argument_parser().parse_intermixed_args(["inference", "--config-file", "", "--device", "cpu"])
    ballast = torch.ones(300, 2**18)  # in this process, which must not count
    assert peak_bytes(_Task(100), None, args) == pytest.approx(100 * 2**20, rel=0.2)
    assert ballast[0, 0] == 1


def test_stopwatch_adds_up_what_runs_twice():
    watch = Stopwatch("cpu")
    twice = watch.timed("stage", lambda: sum(range(10000)))
    twice()
    once = watch.read()["stage"]
    twice(), twice()
    assert once > 0
    assert watch.read()["stage"] > once
    assert watch.read() == {}


def test_json():
    command = [sys.executable, "-m", "kmax_d2.tools.benchmark", "merging", "--config-file", "shapes/quickstart"]
    command += ["--size", "65", "65", "--device", "cpu", "--json", "--no-memory", "--repeats", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert set(rows[0]) == {"name", "seconds", "spread", "yardstick_seconds", "ratio", "peak_bytes"}


def test_stages_add_up():
    """Exactly; a stage within another one, which its name tells, counts once."""
    seconds = {"backbone": 3.0, "backbone.axial_attention": 1.0, "pixel_decoder": 2.0, AXIAL: 0.5}
    seconds |= {"transformer_decoder": 1.5, "final_predictor": 0.25, "total": 7.0, "ResNet-50 body": 2.0}
    parts = _with_rest(seconds, "inference")
    assert parts["kmax_decoders"] == 1.25
    assert parts["merging"] == 0.5
    stages = {name: value for name, value in parts.items() if name not in ("total", "ResNet-50 body")}
    assert sum(value for name, value in stages.items() if "." not in name) == parts["total"]


@pytest.mark.parametrize(
    ("words", "mode"), [([], ""), (["--compile"], "default"), (["--compile", "max-autotune"], "max-autotune")]
)
def test_compile(words, mode):
    line = ["inference", "--config-file", "shapes/quickstart", "--device", "cpu", *words]
    option = prepare(argument_parser().parse_intermixed_args(line)).MODEL.KMAX.COMPILE
    assert option == mode


def test_plot(tmp_path, capsys):
    """Every point is told of as it is measured, and the picture has its panels."""
    line = ["inference", "--config-file", "shapes/quickstart", "--device", "cpu", "--threads", "1", "--repeats", "1"]
    line += ["--size", "33", "33", "--sides", "33", "65", "--queries", "4", "8", "16", "--no-memory"]
    args = argument_parser().parse_intermixed_args([*line, "--plot", str(tmp_path / "growth.png")])
    plot(prepare(args), args)
    told = capsys.readouterr().err.splitlines()
    assert [text.partition(":")[0] for text in told] == [
        "sides 33, 1 of 2",
        "sides 65, 2 of 2",
        "queries 4, 1 of 3",
        "queries 8, 2 of 3",
        "queries 16, 3 of 3",
    ]
    with Image.open(args.plot) as picture:
        assert picture.width > 2 * picture.height  # three panels beside each other


def test_no_threads_at_all():
    args = argument_parser().parse_intermixed_args(["inference", "--config-file", "shapes/quickstart"])
    args.threads = 0
    with pytest.raises(UserError, match="at least 1"):
        prepare(args)
