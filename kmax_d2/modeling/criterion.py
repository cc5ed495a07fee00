"""The training loss of the final and all auxiliary predictions against the ground truth of a batch."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from . import losses
from .build import keyword_arguments, thing_mask
from .matcher import VOID, Targets, match
from .predictor import Prediction

CRITERION_REGISTRY = Registry("CRITERION")
CRITERION_REGISTRY.__doc__ = """
Training losses, named by `MODEL.KMAX.LOSS.NAME` and called with `(cfg)`. The forward pass takes the arguments of
:meth:`Criterion.forward` and returns the weighted losses by name. A subclass of Criterion may replace only `match`.
"""


@CRITERION_REGISTRY.register()
class Criterion(nn.Module):
    """One matching, from the final prediction, serves every prediction's terms; each term has its weight.

    Arguments are the options of MODEL.KMAX.LOSS, and for each of the K contiguous classes whether it is a thing, which
    is read where `semantic_hard_share` is not 0.
    """

    match = staticmethod(match)

    @configurable
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
        semantic_hard_share: float = 0.0,
        is_thing: Sequence[bool] = (),
        small_instance_area: int = 4096,
        small_instance_weight: float = 1.0,
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
        self.semantic_hard_share = semantic_hard_share
        self.small_instance_area = small_instance_area
        self.small_instance_weight = small_instance_weight
        self.register_buffer("is_thing", torch.as_tensor(is_thing, dtype=torch.bool), persistent=False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Reads the constructor's arguments from a config."""
        return keyword_arguments(cfg.MODEL.KMAX.LOSS) | {"is_thing": thing_mask(cfg)}

    def forward(
        self,
        final: Prediction,
        auxiliary: Sequence[Prediction],
        targets: Targets,
        semantic_logits: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Weighted losses by name, each a mean over the batch.

        Args:
            final: the final prediction, at the size (h, w) that the targets are read at.
            auxiliary: those of the decoders, of any size.
            targets: ground truth with P = h · w.
            semantic_logits: (B, K or K + 1, h', w') of the auxiliary semantic head, if there is one, of any size; for
                the hardest pixels each position is one of the targets'.

        Returns:
            "loss_<term>" of the final prediction, "loss_<term>_<i>" of the i-th auxiliary one, and "loss_semantic".
        """
        # Sums over a whole map need float32, also under autocast.
        with torch.autocast(final.mask_logits.device.type, enabled=False):
            predictions = [Prediction(*(tensor.float() for tensor in p)) for p in (final, *auxiliary)]
            weighted = self._matched_losses(predictions, targets)
            if semantic_logits is not None:
                terms = self._semantic_losses(semantic_logits.float(), targets, final.mask_logits.shape[-2:])
                weighted["loss_semantic"] = self.weights["loss_semantic"] * terms.mean()
        return weighted

    def _matched_losses(self, predictions: Sequence[Prediction], targets: Targets) -> dict[str, torch.Tensor]:
        """Every term of every prediction, the final one first; all go through each term as one batch."""
        final, count = predictions[0], len(predictions)
        size = final.mask_logits.shape[-2:]
        matching = self.match(final.class_logits, final.mask_logits.flatten(2), targets)
        targets = targets.repeat(count)
        class_logits = torch.cat([p.class_logits for p in predictions])
        maps = [p.mask_logits for p in predictions]
        log_probability = torch.cat([losses.matched_log_probability(logits, matching, size) for logits in maps])
        matching = matching.repeat(count)
        pixels = losses.sample_pixels(targets, self.num_samples, self.instance_temperature)
        samples = zip(predictions, pixels.chunk(count), strict=True)
        features = torch.cat([losses.sample_features(p.pixel_feature, own, size) for p, own in samples])
        floor = self.min_pq_weight
        terms = {
            "loss_pq_class": losses.pq_class_loss(class_logits, targets, matching, floor),
            "loss_pq_mask": losses.pq_mask_loss(log_probability, class_logits.shape[1], targets, matching, floor),
            "loss_mask_id": losses.mask_id_loss(log_probability, targets, matching),
            "loss_instance": losses.instance_discrimination_loss(features, pixels, targets),
        }
        means = {name: self.weights[name] * term.view(count, -1).mean(1) for name, term in terms.items()}
        weighted = {name: values[0] for name, values in means.items()}
        for index in range(1, count):
            weighted |= {f"{name}_{index - 1}": values[index] for name, values in means.items()}
        return weighted

    def _semantic_losses(self, logits: torch.Tensor, targets: Targets, size: Sequence[int]) -> torch.Tensor:
        if self.semantic_hard_share > 0:
            step = (size[0] - 1) // (logits.shape[2] - 1)
            ids = targets.segment_ids.unflatten(1, size)[:, ::step, ::step].flatten(1)
            area, weight = self.small_instance_area, self.small_instance_weight
            weights = losses.small_instance_weights(targets, self.is_thing, area, weight)
            return losses.hardest_semantic_loss(logits.flatten(2), ids, targets, weights, self.semantic_hard_share)
        pixels = losses.sample_pixels(targets, self.num_samples, self.semantic_temperature)
        return losses.semantic_loss(losses.sample_features(logits, pixels, size), pixels, targets)


def make_targets(
    segment_ids: Sequence[torch.Tensor], classes: Sequence[torch.Tensor], size: Sequence[int], stride: int
) -> Targets:
    """Reads id maps at every `stride`-th pixel, renumbers the masks that are left and counts all their pixels.

    Args:
        segment_ids: for each image (H, W) integers, the index of the pixel's mask or -1 for void.
        classes: for each image (S,) the contiguous class of each mask.
        size: (h, w) of the mask logits; where an id map is smaller, the rest is void.
        stride: pixels between two positions of the mask logits.
    """
    device = segment_ids[0].device
    ids = torch.full((len(segment_ids), *size), VOID, device=device)
    kept, areas = [], []
    for row, image_ids, image_classes in zip(ids, segment_ids, classes, strict=True):
        strided = image_ids[::stride, ::stride]
        row[: strided.shape[0], : strided.shape[1]] = strided
        present = torch.bincount(row.flatten() + 1, minlength=len(image_classes) + 1)[1:] > 0
        # Masks without a pixel left are dropped; index 0 of the table is void.
        table = torch.cat([present.new_full((1,), VOID, dtype=torch.int64), present.cumsum(0) - 1])
        row.copy_(table[row + 1])
        kept.append(image_classes[present])
        areas.append(torch.bincount(image_ids.flatten() + 1, minlength=len(image_classes) + 1)[1:][present])
    # A row of length one more, so that S ≥ 1 where no image has a mask.
    padding = torch.full((1,), VOID, device=device)
    return Targets(
        ids.flatten(1),
        pad_sequence([*kept, padding], batch_first=True, padding_value=VOID)[:-1],
        pad_sequence([*areas, padding], batch_first=True)[:-1],
    )
