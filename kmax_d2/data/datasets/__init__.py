"""Datasets; importing it registers the embedded ones."""

from . import coco_panoptic, shapes


def _register_shapes() -> None:
    folder = shapes.folder()
    for split in shapes.SPLITS:
        coco_panoptic.register(
            f"shapes_{split}",
            str(folder / split),
            str(folder / f"panoptic_{split}"),
            str(folder / f"panoptic_{split}.json"),
            categories=shapes.CATEGORIES,
            prepare=shapes.prepare,
        )


_register_shapes()

__all__ = ["coco_panoptic", "shapes"]
