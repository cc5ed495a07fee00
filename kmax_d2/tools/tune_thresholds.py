"""Finds the merging thresholds with the best panoptic quality on a validation set.

python -m kmax_d2.tools.tune_thresholds --config-file FILE [--weights FILE] [--test-data ...] [NAME VALUE ...]

The network runs once. What merging and evaluation need of each image then fits in some ten kilobytes of memory, so that
hundreds of settings are tried in minutes, one option after the other, until no single change helps. The result is the
options to add to the config. Quality on the images that they were tuned on is a little higher than on others.
"""

from collections.abc import Sequence

from ..command_line import ConfigParser, run_program

PARSER = ConfigParser(__doc__, weights=True, data=True)

PARSER.parse_if_main(__name__)

import dataclasses
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from ..data import panoptic_png
from ..engine import Trainer
from ..evaluation import evaluated_dataset
from ..evaluation.panoptic_quality import count_pairs, pair_segments, panoptic_quality
from ..inference.predictor import Predictor, predictor_config
from ..modeling.merging import MaskWiseMerging, Segmentation
from ..modeling.postprocess import resize_nearest

SHARES = [round(0.05 * step, 2) for step in range(1, 20)]
AREAS = [side**2 for side in (0, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)]
CANDIDATES: dict[str, list] = dict.fromkeys(("thing_threshold", "stuff_threshold", "overlap_threshold"), SHARES)
CANDIDATES |= dict.fromkeys(("thing_area_limit", "stuff_area_limit"), AREAS)


class CachedImage(NamedTuple):
    """All of an image that its quality depends on, whatever the thresholds.

    Attributes:
        numbers, num_queries: for :meth:`~kmax_d2.modeling.merging.MaskWiseMerging.paste`, of queries that have a pixel.
        masks: (2, P) the queries whose masks meet, or num_queries for none, in each of P kinds of pixels.
        truth: (P,) the position in `true_ids` of the true segment there.
        pixels: (P,) the number of such pixels.
        true_ids: (T,) the ids in the true map.
        true_segments: the record's.
    """

    numbers: torch.Tensor
    num_queries: int
    masks: np.ndarray
    truth: np.ndarray
    pixels: np.ndarray
    true_ids: np.ndarray
    true_segments: list[dict]


class RecordingMerging(MaskWiseMerging):
    """Merging that keeps what it merged last."""

    def __call__(self, *args: Any, **kwargs: Any) -> Segmentation:
        """Merges one image, and keeps the masks."""
        merged = super().__call__(*args, **kwargs)
        self.masks = merged.masks
        return merged

    def paste(self, numbers: torch.Tensor, num_queries: int) -> tuple[list[dict], torch.Tensor]:
        """Decides which masks are pasted, and keeps what that depends on."""
        self.numbers, self.num_queries = numbers, num_queries
        return super().paste(numbers, num_queries)

    def cached(self, record: dict, real: tuple[int, int]) -> CachedImage:
        """Returns what to keep of the image that was merged last; `real` is the size of the map without padding."""
        count = self.num_queries
        order, classes, confidence, area, overlap = self.numbers.split([count] * 4 + [count**2])
        used = area.nonzero()[:, 0]
        position = torch.full((count + 1,), len(used)).index_put((used,), torch.arange(len(used)))
        order = position[order.long()]
        parts = order[order < len(used)], classes[used], confidence[used], area[used]
        numbers = torch.cat([*parts, overlap.view(count, count)[used][:, used].flatten()])

        size = record["height"], record["width"]
        true_ids, truth = np.unique(panoptic_png.read(record["pan_seg_file_name"], size), return_inverse=True)
        best, runner_up = position[resize_nearest(self.masks, real, size).cpu().long()].numpy()
        bins = len(used) + 1, len(used) + 1, len(true_ids)
        key = np.ravel_multi_index((best, runner_up, truth.reshape(size)), bins)
        kinds, pixels = np.unique(key, return_counts=True)
        *masks, of_kind = np.unravel_index(kinds, bins)
        return CachedImage(numbers, len(used), np.stack(masks), of_kind, pixels, true_ids, record["segments_info"])


def cache(predict: Predictor, dataset: str) -> tuple[RecordingMerging, list[CachedImage]]:
    """Runs the network on a dataset; returns its merging and what that needs of each image."""
    cfg = predict.cfg
    merging: Any = RecordingMerging.from_config(cfg)
    predict.model.postprocessor.merging = merging
    images = []
    for (record,) in tqdm(Trainer.build_test_loader(cfg, dataset), "predicting", unit="image"):
        size = record["height"], record["width"]
        predict.segment([record])
        images.append(merging.cached(record, record["image"].shape[-2:] if cfg.MODEL.KMAX.TEST.MERGE_AT_CROP else size))
    return merging, images


def quality(merging: MaskWiseMerging, images: Sequence[CachedImage]) -> float:
    """Returns PQ in percent, as the evaluation does for the same thresholds."""
    total: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for image in images:
        segments, tables = merging.paste(image.numbers, image.num_queries)
        rank_of_query, _, id_of_rank = tables.numpy()
        ids = id_of_rank[rank_of_query[image.masks].min(0)]
        sizes = np.zeros((len(image.true_ids), len(segments) + 1), dtype=int)
        np.add.at(sizes, (image.truth, ids), image.pixels)
        overlaps = {(int(image.true_ids[i]), int(j)): int(sizes[i, j]) for i, j in np.argwhere(sizes)}
        visible = [segment for segment in segments if sizes[:, segment["id"]].any()]
        for category, counts in count_pairs(pair_segments(overlaps, visible, image.true_segments)).items():
            total[category] += counts
    return 100 * panoptic_quality(total, total)["pq"]


def tune(
    merging: MaskWiseMerging, images: Sequence[CachedImage], candidates: dict[str, list]
) -> tuple[MaskWiseMerging, float]:
    """Changes one option at a time to the best of its candidates until none helps; returns the merging and its PQ."""
    best, improved = quality(merging, images), True
    while improved:
        improved = False
        for name, values in candidates.items():
            for value in tqdm(values, name.replace("_", " "), leave=False):
                changed = dataclasses.replace(merging, **{name: value})
                score = quality(changed, images)
                if score > best + 1e-6:
                    merging, best, improved = changed, score, True
    return merging, best


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    cfg = predictor_config(args.config_file, args.opts)
    name = evaluated_dataset(cfg)
    merging, images = cache(Predictor(cfg), name)
    size = sum(array.nbytes for image in images for array in (image.numbers.numpy(), *image[2:6]))
    print(f"{len(images)} images of {name}, {size / 2**20:.1f} MB in memory")
    at_crop = cfg.MODEL.KMAX.TEST.MERGE_AT_CROP  # else there are no area limits
    candidates = {option: values for option, values in CANDIDATES.items() if at_crop or "area" not in option}
    before = quality(merging, images)
    tuned, after = tune(merging, images, candidates)
    rows = [(f"MODEL.KMAX.TEST.{n.upper()}", getattr(merging, n), getattr(tuned, n)) for n in candidates]
    print(tabulate([*rows, ("PQ", f"{before:.2f}", f"{after:.2f}")], ["", "before", "after"], tablefmt="github"))
    print("\nadd these options:", *(f"{option} {value}" for option, _, value in rows))


if __name__ == "__main__":
    run_program(main)
