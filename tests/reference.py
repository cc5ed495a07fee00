"""Reads the reference values in tests/data and builds the corresponding model and predictions."""

import gzip
import json
from pathlib import Path

import deterministic
import numpy as np
import torch
from detectron2.modeling import build_model

from kmax_d2.engine import load_config
from kmax_d2.modeling.criterion import make_targets
from kmax_d2.modeling.merging import MaskWiseMerging
from kmax_d2.modeling.predictor import Prediction

DATA = Path(__file__).parent / "data"


def load(name):
    """Returns the arrays of data/<name>.npz by name."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def shapes(name):
    """Returns name and shape of all entries of data/<name>.json.gz, an official checkpoint or a state dict."""
    with gzip.open(DATA / f"{name}.json.gz", "rt") as file:
        return {name: tuple(shape) for name, shape in json.load(file).items()}


def official_variables(tag="coco_r50"):
    """Returns the reference's value of every variable of an official checkpoint."""
    return {name: deterministic.checkpoint_value(name, shape) for name, shape in shapes(f"variables_{tag}").items()}


def build(config, *options):
    """Builds the model of a config, such as "coco/r50", in inference mode on the CPU."""
    return build_model(load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.KMAX.NORM", "BN", *options])).eval()


def outline(config):
    """Builds the model of a config with names and shapes only, without memory for its values."""
    with torch.device("meta"):
        return build(config, "MODEL.DEVICE", "meta")


def load_all(model, state_dict):
    """Loads a state dict that must have all entries of the model and no others."""
    unloaded = model.load_state_dict(state_dict, strict=False)
    assert not unloaded.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in unloaded.missing_keys)
    return model


def channels_first(array):
    """(h, w, C) or (B, h, w, C) to a tensor with the channels before the map."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, -3)))


def loss_inputs(tag):
    """Returns the inputs from which the official losses in loss_<tag>.npz were computed.

    Returns:
        the final prediction, the six auxiliary ones, semantic logits (B, K or K + 1, h', w'), the targets and the
        arrays of the file.
    """
    arrays = load(f"loss_{tag}")
    segment_id, segment_class = arrays["segment_id"], arrays["segment_class"]
    height, width = (int(side) for side in arrays["output_size"])
    queries, classes = int(arrays["num_queries"]), int(arrays["num_classes"])
    batch = len(segment_id)
    stride = (segment_id.shape[1] - 1) // (height - 1)
    small_id = segment_id[:, ::stride, ::stride]

    def prediction(name):
        def values(kind, shape, scale=1.0):
            return deterministic.prediction(f"{tag}/{name}/{kind}", (batch, *shape), scale)

        feature = values("pixel_feature", (height, width, 128))
        feature = feature / np.linalg.norm(feature, axis=-1, keepdims=True)
        mask = values("mask_logits", (-(-height // 4), -(-width // 4), queries), 3.0)
        mask = mask.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]
        mask = mask + values("mask_noise", (height, width, queries), 0.5)
        class_logits = values("class_logits", (queries, classes + 1), 1.5)
        for image, row in enumerate(segment_class):
            for segment, category in enumerate(row, start=1):
                if category >= 0:
                    query = 7 * segment % queries
                    mask[image, :, :, query] += 6 * (small_id[image] == segment)
                    class_logits[image, query, category] += 5
        return Prediction(torch.from_numpy(class_logits), channels_first(mask), channels_first(feature))

    semantic = deterministic.prediction(f"{tag}/semantic_logits", (batch, *arrays["semantic_size"], classes))
    if tag == "coco":  # void
        semantic = np.concatenate([semantic, np.full_like(semantic[..., :1], -1)], axis=-1)
    targets = make_targets(
        [torch.from_numpy(ids).long() - 1 for ids in segment_id],
        [torch.from_numpy(row[row >= 0]).long() for row in segment_class],
        (height, width),
        stride,
    )
    auxiliary = [prediction(f"aux/{index}") for index in range(6)]
    return prediction("final"), auxiliary, channels_first(semantic), targets, arrays


def merging_of(arrays, num_classes):
    """Returns the merging of an official example, its class logits (N, K + 1), and its mask logits (N, h, w)."""
    things = set(arrays["thing_classes"].tolist())
    merging = MaskWiseMerging(
        [category in things for category in range(num_classes)],
        pixel_threshold=float(arrays["pixel_confidence_threshold"]),
        thing_threshold=float(arrays["class_threshold_thing"]),
        stuff_threshold=float(arrays["class_threshold_stuff"]),
        overlap_threshold=float(arrays["overlap_threshold"]),
        class_power=float(arrays["reorder_class_weight"]),
        mask_power=float(arrays["reorder_mask_weight"]),
        thing_area_limit=int(arrays["thing_area_limit"]),
        stuff_area_limit=int(arrays["stuff_area_limit"]),
    )
    class_logits = torch.from_numpy(arrays["class_logits"].astype(np.float32))
    return merging, class_logits, channels_first(arrays["mask_logits"].astype(np.float32))
