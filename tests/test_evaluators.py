"""The evaluators on every layout of data, against the official scripts called on the files that they write."""

import contextlib
import copy
import glob
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from evaluated import evaluate, output, output_of, truth_of
from layouts import registered
from layouts.ade20k import miniature_ade20k
from layouts.cityscapes import miniature_cityscapes
from layouts.coco import miniature_coco, miniature_coconut
from layouts.mapillary import miniature_mapillary
from panopticapi.evaluation import pq_compute
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.data.segment_ids import rgb2id
from kmax_d2.engine import launch, load_config
from kmax_d2.errors import UserError
from kmax_d2.evaluation import build_evaluator

COCO_VAL, CITYSCAPES_VAL, ADE20K_VAL = "coco_2017_val_panoptic", "cityscapes_fine_panoptic_val", "ade20k_panoptic_val"
SHAPES, MAPILLARY_VAL = "evaluated_shapes", "mapillary_vistas_1.2_panoptic_val"
COCONUT_VAL = "relabeled_coco_val_panoptic"
ALL = [COCO_VAL, CITYSCAPES_VAL, ADE20K_VAL, SHAPES, MAPILLARY_VAL, COCONUT_VAL]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    pytest.importorskip("cityscapesscripts")
    folder = tmp_path_factory.mktemp("datasets")
    for make in (miniature_coco, miniature_coconut, miniature_cityscapes, miniature_ade20k, miniature_mapillary):
        make(folder)
    shapes.write_split(folder, "val", 5, 11)
    coco_panoptic.register(SHAPES, *(str(folder / name) for name in ("val", "panoptic_val", "panoptic_val.json")))
    with registered(folder):
        yield folder


@pytest.mark.parametrize("name", ALL)
def test_the_truth_scores_100(root, tmp_path, name):
    """The data have crowds, void, and (ADE20K) things in no instance."""
    results = evaluate(name, tmp_path, lambda record: output_of(name, record))
    for part in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"):
        assert results["panoptic_seg"][part] == 100
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP50"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    # NumPy's would print as np.float64(100.0).
    assert {type(value) for scores in results.values() for value in scores.values()} == {float}


@pytest.mark.parametrize("name", [COCO_VAL, CITYSCAPES_VAL, ADE20K_VAL])
def test_a_class_map_scores_as_its_one_hot_form(root, tmp_path, name):
    def with_class_map(record):
        output = output_of(name, record, spoil=True)
        return output | {"semantic": output.pop("sem_seg").argmax(0)}

    one_hot = evaluate(name, tmp_path, lambda record: output_of(name, record, spoil=True))
    assert evaluate(name, tmp_path, with_class_map)["sem_seg"] == pytest.approx(one_hot["sem_seg"], nan_ok=True)


@pytest.fixture(scope="module", params=ALL)
def spoilt(request, root, tmp_path_factory):
    """A dataset's name, what spoilt predictions score, where they are saved, and Detectron2's output folder."""
    name, saved, output = request.param, tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("output")
    results = evaluate(name, output, lambda record: output_of(name, record, spoil=True), saved)
    return name, results, saved / name, output


def submission(name):
    return {
        COCO_VAL: "panoptic_val2017_kmax_results",
        CITYSCAPES_VAL: "cityscapes_panoptic_val",
        ADE20K_VAL: "panoptic_ade20k_panoptic_val_kmax_results",
        SHAPES: "panoptic_val_kmax_results",
        MAPILLARY_VAL: "panoptic_2018_kmax_results",
        COCONUT_VAL: "panoptic_relabeled_coco_val_kmax_results",
    }[name]


