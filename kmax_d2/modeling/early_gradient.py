"""A branch of the loss that goes through its backward pass at once, so that it keeps nothing while others run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class _EarlyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch: Callable, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        inputs = [x.detach().requires_grad_() for x in tensors[:count]]
        with torch.enable_grad():
            loss = branch(*inputs)
        grads = torch.autograd.grad(loss, [*inputs, *tensors[count:]], allow_unused=True)
        ctx.save_for_backward(*grads)
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(None if own is None else own.mul_(grad) for own in ctx.saved_tensors)


def early_gradient(branch: Callable, inputs: Sequence[torch.Tensor], module: nn.Module) -> torch.Tensor:
    """The scalar loss `branch(*inputs)`, whose gradients are computed here and now.

    They wait for the backward pass, which scales them; all else that the branch made is free. Gradients are not
    differentiable twice. Where float16 may need the loss scaled before its backward pass, nothing is done early.

    Args:
        branch: a loss of the inputs and of the module's parameters.
        inputs: tensors of the rest of the model.
        module: the branch's own part of the model.
    """
    if not torch.is_grad_enabled() or any(x.dtype == torch.float16 for x in inputs):
        return branch(*inputs)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _EarlyGradient.apply(branch, len(inputs), *inputs, *parameters)
