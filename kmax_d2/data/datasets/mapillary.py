"""Mapillary Vistas, versions 1.2 and 2.0, whose classes are read from its JSON when they are first needed."""

import os
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from . import coco_panoptic

JSONS = {"1.2": "panoptic_2018.json", "2.0": "panoptic_2020.json"}
SPLITS = {"train": "training", "val": "validation"}
CLASSES = coco_panoptic.metadata_of([])  # the keys are what a JSON tells


class JsonMetadata(Metadata):
    """Metadata of which the classes come from "panoptic_json"; asking for them raises UserError if it is missing."""

    def __getattr__(self, key: str) -> Any:
        """Returns a value, reading the JSON for the first of the classes'."""
        if key not in CLASSES:
            return super().__getattr__(key)
        self.__dict__.update(coco_panoptic.metadata_of(coco_panoptic.read_categories(self.panoptic_json)))
        return self.__dict__[key]


def register(root: str) -> None:
    """Registers `mapillary_vistas_{1.2,2.0}_panoptic_{train,val}` below `root`/mapillary_vistas."""
    for version, file in JSONS.items():
        for split, folder in SPLITS.items():
            name = f"mapillary_vistas_{version}_panoptic_{split}"
            parent = os.path.join(root, "mapillary_vistas", folder)
            images, pngs = os.path.join(parent, "images"), os.path.join(parent, f"v{version}", "panoptic")
            json_file = os.path.join(pngs, file)
            if name in DatasetCatalog:
                continue
            coco_panoptic.register(name, images, pngs, json_file, categories=())
            known = MetadataCatalog.get(name).as_dict()
            MetadataCatalog[name] = JsonMetadata(**{key: known[key] for key in known.keys() - CLASSES.keys()})
