"""Reads all of a panoptic dataset, reports every fault and its statistics, and draws a page of random samples.

python -m kmax_d2.tools.check_dataset NAME ... | --config-file FILE | --images DIR --panoptic DIR --json FILE
python -m kmax_d2.tools.check_dataset [--config-file FILE] --train-data IMAGES PNGS JSON --test-data IMAGES PNGS JSON

It also warns of what does not suit the model of the config, or the training. The exit status is 0 only if the datasets
are sound.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..command_line import ConfigParser, run_program, whole

PARSER = ConfigParser(__doc__, config_file=False, data=True, overwrite=True, options="--opts")
PARSER.add_argument("names", nargs="*", metavar="NAME", help="registered datasets")
own = ("IMAGES", "PNGS", "JSON")
PARSER.add_argument("--train-data", nargs=3, metavar=own, help="the same for DATASETS.OWN_TRAIN")
PARSER.add_argument("--images", metavar="DIR", help="image folder of data in COCO panoptic format")
PARSER.add_argument("--panoptic", metavar="DIR", help="folder of its PNGs")
PARSER.add_argument("--json", metavar="FILE", help="its JSON")
PARSER.add_argument("--output", default="output/check_dataset", metavar="DIR", help="for the page (%(default)s)")
PARSER.add_argument("--html", action="store_true", help="write the page as HTML, with the report in it")
PARSER.add_argument(
    "--samples", type=whole("--samples", 0), default=12, metavar="N", help="samples on the page (%(default)s)"
)
PARSER.add_argument("--seed", type=int, default=0, metavar="N", help="for choosing them (%(default)s)")
PARSER.add_argument(
    "--examples", type=whole("--examples", 0), default=5, metavar="N", help="shown of each fault (%(default)s)"
)
PARSER.add_argument(
    "--workers", type=whole("--workers", 0, 1024), default=0, metavar="N", help="processes (default: one per core)"
)

PARSER.parse_if_main(__name__)

import random
from collections import defaultdict
from html import escape

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from PIL import Image
from tabulate import tabulate

from ..data.check import Dataset, Findings, registered, unregistered
from ..data.datasets import register_shared
from ..data.segment_ids import rgb2id
from ..data.suitability import data_warnings, model_warnings, training_warnings
from ..engine import load_config, ready_config
from ..errors import UserError, did_you_mean
from ..evaluation.report_page import figure, html_page
from ..files import require_own, write_png, write_text
from ..images import read_rgb
from ..visualization import draw_panoptic, page

COLUMNS = 4  # of the page
LONG_SIDE = 640  # pixels of a sample on the page


def datasets(args: argparse.Namespace) -> tuple[CfgNode, list[str]]:
    """Returns the config and the datasets that a command line names, none for that of --images, --panoptic, --json.

    Raises UserError if it names none, or in more than one way.
    """
    own, config = [args.images, args.panoptic, args.json], args.config_file or args.train_data or args.test_data
    if sum([bool(args.names), bool(config), any(own)]) != 1 or (any(own) and not all(own)):
        raise UserError(
            "give either the names of datasets, or --config-file, or all of --images, --panoptic, --json, "
            "or --train-data and --test-data"
        )
    if not config:
        register_shared()
        for name in args.names:
            if name not in DatasetCatalog:
                raise UserError(f"no dataset {name} is registered{did_you_mean(name, DatasetCatalog.list())}")
        return load_config("", args.opts), args.names
    train = ("DATASETS.OWN_TRAIN", args.train_data) if args.train_data else ()
    cfg = ready_config(args.config_file or "", [*args.opts, *train], ("MODEL.DEVICE", "cpu"))
    return cfg, list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))


def fault_lines(dataset: Dataset, findings: list[Findings], num_examples: int) -> list[str]:
    """Returns the count and first examples of each kind of fault; nothing for a sound dataset."""
    examples = defaultdict(list)
    for fault in [*dataset.faults, *(fault for found in findings for fault in found.faults)]:
        examples[fault.kind].append(fault.line)
    if not dataset.records:
        examples["no samples"].append(dataset.name)
    lines = []
    for kind, of_kind in examples.items():
        lines += [f"{kind}: {len(of_kind)}", *(f"  {line}" for line in of_kind[:num_examples])]
        if len(of_kind) > num_examples:
            lines.append(f"  and {len(of_kind) - num_examples} more")
    return lines


def class_table(dataset: Dataset, findings: list[Findings], form: str = "github") -> str:
    """Returns, for each class, its images, segments, and crowds, its share of the pixels, and its median area."""
    segments = defaultdict(list)
    for number, found in enumerate(findings):
        for id_, area, crowd in found.segments:
            segments[id_].append((number, area, crowd))
    void = [found.void for found in findings if found.void]
    percent = 100 / max(1, sum(void) + sum(area for of_class in segments.values() for _, area, _ in of_class))
    rows: list[tuple] = []
    for id_, category in dataset.categories.items():
        images, areas, crowds = zip(*segments[id_], strict=True) if segments[id_] else ((), (), ())
        row = (id_, category.name, "thing" if category.isthing else "stuff", len(set(images)), len(images))
        rows.append((*row, sum(crowds), percent * sum(areas), np.median(areas or 0)))
    rows.append((None, "void", "", len(void), None, None, percent * sum(void), None))
    headers = ["id", "class", "kind", "images", "segments", "crowds", "% pixels", "median area"]
    return tabulate(rows, headers=headers, floatfmt=("", "", "", "", "", "", ".2f", ".0f"), tablefmt=form)


def size_table(dataset: Dataset, findings: list[Findings], form: str = "github") -> str:
    """Returns minimum, median, and maximum of the sizes of images and segments."""
    kinds = {id_: category.isthing for id_, category in dataset.categories.items()}
    segments = [(kinds.get(id_), area) for found in findings for id_, area, _ in found.segments]
    columns = {
        "image width": [found.size[1] for found in findings if found.size],
        "image height": [found.size[0] for found in findings if found.size],
        "segments per image": [len(found.segments) for found in findings],
        "thing area": [area for is_thing, area in segments if is_thing is True],
        "stuff area": [area for is_thing, area in segments if is_thing is False],
    }
    rows = [(name, min(v), np.median(v), max(v)) for name, v in columns.items() if v]
    return tabulate(rows, headers=["", "minimum", "median", "maximum"], floatfmt=".0f", tablefmt=form)


def draw_sample(record: dict, dataset: Dataset) -> np.ndarray:
    """Draws the annotation over the image, at most LONG_SIDE pixels long or enlarged; (H, W, 3) uint8, RGB."""
    image, colors = (Image.fromarray(read_rgb(record[key])) for key in ("file_name", "pan_seg_file_name"))
    image.thumbnail((LONG_SIDE, LONG_SIDE))
    colors.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.NEAREST)
    ids = rgb2id(np.asarray(colors))
    categories = {segment["id"]: dataset.categories[segment["category_id"]] for segment in record["segments_info"]}
    visible = {id_: category for id_, category in categories.items() if id_ in ids}
    segments = [{"id": id_, "category_id": c.contiguous, "isthing": c.isthing} for id_, c in visible.items()]
    return draw_panoptic(np.asarray(image), ids, segments, dataset.metadata)


def draw_samples(dataset: Dataset, findings: list[Findings], args: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """Draws random samples without faults; returns their names and pictures."""
    sound = [record for record, found in zip(dataset.records, findings, strict=True) if not found.faults]
    chosen = random.Random(args.seed).sample(sound, min(args.samples, len(sound)))
    return [(Path(record["file_name"]).name, draw_sample(record, dataset)) for record in chosen]


def html_report(dataset: Dataset, findings: list[Findings], summary: str, panels: list[tuple[str, np.ndarray]]) -> str:
    """Returns the report of a dataset as one HTML page with everything in it."""
    rows = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    tables = (f"<div>{table(dataset, findings, 'html')}</div><br>" for table in (class_table, size_table))
    pictures = (f'<div class="row">{"".join(figure(*panel) for panel in row)}</div>' for row in rows)
    return html_page(dataset.name, [f"<pre>{escape(summary)}</pre>", *tables, *pictures])


def report(dataset: Dataset, cfg: CfgNode, args: argparse.Namespace) -> tuple[bool, list[Findings]]:
    """Checks a dataset, prints what it finds, and draws a page. Returns whether it is sound, and the findings."""
    file = Path(args.output) / f"{dataset.name}.{'html' if args.html else 'png'}"
    require_own([file], args.overwrite)
    findings = dataset.check(args.workers)
    print(f"\n{dataset.name}: {len(dataset.records)} images, {sum(len(f.segments) for f in findings)} segments")
    print(class_table(dataset, findings))
    print(f"\n{size_table(dataset, findings)}\n")
    lines = fault_lines(dataset, findings, args.examples)
    told = [f"{dataset.name} has faults:", *lines] if lines else [f"{dataset.name} is sound"]
    warnings = [*data_warnings(dataset, findings), *model_warnings(dataset, findings, cfg)]
    told += [f"warning: {line}" for line in warnings]
    panels = draw_samples(dataset, findings, args)
    if args.html:
        write_text(file, html_report(dataset, findings, "\n".join(told), panels))
    elif panels:
        write_png(file, page(panels, COLUMNS))
    if args.html or panels:
        print(f"samples are drawn in {file}")
    print("\n".join(told))
    return not lines, findings


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    cfg, names = datasets(args)
    sound, checked = [], {}
    for dataset in map(registered, names) if names else [unregistered(args.images, args.panoptic, args.json)]:
        is_sound, findings = report(dataset, cfg, args)
        sound.append(is_sound)
        checked[dataset.name] = dataset, findings
    train = [name for name in cfg.DATASETS.TRAIN if name in checked] or list(checked)
    test = [name for name in cfg.DATASETS.TEST if name in checked and name not in train]
    for line in training_warnings([checked[name] for name in train], [checked[name] for name in test]):
        print(f"warning: {line}")
    if not all(sound):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
