"""The benchmark's rows, its made-up prediction, and its command line."""

import json
import multiprocessing
import sys

import pytest
import torch

from kmax_d2.errors import UserError
from kmax_d2.modeling.axial_attention import AxialAttention1D
from kmax_d2.modeling.merging import MaskWiseMerging
from kmax_d2.tools import benchmark
from kmax_d2.tools.made_up import MadeUpMerging, made_up_prediction

LINE = ["--config-file", "shapes/quickstart", "--size", "65", "97", "--device", "cpu", "--threads", "1"]
LINE += ["--repeats", "2", "--no-memory", "--json"]
AXIAL = "pixel_decoder.axial_attention"


def rows(capsys, *argv):
    benchmark.main([*argv, *LINE])
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize(
    ("mode", "stages"),
    [
        ("inference", {"backbone", "pixel_decoder", "kmax_decoders", "final_predictor", "merging", AXIAL}),
        ("training", {"backbone", "pixel_decoder", "kmax_decoders", "semantic_head", "losses", "backward"}),
        ("merging", set()),
    ],
)
def test_rows(capsys, mode, stages):
    found = rows(capsys, mode)
    assert set(found) == stages | {"ResNet-50 body", "total"}
    for row in found.values():
        assert list(row) == ["name", "seconds", "spread", "baseline_seconds", "ratio", "peak_bytes"]
        assert row["baseline_seconds"] == found["ResNet-50 body"]["seconds"] > 0
        assert row["ratio"] == pytest.approx(row["seconds"] / row["baseline_seconds"])
        assert row["peak_bytes"] is None
    assert all(found[name]["seconds"] > 0 for name in stages - {"backward", "kmax_decoders"} | {"total"})


def test_stages_repeat_what_the_model_computes():
    """Each with the inputs, the precision, and so the results that it has in a whole run."""
    args = benchmark.PARSER.parse(["inference", *LINE, "--precision", "bfloat16"])
    benchmark.prepare(args)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, _, out: seen.append((module, out)))
    try:
        task = benchmark.build_task(args, stages=True)
        first, seen[:] = [pair for pair in seen if isinstance(pair[0], AxialAttention1D)], []
        task[AXIAL]()
    finally:
        hook.remove()
    again = [pair for pair in seen if isinstance(pair[0], AxialAttention1D)]
    assert len(again) == len(first) > 0
    for (module, out), (same, expected) in zip(again, first, strict=True):
        assert module is same
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected)


def test_training_takes_checkpointing_from_the_config(monkeypatch):
    """Then each block computes its activations a second time in the backward pass."""
    monkeypatch.setattr("kmax_d2.speed.checkpoint.SMALLEST", 0)
    passes = []
    for words in ([], ["MODEL.KMAX.CHECKPOINT_BLOCKS", "True"]):
        args = benchmark.PARSER.parse(["training", *LINE, *words])
        task, seen = benchmark.build_task(args, stages=False), []
        hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_, to=seen: to.append(type(module)))
        task["total"]()
        hook.remove()
        passes.append(seen.count(AxialAttention1D))
    assert passes[1] == 2 * passes[0] > 0


def test_made_up_prediction_is_a_dozen_confident_masks():
    class_logits, mask_logits = made_up_prediction((20, 6), (20, 17, 25), torch.device("cpu"))
    confident = class_logits.softmax(1)[:, :-1].amax(1) > 0.9
    assert confident.sum() == 12
    owner = mask_logits.softmax(0)
    assert (owner.amax(0) > 0.9).float().mean() > 0.9
    assert set(owner.argmax(0).unique().tolist()) == set(confident.nonzero()[:, 0].tolist())


def test_merging_gets_the_made_up_prediction():
    got = []

    class Recorder(MaskWiseMerging):
        def __call__(self, *inputs):
            got.append(inputs)

    merging = MadeUpMerging(Recorder([True] * 5))
    for _ in range(2):
        merging(torch.zeros(20, 6), torch.zeros(20, 17, 25), (65, 97))
    assert got[0][2] == (65, 97)
    assert got[0][0].shape == (20, 6) and got[0][1].shape == (20, 17, 25)
    assert all(torch.equal(first, second) for first, second in zip(got[0][:2], got[1][:2], strict=True))
    assert (got[0][0].softmax(1)[:, :-1] > 0.9).any()


def _allocate(args, stages):
    """At module level, as a fresh process needs it."""
    return {"total": lambda: torch.ones(100, 2**18)}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no getrusage")
def test_peak_is_that_of_the_task_alone():
    args = benchmark.PARSER.parse(["inference", *LINE])
    ballast = torch.ones(300, 2**18)  # in this process, which must not count
    with multiprocessing.get_context("forkserver").Pool(1) as fresh_process:
        peak = fresh_process.apply(benchmark.peak_bytes, (_allocate, args))
    assert peak == pytest.approx(100 * 2**20, rel=0.2)
    assert ballast[0, 0] == 1


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ([], ""),
        (["--compile"], "default"),
        (["--compile", "max-autotune"], "max-autotune"),
        (["MODEL.KMAX.COMPILE", "default"], "default"),
    ],
)
def test_compile(words, mode):
    args = benchmark.PARSER.parse(["inference", *LINE, *words])
    assert benchmark.prepare(args).MODEL.KMAX.COMPILE == ""  # not before the stages' inputs are known
    assert args.compile == mode


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "--threads is 0, but must be"),
        (["--batch-size", "0"], "--batch-size is 0, but must be"),
        (["--precision", "bfloat15"], r"is bfloat15.*did you mean bfloat16\?"),
        (["--compile", "defualt"], r"is defualt.*did you mean default\?"),
    ],
)
def test_bad_arguments(words, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(["inference", *LINE, *words])
