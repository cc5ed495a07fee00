"""How fast a model can be on a GPU that is not at hand, from counted operations and bytes: the roofline.

`python -m kmax_d2.tools.estimate --config-file coco/r50 [--size HEIGHT WIDTH] [--batch-size 1] [--device-kind h100]
[--precision bfloat16] [--training] [--top 10] [--json] [NAME VALUE ...]`

Nothing is computed, only the shapes are followed. Every kernel takes the longer of two times: the operations of its
products (two for a multiply-add) at the peak of their number format, and the bytes that it reads and writes at the
bandwidth of the memory. The k-means update is a sum by index, and so no product as in :mod:`~kmax_d2.tools.analyze`.
Three ways of running are told apart:

- eager: every operation of PyTorch is a kernel. Views cost nothing.
- compiled: neighbouring operations other than products share a kernel. What only they read never reaches memory. So
  does torch.compile, which leaves convolutions and matrix products to libraries.
- fused: they are part of the product before them too. This is the floor for the model as it is.

The estimate is no promise. It leaves out the sharing of the cache between kernels, which makes them faster, and the
libraries' choice of kernels, layouts and tiles, which makes them slower; so a second column has the shares of the two
peaks that well tuned kernels may reach. The time that a host takes to launch the eager kernels is told beside it.
Reading, decoding and resizing of images, and Detectron2's results at the original size, are left out.

Inference is of the folded model under `no_grad`, as in evaluation. bfloat16 is autocast for the CPU, since PyTorch has
the GPU's only where there is one; it differs in softmax and layer norm, which stay in bfloat16 here. Merging is one
kernel by formula, in every way of running: see :func:`merging_cost`. Training is forward and backward from the sum of
all outputs, the semantic head's too, without losses, matching and the optimizer. Its batch norms read their input once
here, and need all of it before they give anything, so that none joins the product before it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..engine import load_config
from ..engine.precision import PRECISIONS, require_precision, use_precision
from ..errors import UserError, did_you_mean, exit_on_user_error
from ..modeling.fold import fold_batch_norms
from .analyze import parts_of, prepare


class Device(NamedTuple):
    """A GPU's data sheet: operations a second by number format (dense), bytes a second, and its multiprocessors."""

    operations: dict[str, float]
    bandwidth: float
    multiprocessors: int
    clock: float  # of the multiprocessors, Hz


_HOPPER = {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12}
# NVIDIA's data sheets of the SXM modules, and a clock as under load.
DEVICES = {"h100": Device(_HOPPER, 3.35e12, 132, 1.7e9), "h200": Device(_HOPPER, 4.8e12, 132, 1.7e9)}
LANES = 128  # instructions of single threads that a multiprocessor issues in a clock
TOP_TWO_INSTRUCTIONS = 34.5  # of the merging kernel's loop for a query and a pixel, counted in its code for an H100

# Assumed for well tuned kernels, not measured: the share of the compute peaks, and that of the memory's bandwidth.
COMPUTE_EFFICIENCY = 0.6
BANDWIDTH_EFFICIENCY = 0.8
LAUNCH_SECONDS = 5e-6  # assumed, of the host for one eager operation: Python, dispatcher, driver

WAYS = ("eager", "compiled", "fused")

_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Operations that compilers fuse with their neighbours although PyTorch does not tag them as pointwise.
_FUSABLE = {
    "_to_copy",
    "_softmax",
    "_softmax_backward_data",
    "arange",
    "argmax",
    "bernoulli_",
    "cat",
    "copy_",
    "fill_",
    "gelu_",
    "index",
    "mean",
    "native_batch_norm",
    "native_layer_norm",
    "new_zeros",
    "sum",
    "upsample_bilinear2d",
    "zeros",
    "zeros_like",
}


class Op(NamedTuple):
    """One operation that runs on the device.

    Attributes:
        stage: the part of the model.
        name: PyTorch's.
        shape: of its largest output.
        kind: "product"; "fusable" for what compilers fuse; "other".
        unit: the number format of the units that compute it.
        operations: of a product, two for a multiply-add; 0 of anything else.
        reads: (value, bytes) of each input. A value is what was written to one storage at one time.
        writes: (value, bytes) of each output.
    """

    stage: str
    name: str
    shape: tuple[int, ...]
    kind: str
    unit: str
    operations: int
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]


