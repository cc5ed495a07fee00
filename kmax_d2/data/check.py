"""Finds everything that can be wrong with a panoptic dataset on disk in one pass, and collects its statistics."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from ..errors import UserError
from ..images import read_rgb
from ..parallel import parallel_map
from .datasets.coco_panoptic import metadata_of, read_json
from .panoptic_png import describe
from .segment_ids import NUM_IDS, rgb2id

# The fields that entries of a COCO panoptic JSON must have, and their types.
CATEGORY = {"id": int, "name": str, "isthing": int}
IMAGE = {"id": int | str, "file_name": str, "height": int, "width": int}
ANNOTATION = {"image_id": int | str, "file_name": str, "segments_info": list}
SEGMENT = {"id": int, "category_id": int}


class Category(NamedTuple):
    """A class; "contiguous" is its index in training."""

    name: str
    isthing: bool
    contiguous: int


class Fault(NamedTuple):
    """Something wrong: its kind, and a line that names the file."""

    kind: str
    line: str


@dataclass(frozen=True)
class Sample:
    """An image and its annotation as described by the dataset.

    "size" is (height, width), None if not given; "categories" are all ids that a segment may have.
    """

    image: str
    png: str
    size: tuple[int, int] | None
    segments: list[dict]
    categories: frozenset


@dataclass
class Findings:
    """The contents of a sample's files: faults, (height, width), number of void pixels, and segments.

    A segment is (category id, area in pixels, whether it is a crowd).
    """

    faults: list[Fault] = field(default_factory=list)
    size: tuple[int, int] | None = None
    void: int = 0
    segments: list[tuple[int, int, bool]] = field(default_factory=list)


@dataclass
class Dataset:
    """A dataset as described by its JSON, before any other file is read, and the faults of the JSON."""

    name: str
    metadata: Metadata
    categories: dict[int, Category]
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def check(self, workers: int = 0) -> list[Findings]:
        """Reads all files in parallel; returns the findings in the order of the samples."""
        return parallel_map(check_sample, self.samples, f"checking {self.name}", workers)


def registered(name: str) -> Dataset:
    """Describes a dataset of Detectron2's catalogs. Raises UserError if it is missing or not panoptic."""
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("panoptic_json")
    if json_file is None:
        return _from_records(name)
    if not os.path.isfile(json_file):
        # Some datasets are created when first loaded; for others, the missing JSON is reported below.
        with contextlib.suppress(OSError, AssertionError, UserError):
            DatasetCatalog.get(name)
    try:
        content = read_json(json_file)
    except UserError as error:
        if os.path.exists(json_file):
            raise
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise UserError(
            f"{error}; datasets belong below DETECTRON2_DATASETS, now {root}: see datasets/README.md"
        ) from error
    dataset = Dataset(name, metadata, _categories(metadata))
    _read_samples(dataset, content, json_file, metadata.image_root, metadata.panoptic_root)
    return dataset


def unregistered(image_root: str, panoptic_root: str, json_file: str) -> Dataset:
    """Describes a dataset in COCO panoptic format. Raises UserError if the JSON is not in this format."""
    content = read_json(json_file)
    faults: list[Fault] = []
    categories = _well_formed(content["categories"], CATEGORY, "category", json_file, faults)
    _find_duplicates(categories, "id", "category id", json_file, faults)
    name = Path(json_file).stem
    metadata = Metadata(name=name, **metadata_of(categories))
    dataset = Dataset(name, metadata, _categories(metadata), faults=faults)
    _read_samples(dataset, content, json_file, image_root, panoptic_root)
    return dataset


def _categories(metadata: Metadata) -> dict[int, Category]:
    """Returns the categories by dataset id, in the order of the contiguous classes."""
    found = {}
    for kind in ("stuff", "thing"):
        names = metadata.get(f"{kind}_classes", [])
        for id_, index in metadata.get(f"{kind}_dataset_id_to_contiguous_id", {}).items():
            found[id_] = Category(names[index], kind == "thing", index)
    return dict(sorted(found.items(), key=lambda item: item[1].contiguous))


def _from_records(name: str) -> Dataset:
    """Describes a dataset of which the catalogs have only records, with contiguous classes."""
    metadata = MetadataCatalog.get(name)
    categories = {category.contiguous: category for category in _categories(metadata).values()}
    try:
        records = DatasetCatalog.get(name)
    except (OSError, AssertionError) as error:
        raise UserError(f"the dataset {name} cannot be loaded: {error}") from error
    if not categories or any("pan_seg_file_name" not in record for record in records):
        raise UserError(f"the dataset {name} is not panoptic")
    dataset = Dataset(name, metadata, categories)
    ids = frozenset(categories)
    for record in records:
        size = (record["height"], record["width"]) if "height" in record else None
        sample = Sample(record["file_name"], record["pan_seg_file_name"], size, record["segments_info"], ids)
        dataset.samples.append(sample)
    return dataset


def _well_formed(entries: Any, fields: dict, what: str, json_file: str, faults: list[Fault]) -> list[dict]:
    """Returns the entries whose fields have the right types; each of the others is a fault."""
    good: list[dict] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        known = entry if isinstance(entry, dict) else {}
        wrong = [key for key, kind in fields.items() if not isinstance(known.get(key), kind)]
        if wrong:
            shown = textwrap.shorten(str(entry), 80, placeholder="…")
            faults.append(Fault("malformed entry", f"{json_file}: the {what} {shown} has no valid {', '.join(wrong)}"))
        else:
            good.append(entry)
    return good


