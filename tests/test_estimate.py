"""Counted operations and bytes beside what is counted by hand, and the roofline's times."""

import json
import sys

import pytest
from small import options
from torch import nn

from kmax_d2.engine import load_config
from kmax_d2.errors import UserError
from kmax_d2.tools import analyze, estimate
from kmax_d2.tools.estimate import Device, Kernel, kernels, merging_cost, record

SMALL = {"MODEL__KMAX__NUM_CLASSES": 5}


def recorded(model, network, shape, precision="float32", training=False):
    recorder, saved, _ = record(model, network, {"all": [model]}, shape, precision, training)
    return recorder, saved


def by_way(recorder):
    """For each way of running the names and the bytes of every kernel."""
    return {
        way: [([op.name for op in kernel.ops], kernel.bytes) for kernel in kernels(recorder.ops, recorder.sizes, way)]
        for way in estimate.WAYS
    }


class ConvReLUProduct(nn.Module):
    """(1, 3, 4, 5) to the (8, 8) products of its maps with themselves."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x):
        maps = self.conv(x).relu().flatten(2)[0]
        return maps @ maps.T


def test_operations_and_bytes_counted_by_hand():
    model = ConvReLUProduct()
    recorder, _ = recorded(model, lambda x: [model(x)], (1, 3, 4, 5))
    pixels, weights = 4 * 5, 8 * 3 * 9 + 8
    assert [op.operations for op in recorder.ops] == [2 * 3 * 9 * 8 * pixels, 0, 2 * 8 * 8 * pixels]
    assert {op.stage for op in recorder.ops} == {"all"}
    conv = 4 * (3 * pixels + weights + 8 * pixels)
    relu = 4 * (8 * pixels + 8 * pixels)
    product = 4 * (8 * pixels + 8 * 8)  # one matrix, read from memory once
    apart = [(["convolution"], conv), (["relu"], relu), (["mm"], product)]
    assert by_way(recorder)["compiled"] == apart
    assert by_way(recorder)["fused"] == [(["convolution", "relu"], conv), (["mm"], product)]
    # Each operation on its own reads each of its inputs.
    assert by_way(recorder)["eager"] == apart


def test_bfloat16_halves_the_maps_and_casts_the_weights():
    model = ConvReLUProduct()
    recorder, _ = recorded(model, lambda x: [model(x)], (1, 3, 4, 5), "bfloat16")
    pixels, weights = 4 * 5, 8 * 3 * 9 + 8
    casts = [op for op in recorder.ops if op.name == "_to_copy"]
    moved = sum(size for op in casts for _, size in [*op.reads, *op.writes])
    assert moved == (4 + 2) * (3 * pixels + weights)
    (conv,) = (op for op in recorder.ops if op.name == "convolution")
    assert sum(size for _, size in [*conv.reads, *conv.writes]) == 2 * (3 * pixels + weights + 8 * pixels)
    assert conv.unit == "bfloat16"


@pytest.mark.parametrize(("precision", "unit"), [("float32", "float32"), ("tf32", "tf32"), ("bfloat16", "bfloat16")])
def test_depthwise_convolutions_have_no_tensor_cores(precision, unit):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 5, groups=16)).requires_grad_(False)
    recorder, _ = recorded(model, lambda x: [model(x)], (1, 3, 9, 9), precision)
    assert [op.unit for op in recorder.ops if op.name == "convolution"] == [unit, "float32"]
    assert recorder.ops[-1].operations == 2 * 16 * 25 * 5 * 5


def test_what_only_neighbours_read_never_reaches_memory():
    class Chain(nn.Module):
        def forward(self, x):
            doubled = x * 2
            return doubled.mT.relu().mT + doubled + 1

    recorder, _ = recorded(Chain(), lambda x: [Chain()(x)], (1, 3, 4, 5))
    image = 4 * 3 * 4 * 5
    assert [size for _, size in by_way(recorder)["eager"]] == [2 * image, 2 * image, 3 * image, 2 * image]
    assert by_way(recorder)["compiled"] == [(["mul", "relu", "add", "add"], 2 * image)]


def test_a_kernel_does_not_wait_for_its_own_results():
    """The product needs `doubled`, so that the sum cannot be in the kernel that makes it."""

    class Residual(nn.Module):
        def forward(self, x):
            doubled = x * 2
            product = doubled @ doubled
            return doubled.relu() + product

    recorder, _ = recorded(Residual(), lambda x: [Residual()(x)], (1, 3, 4, 4))
    groups = {way: [names for names, _ in found] for way, found in by_way(recorder).items()}
    assert groups["compiled"] == [["mul", "relu"], ["bmm"], ["add"]]
    assert groups["fused"] == [["mul", "relu"], ["bmm", "add"]]
    image = 4 * 3 * 4 * 4
    # doubled and its ReLU are written; the product reads doubled twice as one value, and the ReLU.
    assert [size for _, size in by_way(recorder)["fused"]] == [3 * image, 3 * image]


def test_times_are_the_longer_of_computing_and_moving():
    device = Device({"float32": 100.0, "tf32": 1000.0}, bandwidth=10.0, multiprocessors=1, clock=1.0)
    op = estimate.Op("all", "mm", (), "product", "float32", 600, [], [])
    assert Kernel([op], 50).seconds(device) == 6.0
    assert Kernel([op._replace(unit="tf32")], 50).seconds(device) == 5.0
    assert Kernel([op], 50).seconds(device, compute=0.5, bandwidth=0.1) == 50.0
    assert Kernel([op], 50).seconds(device, compute=0.1, bandwidth=1.0) == pytest.approx(60.0)


def test_merging_by_its_formula():
    cost = merging_cost((5, 9), (2, 3), 10)
    assert cost.operations == 6 * 10 * 45
    assert cost.instructions == 34.5 * 10 * 45
    assert cost.bytes == 8 * 10 * 6 + 84 * 45
    device = Device({"float32": 2700.0}, bandwidth=10.0, multiprocessors=2, clock=3.0)
    assert cost.seconds(device) == pytest.approx(15525 / (2 * 3 * 128) + 4260 / 10)


def test_backward_of_convolutions_costs_the_forward_once_for_each_gradient():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 5, groups=16))
    recorder, saved = recorded(model, lambda x: [model(x)], (2, 3, 9, 9), training=True)
    first, second = 2 * 2 * 3 * 16 * 81, 2 * 2 * 16 * 25 * 25
    backward = [op.operations for op in recorder.ops if op.stage == "backward" and op.operations]
    assert backward == [2 * second, first]  # images want no gradient
    assert saved == 4 * 2 * (3 * 81 + 16 * 81)  # both inputs; weights are held anyway


@pytest.fixture(scope="module", params=[False, True], ids=["inference", "training"])
def result(request):
    cfg = load_config("", options(**SMALL))
    return estimate.estimate(cfg, (65, 97), batch_size=2, training=request.param)


def test_operations_are_those_that_analyze_counts(result):
    parts = analyze.analyze(load_config("", options(**SMALL)), (65, 97))["parts"]
    expected = {name: 2 * 2 * part["flops"] for name, part in parts.items()}
    queries, channels, classes = 12, 16, 6
    # What analyze counts as a product for each decoder, of which two are on a map of each stride, is a sum by index.
    places = 2 * (3 * 4 + 5 * 7 + 9 * 13)
    expected["kmax_decoders"] -= 2 * 2 * queries * channels * places
    if result["training"]:  # the decoders' own classes
        expected["kmax_decoders"] += 2 * 2 * queries * channels * classes * 6
    assert {name: result["stages"][name]["operations"] for name in parts} == expected


def test_stages_are_all_there_is(result):
    for way in estimate.WAYS:
        for unit in ("kernels", "bytes", "seconds", "tuned_seconds"):
            stages = sum(stage[way][unit] for stage in result["stages"].values())
            assert stages == pytest.approx(result["total"][way][unit])
    assert ("semantic_head" in result["stages"]) == ("memory" in result) == result["training"]
    total = result["total"]
    assert total["eager"]["bytes"] > total["compiled"]["bytes"] > total["fused"]["bytes"]
    assert result["launch_seconds"] == 5e-6 * total["eager"]["kernels"]
    assert total["fused"]["images_per_second"] == 2 / total["fused"]["seconds"]


def test_devices_differ_in_bandwidth_alone():
    h100, h200 = estimate.DEVICES["h100"], estimate.DEVICES["h200"]
    op = estimate.Op("all", "mm", (), "product", "bfloat16", 989 * 10**9, [], [])
    assert Kernel([op], 0).seconds(h100) == Kernel([op], 0).seconds(h200) == pytest.approx(1e-3)
    assert Kernel([op], 10**10).seconds(h100) / Kernel([op], 10**10).seconds(h200) == pytest.approx(4.8 / 3.35)


def test_command_line(monkeypatch, capsys):
    command = ["estimate", "--config-file", "coco/r50_tiny", "--size", "65", "97", "--top", "2", "--precision", "tf32"]
    monkeypatch.setattr(sys, "argv", [*command, "--device-kind", "h200", "--json"])
    estimate.main()
    result = json.loads(capsys.readouterr().out)
    wishes = {"config": "coco/r50_tiny", "size": [65, 97], "precision": "tf32", "device_kind": "h200"}
    assert wishes.items() <= result.items()
    assert [len(rows) for rows in result["largest"].values()] == [2, 2, 2]
    first, second = result["largest"]["eager"]
    assert first["bytes"] >= second["bytes"]


def test_tables(result, capsys):
    estimate.show("small", result)
    lines = capsys.readouterr().out.splitlines()
    kind = "training step" if result["training"] else "inference"
    assert lines[0] == f"small, {kind}, 2 × 65×97, bfloat16 on h100"
    stages = [line.split("|")[1].strip() for line in lines[3 : 4 + len(result["stages"])]]
    assert stages == [name.replace("_", " ") for name in [*result["stages"], "total"]]
    assert any(line.startswith("memory:") for line in lines) == result["training"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_kind": "h10"}, r"no data sheet of h10, but of h100, h200 - did you mean h100\?"),
        ({"precision": "bfloat15"}, r"bfloat15.*did you mean bfloat16\?"),
        ({"batch_size": 0}, "a batch of 0 images"),
        ({"size": (0, 65)}, "0×65"),
        ({"size": (65, 255 * 16 + 1)}, "axial attention reaches 255 positions"),
    ],
)
def test_impossible_wishes(arguments, message):
    with pytest.raises(UserError, match=message):
        estimate.estimate(load_config("", options(**SMALL)), **({"size": (65, 65)} | arguments))
