"""Inference in each precision, TF32 emulated by its definition, and the comparison of their quality."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from small import options, randomize_norms
from torch import nn

import kmax_d2
from kmax_d2.data.datasets import shapes
from kmax_d2.engine import Trainer, load_config
from kmax_d2.engine.precision import use_precision
from kmax_d2.errors import UserError
from kmax_d2.modeling.fold import fold_batch_norms
from kmax_d2.tools import compare_precision, pseudo_label
from kmax_d2.tools.compare_precision import EmulatedTF32, TF32Products, round_to_tf32

ROOT = Path(__file__).parents[1]
WEIGHTS = str(Path(kmax_d2.__file__).parent / "assets" / "quickstart.pth")


BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn)


@pytest.fixture(params=[(False, True), (True, False)])
def allowed_before(request):
    """What PyTorch's two switches for TF32 are set to during the test."""
    own = [backend.allow_tf32 for backend in BACKENDS]
    for backend, allowed in zip(BACKENDS, request.param, strict=True):
        backend.allow_tf32 = allowed
    yield request.param
    for backend, allowed in zip(BACKENDS, own, strict=True):
        backend.allow_tf32 = allowed


def state():
    """The two switches, and the type of a product."""
    return (*(backend.allow_tf32 for backend in BACKENDS), (torch.ones(1, 1) @ torch.ones(1, 1)).dtype)


@pytest.mark.parametrize(
    ("precision", "inside"),
    [
        ("float32", (False, False, torch.float32)),
        ("tf32", (True, True, torch.float32)),
        ("bfloat16", (False, False, torch.bfloat16)),
    ],
)
def test_switches_are_set_inside_and_as_before_afterwards(precision, inside, allowed_before):
    with use_precision(precision, "cpu"):
        assert state() == inside
    assert state() == (*allowed_before, torch.float32)
    with pytest.raises(KeyError), use_precision(precision, "cpu"):
        raise KeyError
    assert state() == (*allowed_before, torch.float32)


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    model = build_model(load_config("", options(MODEL__KMAX__NUM_CLASSES=5)))
    return fold_batch_norms(randomize_norms(model).eval())


def predicted(model, precision):
    image = torch.arange(3 * 65 * 97).view(1, 3, 65, 97) % 251
    with use_precision(precision, "cpu"):
        return model.predict(image)


def test_bfloat16_is_near_float32(small_model):
    exact, near = predicted(small_model, "float32"), predicted(small_model, "bfloat16")
    for name, values in exact.items():
        assert near[name].dtype == torch.float32
        error = (near[name] - values).abs().max() / values.abs().max()
        assert 0 < error < 0.15, name
    for name, values in predicted(small_model, "tf32").items():  # which a CPU does not know
        assert torch.equal(values, exact[name])


def test_merging_stays_in_float32(small_model):
    prediction = predicted(small_model, "float32")
    logits = prediction["class_logits"][0], prediction["mask_logits"][0]
    expected = small_model.merging(*logits, (65, 97))
    with use_precision("bfloat16", "cpu"):
        merged = small_model.merging(*logits, (65, 97))
    assert torch.equal(merged.top_two.probability, expected.top_two.probability)
    assert torch.equal(merged.segment_ids, expected.segment_ids)
    assert torch.equal(merged.query_score, expected.query_score)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1 + 2**-10, 1 + 2**-10),  # the last bit of ten
        (1 + 2**-11, 1.0),  # halfway: to the even neighbour
        (1 + 3 * 2**-11, 1 + 2**-9),
        (1 + 2**-11 + 2**-23, 1 + 2**-10),  # just more than half
        (1 + 2**-11 - 2**-23, 1.0),
        (2 - 2**-23, 2.0),  # into the next power of two
        (3.0, 3.0),
        (0.0, 0.0),
        (2.0**-126, 2.0**-126),
        (3.4028234663852886e38, math.inf),
        (math.inf, math.inf),
    ],
)
def test_rounding_to_tf32(value, rounded):
    both = torch.tensor([value, -value])
    assert round_to_tf32(both).tolist() == [rounded, -rounded]


def test_rounding_leaves_what_is_no_float32():
    assert round_to_tf32(torch.tensor([math.nan])).isnan().all()
    bits = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN of nothing but ones
    assert round_to_tf32(bits[None]).isnan().all()
    double = torch.tensor([1 + 2**-11], dtype=torch.float64)
    assert torch.equal(round_to_tf32(double), double)


