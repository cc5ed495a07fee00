"""The training step: mixed precision if requested, and a stop before what is not finite reaches the weights."""

from __future__ import annotations

import math
import time

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..data import seed_by
from ..errors import UserError


class TrainLoop(SimpleTrainer):
    """Detectron2's training loop with autocast and a check of losses and gradients before each optimizer step.

    The random numbers of a step are determined by the seed, its number, and the process, so that a resumed run draws
    the same ones.

    Args:
        model, data_loader, optimizer: as for :class:`~detectron2.engine.SimpleTrainer`.
        seed: the seed of the run, at least 0.
        precision: "float32", "bfloat16", or "float16", which scales the loss and skips a step that overflows.

    Attributes:
        samples: the number of samples that the run has used, over all processes.
    """

    def __init__(self, model, data_loader, optimizer, seed: int, precision: str = "float32"):
        super().__init__(model, data_loader, optimizer)
        self.seed, self.samples, self.skipped = seed, 0, 0
        self.device_type = next(model.parameters()).device.type
        self.dtype = getattr(torch, precision)
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "float16")

    def run_step(self) -> None:
        """Runs one iteration. Raises UserError if a loss or a gradient is not finite."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        seed_by(self.seed, self.iter, comm.get_rank())
        self.optimizer.zero_grad()  # before the forward pass, so that old gradients do not add to its peak memory
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.model(batch)
        self.grad_scaler.scale(sum(losses.values())).backward()
        self._check(losses, batch)
        self._write_metrics(losses, data_time)
        self.grad_scaler.unscale_(self.optimizer)  # which may clip gradients in its step
        self.grad_scaler.step(self.optimizer)
        scale = self.grad_scaler.get_scale()
        self.grad_scaler.update()
        if self.grad_scaler.is_enabled():
            self.skipped += self.grad_scaler.get_scale() < scale
            get_event_storage().put_scalar("skipped_steps", self.skipped)
        self.samples += len(batch) * comm.get_world_size()

    def _check(self, losses: dict[str, torch.Tensor], batch: list[dict]) -> None:
        """Raises UserError that names the terms that are not finite and the images of the batch."""
        terms = {name: loss.detach() for name, loss in losses.items()}
        if not self.grad_scaler.is_enabled():  # which looks for itself
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            terms["norm of the gradient"] = torch.stack(torch._foreach_norm(gradients)).norm()
        values = torch.stack(list(terms.values())).tolist()
        bad = [f"{name} = {value}" for name, value in zip(terms, values, strict=True) if not math.isfinite(value)]
        if not bad:
            return
        images = ", ".join(str(record.get("file_name", record.get("image_id"))) for record in batch)
        raise UserError(
            f"the training is no longer finite at iteration {self.iter}: {', '.join(bad)}; images: {images}. "
            "The last checkpoint is kept; a lower SOLVER.BASE_LR or gradient clipping may help"
        )

    def state_dict(self) -> dict:
        """Returns Detectron2's training state, the scale of the loss, and where the run is in its samples."""
        own = {"grad_scaler": self.grad_scaler.state_dict(), "seed": self.seed, "samples": self.samples}
        return super().state_dict() | own | {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what :meth:`state_dict` returns."""
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.seed, self.samples, self.skipped = (state_dict[name] for name in ("seed", "samples", "skipped"))
