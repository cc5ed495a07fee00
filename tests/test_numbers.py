"""A model that predicts the truth, as a user's own META_ARCHITECTURE: 100.0, whatever the layout, and on odd data."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from evaluated import evaluate, output_of
from layouts import registered
from layouts.ade20k import miniature_ade20k
from layouts.cityscapes import miniature_cityscapes
from layouts.coco import miniature_coco, miniature_coconut
from layouts.mapillary import miniature_mapillary
from panopticapi.evaluation import pq_compute
from PIL import Image
from torch import nn

from kmax_d2.data import panoptic_png
from kmax_d2.data.check import registered as described
from kmax_d2.data.datasets import cityscapes, coco_panoptic
from kmax_d2.data.segment_ids import id2rgb
from kmax_d2.errors import UserError

TRAIN_NET = programs.load(programs.TRAIN_NET)
NAME = "odd_data"
LAYOUTS = [
    *("coco_2017_val_panoptic", "relabeled_coco_val_panoptic", "cityscapes_fine_panoptic_val"),
    *("ade20k_panoptic_val", "mapillary_vistas_1.2_panoptic_val"),
]


@META_ARCH_REGISTRY.register()
class Truth(nn.Module):
    """Predicts what the records say."""

    def __init__(self, cfg):
        super().__init__()
        (self.name,) = cfg.DATASETS.TEST
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, records):
        return [output_of(self.name, record) for record in records]


def evaluate_truth(folder, *arguments):
    """Runs train_net.py --eval-only; returns results.json, which must be valid."""
    torch.save({"model": {"weight": torch.zeros(1)}}, folder / "truth.pth")
    model = ["MODEL.META_ARCHITECTURE", "Truth", "MODEL.WEIGHTS", str(folder / "truth.pth"), "MODEL.DEVICE", "cpu"]
    output = ["OUTPUT_DIR", str(folder / "output"), "DATALOADER.NUM_WORKERS", "0", "MODEL.KMAX.NUM_CLASSES", "0"]
    TRAIN_NET.main(["--eval-only", *arguments, *model, *output])
    (file,) = (folder / "output").rglob("results.json")

    def refuse(text):
        raise AssertionError(f"{text} in {file}")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with dots in its path, where Detectron2's loader does not find Cityscapes."""
    pytest.importorskip("cityscapesscripts")
    folder = tmp_path_factory.mktemp("john.doe") / "v1.0"
    for make in (miniature_coco, miniature_coconut, miniature_cityscapes, miniature_ade20k, miniature_mapillary):
        make(folder)
    with registered(folder):
        yield folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_truth_scores_100_in_train_net(root, tmp_path, name):
    saved = tmp_path / "saved"
    results = evaluate_truth(tmp_path, "--save-predictions", str(saved), "DATASETS.TEST", str((name,)))
    assert {results["panoptic_seg"][key + part] for key in ("PQ", "SQ", "RQ") for part in ("", "_th", "_st")} == {100}
    assert results["sem_seg"]["mIoU"] == pytest.approx(100) and results["segm"]["AP"] == pytest.approx(100)
    if name.startswith("relabeled"):  # without "iscrowd", which panopticapi needs
        return
    metadata, (predicted,) = MetadataCatalog.get(name), (saved / name).glob("*.json")
    with contextlib.redirect_stdout(io.StringIO()):
        folders = metadata.panoptic_root, str(predicted.with_suffix(""))
        official = pq_compute(metadata.panoptic_json, str(predicted), *folders)
    assert {official[part][key] for part in ("All", "Things", "Stuff") for key in ("pq", "sq", "rq")} == {1}


def test_cityscapes_records_are_detectron2s(root, monkeypatch):
    """By a relative path, and through a link."""
    (record, _) = DatasetCatalog.get(LAYOUTS[2])
    assert record["image_id"] == "frankfurt_000000_000019"
    files = [record[f"{kind}file_name"] for kind in ("", "sem_seg_", "pan_seg_")]
    assert all(Path(file).is_file() and file.startswith(f"{root}/cityscapes/") for file in files)
    assert files[1].endswith("/gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelTrainIds.png")
    monkeypatch.chdir(root / "cityscapes")
    (root / "to.it").symlink_to(root)
    for other in ("..", "../to.it"):
        with registered(other):
            assert [DatasetCatalog.get(LAYOUTS[2])[0]["sem_seg_file_name"]] == [files[1].replace(str(root), other, 1)]


def test_loaders_of_others_stay(root, monkeypatch):
    """Only Detectron2's own loader is replaced."""
    monkeypatch.setitem(DatasetCatalog.data, LAYOUTS[2], lambda: ["theirs"])
    cityscapes.register()
    assert DatasetCatalog.get(LAYOUTS[2]) == ["theirs"]


# --- odd data ---