def test_rounding_is_the_nearest_of_ten_bits():
    x = torch.randn(1000, dtype=torch.float32) * 2.0 ** torch.randint(-20, 20, (1000,))
    fraction, exponent = x.double().frexp()
    expected = torch.ldexp((fraction * 2**11).round(), exponent - 11)
    assert torch.equal(round_to_tf32(x).double(), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_have_rounded_factors_and_exact_sums(mode):
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    image, kernel, shift = torch.randn(2, 3, 7, 7), torch.randn(4, 3, 3, 3), torch.randn(4)
    batch = torch.randn(2, 6, 4)
    r = round_to_tf32
    with mode():
        with TF32Products():
            found = [
                F.linear(x, weight, bias),
                F.linear(x, weight),
                F.conv2d(image, kernel, shift, padding=1),
                x @ batch,
                torch.baddbmm(bias[:4], x.expand(2, 4, 6), batch),
                x + 1,
            ]
        expected = [
            F.linear(r(x), r(weight), bias),
            F.linear(r(x), r(weight)),
            F.conv2d(r(image), r(kernel), shift, padding=1),
            r(x) @ r(batch),
            torch.baddbmm(bias[:4], r(x).expand(2, 4, 6), r(batch)),
            x + 1,
        ]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (found[0] - (x @ weight.T + bias)).abs().max() > 1e-4  # and so not float32's own


def test_a_whole_model_in_emulated_tf32(small_model):
    exact = predicted(small_model, "float32")
    with TF32Products():
        near = predicted(small_model, "float32")
    halves = predicted(small_model, "bfloat16")
    for name, values in exact.items():
        error, error_of_bfloat16 = (
            (other[name] - values).abs().mean() / values.abs().max() for other in (near, halves)
        )
        assert 0 < error < 0.5 * error_of_bfloat16, name


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    shapes.write_split(folder, "val", 3, 4)
    return [str(folder / "val"), str(folder / "panoptic_val"), str(folder / "panoptic_val.json")]


def quickstart_options(own_data, output, *more):
    return [
        *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", WEIGHTS, "OUTPUT_DIR", str(output), "DATALOADER.NUM_WORKERS", "0"),
        *("DATASETS.OWN_TEST", str(own_data), "DATASETS.TRAIN", "()", *more),
    ]


def test_evaluation_reads_the_option(own_data, tmp_path):
    seen = []
    for precision in ("float32", "bfloat16"):
        wanted = ["MODEL.KMAX.TEST.PRECISION", precision]
        cfg = compare_precision.setup("shapes/quickstart", quickstart_options(own_data, tmp_path, *wanted))
        model = build_model(cfg).eval()
        model.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(maps["stage5"].dtype))
        Trainer.test(cfg, model)
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3


def test_comparison_of_a_trained_model(own_data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    opts = quickstart_options(own_data, output)
    monkeypatch.setattr(sys, "argv", ["compare_precision", "--config-file", "shapes/quickstart", *opts])
    compare_precision.main()
    lines = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| precision"))
    assert lines[start - 1].endswith(f"{WEIGHTS} on cpu")
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start : start + 5])
    assert header[:4] == ["precision", "PQ", "AP", "mIoU"]
    assert [row[0] for row in rows] == ["float32", "tf32 (emulated)", "bfloat16"]
    results = [list(map(float, row[1:])) for row in rows]
    for values in results:
        assert values[0] > 20  # the model finds things
        for value, exact, difference in zip(values[:3], results[0], values[3:], strict=False):
            assert difference == pytest.approx(value - exact, abs=2e-3)
    assert results[2][:3] != results[0][:3]

    cfg = compare_precision.setup("shapes/quickstart", opts)
    model = build_model(cfg).eval()
    kmax_d2.checkpoint.load_weights(model, WEIGHTS)
    alone = Trainer.test(cfg, EmulatedTF32(fold_batch_norms(model)).eval())
    assert alone["panoptic_seg"]["PQ"] == pytest.approx(results[1][0], abs=1e-3)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS FILE"),
        (["MODEL.KMAX.TEST.SAVE_PREDICTIONS", "there"], "overwrite"),
        (["DATASETS.TEST", "()"], "nothing to evaluate on"),
    ],
)
def test_nothing_to_compare(opts, message):
    with pytest.raises(UserError, match=message):
        compare_precision.setup("shapes/quickstart", ["MODEL.WEIGHTS", WEIGHTS, *opts])


MISSPELT = ["MODEL.KMAX.TEST.PRECISION", "bf16"]


def test_misspelt_precision_before_evaluation_and_training():
    with pytest.raises(UserError, match=r"is bf16, but there are float32, tf32 and bfloat16"):
        Trainer.test(load_config("", MISSPELT), nn.Identity())
    with pytest.raises(UserError, match="is bf16"):
        Trainer(load_config("", [*options(), *MISSPELT]))


def test_misspelt_precision_in_pseudo_labels(own_data, tmp_path):
    command = ["--config-file", "shapes/quickstart", "--weights", WEIGHTS, "--input", own_data[0]]
    with pytest.raises(UserError, match="is bf16"):
        pseudo_label.main([*command, "--output", str(tmp_path), *MISSPELT])
    assert not any(tmp_path.iterdir())


def test_demo_in_bfloat16(own_data, tmp_path):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "demo" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    command = ["--config-file", "shapes/quickstart", "--weights", WEIGHTS, "--assignments", "--input", own_data[0]]
    command += ["--output", str(tmp_path), "--opts", "MODEL.DEVICE", "cpu"]
    with pytest.raises(UserError, match="is bf16"):
        demo.main([*command, *MISSPELT])
    demo.main([*command, "MODEL.KMAX.TEST.PRECISION", "bfloat16"])
    assert len(list(tmp_path.glob("*.png"))) == 2 * 3