def _bytes(tensor: torch.Tensor) -> int:
    """What reading all of a tensor takes from memory; expanded dimensions are there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _operations(packet, args: Sequence, kwargs: dict, out: object) -> int:
    """Of a product, two for a multiply-add; 0 for anything else."""
    aten = torch.ops.aten
    if packet is aten.convolution_backward:  # PyTorch's own formula forgets the groups
        out_gradient, x, weight, _, stride, padding, dilation, transposed, _, _, wanted = args
        forward = flop_registry[aten.convolution](
            x, weight, None, stride, padding, dilation, transposed, out_val=out_gradient
        )
        return sum(wanted[:2]) * forward
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


class Recorder(TorchDispatchMode):
    """A context that lists the operations inside, which must be on fake tensors.

    Args:
        precision: in which float32 products are computed: "tf32", or "float32" for others.

    Attributes:
        ops: the operations so far.
        sizes: bytes of each value.
        stage: what the next ones belong to.
    """

    def __init__(self, precision: str):
        super().__init__()
        self.float32_unit = "tf32" if precision == "tf32" else "float32"
        self.ops: list[Op] = []
        self.sizes: list[int] = []
        self.stage = "rest"
        self._value_of: dict[int, int] = {}
        self._storages: list[object] = []  # kept alive, so that no address comes twice

    def _new_value(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        self._storages.append(storage)
        self.sizes.append(storage.nbytes())
        self._value_of[storage._cdata] = len(self.sizes) - 1
        return len(self.sizes) - 1

    def _value(self, tensor: torch.Tensor) -> int:
        known = self._value_of.get(tensor.untyped_storage()._cdata)
        return self._new_value(tensor) if known is None else known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        reads = [(self._value(tensor), _bytes(tensor)) for tensor in inputs]
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        packet = func.overloadpacket
        name = packet.__name__
        read_from = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in read_from for t in outputs)
        if not outputs or name in _EMPTY or is_view:
            return out
        operations = _operations(packet, args, kwargs, out)
        largest = max(outputs, key=lambda tensor: tensor.numel())
        unit = self._unit_of(name, inputs)
        writes = [(self._new_value(tensor), _bytes(tensor)) for tensor in outputs]
        kind = "product" if operations else self._kind_of(func, name, args)
        self.ops.append(Op(self.stage, name, tuple(largest.shape), kind, unit, operations, reads, writes))
        return out

    def _unit_of(self, name: str, inputs: Sequence[torch.Tensor]) -> str:
        if name.startswith("convolution"):
            # A kernel of one channel a group has nothing for tensor cores to multiply.
            weight = inputs[2 if name.endswith("backward") else 1]
            if weight.shape[1] == 1:
                return "float32"
        return "bfloat16" if inputs and inputs[-1].dtype == torch.bfloat16 else self.float32_unit

    @staticmethod
    def _kind_of(func, name: str, args: Sequence) -> str:
        if name == "native_batch_norm" and args[5]:
            return "other"  # in training it needs all of its input before it gives anything
        return "fusable" if torch.Tag.pointwise in func.tags or name in _FUSABLE else "other"


class Kernel(NamedTuple):
    """Operations that share a kernel, and the bytes that it moves."""

    ops: list[Op]
    bytes: int

    def seconds(self, device: Device, compute: float = 1.0, bandwidth: float = 1.0) -> float:
        """The longer of two times, at given shares of the peaks."""
        computing = sum(op.operations / device.operations[op.unit] for op in self.ops) / compute
        return max(computing, self.bytes / (device.bandwidth * bandwidth))


def kernels(ops: Sequence[Op], sizes: Sequence[int], way: str) -> list[Kernel]:
    """Puts operations into kernels.

    A fusable operation joins the kernel that made its largest input, of two as large the later one; unless that is a
    product and the way does not allow it, or another of its inputs needs that kernel's results first. Then the next
    input is tried. A kernel reads each value that others made once, and writes what others read, or nobody, such as
    results.

    Args:
        ops: in the order in which they ran.
        sizes: bytes of each value.
        way: one of WAYS.
    """
    maker: dict[int, int] = {}  # the kernel of each value
    groups: list[list[Op]] = []
    sources: list[set[int]] = []  # the kernels that each one reads from
    joinable: list[bool] = []
    for op in ops:
        made = [(size, value) for value, size in op.reads if value in maker]
        makers = {maker[value] for _, value in made}
        own = None
        if way != "eager" and op.kind == "fusable":
            candidates = (maker[value] for _, value in sorted(made, reverse=True))
            own = next((k for k in candidates if joinable[k] and not _depends(makers - {k}, k, sources)), None)
        if own is None:
            own = len(groups)
            groups.append([])
            sources.append(set())
            joinable.append(op.kind != "product" or way == "fused")
        groups[own].append(op)
        sources[own] |= makers - {own}
        maker |= {value: own for value, _ in op.writes}
    read_by_others = {
        value for own, group in enumerate(groups) for op in group for value, _ in op.reads if maker.get(value) != own
    }
    written = read_by_others | (set(maker) - {value for op in ops for value, _ in op.reads})
    result = []
    for own, group in enumerate(groups):
        read: Counter[int] = Counter()
        for op in group:
            read.update({value: size for value, size in op.reads if maker.get(value) != own})
        total = sum(min(size, sizes[value]) for value, size in read.items())
        total += sum(size for op in group for value, size in op.writes if value in written)
        result.append(Kernel(group, total))
    return result


def _depends(kernels: set[int], source: int, sources: Sequence[set[int]]) -> bool:
    """Whether any of the kernels needs results of `source`, at first or second hand."""
    seen, waiting = set(kernels), list(kernels)
    while waiting:
        for kernel in sources[waiting.pop()]:
            if kernel == source:
                return True
            if kernel not in seen:
                seen.add(kernel)
                waiting.append(kernel)
    return False


class MergingCost(NamedTuple):
    """Of one image."""

    operations: int
    instructions: float
    bytes: int

    def seconds(self, device: Device, compute: float = 1.0, bandwidth: float = 1.0) -> float:
        """The kernel is bound by its instructions, the passes over pixels after it by memory."""
        issued = device.multiprocessors * device.clock * LANES
        return self.instructions / (issued * compute) + self.bytes / (device.bandwidth * bandwidth)


def merging_cost(size: tuple[int, int], map_size: tuple[int, int], queries: int) -> MergingCost:
    """Merging of one image, if one kernel finds the two best queries of each pixel and others do the rest.

    With N queries, a map of h·w and an image of H·W pixels:

    - operations: 6·N·H·W in float32, for interpolation, the two largest and the sum.
    - instructions: TOP_TWO_INSTRUCTIONS·N·H·W.
    - bytes: 4·N·h·w for the logits, read once for the pixels and once for the mask scores; 24·H·W written, index (8)
      and probability (4) of two queries; the same read again and 12·H·W written (segment 4, query 8); 24·H·W read by
      three counts over pixels.
    """
    pixels, places = size[0] * size[1], map_size[0] * map_size[1]
    return MergingCost(
        operations=6 * queries * pixels,
        instructions=TOP_TWO_INSTRUCTIONS * queries * pixels,
        bytes=2 * 4 * queries * places + (24 + 24 + 12 + 24) * pixels,
    )


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Puts fake tensors in place of all of a model's, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter.detach())
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    return model


def _record_stages(recorder: Recorder, parts: dict[str, list[nn.Module]]) -> None:
    """Makes the recorder know in which part of the model it is; of nested parts the inner one."""
    outer: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(*_) -> None:
            outer.append(recorder.stage)
            recorder.stage = name

        def leave(*_) -> None:
            recorder.stage = outer.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    for name, modules in parts.items():
        for module in modules:
            watch(name, module)


class _SavedActivations:
    """Counts the bytes that the forward pass keeps for the backward one, each storage once.

    The semantic head keeps nothing: in training its backward pass comes before the rest of the forward one.
    """

    def __init__(self, model: nn.Module, recorder: Recorder):
        self._recorder = recorder
        tensors = [*model.parameters(), *model.buffers()]
        self._held = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held and self._recorder.stage != "semantic_head":
            self._held.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


def record(
    model: nn.Module,
    network: Callable[[torch.Tensor], list[torch.Tensor]],
    parts: dict[str, list[nn.Module]],
    shape: tuple[int, ...],
    precision: str,
    training: bool,
) -> tuple[Recorder, int, list[torch.Tensor]]:
    """Lists the operations of one pass.

    Args:
        model: what holds the weights; it is left with fake ones.
        network: makes a list of outputs of an image batch.
        parts: modules by stage.
        shape: (B, 3, H, W) of the batch.
        precision: one of PRECISIONS.
        training: run backward too, from the sum of the outputs.

    Returns:
        the recorder, the bytes kept for the backward pass, and the outputs.
    """
    recorder = Recorder(precision)
    mode = FakeTensorMode()
    _make_fake(model, mode)
    _record_stages(recorder, parts)
    saved = _SavedActivations(model, recorder)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with mode:
        images = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
        with recorder, hooks if training else contextlib.nullcontext(), torch.set_grad_enabled(training):
            with use_precision(precision, "cpu"):
                outputs = network(images)
            if training:
                forward = len(recorder.ops)
                loss = sum(output.float().sum() for output in outputs)
                del recorder.ops[forward:]  # a sum in place of the losses
                recorder.stage = "backward"
                loss.backward()
    return recorder, saved.bytes, outputs


def _network(model: nn.Module, training: bool) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """The model's forward pass on a batch, up to the predictions or, in training, everything that has a loss."""

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        features = model.backbone(images)
        final, auxiliary = model.transformer_decoder(model.pixel_decoder(features), training)
        outputs = [final.mask_logits, final.class_logits, final.pixel_feature]
        if training:
            outputs += [tensor for prediction in auxiliary for tensor in prediction]
            outputs += [model.semantic_head(features)] if model.semantic_head is not None else []
        return outputs

    return run