@pytest.fixture
def odd(tmp_path):
    """Writes two images with ids and JSONs as given, and registers them; returns the folder."""

    def write(maps, annotations, categories):
        (tmp_path / "panoptic").mkdir()
        images = []
        for number, ids in enumerate(maps):
            size = dict(zip(("height", "width"), ids.shape, strict=True))
            images.append({"id": number, "file_name": f"{number}.png", **size})
            Image.fromarray(id2rgb(ids)).save(tmp_path / "panoptic" / f"{number}.png")
            Image.fromarray(id2rgb(ids)).save(tmp_path / f"{number}.png")
        listed = [{"image_id": n, "file_name": f"{n}.png", "segments_info": s} for n, s in enumerate(annotations)]
        content = {"images": images, "annotations": listed, "categories": categories}
        (tmp_path / "panoptic.json").write_text(json.dumps(content))
        coco_panoptic.register(NAME, str(tmp_path), str(tmp_path / "panoptic"), str(tmp_path / "panoptic.json"))
        return tmp_path

    return write


def blocks():
    """(40, 60) void and five segments, of which the first two are things."""
    ids = np.kron([[0, 11, 22], [33, 44, 55]], np.ones((20, 20), int))
    segments = [
        {"id": s["id"], "category_id": n % 4, "area": s["area"], "iscrowd": 0}
        for n, s in enumerate(panoptic_png.describe(ids)[1:])
    ]
    return ids, segments


CATEGORIES = [{"id": index, "name": f"class {index}", "isthing": int(index < 2)} for index in range(6)]
AREAS = {
    "right": lambda area: area,
    "a float": float,
    "null": lambda area: None,
    "a quarter": lambda area: area // 4,
    "double": lambda area: 2 * area,
    "zero": lambda area: 0,
    "negative": lambda area: -area,
    "a float too large": lambda area: 1e300,
}


@pytest.mark.parametrize("form", AREAS)
def test_areas_are_counted_in_the_png(odd, tmp_path, caplog, form):
    ids, segments = blocks()
    folder = odd([ids], [[s | {"area": AREAS[form](s["area"])} for s in segments]], CATEGORIES)
    results = evaluate(NAME, folder / "output", lambda record: output_of(NAME, record))
    is_wrong = form not in ("right", "a float", "null")
    assert {results["panoptic_seg"][key] for key in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")} == {100}
    assert ("5 segments of" in caplog.text and "another area than in their PNGs" in caplog.text) == is_wrong
    (findings,) = described(NAME).check(workers=1)
    assert [fault.kind for fault in findings.faults] == ["area mismatch"] * (5 * is_wrong)


def void(ids, segments):
    return 0 * ids, []


def unlisted(ids, segments):
    return ids, segments[1:]


def crowds(ids, segments):
    return ids, [segment | {"iscrowd": 1} for segment in segments]


def only(isthing):
    kept = [index for index in range(4) if (index < 2) == isthing]
    return lambda ids, segments: (ids, [s | {"category_id": kept[s["category_id"] % 2]} for s in segments])


# How the data differ, and which scores then exist: panoptic ones, AP, mIoU.
ODD = {
    "only void": (void, set(), False, False),
    "only crowds": (crowds, set(), False, True),
    "no things": (only(False), {"", "_st"}, False, True),
    "no stuff": (only(True), {"", "_th"}, True, True),
    "ids that the JSON lacks": (unlisted, {"", "_th", "_st"}, True, True),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("number", [1, 2])
def test_what_does_not_exist_has_no_score(odd, caplog, kind, number):
    change, parts, has_things, has_classes = ODD[kind]
    ids, segments = change(*blocks())
    folder = odd([ids] * number, [segments] * number, CATEGORIES)
    files = [str(folder), str(folder / "panoptic"), str(folder / "panoptic.json")]
    if kind == "ids that the JSON lacks":
        with pytest.raises(UserError, match=r"pixels have ids that its JSON lacks"):
            evaluate_truth(folder, "--test-data", *files)
        results = evaluate(NAME, folder / "output", lambda record: output_of(NAME, record))
    else:
        results = evaluate_truth(folder, "--test-data", *files)
    assert results["panoptic_seg"] == {f"{key}{part}": 100 for part in parts for key in ("PQ", "SQ", "RQ")}
    assert ("AP" in results["segm"]) == has_things and ("mIoU" in results["sem_seg"]) == has_classes
    assert all(np.isfinite(score) for scores in results.values() for score in scores.values())


@pytest.mark.parametrize("size", [(41, 60), (20, 30)])
def test_a_png_of_another_size(odd, size):
    ids, segments = blocks()
    folder = odd([ids], [segments], CATEGORIES)
    (record,) = DatasetCatalog.get(NAME)
    right = output_of(NAME, record)
    file = folder / "panoptic" / "0.png"
    Image.fromarray(id2rgb(np.resize(ids, size))).save(file)
    with pytest.raises(UserError, match=rf"the panoptic PNG {file} is {size[1]}×{size[0]}, but its image is 60×40"):
        evaluate(NAME, folder / "output", lambda record: right)
