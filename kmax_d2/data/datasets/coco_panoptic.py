"""Datasets in COCO panoptic format: a folder of images, a folder of PNGs, one JSON."""

import json
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from ...errors import UserError

IGNORE_LABEL = 65535


class Fault(NamedTuple):
    """Something wrong with a dataset: its kind, and a line that names the file."""

    kind: str
    line: str


UNUSED_IMAGE = "image without annotation"  # the only fault of a JSON with which it can be used


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _is_color(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 3 and all(c in range(256) for c in value))


# The fields of entries, and what their values must be; a missing one has the value None.
FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "category": {"id": _is(int), "name": _is(str), "isthing": lambda value: value in (0, 1), "color": _is_color},
    "image": {"id": _is(int, str), "file_name": _is(str), "height": _is(int), "width": _is(int)},
    "annotation": {"image_id": _is(int, str), "file_name": _is(str), "segments_info": _is(list)},
    "segment": {
        **{"id": _is(int), "category_id": _is(int)},
        **{"iscrowd": lambda value: value in (None, 0, 1), "area": _is(int, float, type(None))},
    },
}


def read_json(json_file: str) -> dict:
    """Reads an annotation file. Raises UserError if it is missing or not a COCO panoptic JSON."""
    try:
        content = json.loads(Path(json_file).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the panoptic annotations {json_file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_file} is not valid JSON: {error}") from error
    parts = content if isinstance(content, dict) else {}
    missing = [key for key in ("images", "annotations", "categories") if key not in parts]
    if missing:
        raise UserError(f"{json_file} is not in COCO panoptic format: it has no {' and no '.join(missing)}")
    return content


def _well_formed(entries: Any, kind: str, where: str, faults: list[Fault]) -> list[dict]:
    """Returns the entries whose fields have valid values; each of the others is a fault."""
    good: list[dict] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        known = entry if isinstance(entry, dict) else {}
        wrong = [key for key, is_valid in FIELDS[kind].items() if not is_valid(known.get(key))]
        if wrong:
            shown = textwrap.shorten(str(entry), 80, placeholder="…")
            faults.append(Fault("malformed entry", f"{where}: the {kind} {shown} has no valid {', '.join(wrong)}"))
        else:
            good.append(entry)
    return good


def _duplicates(entries: list[dict], key: str, what: str, json_file: str) -> list[Fault]:
    counts = Counter(entry[key] for entry in entries)
    lines = [f"{json_file}: {what} {value} is there {count} times" for value, count in counts.items() if count > 1]
    return [Fault("duplicate", line) for line in lines]


def find_categories(content: dict, json_file: str) -> tuple[list[dict], list[Fault]]:
    """Returns the categories of a JSON that are valid, and the faults of the others."""
    faults: list[Fault] = []
    categories = _well_formed(content["categories"], "category", json_file, faults)
    return categories, faults + _duplicates(categories, "id", "category id", json_file)


def read_categories(json_file: str) -> list[dict]:
    """Reads the categories of a JSON. Raises UserError if it is missing or they have a fault."""
    categories, faults = find_categories(read_json(json_file), json_file)
    _require_none(faults)
    return categories


def find_records(
    content: dict, json_file: str, image_root: str | Sequence[str], panoptic_root: str
) -> tuple[list[dict], list[Fault]]:
    """Returns the records of a JSON with its own category ids, and the faults of the entries that are in none.

    Of several image folders, each image is in one.
    """
    faults: list[Fault] = []
    images = _well_formed(content["images"], "image", json_file, faults)
    annotations = _well_formed(content["annotations"], "annotation", json_file, faults)
    faults += _duplicates(images, "id", "image id", json_file)
    faults += _duplicates(images, "file_name", "image file", json_file)
    faults += _duplicates(annotations, "image_id", "annotation of image", json_file)
    faults += _duplicates(annotations, "file_name", "PNG", json_file)
    image_of_id = {image["id"]: image for image in images}
    first, *others = [image_root] if isinstance(image_root, str) else image_root
    folder_of = {name: folder for folder in others if os.path.isdir(folder) for name in os.listdir(folder)}
    records = []
    for annotation in annotations:
        where, image = f"{json_file}: {annotation['file_name']}", image_of_id.get(annotation["image_id"])
        if image is None:
            line = f"{where}: no image has the id {annotation['image_id']}"
            faults.append(Fault("annotation without image", line))
            continue
        name = image["file_name"]
        # The JSON from cityscapesscripts has other names than the image files, which are in one folder per city.
        if name.endswith("_gtFine_leftImg8bit.png"):
            name = os.path.join(name.split("_")[0], name.replace("_gtFine", ""))
        records.append(
            {
                "file_name": os.path.join(folder_of.get(name, first), name),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "pan_seg_file_name": os.path.join(panoptic_root, annotation["file_name"]),
                "segments_info": _well_formed(annotation["segments_info"], "segment", where, faults),
            }
        )
    unused = image_of_id.keys() - {annotation["image_id"] for annotation in annotations}
    names = [image["file_name"] for image in images if image["id"] in unused]
    return records, faults + [Fault(UNUSED_IMAGE, f"{json_file}: the image {name} has no annotation") for name in names]


def _require_none(faults: Sequence[Fault]) -> None:
    lines = [fault.line for fault in faults if fault.kind != UNUSED_IMAGE]
    if lines:
        more = f" ({len(lines) - 1} more faults: kmax_d2.tools.check_dataset lists them)" if len(lines) > 1 else ""
        raise UserError(lines[0] + more)


def load(
    json_file: str, image_root: str | Sequence[str], panoptic_root: str, categories: Sequence[dict] = ()
) -> list[dict]:
    """Loads Detectron2's records of a dataset, with classes contiguous in the order of `categories` or of the JSON's.

    Each has "file_name", "pan_seg_file_name", "height", "width", "image_id" and "segments_info". Raises UserError if
    the JSON has a fault, an image or a PNG is missing, or a segment's category is undefined.
    """
    content = read_json(json_file)
    if not categories:
        categories, faults = find_categories(content, json_file)
        _require_none(faults)
    records, faults = find_records(content, json_file, image_root, panoptic_root)
    _require_none(faults)
    known = {category["id"]: (index, bool(category["isthing"])) for index, category in enumerate(categories)}
    for record in records:
        for segment in record["segments_info"]:
            if segment["category_id"] not in known:
                line = f"{os.path.basename(record['pan_seg_file_name'])} has category {segment['category_id']}"
                raise UserError(f"{json_file}: a segment of {line}, which its categories do not define")
            segment["category_id"], segment["isthing"] = known[segment["category_id"]]
    if not records:
        raise UserError(f"{json_file} has no annotations")
    require_files([record["file_name"] for record in records], "images", json_file)
    require_files([record["pan_seg_file_name"] for record in records], "panoptic PNGs", json_file)
    return records


def require_files(files: list[str], what: str, json_file: str) -> None:
    """Raises UserError if any of the files, named as `what` of the JSON, is missing."""
    # Listing each folder once is far cheaper than looking up each file.
    folders = {os.path.dirname(file) for file in files}
    present = {(folder, name) for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)}
    missing = [file for file in files if os.path.split(file) not in present]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} {what} of {json_file} are missing, first {missing[0]}")


