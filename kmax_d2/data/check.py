"""Everything that can be wrong with a panoptic dataset on disk, found in one pass, and its statistics."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from ..errors import UserError
from .datasets.coco_panoptic import metadata_of, read_json
from .mapper import read_image
from .panoptic_png import NUM_IDS, describe
from .parallel import parallel_map
from .segment_ids import rgb2id

# The fields that the entries of a COCO panoptic JSON must have, and their types.
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
    """Something wrong: its kind, and a line with the file's name."""

    kind: str
    line: str


@dataclass(frozen=True)
class Sample:
    """An image and its annotation, as the dataset tells them.

    "size" is (height, width), None where it is not told; "categories" are all ids that a segment may have.
    """

    image: str
    png: str
    size: tuple[int, int] | None
    segments: list[dict]
    categories: frozenset


@dataclass
class Findings:
    """What one sample's files say: faults, (height, width), void pixels, (category id, area, is crowd) of segments."""

    faults: list[Fault] = field(default_factory=list)
    size: tuple[int, int] | None = None
    void: int = 0
    segments: list[tuple[int, int, bool]] = field(default_factory=list)


@dataclass
class Dataset:
    """A dataset as its JSON tells it, before any other file is read, and the faults of the JSON."""

    name: str
    metadata: Metadata
    categories: dict[int, Category]
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def check(self, workers: int = 0) -> list[Findings]:
        """Reads every file, in parallel; in the order of the samples."""
        return parallel_map(check_sample, self.samples, f"checking {self.name}", workers)


def registered(name: str) -> Dataset:
    """A dataset of Detectron2's catalogs. Raises UserError where it is not there or not panoptic."""
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("panoptic_json")
    if json_file is None:
        return _from_records(name)
    if not os.path.isfile(json_file):
        # Datasets that are drawn or made when they are first asked for; of others, the JSON's absence is told next.
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
    """A dataset in COCO panoptic format. Raises UserError where the JSON is no such."""
    content = read_json(json_file)
    faults: list[Fault] = []
    categories = _well_formed(content["categories"], CATEGORY, "category", json_file, faults)
    _find_duplicates(categories, "id", "category id", json_file, faults)
    metadata = Metadata(name=Path(json_file).stem, **metadata_of(categories))
    dataset = Dataset(Path(json_file).stem, metadata, _categories(metadata), faults=faults)
    _read_samples(dataset, content, json_file, image_root, panoptic_root)
    return dataset


def _categories(metadata: Metadata) -> dict[int, Category]:
    """The dataset's category ids, in the order of the contiguous classes."""
    kinds = (
        (False, metadata.get("stuff_dataset_id_to_contiguous_id", {}), metadata.get("stuff_classes", [])),
        (True, metadata.get("thing_dataset_id_to_contiguous_id", {}), metadata.get("thing_classes", [])),
    )
    found = {id_: Category(names[index], thing, index) for thing, ids, names in kinds for id_, index in ids.items()}
    return dict(sorted(found.items(), key=lambda item: item[1].contiguous))


def _from_records(name: str) -> Dataset:
    """A dataset of which the catalogs know nothing but records, whose classes are contiguous."""
    metadata = MetadataCatalog.get(name)
    categories = {category.contiguous: category for category in _categories(metadata).values()}
    try:
        records = DatasetCatalog.get(name)
    except (OSError, AssertionError) as error:
        raise UserError(f"the dataset {name} cannot be loaded: {error}") from error
    if not categories or any("pan_seg_file_name" not in record for record in records):
        raise UserError(f"the dataset {name} is not panoptic")
    dataset = Dataset(name, metadata, categories)
    for record in records:
        size = (record["height"], record["width"]) if "height" in record else None
        dataset.samples.append(
            Sample(
                record["file_name"], record["pan_seg_file_name"], size, record["segments_info"], frozenset(categories)
            )
        )
    return dataset


def _well_formed(entries: object, fields: dict, what: str, json_file: str, faults: list[Fault]) -> list[dict]:
    """The entries whose fields are of the right types; of each other one there is a fault."""
    good = []
    for entry in entries if isinstance(entries, list) else [entries]:
        wrong = [
            key for key, kind in fields.items() if not (isinstance(entry, dict) and isinstance(entry.get(key), kind))
        ]
        if wrong:
            shown = textwrap.shorten(str(entry), 80, placeholder="…")
            faults.append(Fault("malformed entry", f"{json_file}: the {what} {shown} has no valid {', '.join(wrong)}"))
        else:
            good.append(entry)
    return good


def _read_samples(dataset: Dataset, content: dict, json_file: str, image_root: str, panoptic_root: str) -> None:
    """Fills in the samples and the faults of the JSON's own entries."""
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
            line = f"{png}: no image has the id {annotation['image_id']}"
            faults.append(Fault("annotation without image", line))
            continue
        segments = _well_formed(annotation["segments_info"], SEGMENT, f"segment of {png}", json_file, faults)
        size = (image["height"], image["width"])
        dataset.samples.append(Sample(_image_file(image_root, image), png, size, segments, ids))
    annotated = {annotation["image_id"] for annotation in annotations}
    for id_, image in image_of_id.items():
        if id_ not in annotated:
            line = f"{_image_file(image_root, image)} has no annotation"
            faults.append(Fault("image without annotation", line))


def _find_duplicates(entries: list[dict], key: str, what: str, json_file: str, faults: list[Fault]) -> None:
    for value, count in Counter(entry[key] for entry in entries).items():
        if count > 1:
            faults.append(Fault("duplicate", f"{json_file}: {what} {value} is there {count} times"))


def _image_file(image_root: str, image: dict) -> str:
    # The JSON that cityscapesscripts writes names the images otherwise than their files, which lie in a folder a city.
    name = image["file_name"]
    if name.endswith("_gtFine_leftImg8bit.png"):
        name = os.path.join(name.split("_")[0], name.replace("_gtFine", ""))
    return os.path.join(image_root, name)


def check_sample(sample: Sample) -> Findings:
    """Reads a sample's files and compares them with what the dataset tells of them."""
    findings = Findings()
    faults = findings.faults
    told = sample.size
    image, fault = _read(sample.image, "image")
    if fault is not None:
        faults.append(fault)
    else:
        findings.size = image.shape[:2]
        if told is not None and tuple(told) != findings.size:
            faults.append(
                Fault("size mismatch", f"{sample.image} is {_size(findings.size)}, the JSON says {_size(told)}")
            )
    known = _known_segments(sample, faults)
    colors, fault = _read(sample.png, "PNG")
    if fault is not None:
        faults.append(fault)
        return findings
    if colors.shape[:2] != (findings.size or told or colors.shape[:2]):
        line = f"{sample.png} is {_size(colors.shape)}, its image {_size(findings.size or told)}"
        faults.append(Fault("size mismatch", line))
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
    """The sample's segments by their ids, which a color can tell; what is wrong with others is put to the faults."""
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


def _read(file: str, what: str):
    """(H, W, 3) and None, or None and the fault."""
    if not os.path.isfile(file):
        return None, Fault(f"missing {what}", file)
    try:
        return read_image({"file_name": file}, "RGB"), None
    except UserError as error:
        return None, Fault(f"broken {what}", str(error))


def _size(size: Sequence[int]) -> str:
    return f"{size[1]}×{size[0]}"
