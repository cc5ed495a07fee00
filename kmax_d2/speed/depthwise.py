"""Depthwise convolutions with fast gradients on CPUs, where PyTorch's of the kernel takes ten times the convolution."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

SMALLEST = 2**18  # elements of an image's map; smaller ones fit a processor's cache


def fast_depthwise_gradients(model: nn.Module) -> nn.Module:
    """Speeds up the backward pass of a model's depthwise convolutions on CPUs, in place: those that keep the size."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels == conv.out_channels:
            half = conv.kernel_size[0] // 2
            form = conv.kernel_size, conv.padding, conv.stride, conv.dilation
            if form == ((2 * half + 1,) * 2, (half, half), (1, 1), (1, 1)):
                conv.forward = functools.partial(_forward, conv, conv.forward)
    return model


def _forward(conv: nn.Conv2d, forward: Callable, x: torch.Tensor) -> torch.Tensor:
    trains = torch.is_grad_enabled() and conv.weight.requires_grad and not torch.compiler.is_compiling()
    if trains and x.device.type == "cpu" and x[0].numel() >= SMALLEST:
        return _Depthwise.apply(x, conv.weight, conv.bias)
    return forward(x)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        kernel = weight.flip(2, 3).to(grad.dtype)  # under autocast, the gradient has another type than the weight
        of_x = F.conv2d(grad, kernel, padding=weight.shape[-1] // 2, groups=len(weight)).to(x.dtype)
        of_bias = grad.sum((0, 2, 3), dtype=weight.dtype) if ctx.needs_input_grad[2] else None
        return of_x, _kernel_gradient(x.to(weight.dtype), grad.to(weight.dtype), weight.shape[-1]), of_bias


def _kernel_gradient(x: torch.Tensor, grad: torch.Tensor, side: int) -> torch.Tensor:
    """(C, 1, k, k) of the input and the output's gradient (B, C, H, W), row by row, which the cache holds."""
    total = x.new_zeros(side, side, x.shape[3], x.shape[1])
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, *[side // 2] * 4))
    windows = padded.unfold(1, side, 1).unfold(2, side, 1).permute(0, 1, 4, 5, 2, 3)  # (B, H, k, k, W, C), a view
    for row, window in zip(
        grad.permute(0, 2, 3, 1).flatten(0, 1), (w for image in windows for w in image), strict=True
    ):
        total.addcmul_(row, window)
    return total.sum(2).permute(2, 0, 1)[:, None]