def metadata_of(categories: Sequence[dict]) -> dict:
    """Returns Detectron2's panoptic metadata: names, colors, and the contiguous id of each thing and stuff category."""
    names = [category["name"] for category in categories]
    colors = [category.get("color") or _color(index) for index, category in enumerate(categories)]
    things, stuff = (
        {category["id"]: index for index, category in enumerate(categories) if bool(category["isthing"]) == wanted}
        for wanted in (True, False)
    )
    # As in Detectron2's standard COCO metadata, class names and colors are indexed by all contiguous ids.
    return {
        **{"thing_classes": names, "thing_colors": colors, "thing_dataset_id_to_contiguous_id": things},
        **{"stuff_classes": names, "stuff_colors": colors, "stuff_dataset_id_to_contiguous_id": stuff},
    }


def things_of(metadata: Metadata) -> set[int]:
    """Returns the contiguous classes of a dataset that are things; none where the metadata do not name any."""
    return set(metadata.get("thing_dataset_id_to_contiguous_id", {}).values())


def categories_of(metadata: Metadata) -> list[dict]:
    """Returns the JSON categories of a dataset, in the order of the contiguous classes: :func:`metadata_of` undone."""
    things, stuff = (metadata.get(f"{kind}_dataset_id_to_contiguous_id", {}) for kind in ("thing", "stuff"))
    id_of, colors = {index: id_ for id_, index in (stuff | things).items()}, metadata.get("stuff_colors")
    return [
        {"id": id_of[index], "name": name, "isthing": int(id_of[index] in things)}
        | ({"color": list(colors[index])} if colors else {})
        for index, name in enumerate(metadata.stuff_classes)
    ]


def _color(index: int) -> list[int]:
    """Returns a color for a category without one: the bits of 1 + its index spread over the channels (Pascal VOC)."""
    bits = [(index + 1) >> bit & 1 for bit in range(24)]
    return [sum(bits[3 * bit + channel] << (7 - bit) for bit in range(8)) for channel in range(3)]


def register_records(name: str, load: Callable[[], list[dict]], *, replace: bool = True, **metadata: object) -> None:
    """Registers a dataset in Detectron2's catalogs; `load` returns the records.

    A dataset of the same name, which may be another project's, is replaced, or left as it is without `replace`.
    """
    if name in DatasetCatalog and not replace:
        return
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def register(
    name: str,
    image_root: str | Sequence[str],
    panoptic_root: str,
    json_file: str,
    *,
    categories: Sequence[dict] | None = None,
    prepare: Callable[[], object] | None = None,
    evaluator_type: str = "coco_panoptic_seg",
    replace: bool = True,
) -> None:
    """Registers a dataset in COCO panoptic format; apart from the categories, files are read when it is first used.

    Args:
        name: name in the catalogs.
        image_root, panoptic_root, json_file: where the data are; the images may be in several folders.
        categories: the JSON's, if they are known without reading it; if empty, they are read with the records.
        prepare: creates the files if needed.
        evaluator_type: selects the evaluators.
        replace: whether a dataset of the same name is replaced, or left as it is.
    """
    if categories is None:
        categories = read_categories(json_file)

    def records() -> list[dict]:
        if prepare is not None:
            prepare()
        return load(json_file, image_root, panoptic_root, categories)

    register_records(
        name,
        records,
        replace=replace,
        image_root=image_root,
        panoptic_root=panoptic_root,
        panoptic_json=json_file,
        evaluator_type=evaluator_type,
        ignore_label=IGNORE_LABEL,
        label_divisor=1000,
        **metadata_of(categories),
    )
