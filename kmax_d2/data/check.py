"""Finds everything that can be wrong with a panoptic dataset on disk in one pass, and collects its statistics."""

import contextlib
import functools
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from ..errors import UserError
from ..images import read_rgb, read_size
from ..parallel import parallel_map
from . import panoptic_png
from .datasets import coco_panoptic
from .datasets.coco_panoptic import Fault
from .segment_ids import NUM_IDS

HARMLESS = {"area mismatch", "segment without pixels"}  # faults of records that can be used
MOST = 20_000  # records of which require_readable opens the files; of a larger dataset, evenly spaced ones

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class Category(NamedTuple):
    """A class; "contiguous" is its index in training."""

    name: str
    isthing: bool
    contiguous: int


@dataclass
class Findings:
    """The contents of a record's files: faults, (height, width), number of void pixels, segments, and a digest.

    A segment is (category id, area in pixels, whether it is a crowd). The digest is that of the image's pixels.
    """

    faults: list[Fault] = field(default_factory=list)
    size: tuple[int, int] | None = None
    void: int = 0
    segments: list[tuple[int, int, bool]] = field(default_factory=list)
    digest: bytes = b""


@dataclass
class Dataset:
    """A dataset as described by its JSON, before any other file is read, and the faults of the JSON.

    The records have category ids of `categories`.
    """

    name: str
    metadata: Metadata
    categories: dict[int, Category]
    records: list[dict]
    faults: list[Fault]

    def check(self, workers: int = 0) -> list[Findings]:
        """Reads all files in parallel; returns the findings in the order of the records."""
        check = functools.partial(check_record, categories=frozenset(self.categories))
        return parallel_map(check, self.records, f"checking {self.name}", workers)


def registered(name: str) -> Dataset:
    """Describes a dataset of Detectron2's catalogs. Raises UserError if it is missing or not panoptic."""
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("panoptic_json")
    if json_file is None:
        raise UserError(f"the dataset {name} cannot be checked: its metadata have no panoptic_json")
    if not os.path.isfile(json_file):
        # Some datasets are created when first loaded; for others, the missing JSON is reported below.
        with contextlib.suppress(OSError, AssertionError, UserError):
            DatasetCatalog.get(name)
    try:
        content = coco_panoptic.read_json(json_file)
    except UserError as error:
        if os.path.exists(json_file):
            raise
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise UserError(
            f"{error}; datasets belong below DETECTRON2_DATASETS, now {root}: see datasets/README.md"
        ) from error
    known = _categories(metadata)
    categories, faults = coco_panoptic.find_categories(content, json_file)
    for category in categories:
        same_id, kind = known.get(category["id"]), bool(category["isthing"])
        # Of several names, as in ADE20K's "road, route", the first one counts.
        if same_id is None or (_first(same_id.name), same_id.isthing) != (_first(category["name"]), kind):
            known_as = f"{'thing' if same_id.isthing else 'stuff'} {same_id.name}" if same_id else "no category"
            line = f"{json_file}: the category {category} is {known_as} of the registered dataset"
            faults.append(Fault("other category", line))
    records, more = coco_panoptic.find_records(content, json_file, metadata.image_root, metadata.panoptic_root)
    return Dataset(name, metadata, known, records, faults + more)


def unregistered(image_root: str, panoptic_root: str, json_file: str) -> Dataset:
    """Describes a dataset in COCO panoptic format. Raises UserError if the JSON is not in this format."""
    content = coco_panoptic.read_json(json_file)
    categories, faults = coco_panoptic.find_categories(content, json_file)
    metadata = Metadata(name=Path(json_file).stem, **coco_panoptic.metadata_of(categories))
    records, more = coco_panoptic.find_records(content, json_file, image_root, panoptic_root)
    return Dataset(metadata.name, metadata, _categories(metadata), records, faults + more)


def _first(names: str) -> str:
    return names.partition(",")[0].strip()


def _categories(metadata: Metadata) -> dict[int, Category]:
    """Returns the categories by dataset id, in the order of the contiguous classes."""
    found = {}
    for kind in ("stuff", "thing"):
        names = metadata.get(f"{kind}_classes", [])
        for id_, index in metadata.get(f"{kind}_dataset_id_to_contiguous_id", {}).items():
            found[id_] = Category(names[index], kind == "thing", index)
    return dict(sorted(found.items(), key=lambda item: item[1].contiguous))


def require_readable(names: Sequence[str], records: Sequence[dict]) -> None:
    """Raises UserError for what makes records unusable, before a run starts; the datasets have the same classes.

    Looks at all segments, at the headers of up to MOST records' files in parallel, and at the first record's files
    whole. That takes seconds. Warns of :func:`repeated_stuff`.
    """
    metadata = MetadataCatalog.get(names[0])
    categories = frozenset(range(len(metadata.stuff_classes)))
    things = metadata.get("thing_dataset_id_to_contiguous_id", {}).values()
    stuff = {index: name for index, name in enumerate(metadata.stuff_classes) if index not in things}
    if repeated := repeated_stuff(records, stuff):
        logger.warning(f"{', '.join(names)}: {repeated}")
    step = 1 + len(records) // MOST
    with ThreadPoolExecutor(16) as pool:
        check = functools.partial(check_record, categories=categories, whole=False)
        faults = [fault for findings in pool.map(check, records[::step]) for fault in findings.faults]
    for index, record in enumerate(records):
        if index % step:
            _known_segments(record, categories, faults)
    faults = faults or check_record(records[0], categories).faults
    lines = [fault.line for fault in faults if fault.kind not in HARMLESS]
    if lines:
        more = f" (and {len(lines) - 1} more faults)" if len(lines) > 1 else ""
        raise UserError(
            f"the dataset {', '.join(names)} cannot be used: {lines[0]}{more}; "
            "python -m kmax_d2.tools.check_dataset lists everything that is wrong with a dataset"
        )


