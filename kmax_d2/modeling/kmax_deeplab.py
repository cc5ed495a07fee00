"""The meta-architecture: images in, losses in training, panoptic, semantic and instance segmentation at test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from torch import nn

from ..errors import UserError, did_you_mean
from .criterion import Criterion, make_targets
from .cross_attention import CROSS_ATTENTION_REGISTRY
from .early_gradient import early_gradient
from .kmax_decoder import TRANSFORMER_DECODER_REGISTRY
from .merging import MaskWiseMerging
from .pixel_decoder import PIXEL_DECODER_REGISTRY
from .postprocess import panoptic_instances, panoptic_result, query_classes, query_instances, semantic_result
from .predictor import Prediction
from .recompute import recompute_blocks
from .semantic_head import SEMANTIC_HEAD_REGISTRY
from .top_two import marginal_classes

STRIDE = 32  # the coarsest map's; sides are padded to 32k + 1


def padded_side(side: int) -> int:
    """The next 32k + 1 at or above `side`, in pixels; 33 at least."""
    return max(1, -(-(side - 1) // STRIDE)) * STRIDE + 1


@META_ARCH_REGISTRY.register()
class KMaXDeepLab(nn.Module):
    """kMaX-DeepLab (https://arxiv.org/abs/2207.04044).

    Args:
        backbone: images to maps by name.
        pixel_decoder: these to a list of maps, coarse to fine.
        transformer_decoder: the list to the final and the auxiliary predictions.
        semantic_head: the backbone's maps to semantic logits, in training only; None for none.
        criterion: predictions and targets to losses.
        merging: a prediction to a panoptic segmentation.
        num_classes: K, without void.
        pixel_mean, pixel_std: scaling of the channels.
        input_format: "RGB" or "BGR", the order of the channels in the images that the dicts hold.
        test_size: (height, width) that test images are padded to; None pads to the next 32k + 1.
        merge_at_crop: merge on the padded image and resize ids; else resize logits to the original size and merge.
        outputs: which of "panoptic", "semantic" and "instance" to give.
        semantic: "query" or "marginal", :func:`~kmax_d2.modeling.postprocess.query_classes` or
            :func:`~kmax_d2.modeling.top_two.marginal_classes`.
        instance: "query" or "panoptic", :func:`~kmax_d2.modeling.postprocess.query_instances` or
            :func:`~kmax_d2.modeling.postprocess.panoptic_instances`.
        max_instances: instances kept for each image.
        recompute: whether residual blocks keep only their inputs for the gradient.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        pixel_decoder: nn.Module,
        transformer_decoder: nn.Module,
        semantic_head: nn.Module | None,
        criterion: Criterion,
        merging: MaskWiseMerging,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        test_size: tuple[int, int] | None = None,
        merge_at_crop: bool = True,
        outputs: Sequence[str] = ("panoptic", "semantic", "instance"),
        semantic: str = "query",
        instance: str = "query",
        max_instances: int = 100,
        recompute: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.transformer_decoder = transformer_decoder
        self.semantic_head = semantic_head
        self.criterion = criterion
        self.merging = merging
        self.num_classes = num_classes
        self.input_format = input_format
        self.test_size = test_size
        self.merge_at_crop = merge_at_crop
        self.outputs = tuple(outputs)
        self.semantic = _one_of("SEMANTIC", semantic, ("query", "marginal"))
        self.instance = _one_of("INSTANCE", instance, ("query", "panoptic"))
        self.max_instances = max_instances
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        if recompute:
            recompute_blocks(self)
        # Batch norms, depthwise convolutions and layer norms are fastest with channels last.
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg) -> dict:
        kmax, loss, test = cfg.MODEL.KMAX, cfg.MODEL.KMAX.LOSS, cfg.MODEL.KMAX.TEST
        if kmax.NUM_CLASSES < 1:
            raise ValueError("MODEL.KMAX.NUM_CLASSES is not set, and only kmax_d2.engine.setup takes it from a dataset")
        _require_registered(cfg)
        backbone = build_backbone(cfg)
        shape = backbone.output_shape()
        pixel_decoder = PIXEL_DECODER_REGISTRY.get(kmax.PIXEL_DECODER.NAME)(cfg, shape)
        decoder = TRANSFORMER_DECODER_REGISTRY.get(kmax.TRANSFORMER_DECODER.NAME)(cfg, pixel_decoder.output_shape())
        semantic_head = None
        if loss.SEMANTIC_WEIGHT > 0:
            act_layer = getattr(backbone, "act_layer", nn.ReLU)
            semantic_head = SEMANTIC_HEAD_REGISTRY.get(kmax.SEMANTIC_HEAD.NAME)(cfg, shape, act_layer)
        things = thing_classes(cfg)
        is_thing = [index in things for index in range(kmax.NUM_CLASSES)]
        merging = MaskWiseMerging(
            is_thing,
            pixel_threshold=test.PIXEL_THRESHOLD,
            thing_threshold=test.THING_THRESHOLD,
            stuff_threshold=test.STUFF_THRESHOLD,
            overlap_threshold=test.OVERLAP_THRESHOLD,
            class_power=test.CLASS_POWER,
            mask_power=test.MASK_POWER,
            thing_area_limit=test.THING_AREA_LIMIT if test.MERGE_AT_CROP else 0,
            stuff_area_limit=test.STUFF_AREA_LIMIT if test.MERGE_AT_CROP else 0,
        )
        criterion = Criterion(
            pq_weight=loss.PQ_WEIGHT,
            mask_id_weight=loss.MASK_ID_WEIGHT,
            instance_weight=loss.INSTANCE_WEIGHT,
            semantic_weight=loss.SEMANTIC_WEIGHT,
            num_samples=loss.NUM_SAMPLES,
            instance_temperature=loss.INSTANCE_TEMPERATURE,
            semantic_temperature=loss.SEMANTIC_TEMPERATURE,
            min_pq_weight=loss.MIN_PQ_WEIGHT,
            semantic_hard_share=loss.SEMANTIC_HARD_SHARE,
            is_thing=is_thing,
            small_instance_area=loss.SMALL_INSTANCE_AREA,
            small_instance_weight=loss.SMALL_INSTANCE_WEIGHT,
        )
        wanted = {"panoptic": test.PANOPTIC_ON, "semantic": test.SEMANTIC_ON, "instance": test.INSTANCE_ON}
        return {
            "backbone": backbone,
            "pixel_decoder": pixel_decoder,
            "transformer_decoder": decoder,
            "semantic_head": semantic_head,
            "criterion": criterion,
            "merging": merging,
            "num_classes": kmax.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "test_size": tuple(cfg.INPUT.CROP_SIZE) if test.PAD_TO_CROP else None,
            "merge_at_crop": test.MERGE_AT_CROP,
            "outputs": [name for name, on in wanted.items() if on],
            "semantic": test.SEMANTIC,
            "instance": test.INSTANCE,
            "max_instances": test.MAX_INSTANCES,
            "recompute": kmax.RECOMPUTE_BLOCKS,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Detectron2's interface.

        Args:
            batched_inputs: for each image a dict with "image" (3, H, W), 0 to 255 in the configured channel order; in
                training "segment_ids" (H, W), the index of each pixel's mask or -1 for void, and "segment_classes"
                (S,), the contiguous class of each mask; at test optionally "height" and "width" of the result.

        Returns:
            In training the losses by name. At test for each image a dict with "panoptic_seg", a map (H, W) of segment
            ids and the list of segments; "sem_seg" (K, H, W), one-hot; "instances", with masks, scores and classes.
        """
        images = [self._channels_in_order(x["image"].to(self.device, non_blocking=True)) for x in batched_inputs]
        if self.training:
            return self._losses(images, batched_inputs)
        results: list[dict | None] = [None] * len(images)
        # Images of one padded size go through the network together: padding never depends on a neighbour.
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(self._test_size_of(image), []).append(index)
        for size, members in groups.items():
            prediction, _ = self._predict(self._batch([images[i] for i in members], size))
            # What follows the network is in float32, also under autocast.
            with torch.autocast(self.device.type, enabled=False):
                for row, index in enumerate(members):
                    results[index] = self._segment(prediction, row, images[index], batched_inputs[index], size)
        return results

    @torch.no_grad()
    def predict(self, images: torch.Tensor, auxiliary: bool = False) -> dict[str, torch.Tensor]:
        """The raw network, in inference mode whatever mode the model is in.

        Args:
            images: (B, 3, H, W), RGB, 0 to 255, integers or floats, of any size.
            auxiliary: give the decoders' own predictions too.

        Returns:
            "class_logits" (B, N, K + 1), contiguous classes and void last; "mask_logits" (B, N, h, w) with h and w at
            the stride of the finest map (4), position (i, j) standing for pixel (4 i, 4 j); "pixel_feature"
            (B, C, h, w). With `auxiliary` also "auxiliary", a list with the same of each decoder at its own stride.
        """
        training = self.training
        self.eval()
        try:
            height, width = images.shape[-2:]
            size = (padded_side(height), padded_side(width))
            final, others = self._predict(self._batch(list(images.to(self.device)), size), auxiliary)
        finally:
            self.train(training)

        def cropped(prediction: Prediction) -> dict[str, torch.Tensor]:
            stride = (size[1] - 1) // (prediction.mask_logits.shape[-1] - 1)
            h, w = (height - 1) // stride + 1, (width - 1) // stride + 1
            return {
                "class_logits": prediction.class_logits,
                "mask_logits": prediction.mask_logits[..., :h, :w],
                "pixel_feature": prediction.pixel_feature[..., :h, :w],
            }

        result = cropped(final)
        if auxiliary:
            result["auxiliary"] = [cropped(prediction) for prediction in others]
        return result

    def _channels_in_order(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(0) if self.input_format == "BGR" else image

    def _test_size_of(self, image: torch.Tensor) -> tuple[int, int]:
        height, width = image.shape[-2:]
        if self.test_size is not None and height <= self.test_size[0] and width <= self.test_size[1]:
            height, width = self.test_size
        return padded_side(height), padded_side(width)

    def _batch(self, images: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Scales images and pads them with zeros at the bottom and right: (B, 3, *size)."""
        batch = self.pixel_mean.new_zeros(len(images), 3, *size).to(memory_format=torch.channels_last)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = (image - self.pixel_mean) / self.pixel_std
        return batch

    def _predict(self, batch: torch.Tensor, auxiliary_classes: bool = False) -> tuple[Prediction, list[Prediction]]:
        return self.transformer_decoder(self.pixel_decoder(self.backbone(batch)), auxiliary_classes)

    def _losses(self, images: list[torch.Tensor], batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        size = (
            padded_side(max(image.shape[1] for image in images)),
            padded_side(max(image.shape[2] for image in images)),
        )
        stride = self.pixel_decoder.output_shape()[-1].stride
        map_size = ((size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1)
        targets = make_targets(
            [x["segment_ids"].to(self.device, non_blocking=True) for x in batched_inputs],
            [x["segment_classes"].to(self.device, non_blocking=True) for x in batched_inputs],
            map_size,
            stride,
        )
        features = self.backbone(self._batch(images, size))
        losses = {}
        if self.semantic_head is not None:

            def semantic_loss(*maps: torch.Tensor) -> torch.Tensor:
                logits = self.semantic_head(dict(zip(features, maps, strict=True)))
                return self.criterion.semantic_loss(logits, targets, map_size)

            losses["loss_semantic"] = early_gradient(semantic_loss, list(features.values()), self.semantic_head)
        final, auxiliary = self.transformer_decoder(self.pixel_decoder(features), True)
        return self.criterion(final, auxiliary, targets) | losses

    def _segment(
        self, prediction: Prediction, row: int, image: torch.Tensor, inputs: dict, padded: tuple[int, int]
    ) -> dict:
        """The results of one image at its original size."""
        real = tuple(image.shape[-2:])
        original = (inputs.get("height", real[0]), inputs.get("width", real[1]))
        class_logits, mask_logits = prediction.class_logits[row], prediction.mask_logits[row]
        if self.merge_at_crop:
            place = padded, (1.0, 1.0)
        else:
            place = original, tuple((r - 1) / (p - 1) for r, p in zip(real, padded, strict=True))
            real = original
        merged = self.merging(class_logits, mask_logits, *place)
        result = {}
        if "panoptic" in self.outputs:
            result["panoptic_seg"] = panoptic_result(merged, real, original)
        if "semantic" in self.outputs:
            if self.semantic == "query":
                classes = query_classes(merged)
            else:
                classes = marginal_classes(class_logits, mask_logits, *place)
            result["sem_seg"] = semantic_result(classes, self.num_classes, real, original)
        if "instance" in self.outputs:
            place = self.max_instances, real, original
            if self.instance == "panoptic":
                result["instances"] = panoptic_instances(merged, self.merging.is_thing, *place)
            else:
                threshold = self.merging.pixel_threshold
                result["instances"] = query_instances(merged, self.merging.is_thing, threshold, *place)
        return result


def _one_of(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise UserError(f"MODEL.KMAX.TEST.{option} is {value}, but there are {' and '.join(known)}")
    return value


def _require_registered(cfg) -> None:
    """Raises UserError for an option that names a part which is in no registry."""
    kmax = cfg.MODEL.KMAX
    parts = {
        "BACKBONE.NAME": (BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME),
        "KMAX.PIXEL_DECODER.NAME": (PIXEL_DECODER_REGISTRY, kmax.PIXEL_DECODER.NAME),
        "KMAX.TRANSFORMER_DECODER.NAME": (TRANSFORMER_DECODER_REGISTRY, kmax.TRANSFORMER_DECODER.NAME),
        "KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION": (
            CROSS_ATTENTION_REGISTRY,
            kmax.TRANSFORMER_DECODER.CROSS_ATTENTION,
        ),
        "KMAX.SEMANTIC_HEAD.NAME": (SEMANTIC_HEAD_REGISTRY, kmax.SEMANTIC_HEAD.NAME),
    }
    for option, (registry, name) in parts.items():
        if name not in registry:
            known = sorted(registered for registered, _ in registry)
            raise UserError(f"MODEL.{option} is {name}, but there are {', '.join(known)}{did_you_mean(name, known)}")


def thing_classes(cfg) -> set[int]:
    """Contiguous classes of the test (else training) dataset that are things."""
    names = list(cfg.DATASETS.TEST) + list(cfg.DATASETS.TRAIN)
    if not names:
        return set()
    return set(MetadataCatalog.get(names[0]).get("thing_dataset_id_to_contiguous_id", {}).values())
