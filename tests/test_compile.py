"""A compiled model against the plain one: results, losses, gradients and statistics, at sizes that vary."""

import copy
import os
import subprocess
import sys

import programs
import pytest
import torch
from detectron2.modeling import build_model
from small import options, randomize_norms
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import MarkStepBox

from kmax_d2.engine import load_config
from kmax_d2.engine.setup import choose_device
from kmax_d2.errors import UserError
from kmax_d2.speed import compile_model, fold_batch_norms
from kmax_d2.tools.made_up import made_up_segments

SIZES = [(65, 65), (65, 97), (129, 97)]
CLASSES = 5
# One decoder of each kind is enough, and nothing is dropped at random, which compiled code draws in its own way.
TINY = {
    "MODEL__KMAX__NUM_CLASSES": CLASSES,
    "MODEL__KMAX__TRANSFORMER_DECODER__DECODERS": [1, 1],
    "MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH": 0.0,
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def model():
    cfg = load_config("", options(**TINY))
    choose_device(cfg)
    model = randomize_norms(build_model(cfg))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def picture(size):
    return torch.arange(3 * size[0] * size[1]).view(3, *size) % 251


def assert_near(ours, theirs, tolerance):
    """Every tensor to `tolerance` of its largest value; gradients that are zero but for rounding stay so."""
    assert set(ours) == set(theirs)
    theirs = {name: value.double() for name, value in theirs.items() if value.numel()}
    largest = {name: value.abs().max().item() for name, value in theirs.items()}
    errors = {name: (ours[name].double() - value).abs().max().item() for name, value in theirs.items()}
    assert {name: error for name, error in errors.items() if not error <= tolerance * (largest[name] + 0.1)} == {}


def check_inference(model, backend, tolerance, sizes=SIZES):
    """Yields after each size."""
    plain = fold_batch_norms(model)
    compiled = compile_model(copy.deepcopy(plain), "default", backend=backend)
    for size in sizes:
        assert_near(compiled.predict(picture(size)[None]), plain.predict(picture(size)[None]), tolerance)
        assert not counters["graph_break"]
        yield size


def step(model, size):
    """Losses, gradients and buffers of one training step."""
    torch.manual_seed(1)
    ids, classes = made_up_segments(size, CLASSES)
    losses = model([{"image": picture(size), "segment_ids": ids, "segment_classes": classes}] * 2)
    model.zero_grad()
    sum(losses.values()).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return losses, grads, {name: value.clone() for name, value in model.named_buffers()}


def check_training(model, sizes, backend, tolerance):
    plain, compiled = copy.deepcopy(model).train(), compile_model(model.train(), "default", backend=backend)
    for size in sizes:
        for ours, theirs in zip(step(compiled, size), step(plain, size), strict=True):
            assert_near(ours, theirs, tolerance)
    assert not counters["graph_break"]
    norms = [value for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert norms
    assert all(value == len(sizes) for value in norms)


def test_traced_training(model):
    """As autograd's own tracer sees it, which turns the update of the running statistics into outputs."""
    check_training(model, SIZES[:1], "aot_eager", 1e-4)


@pytest.mark.slow
def test_compiled_inference(model):
    assert list(check_inference(model, "inductor", 1e-4)) == SIZES


@pytest.mark.slow
def test_compiled_training(model):
    check_training(model, SIZES[:2], "inductor", 1e-3)


def test_traced_inference_at_many_sizes(model):
    """Compiled once for the first size, and no more than once for each side that turns out to vary."""
    backend = CompileCounterWithBackend("eager")
    sizes = [*SIZES, (97, 129), (129, 161)]
    counts = [backend.frame_count for _ in check_inference(model, backend, 0.0, sizes)]
    parts = 3
    assert counts[0] == 1 + parts  # the trial is one
    assert counts[2] <= 1 + 3 * parts
    assert counts[3:] == [counts[2]] * 2


def test_names_stay(model):
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    assert compile_model(model, "reduce-overhead", backend="eager") is model
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds


def test_one_step_for_all_parts(model):
    """CUDA graphs may write over the memory of the step before, so that a step must not begin between two parts."""
    compiled = compile_model(fold_batch_norms(model), "reduce-overhead", backend="eager")
    before = MarkStepBox.mark_step_counter
    compiled([{"image": picture((65, 65))}])
    assert MarkStepBox.mark_step_counter == before - 1  # it counts downwards


def test_nothing_is_asked_for(model):
    compile_model(model, "", backend="no such backend")
    assert counters == {}


def test_no_such_mode(model):
    for refuse in (
        lambda: compile_model(model, "reduce-overheads"),
        lambda: load_config("", ["MODEL.KMAX.COMPILE", "reduce-overheads"]),
    ):
        with pytest.raises(UserError, match=r"MODEL.KMAX.COMPILE is reduce-overheads.*did you mean reduce-overhead\?"):
            refuse()


@pytest.mark.slow
def test_no_compiler(tmp_path):
    """One line in place of the long traceback of the first batch."""
    command = [sys.executable, "-m", "kmax_d2.tools.benchmark", "inference", "--config-file", "shapes/quickstart"]
    command += ["--device", "cpu", "--compile", "--no-memory"]
    environment = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=programs.ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: torch.compile does not work here (")
    assert "C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr
