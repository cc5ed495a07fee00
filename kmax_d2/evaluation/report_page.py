"""The HTML page of a report, with everything in it: no scripts, no other files."""

import base64
from collections.abc import Collection, Iterable, Sequence
from html import escape

import cv2
import numpy as np
from detectron2.data import Metadata
from tabulate import tabulate

from ..data.datasets.coco_panoptic import things_of
from ..files import MARK
from .analysis import bootstrap_difference, calibration, class_counts, confusion_matrix, counts_by_size
from .panoptic_quality import SCORES, Pair, quality_row

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2933; max-width: 1280px; margin: 2em auto; padding: 0 1em }
h2 { margin: 2em 0 .5em; border-bottom: 1px solid #d9e2ec } h3 { font-size: 15px; margin: 1.4em 0 .3em }
p { color: #52606d } div { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15em .7em } tbody tr:nth-child(even) { background: #f5f7fa }
.matrix { font-size: 12px } .matrix th, .matrix td { padding: .1em .4em; text-align: right; background: #fff }
.matrix thead th { writing-mode: vertical-rl; text-align: left } .row { display: flex; gap: 6px }
figure { flex: 1; margin: 0 } img { width: 100%; display: block } figcaption { font-size: 12px; color: #52606d }
"""


# A title, and the input, the truth, and the predictions, each (H, W, 3) uint8, RGB.
Picture = tuple[str, list[np.ndarray]]


def html_page(title: str, parts: Iterable[str]) -> str:
    """Returns a page with its title as the heading, and then the parts, which are HTML."""
    title = escape(title)
    head = f'<!DOCTYPE html><!-- {MARK} --><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    return "\n".join([f"{head}<style>{STYLE}</style><h1>{title}</h1>", *parts])


def report_page(
    title: str, metadata: Metadata, models: dict[str, list[list[Pair]]], pictures: dict[str, list[Picture]]
) -> str:
    """Returns the page about one model, or about two, of which the second is compared with the first.

    `models` has the paired segments of each image by the model's name, which begins with A or B; `pictures` has those
    of each section by its heading.
    """
    parts = [_qualities(metadata, models)]
    for name, images in models.items():
        pairs = [pair for of_image in images for pair in of_image]
        sizes = [(size, *quality_row(counts, counts)) for size, counts in counts_by_size(pairs).items()]
        parts += [
            f"<h2>{escape(name)}</h2><h3>Confusion matrix</h3>",
            "<p>Rows are true classes, columns predicted ones; segments match if their IoU is above 1/2.</p>",
            _matrix(confusion_matrix(pairs, len(metadata.stuff_classes)), metadata.stuff_classes),
            "<h3>Panoptic quality by size, with COCO's limits of 32² and 96² pixels</h3>",
            _table(["segments", *SCORES], sizes),
            _calibration(*calibration(pairs)),
        ]
    captions = ["input", "truth", *models]
    for heading, of_section in pictures.items():
        parts += [f"<h2>{heading}</h2>", *(_picture(picture, captions) for picture in of_section)]
    return html_page(title, parts)


def _table(headers: Sequence[str], rows: Iterable[Sequence]) -> str:
    return f"<div>{tabulate(rows, headers, tablefmt='html', floatfmt='.1f', missingval='')}</div>"


def _qualities(metadata: Metadata, models: dict[str, list[list[Pair]]]) -> str:
    """Tables of all classes, things, and stuff, and of each class, the best first."""
    names, things = metadata.stuff_classes, things_of(metadata)
    counts = [class_counts(images, len(names)) for images in models.values()]
    totals = [dict(enumerate(of_model.sum(0))) for of_model in counts]
    intervals = bootstrap_difference(counts[0], counts[1]) if len(counts) > 1 else None
    headers = [f"{score} {name[0]}" if len(models) > 1 else score for name in models for score in SCORES]
    headers += ["PQ B − A", "95% interval"] if len(models) > 1 else []

    def row(label: str, chosen: Collection[int], index: int | None) -> list:
        scores = [quality_row(total, chosen) for total in totals]
        cells = [label, *(score for of_model in scores for score in of_model)]
        if intervals is not None and index is not None and not np.isnan(intervals[index]).any():
            low, high = 100 * intervals[index]
            cells += [scores[1][0] - scores[0][0], f"{low:.1f} to {high:.1f}"]
        return cells

    parts = ("all", totals[0], -1), ("things", things, None), ("stuff", totals[0].keys() - things, None)
    classes = [row(name, [index], index) for index, name in enumerate(names)]
    found = sorted((cells for cells in classes if cells[1] is not None), key=lambda cells: -cells[1])
    return f"{_table(['', *headers], [row(*part) for part in parts])}<h2>Classes</h2>{_table(['', *headers], found)}"


def _matrix(matrix: np.ndarray, names: Sequence[str]) -> str:
    """A table of the classes that occur: right ones blue, wrong ones red, by their share of the row."""
    shown = np.flatnonzero(matrix.any(0) | matrix.any(1) | (np.arange(len(matrix)) == len(names)))
    rows = []
    for true in shown:
        cells = [f"<tr><th>{escape([*names, 'invented'][true])}"]
        for predicted in shown:
            number, color = matrix[true, predicted], "37,99,235" if true == predicted else "220,38,38"
            share = 0.75 * number / matrix[true].sum() if number else 0
            cells.append(f'<td style="background:rgba({color},{share:.2f})">{number}' if number else "<td>")
        rows.append("".join(cells))
    heads = "".join(f"<th>{escape([*names, 'missed'][index])}" for index in shown)
    return f'<div><table class="matrix"><thead><tr><td>{heads}</thead><tbody>{"".join(rows)}</table></div>'


def _calibration(error: float, bins: Sequence[tuple[int, float, float]]) -> str:
    marks = (f'<circle cx="{200 * score:.0f}" cy="{200 - 200 * precision:.0f}" r="4"/>' for _, score, precision in bins)
    plot = (
        '<svg viewBox="-50 -10 260 240" width="320" font-size="11" fill="#2563eb"><path d="M0 0V200H200M0 200L200 0" '
        f'fill="none" stroke="#9aa5b1"/>{"".join(marks)}<g fill="#52606d"><text x="85" y="215">score</text>'
        '<text x="-50" y="8">precision</text><text y="215">0</text><text x="192" y="215">1</text></g></svg>'
    )
    rows = [(size, 100 * score, 100 * precision) for size, score, precision in bins]
    text = f"<h3>Calibration of scores: expected error {100 * error:.1f}%</h3>" if bins else "<h3>No segments</h3>"
    return text + plot + _table(["segments", "mean score", "precision"], rows)


def figure(caption: str, image: np.ndarray) -> str:
    """Returns the HTML of an image (H, W, 3), uint8, RGB, with everything in it."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 65))
    source, caption = f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}", escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _picture(picture: Picture, captions: Sequence[str]) -> str:
    title, panels = picture
    figures = [figure(caption, panel) for caption, panel in zip(captions, panels, strict=True)]
    return f'<h3>{escape(title)}</h3><div class="row">{"".join(figures)}</div>'
