"""The training loss of the final and all auxiliary predictions against the ground truth of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .layers import resize
from .losses import (
    instance_discrimination_loss,
    mask_id_loss,
    pq_class_loss,
    pq_mask_loss,
    sample_features,
    sample_pixels,
    semantic_loss,
)
from .matcher import VOID, Targets, match
from .predictor import Prediction


class Criterion(nn.Module):
    """One matching, from the final prediction, serves every prediction's terms; each term has its weight.

    Args:
        pq_weight: of both PQ-style terms.
        mask_id_weight: of the mask-id cross-entropy.
        instance_weight: of the pixel-wise instance discrimination.
        semantic_weight: of the auxiliary semantic loss.
        num_samples: pixels sampled for the instance and semantic terms.
        instance_temperature, semantic_temperature: how much these samples prefer small masks.
        min_pq_weight: floor of the detached weights of the PQ-style terms.
    """

    def __init__(
        self,
        *,
        pq_weight: float = 3.0,
        mask_id_weight: float = 0.3,
        instance_weight: float = 1.0,
        semantic_weight: float = 1.0,
        num_samples: int = 4096,
        instance_temperature: float = 1.5,
        semantic_temperature: float = 2.0,
        min_pq_weight: float = 1e-5,
    ):
        super().__init__()
        self.weights = {
            "loss_pq_class": pq_weight,
            "loss_pq_mask": pq_weight,
            "loss_mask_id": mask_id_weight,
            "loss_instance": instance_weight,
            "loss_semantic": semantic_weight,
        }
        self.num_samples = num_samples
        self.instance_temperature = instance_temperature
        self.semantic_temperature = semantic_temperature
        self.min_pq_weight = min_pq_weight

    def forward(
        self,
        final: Prediction,
        auxiliary: Sequence[Prediction],
        semantic_logits: torch.Tensor | None,
        targets: Targets,
    ) -> dict[str, torch.Tensor]:
        """Weighted losses by name, each a mean over the batch.

        Args:
            final: the final prediction, at the size (h, w) that the targets are read at.
            auxiliary: those of the decoders, of any size.
            semantic_logits: (B, K + 1, h, w), or None without a semantic head.
            targets: ground truth with P = h · w.

        Returns:
            "loss_<term>" of the final prediction, "loss_<term>_<i>" of the i-th auxiliary one, and "loss_semantic".
        """
        # Sums over a whole map need float32, also under autocast.
        with torch.autocast(final.mask_logits.device.type, enabled=False):
            predictions = [Prediction(*(tensor.float() for tensor in p)) for p in (final, *auxiliary)]
            losses = self._matched_losses(predictions, targets)
            if semantic_logits is not None:
                losses["loss_semantic"] = self._semantic_loss(semantic_logits.float(), targets, final)
        return losses

    def _matched_losses(self, predictions: Sequence[Prediction], targets: Targets) -> dict[str, torch.Tensor]:
        """Every term of every prediction, the final one first; all go through each term as one batch."""
        final, count = predictions[0], len(predictions)
        size = final.mask_logits.shape[-2:]
        matching = match(final.class_logits, final.mask_logits.flatten(2), targets).repeat(count)
        targets = targets.repeat(count)
        class_logits = torch.cat([p.class_logits for p in predictions])
        mask_logits = torch.cat([resize(p.mask_logits, size).flatten(2) for p in predictions])
        log_partition = mask_logits.logsumexp(1)
        pixels = sample_pixels(targets, self.num_samples, self.instance_temperature)
        features = torch.cat(
            [
                sample_features(p.pixel_feature, own, size)
                for p, own in zip(predictions, pixels.chunk(count), strict=True)
            ]
        )
        floor = self.min_pq_weight
        terms = {
            "loss_pq_class": pq_class_loss(class_logits, targets, matching, floor),
            "loss_pq_mask": pq_mask_loss(mask_logits, log_partition, targets, matching, floor),
            "loss_mask_id": mask_id_loss(mask_logits, log_partition, targets, matching),
            "loss_instance": instance_discrimination_loss(features, pixels, targets),
        }
        means = {name: self.weights[name] * term.view(count, -1).mean(1) for name, term in terms.items()}
        losses = {name: values[0] for name, values in means.items()}
        for index in range(1, count):
            losses |= {f"{name}_{index - 1}": values[index] for name, values in means.items()}
        return losses

    def _semantic_loss(self, logits: torch.Tensor, targets: Targets, final: Prediction) -> torch.Tensor:
        pixels = sample_pixels(targets, self.num_samples, self.semantic_temperature)
        sampled = sample_features(logits, pixels, final.mask_logits.shape[-2:])
        return self.weights["loss_semantic"] * semantic_loss(sampled, pixels, targets).mean()


def make_targets(
    segment_ids: Sequence[torch.Tensor], classes: Sequence[torch.Tensor], size: tuple[int, int], stride: int
) -> Targets:
    """Reads id maps at every `stride`-th pixel and renumbers the masks that are left.

    Args:
        segment_ids: for each image (H, W) integers, the index of the pixel's mask or -1 for void.
        classes: for each image (S,) the contiguous class of each mask.
        size: (h, w) of the mask logits; where an id map is smaller, the rest is void.
        stride: pixels between two positions of the mask logits.
    """
    device = segment_ids[0].device
    ids = torch.full((len(segment_ids), *size), VOID, device=device)
    kept = []
    for row, image_ids, image_classes in zip(ids, segment_ids, classes, strict=True):
        strided = image_ids[::stride, ::stride]
        row[: strided.shape[0], : strided.shape[1]] = strided
        present = torch.bincount(row.flatten() + 1, minlength=len(image_classes) + 1)[1:] > 0
        # Masks without a pixel left are dropped; index 0 of the table is void.
        table = torch.cat([present.new_full((1,), VOID, dtype=torch.int64), present.cumsum(0) - 1])
        row.copy_(table[row + 1])
        kept.append(image_classes[present])
    padded = torch.full((len(kept), max(1, *(len(c) for c in kept))), VOID, device=device)
    for row, image_classes in zip(padded, kept, strict=True):
        row[: len(image_classes)] = image_classes
    return Targets(ids.flatten(1), padded)
