"""What keeps memory and time of a training step low changes nothing: values, gradients and running statistics."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from kmax_d2.modeling.depthwise import DepthwiseConv2d
from kmax_d2.modeling.early_gradient import early_gradient
from kmax_d2.modeling.norm_act_conv import fits, norm_act_conv
from kmax_d2.modeling.recompute import recompute
from small import options
from torch import nn

from kmax_d2.engine import load_config
from kmax_d2.modeling.layers import ConvBN, DepthwiseSeparable

USERS_OF_RECOMPUTE = ("layers", "axial_attention", "pixel_decoder")


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    for name in ("recompute", "depthwise"):
        monkeypatch.setattr(f"kmax_d2.modeling.{name}.WORTHWHILE", 0)


def kept_bytes(run):
    """What the graph of `run()` still holds for its backward pass when that is done, parameters included."""
    kept = []

    def pack(tensor):
        tensor = tensor.detach()
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    alive = [tensor for reference in kept if (tensor := reference()) is not None]
    del result
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values())


# --- depthwise convolution ---


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_depthwise_gradients(kernel_size, memory_format):
    layer = DepthwiseConv2d(6, kernel_size, bias=True).double()
    x = torch.randn(2, 6, 9, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    grad = torch.randn_like(x)
    out = layer(x)
    plain = F.conv2d(x, layer.weight, layer.bias, padding=kernel_size // 2, groups=6)
    assert torch.equal(out, plain)
    inputs = (x, layer.weight, layer.bias)
    ours, expected = (torch.autograd.grad(y, inputs, grad) for y in (out, plain))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_depthwise_gradient_of_one_input_alone():
    layer = DepthwiseConv2d(3, 5)
    x = torch.randn(1, 3, 7, 7)
    layer(x).sum().backward()
    expected = torch.autograd.grad(F.conv2d(x, layer.weight, padding=2, groups=3).sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


def test_depthwise_gradients_under_autocast():
    layer, x = DepthwiseConv2d(4, 5), torch.randn(2, 4, 9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    grad = torch.randn(out.shape).bfloat16()
    ours = torch.autograd.grad(out, (x, layer.weight), grad)
    assert [g.dtype for g in ours] == [torch.float32] * 2
    expected = torch.autograd.grad(F.conv2d(x, layer.weight, padding=2, groups=4), (x, layer.weight), grad.float())
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


# --- activations made anew ---


def with_running_statistics(module):
    """The module in training mode, with gains and statistics that are not those of the start."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.running_mean)
    return module.train()


def test_statistics_take_in_each_batch_once():
    layer = with_running_statistics(ConvBN(3, 4, norm="BN", act_layer=nn.GELU))
    x, before = torch.randn(2, 3, 5, 5), layer.norm.running_mean.clone()
    layer(x).sum().backward()
    mean = layer.conv(x).mean((0, 2, 3))
    torch.testing.assert_close(layer.norm.running_mean, 0.99 * before + 0.01 * mean)
    assert layer.norm.num_batches_tracked == 1
    assert layer.norm.momentum == 0.01


def test_only_the_convolutions_outputs_are_kept():
    """Not what the norms and activations make of them."""
    block = with_running_statistics(DepthwiseSeparable(16, 16, norm="BN"))
    x = torch.randn(2, 16, 33, 33)
    kept = kept_bytes(lambda: block(x))
    assert 3 * x.nbytes <= kept < 3.2 * x.nbytes  # the input and two outputs


def test_random_numbers_are_the_same_the_second_time():
    x = torch.randn(50, requires_grad=True)
    out = recompute(lambda x: F.dropout(x.exp()).square(), x, modules=[], random=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad != 0, out != 0)


def test_nothing_is_made_anew_without_gradients():
    calls = []
    with torch.no_grad():
        recompute(lambda x: calls.append(0) or x * 2, torch.ones(1), modules=[])
    assert len(calls) == 1


# --- norm, activation and convolution as one step ---


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU()])
@pytest.mark.parametrize("conv", [None, nn.Conv2d(6, 4, 1), nn.Conv2d(6, 6, 3, 2, 2, 2, bias=False)])
def test_norm_act_conv(act, conv):
    """Twice with different inputs before the backward passes: memory used again must not mix them up."""
    norm = with_running_statistics(nn.BatchNorm2d(6)).double()
    conv = None if conv is None else copy.deepcopy(conv).double()
    plain_norm = copy.deepcopy(norm)
    inputs = [torch.randn(2, 6, 7, 9).double().to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)]
    assert fits(inputs[0], norm, act)
    ours = [norm_act_conv(x, norm, act, conv) for x in inputs]
    plain = [(conv or nn.Identity())(act(plain_norm(x))) for x in inputs]
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    others = [] if conv is None else list(conv.parameters())
    for mine, theirs in ((norm, ours), (plain_norm, plain)):
        total = sum(y.square().sum() for y in theirs)
        theirs[:] = torch.autograd.grad(total, [*inputs, *mine.parameters(), *others])
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for name, value in plain_norm.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), value)


def test_where_one_step_does_not_fit():
    x, norm, gelu = torch.randn(1, 3, 4, 4), nn.BatchNorm2d(3).train(), nn.GELU()
    assert fits(x, norm, gelu)
    assert not fits(x.bfloat16(), norm, gelu)
    assert not fits(x, norm, nn.SiLU())
    assert not fits(x, nn.GroupNorm(1, 3), gelu)
    with torch.no_grad():
        assert not fits(x, norm, gelu)
    assert not fits(x, norm.eval(), gelu)


