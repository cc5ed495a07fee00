"""Registration in Detectron2's catalogs."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.data import DatasetCatalog, MetadataCatalog


def register(name: str, load: Callable[[], list[dict]], **metadata: object) -> None:
    """Registers a dataset, replacing any previous one of the same name.

    Args:
        name: name in the catalogs.
        load: returns the records; called when the dataset is first used.
        metadata: entries of Detectron2's metadata.
    """
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