def test_pq_is_panopticapis(spoilt, tmp_path):
    name, results, saved, _ = spoilt
    metadata = MetadataCatalog.get(name)
    files = str(saved / f"{submission(name)}.json"), str(saved / submission(name))
    truth = json.loads(Path(metadata.panoptic_json).read_text())
    for segment in (s for annotation in truth["annotations"] for s in annotation["segments_info"]):
        segment.setdefault("iscrowd", 0)  # which COCONut leaves out, and panopticapi needs
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        expected = pq_compute(str(tmp_path / "truth.json"), files[0], metadata.panoptic_root, files[1])
    assert 0 < expected["All"]["pq"] < 0.9
    for part, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for key in ("pq", "sq", "rq"):
            # Sums of the same numbers in another order.
            value = results["panoptic_seg"][f"{key.upper()}{suffix}"]
            assert value == pytest.approx(100 * expected[part][key], rel=1e-13, abs=0)
    if name == CITYSCAPES_VAL:
        from cityscapesscripts.evaluation.evalPanopticSemanticLabeling import evaluatePanoptic

        with contextlib.redirect_stdout(io.StringIO()):
            official = evaluatePanoptic(metadata.panoptic_json, metadata.panoptic_root, *files, "/dev/null")
        assert results["panoptic_seg"]["PQ"] == pytest.approx(100 * official["All"]["pq"], rel=1e-13)


def test_ap_is_the_official_one(spoilt):
    name, results, saved, output = spoilt
    if name == CITYSCAPES_VAL:
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script

        args = copy.copy(script.args)
        args.predictionPath, args.quiet = str(saved / "instance"), True
        truths = sorted(glob.glob(f"{MetadataCatalog.get(name).gt_dir}/*/*_gtFine_instanceIds.png"))
        # The script's evaluateImgLists, without the files that it leaves, and which it cannot write with NumPy 2.
        script.setInstanceLabels(args)
        predictions = [script.getPrediction(file, args) for file in truths]
        matches = script.matchGtWithPreds(predictions, truths, script.instances2dict(truths, False), args)
        expected = script.computeAverages(script.evaluateMatches(matches, args), args)
        assert results["segm"]["AP"] == 100 * expected["allAp"]
        assert results["segm"]["AP50"] == 100 * expected["allAp50%"]
        assert results["segm"]["AP-person"] == 100 * expected["classes"]["person"]["ap"]
    else:
        truth_json = MetadataCatalog.get(name).get("json_file") or str(output / "instances_gt.json")
        assert truth_json.endswith("instances_val2017.json" if name == COCO_VAL else "instances_gt.json")
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(truth_json)
            protocol = COCOeval(truth, truth.loadRes(str(output / "coco_instances_results.json")), "segm")
            protocol.evaluate()
            protocol.accumulate()
            protocol.summarize()
        assert results["segm"]["AP"] == 100 * protocol.stats[0]
        assert results["segm"]["AP50"] == 100 * protocol.stats[1]
    assert 1 < results["segm"]["AP"] < 90


def test_miou_is_the_official_one(spoilt):
    name, results, saved, _ = spoilt
    if name == CITYSCAPES_VAL:
        import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as script

        args = copy.copy(script.args)
        args.predictionPath, args.quiet, args.JSONOutput = str(saved / "semantic"), True, False
        truths = sorted(glob.glob(f"{MetadataCatalog.get(name).gt_dir}/*/*_gtFine_labelIds.png"))
        expected = script.evaluateImgLists([script.getPrediction(args, file) for file in truths], truths, args)
        scores = results["sem_seg"]
        assert scores["mIoU"] == scores["IoU"] == 100 * expected["averageScoreClasses"]
        assert scores["iIoU"] == pytest.approx(100 * expected["averageScoreInstClasses"], rel=1e-12)
        assert scores["IoU_sup"] == 100 * expected["averageScoreCategories"]
        assert scores["iIoU_sup"] == pytest.approx(100 * expected["averageScoreInstCategories"], rel=1e-12)
        assert scores["IoU-road"] == 100 * expected["classScores"]["road"]
    else:
        count = len(MetadataCatalog.get(name).stuff_classes)
        matrix = np.zeros((count, count))
        for record in DatasetCatalog.get(name):
            truth = truth_of(name, record)[1]
            predicted = output_of(name, record, spoil=True)["sem_seg"].argmax(0).numpy()
            np.add.at(matrix, (truth[truth >= 0], predicted[truth >= 0]), 1)
        present = matrix.sum(1) > 0
        iou = matrix.diagonal()[present] / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())[present]
        assert results["sem_seg"]["mIoU"] == pytest.approx(100 * iou.mean(), rel=1e-12)
    assert 30 < results["sem_seg"]["mIoU"] < 95


