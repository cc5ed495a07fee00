"""From the prediction for one image to Detectron2's results at the original size."""

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes, Instances
from torch import nn

from .build import find_part
from .merging import MERGING_REGISTRY, MaskWiseMerging, Segmentation, count_values, look_up
from .top_two import by_rows, marginal_classes, row_strips


class ModelOutput(dict):
    """The results for one image by name, each computed when it is first read. Copies are plain dicts with all values.

    Args:
        compute: for each name the function that gives its result, called with this dict.
    """

    def __init__(self, compute: Mapping[str, Callable[[dict], Any]]):
        super().__init__({name: _Deferred(function) for name, function in compute.items()})

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, _Deferred):
            with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                value = self[name] = value.function(self)
        return value

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # with a method of its own, dict(self) reads values by __getitem__

    get, items, values = Mapping.get, Mapping.items, Mapping.values  # type: ignore[assignment]
    pop, popitem, setdefault = MutableMapping.pop, MutableMapping.popitem, MutableMapping.setdefault  # type: ignore

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)

    def copy(self) -> dict:
        """Returns a plain dict with all values."""
        return dict(self)


class _Deferred(NamedTuple):
    """A value that is not computed yet."""

    function: Callable[[dict], Any]


def one_hot(classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Class map (H, W) int64 to Detectron2's (K, H, W) uint8."""
    result = torch.zeros(num_classes, *classes.shape, dtype=torch.uint8, device=classes.device)
    return result.scatter_(0, classes[None], 1)


class Postprocessor(nn.Module):
    """Merges the prediction for one image, and resizes the results to the original size.

    Args:
        merging: a prediction to a panoptic segmentation.
        merge_at_crop: merge on the padded image and resize ids; else resize logits to the original size and merge.
        outputs: which of "panoptic", "semantic" and "instance" to give.
        semantic: "query" or "marginal", :func:`query_classes` or :func:`~kmax_d2.modeling.top_two.marginal_classes`.
        instance: "query" or "panoptic", :meth:`query_instances` or :meth:`panoptic_instances`.
        max_instances: most instances of an image; those with the best scores are kept.
    """

    @configurable
    def __init__(
        self,
        merging: MaskWiseMerging,
        *,
        merge_at_crop: bool = True,
        outputs: Sequence[str] = ("panoptic", "semantic", "instance"),
        semantic: str = "query",
        instance: str = "query",
        max_instances: int = 100,
    ):
        super().__init__()
        self.merging = merging
        self.merge_at_crop = merge_at_crop
        self.outputs = tuple(outputs)
        self.semantic = semantic
        self.instance = instance
        self.max_instances = max_instances

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Reads the constructor's arguments from a config."""
        test = cfg.MODEL.KMAX.TEST
        wanted = {"panoptic": test.PANOPTIC_ON, "semantic": test.SEMANTIC_ON, "instance": test.INSTANCE_ON}
        return {
            "merging": find_part(MERGING_REGISTRY, "MODEL.KMAX.TEST.MERGING", test.MERGING).from_config(cfg),
            "merge_at_crop": test.MERGE_AT_CROP,
            "outputs": [name for name, on in wanted.items() if on],
            "semantic": test.SEMANTIC,
            "instance": test.INSTANCE,
            "max_instances": test.MAX_INSTANCES,
        }

    def forward(
        self,
        class_logits: torch.Tensor,
        mask_logits: torch.Tensor,
        padded: tuple[int, int],
        real: tuple[int, int],
        original: tuple[int, int],
    ) -> ModelOutput:
        """Gives the results for one image.

        Args:
            class_logits: (N, K + 1), void last.
            mask_logits: (N, h, w), over the padded image.
            padded, real, original: (height, width) of the image with padding, without it, and of the results.
        """
        size, extent = padded, (1.0, 1.0)
        if not self.merge_at_crop:
            size, extent = original, ((real[0] - 1) / (padded[0] - 1), (real[1] - 1) / (padded[1] - 1))
            real = original
        merged = self.merging(class_logits, mask_logits, size, extent)
        compute: dict[str, Callable[[dict], Any]] = {}
        if "panoptic" in self.outputs:
            compute["panoptic_seg"] = lambda _: panoptic_result(merged, real, original)
        if "semantic" in self.outputs:
            by_query = self.semantic == "query"
            logits = None if by_query else (class_logits, mask_logits)  # kept in memory only where they are needed

            def semantic(_: dict) -> torch.Tensor:
                classes = query_classes(merged) if logits is None else marginal_classes(*logits, size, extent)
                return resize_nearest(classes, real, original)

            num_classes = class_logits.shape[1] - 1
            compute["semantic"] = semantic
            compute["sem_seg"] = lambda output: one_hot(output["semantic"], num_classes)
        if "instance" in self.outputs:
            instances = self.query_instances if self.instance == "query" else self.panoptic_instances
            compute["instances"] = lambda _: instances(merged, real, original)
        return ModelOutput(compute)

    def panoptic_instances(self, merged: Segmentation, real: tuple[int, int], size: tuple[int, int]) -> Instances:
        """The official instances: pixels of each thing class in :func:`query_classes`, split by the pasted queries.

        Instances do not overlap. The score is the mean class confidence of the pixels times the mean of their largest
        mask probability. `real` is without padding, `size` that of the result.
        """
        num_queries, is_thing = len(merged.query_class), self.merging.is_thing.to(merged.query_class.device)
        # An instance is a pair of class and pasted query; the last key is for the pixels of none.
        none = len(is_thing) * num_queries
        first_key = (merged.query_class * num_queries).where(is_thing[merged.query_class], none)

        def key_of(top: torch.Tensor, pasted: torch.Tensor) -> torch.Tensor:
            return torch.where(pasted >= 0, look_up(first_key, top) + pasted, none).clamp_max(none).int()

        maps = merged.best_query, merged.best_probability, merged.pasted_query
        top, probability, pasted = (resize_nearest(x, real, size) for x in maps)
        key = by_rows(key_of, top, pasted)
        sums = torch.zeros(3, none + 1, dtype=torch.float64, device=key.device)
        for rows in row_strips(size):
            confidence = look_up(merged.query_confidence, top[rows])
            weights = torch.ones_like(confidence), confidence, probability[rows]
            flat = key[rows].flatten()
            sums += torch.stack([flat.bincount(x.flatten().double(), minlength=none + 1) for x in weights])
        area, confidence, mask_probability = sums[:, :-1]
        score = (confidence * mask_probability / area.clamp_min(1) ** 2).float()
        score, kept = score.topk(min(self.max_instances, none))
        kept, score = kept[score > 0], score[score > 0]
        return _instances(key == kept[:, None, None].int(), score, kept // num_queries)

    def query_instances(self, merged: Segmentation, real: tuple[int, int], size: tuple[int, int]) -> Instances:
        """The usual instances: the best thing queries with their whole masks, scored by class confidence × mask score.

        `real` is without padding, `size` that of the result.
        """
        is_thing = self.merging.is_thing.to(merged.query_class.device)
        score = merged.query_score.where(is_thing[merged.query_class], 0)
        score, query = score.topk(min(self.max_instances, len(score)))
        at_pixels = resize_nearest(merged.masks, real, size)
        areas = torch.zeros(len(merged.query_score) + 1, dtype=torch.int64, device=score.device)  # the last is of none
        for rows in row_strips(size):
            areas += count_values(at_pixels[:, rows].long(), len(areas))
        kept = (score > 0) & (areas[query] > 0)
        score, query = score[kept], query[kept]
        wanted = query.short()[:, None, None]
        masks = by_rows(lambda strip: (strip[0] == wanted) | (strip[1] == wanted), at_pixels)
        return _instances(masks, score, merged.query_class[query])


def resize_nearest(labels: torch.Tensor, real: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Cuts the real part out of padded labels (..., H, W) and resizes it to `size` by the nearest pixel centers."""
    if tuple(labels.shape[-2:]) == tuple(size) == tuple(real):
        return labels
    rows, columns = (
        ((torch.arange(n, device=labels.device) + 0.5) * (m / n)).long().clamp_max(m - 1)
        for m, n in zip(real, size, strict=True)
    )
    return labels[..., rows[:, None], columns]


def panoptic_result(
    merged: Segmentation, real: tuple[int, int], size: tuple[int, int]
) -> tuple[torch.Tensor, list[dict]]:
    """Segment ids (H, W) int32 at `size`, and the segments that have a pixel there."""
    segment_ids = resize_nearest(merged.segment_ids, real, size)
    areas = torch.bincount(segment_ids.flatten(), minlength=len(merged.segments) + 1).tolist()
    return segment_ids, [s | {"area": areas[s["id"]]} for s in merged.segments if areas[s["id"]] > 0]


def query_classes(merged: Segmentation) -> torch.Tensor:
    """(H, W) class of the query with the largest mask logit at each pixel, without thresholds, as officially."""
    return by_rows(functools.partial(look_up, merged.query_class), merged.best_query)


def _instances(masks: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor) -> Instances:
    """Masks (n, H, W), none of them empty, with their boxes, which reach to the far edge of their last pixel."""
    sides = masks.any(1).byte(), masks.any(2).byte()  # columns, rows
    first, behind = [x.argmax(1) for x in sides], [x.shape[1] - x.flip(1).argmax(1) for x in sides]
    boxes = Boxes(torch.stack([*first, *behind], dim=1).float())
    size = tuple(masks.shape[-2:])
    return Instances(size, pred_masks=masks, pred_boxes=boxes, scores=scores, pred_classes=classes)
