"""A trained model that turns images into results."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from .. import model_zoo
from ..data.mapper import PanopticTestMapper
from ..engine.setup import CHECKPOINT, dataset_metadata, load_predictor, ready_config
from ..errors import DownloadError
from ..images import images_in
from ..modeling.layers import evaluating
from ..modeling.postprocess import ModelOutput
from ..speed import use_precision
from ..visualization import assignments
from .result import Result
from .sources import Source, read_source
from .tiles import segment_tiles

logger = logging.getLogger(__name__)
ALL_RESULTS = [part for kind in ("PANOPTIC", "SEMANTIC", "INSTANCE") for part in (f"MODEL.KMAX.TEST.{kind}_ON", True)]
# Precision is a setting of the process, so that only one prediction runs at a time. A device has no time for two.
_LOCK = threading.RLock()


def load(
    name: str | os.PathLike = "",
    weights: str | os.PathLike | None = None,
    device: str | None = None,
    precision: str | None = None,
    compile: str | None = None,
    options: Sequence = (),
) -> Predictor:
    """Loads a trained model by one name.

    Args:
        name: a config such as "coco/r50", with its published weights; a checkpoint of ours, which knows its config and
            classes, as a file or as "hf://OWNER/REPOSITORY/FILE"; by default coco/r50, or where its weights cannot be
            downloaded the model that is included.
        weights: other weights for a config, in any format of MODEL.WEIGHTS.
        device: such as "cpu" or "cuda:1"; by default a GPU if there is one.
        precision: "float32", "tf32", or "bfloat16"; by default the config's.
        compile: a mode of torch.compile; by default the config's.
        options: further config options, (name, value, name, value, ...).

    Raises:
        UserError: there is no such model, or its weights cannot be had.
    """
    name = os.fspath(name)
    given = {"MODEL.WEIGHTS": weights and os.fspath(weights), "MODEL.DEVICE": device}
    given |= {"MODEL.KMAX.TEST.PRECISION": precision, "MODEL.KMAX.COMPILE": compile}
    options = [*options, *(part for pair in given.items() if pair[1] is not None for part in pair)]
    if name:
        return Predictor(predictor_config(name, options))
    cfg = predictor_config(model_zoo.DEFAULT, options)
    try:
        return Predictor(cfg)
    except DownloadError as error:
        if "MODEL.WEIGHTS" in options:
            raise
        reason = error
    predict = Predictor(predictor_config(model_zoo.OFFLINE, options))
    logger.warning(
        f"{reason}. THIS IS ANOTHER MODEL, {model_zoo.OFFLINE} in place of {model_zoo.DEFAULT}, with the classes "
        f"{', '.join(predict.class_names)}: load({model_zoo.DEFAULT!r}) fails instead"
    )
    return predict


def predictor_config(name: str, options: Sequence = ()) -> CfgNode:
    """Returns the ready config of a config or checkpoint, with its published weights unless the options name others.

    All kinds of results are on: each is computed only where it is read.
    """
    if model_zoo.has_weights(name) and "MODEL.WEIGHTS" not in options:
        weights = model_zoo.get_checkpoint_url(name)
        if weights.endswith(CHECKPOINT):  # which knows its config
            return ready_config(weights, options, ALL_RESULTS)
        options = ["MODEL.WEIGHTS", weights, *options]
    return ready_config(name, options, ALL_RESULTS)


class Predictor:
    """Segments images. It can be used from several threads, which take turns.

    Args:
        cfg: a :func:`~kmax_d2.engine.ready_config` with weights and a dataset, whose classes are the model's.
        model: the model, if it is loaded already.

    Attributes:
        cfg, model: as given; the model is ready for inference.
        metadata: Detectron2's metadata of the classes.
        class_names: by contiguous class.
        mapper: an image to the model's inputs.

    Raises:
        UserError: weights or classes are missing.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module | None = None):
        self.cfg = cfg
        self.metadata = dataset_metadata(cfg)  # fails before the model is loaded
        self.class_names: list[str] = self.metadata.stuff_classes
        self.mapper = PanopticTestMapper(cfg)
        self.model = load_predictor(cfg) if model is None else model

    def __call__(self, source: Source | Sequence[Source], batch_size: int = 8) -> Any:
        """Segments one image, or several.

        Args:
            source: an image as for :func:`~kmax_d2.inference.sources.read_source`, a list of them, or a folder's path.
            batch_size: images that go through a GPU together. On a CPU they go one by one, which is as fast.

        Returns:
            a :class:`Result`; for a list or a folder an iterator over the results, in order.

        Raises:
            UserError: an image cannot be read.
        """
        if isinstance(source, (list, tuple)):
            return self._segment_all(source, batch_size)
        if isinstance(source, (str, Path)) and Path(source).is_dir():
            return self._segment_all(images_in(Path(source)), batch_size)
        return next(self._segment_all([cast(Source, source)], 1))

    def tiled(self, source: Source, size: int, overlap: int | None = None) -> Result:
        """Segments a very large image in square tiles: :func:`~kmax_d2.inference.tiles.segment_tiles`."""
        image, name = read_source(source)
        return Result(self, image, name, self.mapper.inputs(image)["image"], segment_tiles(self, image, size, overlap))

    def _segment_all(self, sources: Iterable[Source], batch_size: int) -> Iterator[Result]:
        remaining = iter(sources)
        while batch := list(islice(remaining, batch_size if self.model.device.type != "cpu" else 1)):
            images = [read_source(source) for source in batch]
            inputs = [self.mapper.inputs(image) for image, _ in images]
            for (image, name), tensors, results in zip(images, inputs, self.segment(inputs), strict=True):
                yield Result(self, image, name, tensors["image"], results)

    @torch.no_grad()
    def segment(self, inputs: list[dict]) -> list[ModelOutput]:
        """Runs the model on a batch of its inputs in the config's precision; Detectron2's interface."""
        test = self.cfg.MODEL.KMAX.TEST
        with _LOCK, use_precision(test.PRECISION, self.cfg.MODEL.DEVICE), evaluating(self.model):
            return self.model(inputs)

    def assignments(self, image: torch.Tensor) -> list[np.ndarray]:
        """Returns :func:`~kmax_d2.visualization.assignments` of an image (3, H, W) in the config's precision."""
        with _LOCK, use_precision(self.cfg.MODEL.KMAX.TEST.PRECISION, self.cfg.MODEL.DEVICE):
            return assignments(self.model, image)
