"""The HTML page of a report, with everything in it: no scripts, no other files."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from ..files import MARK
from .analysis import Bin, bootstrap_difference, calibration, class_counts, confusion_matrix, counts_by_size
from .panoptic_quality import Pair, class_quality, panoptic_quality

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2933; max-width: 1280px; margin: 2em auto; padding: 0 1em }
h2 { margin: 2em 0 .5em; border-bottom: 1px solid #d9e2ec }
p { max-width: 75ch; color: #52606d }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } div { overflow-x: auto }
th, td { padding: .15em .7em } th { font-weight: 600 } tbody tr:nth-child(even) { background: #f5f7fa }
.matrix { font-size: 12px } .matrix th, .matrix td { padding: .1em .4em; text-align: right; background: #fff }
.matrix thead th { writing-mode: vertical-rl; text-align: left }
.row { display: flex; gap: 6px } .row figure { flex: 1; margin: 0 } img { width: 100%; display: block }
figcaption { font-size: 12px; color: #52606d } h3 { font-size: 15px; margin: 1.4em 0 .3em }
"""


class Study(NamedTuple):
    """A model's name, and its paired segments of each image."""

    name: str
    images: list[list[Pair]]


class Picture(NamedTuple):
    """A title, and the input, the truth, and the predictions, each (H, W, 3) uint8, RGB."""

    title: str
    panels: list[np.ndarray]


def report_page(
    config: str, dataset: str, studies: Sequence[Study], worst: Sequence[Picture], errors: Sequence[Picture]
) -> str:
    """Returns the page about one model, or about two, of which the second is compared with the first."""
    metadata = MetadataCatalog.get(dataset)
    names = metadata.stuff_classes
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    labels = ["A", "B"] if len(studies) > 1 else [""]
    counts = [class_counts(study.images, len(names)) for study in studies]
    totals = [dict(enumerate(of_images.sum(0))) for of_images in counts]
    intervals = bootstrap_difference(counts[0], counts[1]) if len(studies) > 1 else None
    parts = [
        f"<h1>{escape(dataset)}</h1>",
        f"<p>{len(studies[0].images)} images, {escape(config)}: "
        + ", ".join(f"{label} {escape(study.name)}" for label, study in zip(labels, studies, strict=True)),
        "<h2>Panoptic quality</h2>",
        _totals(totals, labels, things, intervals),
        "<h2>Classes</h2>",
        _classes(totals, labels, names, things, intervals),
    ]
    for label, study in zip(labels, studies, strict=True):
        parts += [
            f"<h2>Confusion matrix {label}</h2><p>Rows are true classes, columns predicted ones. Segments match if "
            "their IoU is above 1/2.</p>",
            _matrix(confusion_matrix(study.images, len(names)), names),
            f"<h2>Panoptic quality by size {label}</h2><p>COCO's limits, 32² and 96² pixels.</p>",
            _sizes(counts_by_size(study.images)),
            f"<h2>Calibration of scores {label}</h2>",
            _calibration(*calibration(study.images)),
        ]
    parts += ["<h2>Worst images</h2>", *(_picture(picture, labels) for picture in worst)]
    parts += ["<h2>Largest errors</h2>", *(_picture(picture, labels) for picture in errors)]
    head = f'<!DOCTYPE html><!-- {MARK} --><html lang="en"><meta charset="utf-8"><title>{escape(dataset)}</title>'
    return f"{head}<style>{STYLE}</style>" + "\n".join(parts)


def _table(headers: Sequence[str], rows: Sequence[Sequence]) -> str:
    return f"<div>{tabulate(rows, headers, tablefmt='html', floatfmt='.1f', missingval='')}</div>"


def _percent(scores: Sequence[float] | None) -> list[float | None]:
    return [100 * score for score in scores] if scores else [None] * 3


def _difference(qualities: Sequence[float | None], interval: np.ndarray) -> list:
    first, second = qualities
    if first is None or second is None:
        return [None, None]
    low, high = 100 * interval
    return [f"{second - first:+.1f}", f"{low:+.1f} to {high:+.1f}"]


def _headers(labels: Sequence[str], scores: Sequence[str]) -> list[str]:
    compared = ["B − A", "95% interval"] if len(labels) > 1 else []
    return [f"{score} {label}".strip() for label in labels for score in scores] + compared


