"""Reads all of a panoptic dataset, tells every fault and its statistics, and draws a page of random samples.

`python -m kmax_d2.tools.check_dataset NAME ... | --config-file FILE | --images DIR --panoptic DIR --json FILE`

The exit status is 0 only for sound datasets.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog
from PIL import Image
from tabulate import tabulate

from ..data.check import Dataset, Findings, Sample, registered, unregistered
from ..data.mapper import read_image
from ..data.panoptic_png import written_whole
from ..data.segment_ids import rgb2id
from ..engine import load_config
from ..engine.setup import prepare_datasets
from ..errors import UserError, did_you_mean, exit_on_user_error
from ..visualization import draw_panoptic, page

COLUMNS = 4  # of the page of samples
LONG_SIDE = 640  # pixels of a sample on the page


def datasets(args: argparse.Namespace) -> Iterator[Dataset]:
    """The datasets that the command line names, one at a time."""
    own = [args.images, args.panoptic, args.json]
    if sum([bool(args.names), bool(args.config_file), any(own)]) != 1 or (any(own) and not all(own)):
        raise UserError(
            "give either the names of datasets, or --config-file, or all of --images, --panoptic and --json"
        )
    if all(own):
        yield unregistered(*own)
        return
    names = args.names
    if args.config_file:
        cfg = load_config(args.config_file, args.opts)
        prepare_datasets(cfg)
        names = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    for name in names:
        if name not in DatasetCatalog:
            raise UserError(f"no dataset {name} is registered{did_you_mean(name, DatasetCatalog.list())}")
        yield registered(name)


def fault_lines(dataset: Dataset, findings: list[Findings], num_examples: int) -> list[str]:
    """For each kind of fault its count and the first examples; none for a sound dataset."""
    examples: dict[str, list[str]] = {}
    for fault in [*dataset.faults, *(fault for found in findings for fault in found.faults)]:
        examples.setdefault(fault.kind, []).append(fault.line)
    if not dataset.samples:
        examples.setdefault("no samples", []).append(dataset.name)
    lines = []
    for kind, of_kind in examples.items():
        lines.append(f"{kind}: {len(of_kind)}")
        lines += [f"  {line}" for line in of_kind[:num_examples]]
        if len(of_kind) > num_examples:
            lines.append(f"  and {len(of_kind) - num_examples} more")
    return lines


def class_table(dataset: Dataset, findings: list[Findings]) -> str:
    """For each class the number of its images, segments and crowds, its share of the pixels, and its median area."""
    areas: dict[int, list[int]] = {id_: [] for id_ in dataset.categories}
    images, crowds = dict.fromkeys(areas, 0), dict.fromkeys(areas, 0)
    for found in findings:
        for id_ in {id_ for id_, _, _ in found.segments} & set(areas):
            images[id_] += 1
        for id_, area, crowd in found.segments:
            if id_ in areas:
                areas[id_].append(area)
                crowds[id_] += crowd
    void = sum(found.void for found in findings)
    total = max(1, void + sum(area for found in findings for _, area, _ in found.segments))
    rows = [
        (
            id_,
            category.name,
            "thing" if category.isthing else "stuff",
            images[id_],
            len(areas[id_]),
            crowds[id_],
            100 * sum(areas[id_]) / total,
            np.median(areas[id_]) if areas[id_] else 0,
        )
        for id_, category in dataset.categories.items()
    ]
    rows.append((None, "void", "", sum(found.void > 0 for found in findings), None, None, 100 * void / total, None))
    headers = ["id", "class", "kind", "images", "segments", "crowds", "% pixels", "median area"]
    return tabulate(rows, headers=headers, floatfmt=("", "", "", "", "", "", ".2f", ".0f"), tablefmt="github")


def size_table(dataset: Dataset, findings: list[Findings]) -> str:
    """Least, median and largest of what has a size."""
    segments = [
        (dataset.categories[id_].isthing, area)
        for f in findings
        for id_, area, _ in f.segments
        if id_ in dataset.categories
    ]
    columns = {
        "image width": [found.size[1] for found in findings if found.size],
        "image height": [found.size[0] for found in findings if found.size],
        "segments an image": [len(found.segments) for found in findings],
        "thing area": [area for thing, area in segments if thing],
        "stuff area": [area for thing, area in segments if not thing],
    }
    rows = [(name, min(v), np.median(v), max(v)) for name, v in columns.items() if v]
    return tabulate(rows, headers=["", "least", "median", "largest"], floatfmt=".0f", tablefmt="github")


def draw_sample(sample: Sample, dataset: Dataset) -> np.ndarray:
    """An overlay of the annotation on the image, of at most LONG_SIDE pixels or enlarged, (H, W, 3) uint8, RGB."""
    image = Image.fromarray(read_image({"file_name": sample.image}))
    colors = Image.fromarray(read_image({"file_name": sample.png}))
    scale = min(1.0, LONG_SIDE / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    ids = rgb2id(np.asarray(colors.resize(size, Image.Resampling.NEAREST)))
    segments = []
    for segment in sample.segments:
        category = dataset.categories[segment["category_id"]]
        if (ids == segment["id"]).any():
            segments.append({"id": segment["id"], "category_id": category.contiguous, "isthing": category.isthing})
    return draw_panoptic(np.asarray(image.resize(size)), ids, segments, dataset.metadata)


def draw_page(dataset: Dataset, findings: list[Findings], count: int, seed: int, file: Path) -> bool:
    """Writes a page of samples without faults, drawn at random; False where there are none."""
    sound = [sample for sample, found in zip(dataset.samples, findings, strict=True) if not found.faults]
    chosen = random.Random(seed).sample(sound, min(count, len(sound)))
    if not chosen:
        return False
    panels = [(Path(sample.image).name, draw_sample(sample, dataset)) for sample in chosen]
    sheet = page([panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)])
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as unfinished:
        Image.fromarray(sheet).save(unfinished)
    return True


def report(dataset: Dataset, args: argparse.Namespace) -> bool:
    """Checks a dataset and prints what is found. Whether it is sound."""
    findings = dataset.check(args.workers)
    print(f"\n{dataset.name}: {len(dataset.samples)} images, {sum(len(f.segments) for f in findings)} segments")
    print(class_table(dataset, findings))
    print(f"\n{size_table(dataset, findings)}\n")
    file = Path(args.output) / f"{dataset.name}.png"
    if args.samples and draw_page(dataset, findings, args.samples, args.seed, file):
        print(f"samples are drawn in {file}")
    lines = fault_lines(dataset, findings, args.examples)
    print("\n".join([f"{dataset.name} has faults:", *lines]) if lines else f"{dataset.name} is sound")
    return not lines


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="registered datasets")
    parser.add_argument("--config-file", metavar="FILE", help="config file or name: all its datasets")
    parser.add_argument("--images", metavar="DIR", help="image folder of data in COCO panoptic format")
    parser.add_argument("--panoptic", metavar="DIR", help="folder of their PNGs")
    parser.add_argument("--json", metavar="FILE", help="their JSON")
    parser.add_argument("--output", default="output/check_dataset", metavar="DIR", help="of the page (%(default)s)")
    parser.add_argument("--samples", type=int, default=12, metavar="N", help="samples on the page (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of their choice (%(default)s)")
    parser.add_argument("--examples", type=int, default=5, metavar="N", help="shown of each fault (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (one a core)")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="NAME VALUE",
        help="options of the config; they come last",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    sound = [report(dataset, args) for dataset in datasets(args)]
    if not all(sound):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