def test_what_is_saved_can_be_handed_in(spoilt):
    name, _, saved, _ = spoilt
    stem = submission(name)
    names = zipfile.ZipFile(saved / f"{stem}.zip").namelist()
    images = len(DatasetCatalog.get(name))
    assert f"{stem}.json" in names and len(names) == images + 1
    content = json.loads((saved / f"{stem}.json").read_text())
    assert {f"{stem}/{annotation['file_name']}" for annotation in content["annotations"]} < set(names)
    keys = {key for annotation in content["annotations"] for key in annotation}
    assert keys == {"image_id", "file_name", "segments_info"}
    if name == CITYSCAPES_VAL:
        # Ids of the official label list, not of the classes that are trained on.
        classes = {segment["category_id"] for a in content["annotations"] for segment in a["segments_info"]}
        known = {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33}
        assert classes <= known and 26 in classes
        pixels = zipfile.ZipFile(saved / "semantic.zip")
        assert len(pixels.namelist()) == images
        labels = np.asarray(Image.open(io.BytesIO(pixels.read(pixels.namelist()[0]))))
        assert labels.dtype == np.uint8 and set(np.unique(labels)) <= known
        instances = zipfile.ZipFile(saved / "instance.zip")
        (lines,) = (
            instances.read(file).decode().splitlines()
            for file in instances.namelist()
            if file.startswith("instance/frankfurt") and file.endswith(".txt")
        )
        mask, label, score = lines[0].split(" ")
        assert int(label) in known and 0 < float(score) <= 1
        pixels = np.asarray(Image.open(io.BytesIO(instances.read(f"instance/{mask}"))))
        assert pixels.shape == (64, 128) and set(np.unique(pixels)) == {0, 255}


# --- test sets ---


