"""Batch norm, activation and convolution as one step of training on a CPU, which keeps its input alone.

On CPUs fresh memory costs more time than the arithmetic that fills it: pages are handed out zeroed, one by one. So what
lies between two convolutions is written into memory that is used over and over, and made anew in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import nn

_buffers: dict[str, torch.Tensor] = {}


def _scratch(name: str, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and layout, over the memory of the last one by this name."""
    buffer = _buffers.get(name)
    if buffer is None or buffer.numel() < like.numel() or buffer.dtype != like.dtype:
        buffer = _buffers[name] = torch.empty(like.numel(), dtype=like.dtype)
    return buffer.as_strided(like.shape, like.stride())


class _NormActConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        gain: torch.Tensor,
        bias: torch.Tensor,
        conv_weight: torch.Tensor | None,
        conv_bias: torch.Tensor | None,
        norm: nn.BatchNorm2d,
        is_gelu: bool,
        conv: nn.Conv2d | None,
    ) -> torch.Tensor:
        norm.num_batches_tracked.add_(1)
        # What goes into a convolution is not read again.
        y = torch.empty_like(x) if conv is None else _scratch("active", x)
        mean, inverse_std = torch.empty_like(gain), torch.empty_like(gain)
        torch.native_batch_norm(
            x,
            gain,
            bias,
            norm.running_mean,
            norm.running_var,
            True,
            norm.momentum,
            norm.eps,
            out=(y, mean, inverse_std),
        )
        y = torch.ops.aten.gelu_(y) if is_gelu else y.relu_()
        ctx.save_for_backward(x, gain, bias, mean, inverse_std, conv_weight)
        ctx.eps, ctx.is_gelu, ctx.conv, ctx.has_bias = norm.eps, is_gelu, conv, conv_bias is not None
        if conv is None:
            return y
        return F.conv2d(y, conv_weight, conv_bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gain, bias, mean, inverse_std, conv_weight = ctx.saved_tensors
        scale = gain * inverse_std
        shift = bias - mean * scale
        normed = torch.addcmul(shift[:, None, None], x, scale[:, None, None], out=_scratch("normed", x))
        grad_weight = grad_bias = None
        if ctx.conv is not None:
            active = torch.ops.aten.gelu.out(normed, out=_scratch("active", x)) if ctx.is_gelu else normed.relu_()
            grad, grad_weight, grad_bias = _convolution_backward(grad, active, conv_weight, ctx.conv, ctx.has_bias)
        if ctx.is_gelu:
            grad = torch.ops.aten.gelu_backward.grad_input(grad, normed, grad_input=normed)
        else:
            grad = torch.ops.aten.threshold_backward.grad_input(grad, normed, 0, grad_input=normed)
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, gain, None, None, mean, inverse_std, True, ctx.eps, [True, True, True]
        )
        return *grads, grad_weight, grad_bias, None, None, None


def _convolution_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, conv: nn.Conv2d, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [len(weight)] if has_bias else None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        [True, True, has_bias],
    )


def fits(x: torch.Tensor, norm: nn.Module, act: nn.Module) -> bool:
    """Whether :func:`norm_act_conv` can take these: a plain batch norm in training on a CPU, without autocast."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and type(x) is torch.Tensor  # with memory of its own, unlike a fake one
        and type(norm) in (nn.BatchNorm2d, NaiveSyncBatchNorm)
        and norm.training
        and norm.momentum is not None
        and comm.get_world_size() == 1  # so that a synchronised norm is a plain one
        and isinstance(act, (nn.GELU, nn.ReLU))
        and x.dtype == norm.weight.dtype  # under autocast it is not
        and torch.is_grad_enabled()
    )


def norm_act_conv(x: torch.Tensor, norm: nn.BatchNorm2d, act: nn.Module, conv: nn.Conv2d | None) -> torch.Tensor:
    """`conv(act(norm(x)))`, or without the convolution if that is None, where :func:`fits` says so.

    Args:
        x: (B, C, H, W).
        norm: updates its running statistics, as ever.
        act: GELU or ReLU.
        conv: of the C channels.
    """
    weights = (None, None) if conv is None else (conv.weight, conv.bias)
    return _NormActConv.apply(x, norm.weight, norm.bias, *weights, norm, isinstance(act, nn.GELU), conv)
