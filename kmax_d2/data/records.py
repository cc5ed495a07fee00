"""The training records of registered panoptic datasets, whoever registered them."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from torch.utils.data import IterableDataset


def training_records(names: Sequence[str], filter_empty: bool = True) -> list[dict] | IterableDataset:
    """The records of all `names`, in which every segment says whether it is a thing: Cityscapes' do not by themselves.

    Args:
        names: registered datasets.
        filter_empty: leave out records without annotations.
    """
    records = get_detection_dataset_dicts(names, filter_empty=filter_empty)
    if isinstance(records, IterableDataset):
        return records
    things = set(MetadataCatalog.get(names[0]).get("thing_dataset_id_to_contiguous_id", {}).values())
    for record in records:
        for segment in record.get("segments_info", ()):
            segment.setdefault("isthing", segment["category_id"] in things)
    return records
