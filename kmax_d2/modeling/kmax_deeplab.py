"""The meta-architecture: images to losses in training, to panoptic, semantic and instance segmentation at test."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import UserError
from .build import build_from
from .criterion import CRITERION_REGISTRY, make_targets
from .inputs import check_images, check_inputs
from .kmax_decoder import TRANSFORMER_DECODER_REGISTRY
from .layers import backbone_maps, evaluating, padded_side
from .merging import MaskWiseMerging
from .pixel_decoder import PIXEL_DECODER_REGISTRY
from .postprocess import ModelOutput, Postprocessor
from .predictor import Prediction
from .semantic_head import SEMANTIC_HEAD_REGISTRY


@META_ARCH_REGISTRY.register()
class KMaXDeepLab(nn.Module):
    """kMaX-DeepLab (https://arxiv.org/abs/2207.04044).

    The backbone turns images into maps by name, the pixel decoder these into a list of maps, coarse to fine, and the
    transformer decoder that into the final and the auxiliary predictions. The semantic head reads the backbone's maps,
    in training only. Test images are padded to `test_size` (height, width), or with None to the next 32k + 1.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        pixel_decoder: nn.Module,
        transformer_decoder: nn.Module,
        semantic_head: nn.Module | None,
        criterion: nn.Module,
        postprocessor: Postprocessor,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        test_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.transformer_decoder = transformer_decoder
        self.semantic_head = semantic_head
        self.criterion = criterion
        self.postprocessor = postprocessor
        self.test_size = test_size
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        # Batch norms, depthwise convolutions and layer norms are fastest with channels last.
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Reads the constructor's arguments from a config."""
        kmax = cfg.MODEL.KMAX
        if kmax.NUM_CLASSES < 1:
            raise UserError("MODEL.KMAX.NUM_CLASSES is not set, and only kmax_d2.engine.setup takes it from a dataset")
        if cfg.INPUT.FORMAT != "RGB":
            raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, but the model takes RGB images")
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))  # as Detectron2's build_backbone does
        backbone = build_from(BACKBONE_REGISTRY, "MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, cfg, input_shape)
        shape = backbone.output_shape()

        def part(registry: Registry, node: str, *args: object) -> nn.Module:
            return build_from(registry, f"MODEL.KMAX.{node}.NAME", kmax[node].NAME, cfg, *args)

        pixel_decoder = part(PIXEL_DECODER_REGISTRY, "PIXEL_DECODER", shape)
        transformer_decoder = part(TRANSFORMER_DECODER_REGISTRY, "TRANSFORMER_DECODER", pixel_decoder.output_shape())
        semantic_head = None
        if kmax.LOSS.SEMANTIC_WEIGHT > 0:
            act_layer = getattr(backbone, "act_layer", nn.ReLU)
            semantic_head = part(SEMANTIC_HEAD_REGISTRY, "SEMANTIC_HEAD", shape, act_layer)
        return {
            "backbone": backbone,
            "pixel_decoder": pixel_decoder,
            "transformer_decoder": transformer_decoder,
            "semantic_head": semantic_head,
            "criterion": part(CRITERION_REGISTRY, "LOSS"),
            "postprocessor": Postprocessor(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "test_size": tuple(cfg.INPUT.CROP_SIZE) if kmax.TEST.PAD_TO_CROP else None,
        }

    @property
    def merging(self) -> MaskWiseMerging:
        """Mask-wise merging, with what it knows of things and stuff."""
        return self.postprocessor.merging

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[ModelOutput]:
        """Detectron2's interface.

        Args:
            batched_inputs: for each image a dict with "image" (3, H, W), RGB, 0 to 255; in training "segment_ids"
                (H, W), the index of each pixel's mask or -1 for void, and "segment_classes" (S,), the contiguous class
                of each mask; at test optionally "height" and "width" of the result.

        Returns:
            In training the losses by name. At test for each image a dict with "panoptic_seg", a map (H, W) of segment
            ids and the list of segments; "semantic" (H, W), the class map, and "sem_seg" (K, H, W), the same one-hot;
            "instances", with masks, scores and classes. Raises UserError for other inputs.
        """
        check_inputs(batched_inputs, self.training, len(self.merging.is_thing))
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        if self.training:
            return self._losses(images, batched_inputs)
        results: dict[int, ModelOutput] = {}
        # Images of one padded size go through the network together: padding never depends on a neighbor.
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(self._padded_size(image), []).append(index)
        for size, members in groups.items():
            prediction, _ = self._predict(self._batch([images[i] for i in members], size), auxiliary_classes=False)
            # What follows the network is in float32, also under autocast.
            with torch.autocast(self.device.type, enabled=False):
                for row, index in enumerate(members):
                    real = tuple(images[index].shape[-2:])
                    inputs = batched_inputs[index]
                    original = inputs.get("height", real[0]), inputs.get("width", real[1])
                    logits = prediction.class_logits[row], prediction.mask_logits[row]
                    results[index] = self.postprocessor(*logits, size, real, original)
        return [results[index] for index in range(len(images))]

    @torch.no_grad()
    def predict(self, images: torch.Tensor, auxiliary: bool = False) -> dict[str, Any]:
        """Runs the network alone, in inference mode whatever mode the model is in.

        Args:
            images: (B, 3, H, W), RGB, 0 to 255, integers or floats, of any size.
            auxiliary: give the decoders' own predictions too.

        Returns:
            "class_logits" (B, N, K + 1), contiguous classes and void last; "mask_logits" (B, N, h, w) with h and w at
            the stride of the finest map (4), position (i, j) standing for pixel (4 i, 4 j); "pixel_feature"
            (B, C, h, w). With `auxiliary` also "auxiliary", a list with the same of each decoder at its own stride.
        """
        check_images(images)
        height, width = images.shape[-2:]
        size = (padded_side(height), padded_side(width))
        with evaluating(self):
            batch = self._batch(list(images.to(self.device)), size)
            final, others = self._predict(batch, auxiliary_classes=auxiliary)
        result: dict[str, Any] = final.cropped(height, width, size)
        if auxiliary:
            result["auxiliary"] = [prediction.cropped(height, width, size) for prediction in others]
        return result

    def _padded_size(self, image: torch.Tensor) -> tuple[int, int]:
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

    def _predict(self, batch: torch.Tensor, *, auxiliary_classes: bool) -> tuple[Prediction, list[Prediction]]:
        return self.transformer_decoder(self.pixel_decoder(backbone_maps(self.backbone, batch)), auxiliary_classes)

    def _losses(self, images: list[torch.Tensor], batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        height, width = (padded_side(max(image.shape[axis] for image in images)) for axis in (1, 2))
        features = backbone_maps(self.backbone, self._batch(images, (height, width)))
        semantic_logits = self.semantic_head(features) if self.semantic_head is not None else None
        final, auxiliary = self.transformer_decoder(self.pixel_decoder(features))
        targets = make_targets(
            [x["segment_ids"].to(self.device, non_blocking=True) for x in batched_inputs],
            [x["segment_classes"].to(self.device, non_blocking=True) for x in batched_inputs],
            final.mask_logits.shape[-2:],
            self.pixel_decoder.output_shape()[-1].stride,
        )
        return self.criterion(final, auxiliary, targets, semantic_logits)
