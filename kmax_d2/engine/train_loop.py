"""The training step: mixed precision if requested, and a stop before a loss that is not finite reaches the weights."""

from __future__ import annotations

import math
import time

import torch
from detectron2.engine import SimpleTrainer

from ..errors import UserError, did_you_mean

PRECISIONS = ("float32", "bfloat16", "float16")


class TrainLoop(SimpleTrainer):
    """Detectron2's training loop with autocast and a check of the losses before each optimizer step.

    Args:
        model, data_loader, optimizer: as for :class:`~detectron2.engine.SimpleTrainer`.
        precision: one of PRECISIONS; float16 scales the loss against underflow.

    Raises:
        UserError: there is no such precision.
    """

    def __init__(self, model, data_loader, optimizer, precision: str = "float32"):
        super().__init__(model, data_loader, optimizer)
        if precision not in PRECISIONS:
            raise UserError(
                f"the precision of training (SOLVER.AMP.PRECISION) is {precision}, but there are "
                f"{', '.join(PRECISIONS)}{did_you_mean(str(precision), PRECISIONS)}"
            )
        self.device_type = next(model.parameters()).device.type
        self.dtype = getattr(torch, precision)
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "float16")

    def run_step(self) -> None:
        """Runs one iteration. Raises UserError if a loss is not finite."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()  # before the forward pass, so that old gradients do not add to its peak memory
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.model(batch)
        self.grad_scaler.scale(sum(losses.values())).backward()
        self._check(losses, batch)
        self._write_metrics(losses, data_time)
        self.grad_scaler.unscale_(self.optimizer)  # which may clip gradients in its step
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _check(self, losses: dict[str, torch.Tensor], batch: list[dict]) -> None:
        """Raises UserError that names the losses that are not finite and the images of the batch."""
        values = torch.stack([value.detach() for value in losses.values()])
        if values.isfinite().all():
            return
        bad = [
            f"{name} = {value}" for name, value in zip(losses, values.tolist(), strict=True) if not math.isfinite(value)
        ]
        images = ", ".join(str(record.get("file_name", record.get("image_id"))) for record in batch)
        raise UserError(
            f"the loss is no longer finite at iteration {self.iter}: {', '.join(bad)}; images: {images}. "
            "The last checkpoint is kept; a lower SOLVER.BASE_LR or gradient clipping may help"
        )

    def state_dict(self) -> dict:
        """Returns Detectron2's training state and the scale of the loss."""
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what :meth:`state_dict` returns."""
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