def _total(costs: Sequence[Kernel | MergingCost], device: Device) -> dict[str, float]:
    """The number of kernels, their bytes, and their seconds at the peaks and at the efficiencies of good kernels."""
    return {
        "kernels": len(costs),
        "bytes": sum(cost.bytes for cost in costs),
        "seconds": sum(cost.seconds(device) for cost in costs),
        "tuned_seconds": sum(cost.seconds(device, COMPUTE_EFFICIENCY, BANDWIDTH_EFFICIENCY) for cost in costs),
    }


def _totals(ways: dict[str, list], device: Device, batch_size: int) -> dict[str, dict[str, float]]:
    """The totals of each way of running, with images a second."""
    totals = {way: _total(costs, device) for way, costs in ways.items()}
    for total in totals.values():
        total["images_per_second"] = batch_size / total["seconds"]
        total["tuned_images_per_second"] = batch_size / total["tuned_seconds"]
    return totals


def _largest(costs: Sequence[Kernel], device: Device, number: int) -> list[dict]:
    """The kernels that move the most bytes, those alike together."""
    alike = defaultdict(list)
    for kernel in costs:
        first, last = kernel.ops[0], kernel.ops[-1]
        names = Counter(op.name for op in kernel.ops)
        label = " + ".join(name if count == 1 else f"{count} {name}" for name, count in names.items())
        alike[first.stage, label, last.shape].append(kernel)
    rows = [
        {
            "stage": stage,
            "operations": label,
            "shape": list(shape),
            "times": len(group),
            "bytes": sum(kernel.bytes for kernel in group),
            "seconds": sum(kernel.seconds(device) for kernel in group),
        }
        for (stage, label, shape), group in alike.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])[:number]


