"""One training step: mixed precision where asked for, and a halt before a bad loss reaches the weights."""

from __future__ import annotations

import contextlib
import time

import torch
from detectron2.engine import SimpleTrainer

from ..errors import UserError


class TrainLoop(SimpleTrainer):
    """Detectron2's loop with autocast and a check of every loss before the optimizer's step.

    Args:
        precision: "float32", "bfloat16" or "float16"; the last scales the loss against underflow.
    """

    def __init__(self, model, data_loader, optimizer, precision: str = "float32"):
        super().__init__(model, data_loader, optimizer)
        if precision not in ("float32", "bfloat16", "float16"):
            raise UserError(f"the precision is float32, bfloat16 or float16, not {precision}")
        self.device_type = next(model.parameters()).device.type
        self.autocast_dtype = None if precision == "float32" else getattr(torch, precision)
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "float16")

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()  # before the forward pass, whose peak would hold the old gradients too
        with self._autocast():
            losses = self.model(batch)
        self.grad_scaler.scale(sum(losses.values())).backward()
        self._check(losses, batch)
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype)

    def _check(self, losses: dict[str, torch.Tensor], batch: list[dict]) -> None:
        values = torch.stack([value.detach() for value in losses.values()])
        if values.isfinite().all():
            return
        bad = [f"{name} = {value}" for name, value in zip(losses, values.tolist(), strict=True) if abs(value) != value]
        images = ", ".join(str(record.get("file_name", record.get("image_id"))) for record in batch)
        raise UserError(
            f"the loss is no longer finite at iteration {self.iter}: {', '.join(bad)}; images: {images}. "
            "The last checkpoint is kept; a lower SOLVER.BASE_LR or gradient clipping may help"
        )

    def state_dict(self) -> dict:
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
