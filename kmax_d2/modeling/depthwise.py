"""Depthwise convolution with a gradient of its kernel that is fast on CPUs too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WORTHWHILE = 2**18  # elements of an image's map: those of smaller ones fit a processor's cache


class _DepthwiseConv(torch.autograd.Function):
    """A depthwise convolution of stride 1 that keeps the size.

    On CPUs PyTorch's gradient of the kernel takes seven times as long as the convolution itself.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding, groups=len(weight))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Under autocast the gradient has another type than the weight.
            kernel = weight.flip(2, 3).to(grad.dtype)
            grad_x = F.conv2d(grad, kernel, padding=ctx.padding, groups=len(weight)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x.to(weight.dtype), grad.to(weight.dtype), weight.shape[-1], ctx.padding)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3), dtype=weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def _weight_gradient(x: torch.Tensor, grad: torch.Tensor, kernel_size: int, padding: int) -> torch.Tensor:
    """(C, 1, k, k) of the input and the output's gradient (B, C, H, W), row by row.

    One product takes a row of the gradient times the rows of the input that all k² places of the kernel saw.
    """
    total = x.new_zeros(kernel_size, kernel_size, x.shape[3], x.shape[1])
    for image, image_grad in zip(x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1), strict=True):
        padded = F.pad(image, (0, 0, *[padding] * 4))
        windows = padded.unfold(0, kernel_size, 1).unfold(1, kernel_size, 1)  # (H, W, C, k, k), a view
        for row, window in zip(image_grad, windows.permute(0, 3, 4, 1, 2), strict=True):
            total.addcmul_(row, window)
    return total.sum(2).permute(2, 0, 1)[:, None].contiguous()


class DepthwiseConv2d(nn.Conv2d):
    """One kernel for each channel, stride 1, zero padding that keeps the size.

    Args:
        channels: of input and output.
        kernel_size: odd.
        bias: whether to add a bias.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool = False):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same shape."""
        trains = self.weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        # A fake tensor, which has no memory, is a subclass.
        if trains and x.device.type == "cpu" and type(x) is torch.Tensor and x[0].numel() >= WORTHWHILE:
            return _DepthwiseConv.apply(x, self.weight, self.bias, self.padding[0])
        return super().forward(x)