def estimate(
    cfg: CfgNode,
    size: tuple[int, int] | None = None,
    *,
    batch_size: int = 1,
    device_kind: str = "h100",
    precision: str = "bfloat16",
    training: bool = False,
    top: int = 0,
) -> dict:
    """Counts a config's model and the plain ResNet-50 body, and gives their times on a device.

    Args:
        cfg: the config; it is not changed.
        size: (height, width) of the network's input; None for the paper's.
        batch_size: images at once.
        device_kind: one of DEVICES.
        precision: one of PRECISIONS.
        training: forward and backward instead of inference.
        top: so many of the kernels that move the most bytes are named.

    Returns:
        what was asked for; "stages", by name "operations" and for each way of running "kernels", "bytes", "seconds" at
        the peaks and "tuned_seconds" at the efficiencies of good kernels; "total" and the ResNet-50 "yardstick", for
        each way the same with images a second; "launch_seconds" of the eager way; "largest" kernels of each way; in
        training "memory", the bytes that the pass holds at least.

    Raises:
        UserError: there is no such device or precision, or the config makes no model for this size.
    """
    if device_kind not in DEVICES:
        known = ", ".join(DEVICES)
        raise UserError(f"there is no data sheet of {device_kind}, but of {known}{did_you_mean(device_kind, DEVICES)}")
    require_precision(precision)
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} images has no image")
    device = DEVICES[device_kind]
    cfg, height, width = prepare(cfg, size, semantic_head=training)
    shape = (batch_size, 3, height, width)
    try:
        model = build_model(cfg)
        num_weights = sum(parameter.numel() for parameter in model.parameters())
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        model = model.train() if training else fold_batch_norms(model, dtype)
        parts = parts_of(model)
        if training and model.semantic_head is not None:
            parts["semantic_head"] = [model.semantic_head]
        recorder, saved, outputs = record(model, _network(model, training), parts, shape, precision, training)
    except ValueError as error:
        raise UserError(str(error)) from error
    ways: dict[str, list] = {way: kernels(recorder.ops, recorder.sizes, way) for way in WAYS}
    stages: dict[str, dict] = {}
    for name in [*parts, *(["backward"] if training else [])]:
        stages[name] = {"operations": sum(op.operations for op in recorder.ops if op.stage == name)}
        for way, costs in ways.items():
            stages[name][way] = _total([kernel for kernel in costs if kernel.ops[0].stage == name], device)
    result = {
        "size": [height, width],
        "batch_size": batch_size,
        "device_kind": device_kind,
        "precision": precision,
        "training": training,
        "stages": stages,
    }
    result["largest"] = {way: _largest(costs, device, top) for way, costs in ways.items()}
    if training:
        # Weights, gradients and Adam's two moments in float32.
        result["memory"] = {"saved_activations": saved, "weights_and_optimizer": 16 * num_weights}
        result["memory"]["total"] = sum(result["memory"].values())
    else:
        queries, *map_size = outputs[0].shape[1:]
        merging = [merging_cost((height, width), tuple(map_size), queries)] * batch_size
        for costs in ways.values():
            costs.extend(merging)
        stages["merging"] = {"operations": batch_size * merging[0].operations}
        stages["merging"] |= {way: _total(merging, device) for way in WAYS}
    result["total"] = _totals(ways, device, batch_size)
    result["launch_seconds"] = LAUNCH_SECONDS * len(ways["eager"])
    result["yardstick"] = _yardstick(shape, device, precision, training)
    return result


