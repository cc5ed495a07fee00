"""Writes panoptic data as annotation tools would: the inverse of kmax_d2.tools.make_panoptic."""

import base64
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import yaml
from PIL import Image

from kmax_d2.data.segment_ids import rgb2id


def panoptic(images, pngs, json_file):
    """Yields each image's path and entry, its id map, and its segments; the categories come first."""
    content = json.loads(Path(json_file).read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    yield [category["name"] for category in content["categories"]]
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        ids = rgb2id(np.asarray(Image.open(Path(pngs) / annotation["file_name"])))
        segments = [(segment["id"], names[segment["category_id"]]) for segment in annotation["segments_info"]]
        yield Path(images, image["file_name"]).absolute(), image, ids, segments


def outlines(mask):
    """The outer outline (N, 2) of each part of a mask (H, W), in whole pixels.

    Parts are connected by edges: then what is in a hole of a part is all there, and smaller than the part.
    """
    count, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    found = []
    for part in range(1, count):
        ((outline, *_), _) = cv2.findContours(
            (parts == part).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        # An outline of one or two pixels is repeated up to the three corners of a polygon.
        found.append(np.resize(outline[:, 0], (max(3, len(outline)), 2)))
    return found


def edges(mask):
    """The outer outlines (N, 2) of a mask as COCO means polygons: along the edges of pixels, just inside them."""
    return [(outline + 0.5) / 4 for outline in outlines(mask.repeat(4, 0).repeat(4, 1))]


def to_coco(source, folder, polygons=False):
    """Run lengths or polygons."""
    names, *samples = panoptic(*source)
    annotations = []
    for _, image, ids, segments in samples:
        for id_, name in segments:
            rle = mask_util.encode(np.asfortranarray(ids == id_, dtype=np.uint8))
            mask = {"size": rle["size"], "counts": rle["counts"].decode()}
            if polygons:
                mask = [part.ravel().tolist() for part in edges(ids == id_)]
            number = {"id": len(annotations) + 1, "image_id": image["id"], "iscrowd": 0}
            annotations.append(number | {"category_id": names.index(name) + 1, "segmentation": mask})
    categories = [{"id": index, "name": name} for index, name in enumerate(names, start=1)]
    content = {"images": [image for _, image, *_ in samples], "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def to_yolo(source, folder):
    """A polygon for each connected part: a thing in several parts becomes several things."""
    names, *samples = panoptic(*source)
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True)
    for file, image, ids, segments in samples:
        (folder / "images/train" / file.name).symlink_to(file)
        lines = []
        for id_, name in segments:
            for part in outlines(ids == id_):
                shares = part / (image["width"], image["height"])
                lines.append(f"{names.index(name)} " + " ".join(f"{share:.6f}" for share in shares.ravel()))
        (folder / "labels/train" / f"{file.stem}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(yaml.safe_dump({"path": ".", "train": "images/train", "names": names}))
    return folder


def to_labelme(source, folder, masks=False):
    """Polygons, of which those of one segment have a group_id, or masks; what is void is an ignored shape."""
    _, *samples = panoptic(*source)
    for file, image, ids, segments in samples:
        shapes = []
        for id_, name in [*segments, *([(0, "__ignore__")] if (ids == 0).any() else [])]:
            if masks:
                x, y, width, height = cv2.boundingRect((ids == id_).astype(np.uint8))
                buffer = io.BytesIO()
                Image.fromarray(ids[y : y + height, x : x + width] == id_).save(buffer, "PNG")
                shape = {"points": [[x, y], [x + width - 1, y + height - 1]], "shape_type": "mask"}
                shapes.append({"label": name, "mask": base64.b64encode(buffer.getvalue()).decode()} | shape)
                continue
            group = {"label": name, "group_id": id_, "shape_type": "polygon"}
            shapes += [group | {"points": part.tolist()} for part in outlines(ids == id_)]
        size = {"imageHeight": image["height"], "imageWidth": image["width"]}
        content = {"version": "5", "shapes": shapes, "imagePath": str(file), "imageData": None} | size
        (folder / f"{file.stem}.json").write_text(json.dumps(content))
    return folder


def to_cvat(source, folder, masks=False):
    """Polygons in groups, or masks."""
    names, *samples = panoptic(*source)
    lines = [f"<label><name>{name}</name><color>#10{index:02x}30</color></label>" for index, name in enumerate(names)]
    text = f"<annotations><meta><job><labels>{''.join(lines)}</labels></job></meta>"
    for file, image, ids, segments in samples:
        text += f'<image id="0" name="{file.name}" width="{image["width"]}" height="{image["height"]}">'
        for id_, name in segments:
            x, y, width, height = cv2.boundingRect((ids == id_).astype(np.uint8))
            if masks:
                pixels = (ids[y : y + height, x : x + width] == id_).ravel()
                edges = np.flatnonzero(np.diff(pixels, prepend=False))
                runs = ", ".join(map(str, np.diff([0, *edges, pixels.size])))
                text += f'<mask label="{name}" rle="{runs}" left="{x}" top="{y}" width="{width}" height="{height}"/>'
                continue
            for part in outlines(ids == id_):
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in part)
                text += f'<polygon label="{name}" points="{points}" group_id="{id_}" z_order="0"/>'
        text += "</image>"
    (folder / "annotations.xml").write_text(text + "</annotations>")
    return folder / "annotations.xml"


def to_pngs(source, folder, things, instances=True):
    """Values of class · 1000 + instance, 16 bits, or without instances the class, 8 bits; names in classes.txt."""
    names, *samples = panoptic(*source)
    for file, _, ids, segments in samples:
        values, counts = np.zeros(ids.shape, np.uint16 if instances else np.uint8), {}
        for id_, name in segments:
            value = names.index(name) + 1
            if instances and name in things:
                counts[name] = counts.get(name, 0) + 1
                value = 1000 * value + counts[name]
            values[ids == id_] = value
        Image.fromarray(values).save(folder / f"{file.stem}.png")
    (folder / "classes.txt").write_text("\n".join(f"{value} {name}" for value, name in enumerate(names, start=1)))
    return folder


def to_voc(source, folder):
    """A PNG of classes and one of objects; images stay where they are."""
    names, *samples = panoptic(*source)
    for kind in ("SegmentationClass", "SegmentationObject"):
        (folder / kind).mkdir()
    for file, _, ids, segments in samples:
        classes, objects = np.zeros((2, *ids.shape), np.uint8)
        for number, (id_, name) in enumerate(segments, start=1):
            classes[ids == id_], objects[ids == id_] = names.index(name) + 1, number
        Image.fromarray(classes).save(folder / "SegmentationClass" / f"{file.stem}.png")
        Image.fromarray(objects).save(folder / "SegmentationObject" / f"{file.stem}.png")
    (folder / "names.txt").write_text("\n".join(["void", *names]))
    return folder