def without_ground_truth(name, shape):
    """Two segments: the first thing class on the left, the first stuff class on the right."""
    metadata = MetadataCatalog.get(name)
    thing = min(metadata.thing_dataset_id_to_contiguous_id.values())
    stuff = min(metadata.stuff_dataset_id_to_contiguous_id.values())
    ids = np.ones(shape, np.int64)
    ids[:, shape[1] // 2 :] = 2
    segments = [{"id": 1, "category_id": thing}, {"id": 2, "category_id": stuff}]
    return output(name, ids, np.where(ids == 1, thing, stuff), segments)


@pytest.mark.parametrize("name", ["coco_2017_test-dev_panoptic", "cityscapes_fine_panoptic_test"])
def test_a_test_set_is_only_saved(root, tmp_path, name):
    def outputs(record):
        return without_ground_truth(name, Image.open(record["file_name"]).size[::-1])

    with pytest.raises(UserError, match=r"has no ground truth: --save-predictions DIR writes"):
        evaluate(name, tmp_path, outputs)
    assert evaluate(name, tmp_path, outputs, tmp_path / "saved") == {}
    saved = tmp_path / "saved" / name
    if name.startswith("coco"):
        stem, image, segments = "panoptic_test-dev2017_kmax_results", 142238, [(1, 1), (2, 92)]
        assert sorted(file.name for file in saved.iterdir()) == [".kmax_d2", stem, f"{stem}.json", f"{stem}.zip"]
    else:
        stem, image, segments = "cityscapes_panoptic_test", "berlin_000000_000019", [(1, 24), (2, 7)]
        text = (saved / "instance" / f"{image}_leftImg8bit_pred.txt").read_text()
        assert text == f"{image}_leftImg8bit_0_person.png 24 0.875\n"
        labels = np.asarray(Image.open(saved / "semantic" / f"{image}_leftImg8bit_pred.png"))
        assert (labels[:, :64] == 24).all() and (labels[:, 64:] == 7).all()
    annotation = json.loads((saved / f"{stem}.json").read_text())["annotations"][0]
    assert annotation["image_id"] == image
    assert [(s["id"], s["category_id"]) for s in annotation["segments_info"]] == segments
    ids = rgb2id(np.asarray(Image.open(saved / stem / annotation["file_name"])))
    assert (ids == 1).sum() == ids.shape[0] * (ids.shape[1] // 2) and (ids == 2).sum() == ids.size - (ids == 1).sum()


# --- bad input and odd data ---


def test_an_image_without_a_prediction(root, tmp_path):
    evaluator = build_evaluator(load_config(""), COCO_VAL, str(tmp_path))
    evaluator.reset()
    record = DatasetCatalog.get(COCO_VAL)[0]
    evaluator.process([record], [output_of(COCO_VAL, record)])
    with pytest.raises(UserError, match=r"no prediction for the image 439180 \(000000439180\.png\) of .*val2017\.json"):
        evaluator.evaluate()


def test_an_image_without_segments(root, tmp_path):
    """A prediction of nothing is a miss of everything, and no error."""

    def outputs(record):
        output = output_of(COCO_VAL, record)
        if record["image_id"] == 439180:
            output["panoptic_seg"] = torch.zeros_like(output["panoptic_seg"][0]), []
            output["instances"] = output["instances"][:0]
        return output

    results = evaluate(COCO_VAL, tmp_path, outputs)
    content = json.loads(Path(MetadataCatalog.get(COCO_VAL).panoptic_json).read_text())
    counts = [
        [s["category_id"] for s in annotation["segments_info"] if not s["iscrowd"]]
        for annotation in content["annotations"]
    ]
    right, missed = counts
    expected = [right.count(c) / (right.count(c) + 0.5 * missed.count(c)) for c in sorted({*right, *missed})]
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100 * np.mean(expected))


def test_cityscapes_without_cityscapesscripts(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)
    with pytest.raises(UserError, match=r"cityscapesscripts is not installed: pip install 'kmax_d2\[cityscapes\]'$"):
        build_evaluator(load_config(""), CITYSCAPES_VAL, str(tmp_path))
    only_panoptic = ["MODEL.KMAX.TEST.INSTANCE_ON", False, "MODEL.KMAX.TEST.SEMANTIC_ON", False]
    build_evaluator(load_config("", only_panoptic), CITYSCAPES_VAL, str(tmp_path))


def test_importing_the_project_needs_no_cityscapesscripts():
    code = "import sys; sys.modules['cityscapesscripts'] = None; import kmax_d2, kmax_d2.engine, kmax_d2.evaluation"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=programs.ROOT)


# --- several processes ---


def _in_two_processes(folder, output):
    torch.set_num_threads(1)
    with registered(folder):
        results = {
            name: evaluate(name, f"{output}/{name}", lambda record, name=name: output_of(name, record, spoil=True))
            for name in (COCO_VAL, CITYSCAPES_VAL, ADE20K_VAL)
        }
    if comm.is_main_process():
        torch.save(results, f"{output}/results.pth")
    else:
        assert results == {name: {} for name in results}


def test_two_processes_score_what_one_does(root, tmp_path):
    launch(_in_two_processes, 2, dist_url="auto", args=(str(root), str(tmp_path)))
    together = torch.load(tmp_path / "results.pth", weights_only=False)
    for name in (COCO_VAL, CITYSCAPES_VAL, ADE20K_VAL):
        alone = evaluate(name, tmp_path / "alone", lambda record, name=name: output_of(name, record, spoil=True))
        assert alone.keys() == together[name].keys()
        for task, scores in alone.items():
            assert scores == pytest.approx(together[name][task], rel=1e-12, nan_ok=True)
        assert alone["panoptic_seg"] == together[name]["panoptic_seg"]


def test_what_fails_in_the_background_is_raised(root, tmp_path):
    name = submission(COCO_VAL)
    cfg = load_config("", ["MODEL.KMAX.TEST.SAVE_PREDICTIONS", str(tmp_path)])
    evaluator = build_evaluator(cfg, COCO_VAL, str(tmp_path))
    evaluator.reset()
    (tmp_path / COCO_VAL / name).rmdir()
    record = DatasetCatalog.get(COCO_VAL)[0]
    evaluator.process([record], [output_of(COCO_VAL, record)])
    with pytest.raises(FileNotFoundError, match=name):
        evaluator.evaluate()