def _yardstick(shape: tuple[int, ...], device: Device, precision: str, training: bool) -> dict[str, dict[str, float]]:
    """The same for torchvision's ResNet-50 without pooling and head, as in :mod:`~kmax_d2.tools.benchmark`."""
    body = nn.Sequential(*list(torchvision.models.resnet50().children())[:-2]).train(training)
    body = body.to(memory_format=torch.channels_last)
    recorder, _, _ = record(body, lambda images: [body(images)], {}, shape, precision, training)
    return _totals({way: kernels(recorder.ops, recorder.sizes, way) for way in WAYS}, device, shape[0])


def show(name: str, result: dict) -> None:
    """The tables of one estimate."""
    height, width = result["size"]
    what = "training step" if result["training"] else "inference"
    print(
        f"{name}, {what}, {result['batch_size']} × {height}×{width}, {result['precision']} on {result['device_kind']}"
    )
    total, fused = result["total"], result["total"]["fused"]["seconds"]
    operations = sum(stage["operations"] for stage in result["stages"].values())
    rows = [
        (
            stage.replace("_", " "),
            cost["operations"] / 1e9,
            *(cost[way]["bytes"] / 1e9 for way in WAYS),
            *(cost[way]["seconds"] * 1e3 for way in WAYS),
            f"{cost['fused']['seconds'] / fused:.0%}",
        )
        for stage, cost in [*result["stages"].items(), ("total", {"operations": operations, **total})]
    ]
    headers = ["stage", "GFLOP", *(f"GB {way}" for way in WAYS), *(f"ms {way}" for way in WAYS), "share of fused"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".1f", *[".2f"] * 6), tablefmt="github"))
    yardstick = result["yardstick"]
    rows = [
        (
            way,
            total[way]["kernels"],
            total[way]["seconds"] * 1e3,
            total[way]["images_per_second"],
            total[way]["tuned_seconds"] * 1e3,
            total[way]["tuned_images_per_second"],
            yardstick[way]["tuned_images_per_second"],
            total[way]["tuned_seconds"] / yardstick[way]["tuned_seconds"],
        )
        for way in WAYS
    ]
    tuned = f"at {COMPUTE_EFFICIENCY:.0%} of compute, {BANDWIDTH_EFFICIENCY:.0%} of bandwidth"
    headers = ["way", "kernels", "ms", "images/s", f"ms {tuned}", "images/s", "ResNet-50 body's", "ratio of times"]
    print()
    print(
        tabulate(rows, headers=headers, floatfmt=("", "", ".2f", ".0f", ".2f", ".0f", ".0f", ".2f"), tablefmt="github")
    )
    launch = result["launch_seconds"]
    print(
        f"\nlaunching the eager kernels takes the host {launch * 1e3:.1f} ms, so that without CUDA graphs there are "
        f"{result['batch_size'] / launch:.0f} images/s at most"
    )
    if "memory" in result:
        memory = {name: size / 1e9 for name, size in result["memory"].items()}
        print(
            f"memory: {memory['total']:.1f} GB at least, {memory['saved_activations']:.1f} GB kept for backward and "
            f"{memory['weights_and_optimizer']:.1f} GB of weights, gradients and Adam's moments"
        )
    for way, largest in result["largest"].items():
        if largest:
            rows = [
                (
                    row["stage"].replace("_", " "),
                    row["operations"],
                    "×".join(map(str, row["shape"])),
                    row["times"],
                    row["bytes"] / 1e9,
                    row["seconds"] * 1e3,
                )
                for row in largest
            ]
            print(f"\nmost bytes, {way}")
            headers = ["stage", "operations", "shape", "times", "GB", "ms"]
            print(tabulate(rows, headers=headers, floatfmt=("", "", "", "", ".3f", ".3f"), tablefmt="github"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config file or name, such as coco/r50")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the network's input (the paper's)"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--device-kind", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} (%(default)s)")
    parser.add_argument(
        "--precision", default="bfloat16", metavar="NAME", help=f"{', '.join(PRECISIONS)} (%(default)s)"
    )
    parser.add_argument("--training", action="store_true", help="forward and backward, without losses and optimizer")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="name the N kernels that move the most bytes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="NAME VALUE", help="config options to change")
    args = parser.parse_args()
    result = estimate(
        load_config(args.config_file, args.opts),
        args.size,
        batch_size=args.batch_size,
        device_kind=args.device_kind,
        precision=args.precision,
        training=args.training,
        top=args.top,
    )
    if args.json:
        print(json.dumps({"config": args.config_file, **result}, indent=2))
    else:
        show(args.config_file, result)


if __name__ == "__main__":
    exit_on_user_error(main)