def repeated_stuff(records: Sequence[dict], stuff: Mapping[int, str]) -> str:
    """Returns a line about the classes of stuff, here their names, with several segments in one image; "" for none."""
    most: dict[int, int] = {}
    for record in records:
        classes = [s["category_id"] for s in record.get("segments_info", ()) if not s.get("iscrowd")]
        if len(classes) > len(set(classes)):
            most |= {id_: max(count, most.get(id_, 1)) for id_, count in Counter(classes).items() if id_ in stuff}
    repeated = ", ".join(f"{stuff[id_]} (up to {count})" for id_, count in most.items() if count > 1)
    text = f'stuff with several segments in an image: {repeated}; are these classes things ("isthing": 1 in the JSON)?'
    return text if repeated else ""


def check_record(record: dict, categories: Container[int], whole: bool = True) -> Findings:
    """Compares a record's files, or unless `whole` their headers, with the record; segments are of `categories`."""
    findings = Findings()
    faults, image = findings.faults, record["file_name"]
    png = record.get("pan_seg_file_name", "")  # a test set may have no ground truth
    if whole:
        pixels = _read(read_rgb, image, "image", faults)
        if pixels is not None:
            findings.size, findings.digest = pixels.shape[:2], hashlib.sha1(pixels.tobytes()).digest()
    else:
        findings.size = _read(read_size, image, "image", faults)
    described = (record["height"], record["width"]) if "height" in record else None
    if findings.size and described and findings.size != described:
        faults.append(Fault("size mismatch", f"{image} is {_text(findings.size)}, the JSON says {_text(described)}"))
    known = _known_segments(record, categories, faults)
    size = _read(panoptic_png.size_of, png, "PNG", faults) if png else None
    if size is None:
        return findings
    expected = findings.size or described
    if expected not in (None, size):
        faults.append(Fault("size mismatch", f"{png} is {_text(size)}, its image {_text(expected)}"))
    ids = _read(panoptic_png.read, png, "PNG", faults) if whole else None
    if ids is not None:
        _check_pixels(ids, known, png, findings)
    return findings


def _check_pixels(ids: np.ndarray, known: dict[int, dict], png: str, findings: Findings) -> None:
    """Adds the segments of an id map (H, W), and where it differs from those that are known."""
    faults = findings.faults
    present = {segment["id"]: segment["area"] for segment in panoptic_png.describe(ids)}
    findings.void = present.pop(0, 0)
    unknown = [id_ for id_ in present if id_ not in known]
    if unknown:
        shown = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        line = f"{png}: {sum(present[id_] for id_ in unknown)} pixels have ids that its JSON lacks: {shown}"
        if {id_ % 65536 for id_ in unknown} <= {id_ % 65536 for id_ in known}:
            line += " (up to a multiple of 65536 they are in the JSON: was the blue channel lost?)"
        elif len(unknown) > max(5, len(known)):
            line += f" ({len(unknown)} ids: was it scaled, or saved with loss?)"
        faults.append(Fault("id without segment", line))
    for id_, segment in known.items():
        area = present.get(id_, 0)
        if not area:
            faults.append(Fault("segment without pixels", f"{png}: no pixel of segment {id_}"))
            continue
        if segment.get("area") not in (None, area):
            line = f"{png}: segment {id_} has {area} pixels, the JSON says {segment['area']}"
            faults.append(Fault("area mismatch", line))
        findings.segments.append((segment["category_id"], area, bool(segment.get("iscrowd", 0))))


def _known_segments(record: dict, categories: Container[int], faults: list[Fault]) -> dict[int, dict]:
    """Returns the segments by those ids that a color can encode; adds the faults of the others."""
    png, segments = record.get("pan_seg_file_name"), record.get("segments_info", ())
    known: dict[int, dict] = {}
    for segment in segments:
        id_, category = segment["id"], segment["category_id"]
        if category not in categories:
            faults.append(Fault("unknown category", f"{png}: segment {id_} has category {category}"))
        if not 0 < id_ < NUM_IDS:
            faults.append(Fault("id out of range", f"{png}: segment id {id_} is not within 1 and {NUM_IDS - 1}"))
        elif id_ in known:
            faults.append(Fault("duplicate", f"{png}: segment id {id_} is there more than once"))
        else:
            known[id_] = segment
    return known


def _read(read: Callable[[str], Result], file: str, what: str, faults: list[Fault]) -> Result | None:
    """Returns what is read from a file, or None and a fault."""
    try:
        return read(file)
    except UserError as error:
        faults.append(Fault(f"{'broken' if os.path.exists(file) else 'missing'} {what}", str(error)))
        return None


def _text(size: Sequence[int]) -> str:
    return f"{size[1]}×{size[0]}"