def _read_samples(dataset: Dataset, content: dict, json_file: str, image_root: str, panoptic_root: str) -> None:
    """Adds the samples and the faults of the JSON's own entries to a dataset."""
    faults = dataset.faults
    ids = frozenset(dataset.categories)
    images = _well_formed(content["images"], IMAGE, "image", json_file, faults)
    annotations = _well_formed(content["annotations"], ANNOTATION, "annotation", json_file, faults)
    _find_duplicates(images, "id", "image id", json_file, faults)
    _find_duplicates(images, "file_name", "image file", json_file, faults)
    _find_duplicates(annotations, "image_id", "annotation of image", json_file, faults)
    _find_duplicates(annotations, "file_name", "PNG", json_file, faults)
    image_of_id = {image["id"]: image for image in images}
    for annotation in annotations:
        png = os.path.join(panoptic_root, annotation["file_name"])
        image = image_of_id.get(annotation["image_id"])
        if image is None:
            faults.append(Fault("annotation without image", f"{png}: no image has the id {annotation['image_id']}"))
            continue
        segments = _well_formed(annotation["segments_info"], SEGMENT, f"segment of {png}", json_file, faults)
        size = (image["height"], image["width"])
        dataset.samples.append(Sample(_image_file(image_root, image), png, size, segments, ids))
    annotated = {annotation["image_id"] for annotation in annotations}
    for id_, image in image_of_id.items():
        if id_ not in annotated:
            faults.append(Fault("image without annotation", f"{_image_file(image_root, image)} has no annotation"))


def _find_duplicates(entries: list[dict], key: str, what: str, json_file: str, faults: list[Fault]) -> None:
    for value, count in Counter(entry[key] for entry in entries).items():
        if count > 1:
            faults.append(Fault("duplicate", f"{json_file}: {what} {value} is there {count} times"))


def _image_file(image_root: str, image: dict) -> str:
    # The JSON from cityscapesscripts has other names than the image files, which are in one folder per city.
    name = image["file_name"]
    if name.endswith("_gtFine_leftImg8bit.png"):
        name = os.path.join(name.split("_")[0], name.replace("_gtFine", ""))
    return os.path.join(image_root, name)


def check_sample(sample: Sample) -> Findings:
    """Reads a sample's files and compares them with the dataset's description."""
    findings = Findings()
    faults = findings.faults
    expected = sample.size
    image = _read(sample.image, "image", faults)
    if image is not None:
        findings.size = (image.shape[0], image.shape[1])
        if expected is not None and tuple(expected) != findings.size:
            faults.append(
                Fault("size mismatch", f"{sample.image} is {_size(image.shape)}, the JSON says {_size(expected)}")
            )
    known = _known_segments(sample, faults)
    colors = _read(sample.png, "PNG", faults)
    if colors is None:
        return findings
    size = findings.size or expected
    if size is not None and colors.shape[:2] != size:
        faults.append(Fault("size mismatch", f"{sample.png} is {_size(colors.shape)}, its image {_size(size)}"))
    present = {segment["id"]: segment["area"] for segment in describe(rgb2id(colors))}
    findings.void = present.pop(0, 0)
    for id_, area in present.items():
        if id_ not in known:
            faults.append(Fault("id without segment", f"{sample.png}: {area} pixels of id {id_}, which its JSON lacks"))
    for id_, segment in known.items():
        if id_ not in present:
            faults.append(Fault("segment without pixels", f"{sample.png}: no pixel of segment {id_}"))
            continue
        area = present[id_]
        if segment.get("area", area) != area:
            line = f"{sample.png}: segment {id_} has {area} pixels, the JSON says {segment['area']}"
            faults.append(Fault("area mismatch", line))
        findings.segments.append((segment["category_id"], area, bool(segment.get("iscrowd", 0))))
    return findings


def _known_segments(sample: Sample, faults: list[Fault]) -> dict[int, dict]:
    """Returns the segments by those ids that a color can encode; adds the faults of the others."""
    if not sample.segments:
        faults.append(Fault("empty image", f"{sample.png} has no segment"))
    known: dict[int, dict] = {}
    for segment in sample.segments:
        id_, category = segment["id"], segment["category_id"]
        if category not in sample.categories:
            faults.append(Fault("unknown category", f"{sample.png}: segment {id_} has category {category}"))
        if not 0 < id_ < NUM_IDS:
            faults.append(Fault("id out of range", f"{sample.png}: segment id {id_} is not within 1 and {NUM_IDS - 1}"))
        elif id_ in known:
            faults.append(Fault("duplicate", f"{sample.png}: segment id {id_} is there more than once"))
        else:
            known[id_] = segment
    return known


def _read(file: str, what: str, faults: list[Fault]) -> np.ndarray | None:
    """Reads (H, W, 3); returns None and adds a fault on failure."""
    if not os.path.isfile(file):
        faults.append(Fault(f"missing {what}", file))
        return None
    try:
        return read_rgb(file, what)
    except UserError as error:
        faults.append(Fault(f"broken {what}", str(error)))
        return None


def _size(size: Sequence[int]) -> str:
    return f"{size[1]}×{size[0]}"
