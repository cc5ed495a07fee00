"""What to say of a training that fails: the layer that is not finite, and what needs less memory."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Runs `forward` again and says which layer of the model first gives a value that is not finite, in words.

    With several processes, each looks for itself: batch norms then take their running statistics.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
            if not found and not all(tensor.isfinite().all() for tensor in tensors):
                found.append(f"the first output that is not finite is that of {name} ({type(module).__name__})")

        return hook

    for name, module in model.named_modules():
        if name.removeprefix("module"):
            module.register_forward_hook(look(name.removeprefix("module."), module))
        if comm.get_world_size() > 1 and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    forward()
    gradients = ((name, weight.grad) for name, weight in model.named_parameters() if weight.grad is not None)
    bad = [name for name, gradient in gradients if not gradient.isfinite().all()]
    without = f", and the first such gradient that of {bad[-1].removeprefix('module.')}" if bad else ""
    return found[0] if found else f"the outputs of all layers are finite{without}"


def memory_advice(error: RuntimeError, cfg: CfgNode) -> str:
    """Returns what needs less memory if an error says that it ran out; else an empty string."""
    if not isinstance(error, torch.cuda.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
        return ""
    solver = cfg.SOLVER
    images = solver.IMS_PER_BATCH // comm.get_world_size() // solver.ACCUMULATE
    ways = [
        (images > 1, f"SOLVER.ACCUMULATE {2 * solver.ACCUMULATE} (half the images at once, the same step)"),
        (not cfg.MODEL.KMAX.CHECKPOINT_BLOCKS, "MODEL.KMAX.CHECKPOINT_BLOCKS True (a third less, a quarter slower)"),
        (not solver.AMP.ENABLED, "SOLVER.AMP.ENABLED True (half the size of most maps)"),
        ("backbone" not in solver.FREEZE, "--freeze backbone (keeps none of its maps, and it does not learn)"),
        (images > 1, f"--scale-schedule {solver.IMS_PER_BATCH // 2} (a smaller batch, more iterations)"),
        (True, "a smaller INPUT.CROP_SIZE (memory falls with its area)"),
    ]
    height, width = cfg.INPUT.CROP_SIZE
    what = f"{images} image{'s' * (images > 1)} of {height}×{width}"
    ways_left = "; ".join(text for helps, text in ways if helps)
    return f"not enough memory for {what} at once; what needs less: {ways_left}"