# --- a branch's early gradient ---


def test_early_gradient():
    """Of inputs that the rest reads too, scaled by what comes after; parameters that nothing reads have none."""
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double()
    inputs = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def branch(used, unused):
        return module[0](used).square().mean()

    results = []
    for loss in (branch(*inputs), early_gradient(branch, inputs, module)):
        total = 3 * loss + inputs[0].sin().sum()
        grads = torch.autograd.grad(total, [*inputs, *module.parameters()], allow_unused=True)
        results.append([total, *grads])
    assert [value is None for value in results[0]] == [value is None for value in results[1]]
    for ours, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_early_gradient_keeps_nothing_of_the_branch():
    module, x = nn.Linear(8, 8), torch.randn(1000, 8, requires_grad=True)

    def branch(x):
        return module(module(module(x).exp()).exp()).square().mean()

    assert kept_bytes(lambda: branch(x)) > 3 * x.nbytes
    assert kept_bytes(lambda: early_gradient(branch, [x], module)) < 1.2 * x.nbytes


def test_float16_is_left_to_the_loss_scale():
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    loss = early_gradient(lambda x: (x * 1e-7).sum() * 1e-4, [x], nn.Identity())
    (grad,) = torch.autograd.grad(loss * 2.0**14, x)
    assert (grad > 0).all()


# --- the whole model ---


def training_step(model, scale=1.0):
    """Losses, gradients and buffers by name of a step with the same random numbers every time."""
    torch.manual_seed(5)
    inputs = [
        {
            "image": torch.randint(0, 256, (3, 65, 97), dtype=torch.uint8),
            "segment_ids": torch.arange(65)[:, None] // 22 * 2 + torch.arange(97) // 60,
            "segment_classes": torch.arange(6),
        }
        for _ in range(2)
    ]
    losses = model(inputs)
    (scale * sum(losses.values())).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, grads, dict(model.named_buffers())


def small_model(*more):
    cfg = load_config("", [*options(MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH=0.3), "MODEL.KMAX.NORM", "BN", *more])
    torch.manual_seed(0)
    return with_running_statistics(build_model(cfg)).double()


CONVNEXT = (
    *("MODEL.BACKBONE.NAME", "KMaXConvNeXt", "MODEL.KMAX.CONVNEXT.DEPTHS", [1, 2, 1, 1]),
    *("MODEL.KMAX.CONVNEXT.WIDTHS", [8, 8, 16, 16], "MODEL.KMAX.CONVNEXT.DROP_PATH", 0.5),
)
MAX_S = (
    *("MODEL.BACKBONE.NAME", "KMaXMaXS", "MODEL.KMAX.MAXS.BLOCKS", [1, 1, 1, 2]),
    *("MODEL.KMAX.MAXS.WIDTHS", [8, 8, 16, 16], "MODEL.KMAX.MAXS.STEM_WIDTHS", [8, 8, 8]),
)


RESNET = ("MODEL.KMAX.RESNET.BLOCKS", [1, 2, 1, 2])  # a second block writes over the sum that the first one gave


@pytest.mark.parametrize("backbone", [RESNET, CONVNEXT, MAX_S], ids=["resnet", "convnext", "max_s"])
@pytest.mark.parametrize("way", ["one step", "activations", "blocks"])
def test_a_step_is_that_of_the_plain_model(monkeypatch, backbone, way):
    """Whether norm, activation and convolution are one step, as on a CPU, or their activations are made anew."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what the model itself does in float32
    model = small_model(*backbone, "MODEL.KMAX.RECOMPUTE_BLOCKS", way == "blocks")
    with monkeypatch.context() as patch:
        if way == "activations":
            patch.setattr("kmax_d2.modeling.layers.fits", lambda *_: False)
        ours = training_step(model, scale=7.0)
    plain = small_model(*backbone)
    with monkeypatch.context() as patch:
        patch.setattr("kmax_d2.modeling.layers.fits", lambda *_: False)
        for name in USERS_OF_RECOMPUTE:
            patch.setattr(f"kmax_d2.modeling.{name}.recompute", lambda function, *x, **_: function(*x))
        patch.setattr("kmax_d2.modeling.kmax_deeplab.early_gradient", lambda branch, inputs, module: branch(*inputs))
        patch.setattr(DepthwiseConv2d, "forward", nn.Conv2d.forward)
        expected = training_step(plain, scale=7.0)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-11)


def test_blocks_that_keep_only_their_inputs_need_less():
    sizes = []
    for blocks in (False, True):
        model = small_model("MODEL.KMAX.RECOMPUTE_BLOCKS", blocks, "MODEL.KMAX.RESNET.BLOCKS", [3, 3, 3, 3]).float()
        image = torch.randint(0, 256, (3, 129, 129), dtype=torch.uint8)
        ids = torch.zeros(129, 129, dtype=torch.int64)
        inputs = [{"image": image, "segment_ids": ids, "segment_classes": torch.tensor([1])}]
        sizes.append(kept_bytes(lambda model=model, inputs=inputs: list(model(inputs).values())))
    assert sizes[1] < 0.7 * sizes[0]
