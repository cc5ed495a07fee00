"""The training step: mixed precision and parts of a batch if requested, and a stop before what is not finite."""

import contextlib
import math
import time

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ..data.loading import seed_by
from ..errors import UserError
from .diagnosis import first_not_finite


class TrainLoop(SimpleTrainer):
    """Detectron2's training loop with autocast and a check of losses and gradients before each optimizer step.

    The random numbers of a step are determined by the seed, its number, and the process, so that a resumed run draws
    the same ones.

    Args:
        model, data_loader, optimizer: as for :class:`~detectron2.engine.SimpleTrainer`.
        seed: the seed of the run, at least 0.
        precision: "float32", "bfloat16", or "float16", which scales the loss and skips a step that overflows.
        parts: how many equal parts of a batch go through the model one after another. The sum of their gradients is
            the gradient of the whole batch, except that batch norms see only a part.

    Attributes:
        samples: the number of samples that the run has used, over all processes.
        last_step: the last iteration that was done; None before the first one here, while the weights change, and once
            a step was not finite.
    """

    def __init__(self, model, data_loader, optimizer, seed: int, precision: str = "float32", parts: int = 1):
        super().__init__(model, data_loader, optimizer)
        self.seed, self.samples, self.skipped, self.parts = seed, 0, 0, parts
        self.last_step: int | None = None
        self.device_type = next(model.parameters()).device.type
        self.dtype = getattr(torch, precision)
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "float16")

    def run_step(self) -> None:
        """Runs one iteration. Raises UserError if a loss or a gradient is not finite."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()  # before the forward pass, so that old gradients do not add to its peak memory
        losses: dict[str, torch.Tensor] = {}
        seed_by(self.seed, self.iter, comm.get_rank())
        for number, part in enumerate(self._split(batch), start=1):
            waits = number < self.parts and isinstance(self.model, nn.parallel.DistributedDataParallel)
            with self.model.no_sync() if waits else contextlib.nullcontext():
                terms = {name: loss / self.parts for name, loss in self._forward(part).items()}
                self.grad_scaler.scale(torch.stack(list(terms.values())).sum()).backward()
            losses = {name: losses.get(name, 0) + loss.detach() for name, loss in terms.items()}
        self._check(losses, batch)
        self._write_metrics(losses, data_time)
        self.last_step = None
        self.grad_scaler.unscale_(self.optimizer)  # which may clip gradients in its step
        self.grad_scaler.step(self.optimizer)
        scale = self.grad_scaler.get_scale()
        self.grad_scaler.update()
        if self.grad_scaler.is_enabled():
            self.skipped += self.grad_scaler.get_scale() < scale
            get_event_storage().put_scalar("skipped_steps", self.skipped)
        self.samples += len(batch) * comm.get_world_size()
        self.last_step = self.iter

    def _split(self, batch: list[dict]) -> list[list[dict]]:
        size = len(batch) // self.parts
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def _forward(self, part: list[dict]) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(part)

    def _check(self, losses: dict[str, torch.Tensor], batch: list[dict]) -> None:
        """Raises UserError that names the terms and the layer that are not finite, and the images of the batch."""
        terms = dict(losses)
        if not self.grad_scaler.is_enabled():  # which looks for itself
            weights = (weight for group in self.optimizer.param_groups for weight in group["params"])
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            terms["norm of the gradient"] = torch.stack(torch._foreach_norm(gradients)).norm()
        values = torch.stack(list(terms.values())).tolist()
        bad = [f"{name} = {value}" for name, value in zip(terms, values, strict=True) if not math.isfinite(value)]
        if not bad:
            return
        self.last_step = None
        seed_by(self.seed, self.iter, comm.get_rank())
        layer = first_not_finite(self.model, lambda: [self._forward(part) for part in self._split(batch)])
        images = ", ".join(str(record.get("file_name", record.get("image_id"))) for record in batch)
        raise UserError(
            f"the training is no longer finite at iteration {self.iter}: {', '.join(bad)}; {layer}; images: {images}. "
            "The last checkpoint is kept. Try a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, or "
            "SOLVER.CLIP_GRADIENTS.ENABLED True, with SOLVER.AMP also PRECISION bfloat16, and look at the images"
        )

    def state_dict(self) -> dict:
        """Returns Detectron2's training state, the scale of the loss, and where the run is in its samples."""
        own = {"grad_scaler": self.grad_scaler.state_dict(), "seed": self.seed, "samples": self.samples}
        return super().state_dict() | own | {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what :meth:`state_dict` returns. Raises UserError if other parts were learning."""
        try:
            super().load_state_dict(state_dict)
            for weight, moments in self.optimizer.state.items():
                shapes = {tuple(moment.shape) for moment in moments.values() if getattr(moment, "ndim", 0)}
                if not shapes <= {tuple(weight.shape)}:  # with which the optimizer would read beyond its memory
                    raise ValueError(f"moments of shape {min(shapes)} for a weight of shape {tuple(weight.shape)}")
        except ValueError as error:
            raise UserError(f"cannot resume ({error}): SOLVER.FREEZE or LAYER_DECAY was another one") from error
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.seed, self.samples, self.skipped = (state_dict[name] for name in ("seed", "samples", "skipped"))
