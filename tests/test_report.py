"""What is wrong with a model, by hand, and the page about it."""

import re

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from runs import write_own_data
from test_pseudo_label import CONFIG, WEIGHTS

import kmax_d2
from kmax_d2.engine import Trainer, load_predictor, ready_config
from kmax_d2.errors import UserError
from kmax_d2.evaluation.analysis import (
    bootstrap_difference,
    calibration,
    class_counts,
    confusion_matrix,
    counts_by_size,
)
from kmax_d2.evaluation.panoptic_quality import Pair, count_overlaps, count_pairs, pair_segments, quality_row
from kmax_d2.tools.report import describe, draw, main


def segments(*classes, **more):
    return [
        {"id": id_, "category_id": c} | {key: v[id_ - 1] for key, v in more.items()} for id_, c in enumerate(classes, 1)
    ]


@pytest.fixture
def pairs():
    """A hit, a confusion, a miss, an invention, and, mostly on void, one that is ignored."""
    true_ids = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 0, 0, 0, 0, 4, 4]])
    ids = np.array([[1, 1, 1, 0, 2, 2, 0, 0, 3, 3, 3, 0, 4, 0]])
    predicted = segments(0, 2, 2, 1, score=[0.9, 0.5, 0.3, 0.95])
    return pair_segments(count_overlaps(ids, true_ids), predicted, segments(0, 1, 1, 2))


def test_pairs(pairs):
    kinds = [(p.true and p.true["id"], p.predicted and p.predicted["id"], p.iou, p.ignored) for p in pairs]
    assert kinds == [
        (1, 1, 0.75, False),
        (2, 2, 1.0, False),
        (3, None, 0.0, False),
        (4, None, 0.0, False),
        (None, 3, 0.0, True),
        (None, 4, 0.0, False),
    ]
    assert [(p.true or p.predicted)["area"] for p in pairs] == [4, 2, 2, 2, 3, 1]
    wrong = [describe(pair, ["car", "dog", "sky"]) for pair in pairs if pair.is_error]
    assert wrong == ["dog taken for sky, IoU 1.00", "missed dog", "missed sky", "invented dog, score 0.95"]


def test_confusion_matrix(pairs):
    assert confusion_matrix([*pairs, pairs[0]], 3).tolist() == [[2, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]]


def test_quality_of_an_image(pairs):
    assert class_counts([[], pairs], 3)[1].tolist() == [[0.75, 1, 0, 0], [0, 0, 1, 2], [0, 0, 1, 1]]
    counts = count_pairs(pairs)
    assert quality_row(counts, counts) == pytest.approx([25, 25, 100 / 3, 1, 2, 3])
    assert quality_row({}, [0]) == [None, None, None, 0, 0, 0]


def test_quality_by_size():
    true, predicted = ({"category_id": c, "area": area} for c, area in ((0, 1024), (1, 10**4)))
    pairs = [Pair(true, predicted, 0.6, False), Pair(true, true, 0.8, False), Pair(None, predicted, 0, False)]
    found = {
        size: {c: counts.tolist() for c, counts in of_size.items()} for size, of_size in counts_by_size(pairs).items()
    }
    assert found == {"small": {}, "medium": {0: [0.8, 1, 0, 1], 1: [0, 0, 1, 0]}, "large": {1: [0, 0, 1, 0]}}


def test_calibration(pairs):
    error, bins = calibration(pairs)
    assert np.array(bins) == pytest.approx(np.array([(1, 0.5, 0), (2, 0.925, 0.5)]))
    assert error == pytest.approx((0.5 + 2 * 0.425) / 3)
    assert np.isnan(calibration([])[0])


def test_bootstrap_of_two_images():
    """The first model misses a segment in one of two images: PQ 1, 2/3, or 0 with probability 1/4, 1/2, and 1/4."""
    hit, miss, none = (1, 1, 0, 0), (0, 0, 0, 1), (0, 0, 0, 0)
    first, second = np.array([[hit, hit, none], [miss, hit, none]]), np.array([[hit, hit, none], [hit, hit, none]])
    intervals = bootstrap_difference(first, second)
    assert intervals[:2].tolist() == [[0, 1], [0, 0]] and intervals[3].tolist() == [0, 0.5]
    assert np.isnan(intervals[2]).all()
    assert np.array_equal(intervals, bootstrap_difference(first, second), equal_nan=True)
    many = bootstrap_difference(np.tile(first, (500, 1, 1)), np.tile(second, (500, 1, 1)))
    assert 0.2 < many[0, 0] < 1 / 3 < many[0, 1] < 0.5


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Four images, and a checkpoint that is worse than the quickstart's."""
    folder = tmp_path_factory.mktemp("report")
    checkpoint = torch.load(WEIGHTS, weights_only=True)
    head = checkpoint["model"]["transformer_decoder.predictor.class_head.weight"]
    head[:5] = head[:5].flip(0)  # things
    torch.save(checkpoint, folder / "worse.pth")
    return folder, write_own_data(folder)["val"]


def evaluated(weights, data):
    options = ["MODEL.WEIGHTS", str(weights), "DATASETS.OWN_TEST", data, "MODEL.DEVICE", "cpu"]
    off = ["MODEL.KMAX.TEST.SEMANTIC_ON", False, "MODEL.KMAX.TEST.INSTANCE_ON", False]
    cfg = ready_config(CONFIG, options + off)
    return Trainer.test(cfg, load_predictor(cfg))["panoptic_seg"]["PQ"]


def test_a_page_about_two_models(own, tmp_path, monkeypatch):
    folder, data = own
    monkeypatch.chdir(tmp_path)
    command = ["--config-file", CONFIG, "--weights", WEIGHTS, "--compare", str(folder / "worse.pth"), "--pictures", "1"]
    command += ["--output", str(tmp_path), "--test-data", *data, "DATALOADER.NUM_WORKERS", "0"]
    main(command)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', page)) == page.count("<img") == 2 * 4
    assert not re.search(r"https?:|<script|<link|\bnan\b", page)
    first, second = evaluated(WEIGHTS, data), evaluated(folder / "worse.pth", data)
    assert first > second
    row = re.sub("<[^>]*>", " ", page[page.index("<td>all") :].partition("</tr>")[0]).split()
    assert [row[1], row[7], row[13]] == [f"{first:.1f}", f"{second:.1f}", f"{second - first:.1f}"]
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(UserError, match=r"report\.html exists and was not made by kmax_d2"):
        main(command)


def test_records_need_not_say_what_is_a_thing():
    """Those of Cityscapes do not."""
    record = DatasetCatalog.get("shapes_val")[0]
    without = [{key: value for key, value in s.items() if key != "isthing"} for s in record["segments_info"]]
    assert without != record["segments_info"]
    models = [kmax_d2.load("shapes/quickstart", device="cpu")]
    pages = [draw(each, models, None) for each in (record, record | {"segments_info": without})]
    assert all(np.array_equal(one, other) for one, other in zip(*pages, strict=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compare-config", CONFIG], "--compare-config needs --compare"),
        (["DATASETS.TEST", "()", "DATASETS.TRAIN", "('shapes_train',)"], "the config has no ground truth: set DATA"),
    ],
)
def test_bad_command_lines(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main(["--config-file", CONFIG, "--output", str(tmp_path / "new"), *more])
    assert not (tmp_path / "new").exists()
