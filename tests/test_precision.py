"""Inference in each precision."""

from pathlib import Path

import programs
import pytest
import scenes
import torch
from detectron2.modeling import build_model
from small import options
from torch import nn

import kmax_d2
from kmax_d2.data.datasets import shapes
from kmax_d2.engine import Trainer, load_config, ready_config
from kmax_d2.errors import UserError
from kmax_d2.speed import fold_batch_norms, use_precision
from kmax_d2.tools import pseudo_label

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
    return fold_batch_norms(scenes.build_model(seed=0))


def predicted(model, precision):
    with use_precision(precision, "cpu"):
        return model.predict(scenes.picture(65, 97)[None])


def test_bfloat16_is_near_float32(small_model):
    exact, near = predicted(small_model, "float32"), predicted(small_model, "bfloat16")
    for name, values in exact.items():
        assert near[name].dtype == torch.float32
        error = (near[name] - values).norm() / values.norm()
        assert 0 < error < 0.15, name
    for name, values in predicted(small_model, "tf32").items():  # which a CPU does not know
        assert torch.equal(values, exact[name])


def test_merging_stays_in_float32(small_model):
    prediction = predicted(small_model, "float32")
    logits = prediction["class_logits"][0], prediction["mask_logits"][0]
    expected = small_model.merging(*logits, (65, 97))
    with use_precision("bfloat16", "cpu"):
        merged = small_model.merging(*logits, (65, 97))
    assert torch.equal(merged.best_probability, expected.best_probability)
    assert torch.equal(merged.segment_ids, expected.segment_ids)
    assert torch.equal(merged.query_score, expected.query_score)


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
        cfg = ready_config("shapes/quickstart", quickstart_options(own_data, tmp_path, *wanted))
        model = build_model(cfg).eval()
        model.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(maps["stage5"].dtype))
        Trainer.test(cfg, model)
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3


MISSPELT = ["MODEL.KMAX.TEST.PRECISION", "bf16"]


def test_misspelt_precision(own_data, tmp_path):
    """Said before evaluation, training, and pseudo-labels begin."""
    with pytest.raises(UserError, match=r"is bf16, but must be one of float32, tf32, bfloat16"):
        Trainer.test(load_config("", MISSPELT), nn.Identity())
    with pytest.raises(UserError, match="is bf16"):
        Trainer(load_config("", [*options(), *MISSPELT]))
    command = ["--config-file", "shapes/quickstart", "--weights", WEIGHTS, "--input", own_data[0]]
    with pytest.raises(UserError, match="is bf16"):
        pseudo_label.main([*command, "--output", str(tmp_path), *MISSPELT])
    assert not any(tmp_path.iterdir())


def test_demo_in_bfloat16(own_data, tmp_path):
    demo = programs.load(programs.DEMO)
    command = ["--config-file", "shapes/quickstart", "--weights", WEIGHTS, "--assignments", "--input", own_data[0]]
    command += ["--output", str(tmp_path), "--opts", "MODEL.DEVICE", "cpu"]
    with pytest.raises(UserError, match="is bf16"):
        demo.main([*command, *MISSPELT])
    demo.main([*command, "MODEL.KMAX.TEST.PRECISION", "bfloat16"])
    assert len(list(tmp_path.glob("*.png"))) == 2 * 3