def _totals(totals: Sequence[Mapping], labels: Sequence[str], things: set[int], intervals: np.ndarray | None) -> str:
    everything = set(totals[0])
    rows = []
    for part, chosen in (("all", everything), ("things", things), ("stuff", everything - things)):
        averages = [panoptic_quality(total, chosen) for total in totals]
        scores = [[100 * a[key] if a["n"] else None for key in ("pq", "sq", "rq")] for a in averages]
        row: list = [part, averages[0]["n"], *(score for of_model in scores for score in of_model)]
        if intervals is not None and part == "all":
            row += _difference([of_model[0] for of_model in scores], intervals[-1])
        rows.append(row)
    return _table(["", "classes", *_headers(labels, ("PQ", "SQ", "RQ"))], rows)


def _classes(
    totals: Sequence[Mapping],
    labels: Sequence[str],
    names: Sequence[str],
    things: set[int],
    intervals: np.ndarray | None,
) -> str:
    rows = []
    for index, name in enumerate(names):
        scores = [_percent(class_quality(total[index])) for total in totals]
        if all(of_model[0] is None for of_model in scores):
            continue
        row: list = [name, "thing" if index in things else "stuff"]
        for of_model, total in zip(scores, totals, strict=True):
            row += [*of_model, *map(int, total[index][1:])]
        if intervals is not None:
            row += _difference([of_model[0] for of_model in scores], intervals[index])
        rows.append(row)
    rows.sort(key=lambda row: -(row[2] or 0))
    return _table(["class", "kind", *_headers(labels, ("PQ", "SQ", "RQ", "TP", "FP", "FN"))], rows)


def _matrix(matrix: np.ndarray, names: Sequence[str]) -> str:
    """A table of the classes that occur: right ones blue, wrong ones red, by their share of the row."""
    shown = np.flatnonzero(matrix.any(0) | matrix.any(1) | (np.arange(len(matrix)) == len(names)))
    rows = []
    for true in shown:
        cells = []
        for predicted in shown:
            share = matrix[true, predicted] / max(1, matrix[true].sum())
            color = f"rgba({'37,99,235' if true == predicted else '220,38,38'},{0.75 * share:.2f})"
            number = matrix[true, predicted]
            cells.append(f'<td style="background:{color}">{number}' if number else "<td>")
        rows.append(f"<tr><th>{escape(names[true]) if true < len(names) else 'invented'}{''.join(cells)}")
    heads = "".join(f"<th>{escape(names[index]) if index < len(names) else 'missed'}" for index in shown)
    return f'<div><table class="matrix"><thead><tr><td>{heads}</thead><tbody>{"".join(rows)}</table></div>'


def _sizes(by_size: Mapping[str, dict[int, np.ndarray]]) -> str:
    rows = []
    for name, counts in by_size.items():
        quality = panoptic_quality(counts, counts)
        scores = [100 * quality[key] if quality["n"] else None for key in ("pq", "sq", "rq")]
        rows.append([name, *scores, *np.sum([*counts.values(), np.zeros(4)], axis=0)[1:].astype(int).tolist()])
    return _table(["segments", "PQ", "SQ", "RQ", "TP", "FP", "FN"], rows)


def _calibration(error: float, bins: Sequence[Bin]) -> str:
    if math.isnan(error):
        return "<p>No segments are predicted.</p>"
    marks = [
        f'<circle cx="{200 * b.score:.1f}" cy="{200 - 200 * b.precision:.1f}" r="4"><title>{b.number} segments</title>'
        "</circle>"
        for b in bins
    ]
    plot = (
        '<svg viewBox="-40 -10 260 250" width="320" font-size="11" fill="#2563eb"><path d="M0 0V200H200M0 200L200 0" '
        f'fill="none" stroke="#9aa5b1"/>{"".join(marks)}<g fill="#52606d"><text x="80" y="230">score</text>'
        '<text x="-38" y="8">precision</text><text y="215">0</text><text x="190" y="215">1</text></g></svg>'
    )
    rows = [(b.number, 100 * b.score, 100 * b.precision) for b in bins]
    text = f"<p>Expected calibration error {100 * error:.1f}%: the mean distance from the diagonal.</p>"
    return text + plot + _table(["segments", "mean score (%)", "precision (%)"], rows)


def figure(caption: str, image: np.ndarray) -> str:
    """Returns the HTML of an image (H, W, 3), uint8, RGB, with everything in it."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 70))
    source, caption = f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}", escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _picture(picture: Picture, labels: Sequence[str]) -> str:
    captions = ["input", "truth", *(f"prediction {label}" for label in labels)]
    figures = []
    for caption, panel in zip(captions, picture.panels, strict=True):
        figures.append(figure(caption, panel))
    return f'<h3>{escape(picture.title)}</h3><div class="row">{"".join(figures)}</div>'
