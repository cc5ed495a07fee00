"""Warns of what does not suit a model or a training in datasets that are sound."""

from collections import Counter
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode

from .check import Dataset, Findings, repeated_stuff

FEW = 10  # examples of a class
Checked = tuple[Dataset, list[Findings]]


def data_warnings(dataset: Dataset, findings: Sequence[Findings]) -> list[str]:
    """Returns a line each for images without segments, :func:`repeated_stuff`, and classes that are only crowds."""
    categories, segments = dataset.categories, {(id_, crowd) for found in findings for id_, _, crowd in found.segments}
    empty = [record["file_name"] for record in dataset.records if not record["segments_info"]]
    crowds = [c.name for id_, c in categories.items() if (id_, True) in segments and (id_, False) not in segments]
    lines = [f"{len(empty)} images have no segment, such as {empty[0]}"] if empty else []
    lines += [f"classes whose segments are all crowds, which no model learns: {', '.join(crowds)}"] if crowds else []
    repeated = repeated_stuff(dataset.records, {id_: c.name for id_, c in categories.items() if not c.isthing})
    return [*lines, repeated] if repeated else lines


def model_warnings(dataset: Dataset, findings: Sequence[Findings], cfg: CfgNode) -> list[str]:
    """Returns a line for the images with more segments than queries, and one for the segments that merging drops."""
    options = cfg.MODEL.KMAX
    queries, lines = options.TRANSFORMER_DECODER.NUM_QUERIES, []
    limits = {True: options.TEST.THING_AREA_LIMIT, False: options.TEST.STUFF_AREA_LIMIT}
    most = crowded = 0
    small: Counter = Counter()
    for found in findings:
        areas: Counter = Counter()  # of things one by one, and of each class of stuff
        for number, (id_, area, crowd) in enumerate(found.segments):
            if not crowd and id_ in dataset.categories:
                areas[number if dataset.categories[id_].isthing else -1 - id_] += area
        most, crowded = max(most, len(areas)), crowded + (len(areas) > queries)
        if found.size and options.TEST.MERGE_AT_CROP:
            ratios = [crop / side for crop, side in zip(cfg.INPUT.CROP_SIZE, found.size, strict=True)]
            scale = min(ratios) if cfg.INPUT.FIT_CROP else 1.0
            small.update(number >= 0 for number, area in areas.items() if area * scale**2 < limits[number >= 0])
    if crowded:
        lines.append(f"{crowded} images have more segments than the model's {queries} queries, at most {most}")
    for isthing, count in small.items():
        kind = "THING" if isthing else "STUFF"
        lines.append(
            f"{count} {'things' if isthing else 'stuff segments'} are smaller than MODEL.KMAX.TEST.{kind}_AREA_LIMIT, "
            f"{limits[isthing]} pixels at the size of the crop: the model cannot find them"
        )
    return lines


def _examples(checked: Sequence[Checked]) -> Counter:
    """Counts the segments of each class name."""
    counts: Counter = Counter()
    for dataset, findings in checked:
        known = dataset.categories
        counts.update(known[id_].name for found in findings for id_, *_ in found.segments if id_ in known)
    return counts


def _digests(checked: Sequence[Checked]) -> Iterator[tuple[bytes, str]]:
    """Yields the digest of each image that can be read, and its file."""
    for dataset, findings in checked:
        for record, found in zip(dataset.records, findings, strict=True):
            if found.digest:
                yield found.digest, record["file_name"]


def training_warnings(train: Sequence[Checked], test: Sequence[Checked]) -> list[str]:
    """Returns a line each for rare classes, classes that only validation has, and images in both parts by content."""
    examples, tested = _examples(train), _examples(test)
    names = dict.fromkeys(category.name for dataset, _ in train for category in dataset.categories.values())
    rare = [f"{name} ({examples[name]})" for name in names if examples[name] < FEW]
    unseen = [name for name in tested if not examples[name]] if train else []
    files = dict(_digests(train))
    shared = [f"{file} is {files[digest]}" for digest, file in _digests(test) if digest in files]
    lines = [f"classes with fewer than {FEW} examples for training: {', '.join(rare)}"] if rare else []
    lines += [f"classes that only validation has: {', '.join(unseen)}"] if unseen else []
    return lines + ([f"{len(shared)} images of validation are training images too: {shared[0]}"] if shared else [])
