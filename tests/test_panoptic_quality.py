"""Panoptic quality against panopticapi, and by hand."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from kmax_d2.data.segment_ids import id2rgb
from kmax_d2.evaluation.panoptic_quality import match_segments, panoptic_quality

CATEGORIES = {id_: {"id": id_, "isthing": int(id_ < 4)} for id_ in (1, 2, 3, 4, 5, 9)}


def blocks(rng, first_id):
    """(24, 32) ids of up to 12 rectangles, some of which repeat; 0 where none is."""
    return np.kron(rng.choice([0, *range(first_id, first_id + 7)], (3, 4)), np.ones((8, 8), int)).astype(np.int32)


def random_image(seed):
    """Ids and segments of a prediction and of the truth, which overlap well, with void, crowds, and unlisted ids."""
    rng = np.random.default_rng(seed)
    true_ids = blocks(rng, 300)
    ids = np.where(rng.random(true_ids.shape) < 0.1, 0, np.roll(true_ids, rng.integers(0, 3), axis=1))
    ids = np.where(ids > 0, ids * 50000 % (1 << 24), 0).astype(np.int32)
    present = [id_ for id_ in np.unique(true_ids).tolist() if id_]
    truth = [
        {
            "id": id_,
            "category_id": int(rng.choice([1, 2, 4])),
            "area": int((true_ids == id_).sum()),
            "iscrowd": int(rng.random() < 0.25),
        }
        for id_ in present[: len(present) - seed % 2]
    ]
    category = {segment["id"] * 50000 % (1 << 24): segment["category_id"] for segment in truth}
    segments = [
        {"id": id_, "category_id": category.get(id_, 5) if rng.random() < 0.8 else int(rng.choice([1, 3]))}
        for id_ in np.unique(ids).tolist()
        if id_
    ]
    return ids, segments, true_ids, truth


def test_equals_panopticapi(tmp_path):
    evaluation = pytest.importorskip("panopticapi.evaluation")
    expected, total = evaluation.PQStat(), {}
    for seed in range(60):
        ids, segments, true_ids, truth = random_image(seed)
        for name, values in (("truth", true_ids), ("prediction", ids)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(id2rgb(values)).save(tmp_path / name / f"{seed}.png")
        entry = {"image_id": seed, "file_name": f"{seed}.png"}
        pair = entry | {"segments_info": truth}, entry | {"segments_info": [dict(s) for s in segments]}
        with contextlib.redirect_stdout(io.StringIO()):
            folders = str(tmp_path / "truth"), str(tmp_path / "prediction")
            expected += evaluation.pq_compute_single_core(0, [pair], *folders, CATEGORIES)
        for category, counts in match_segments(ids, segments, true_ids, truth).items():
            total[category] = total.get(category, 0) + counts
    for category in CATEGORIES:
        reference = expected[category]
        counts = (reference.iou, reference.tp, reference.fp, reference.fn)
        assert total.get(category, np.zeros(4)).tolist() == pytest.approx(counts, rel=1e-12)
    assert sum(counts[1] for counts in total.values()) > 50
    assert sum(counts[2] for counts in total.values()) > 20 and sum(counts[3] for counts in total.values()) > 20
    for is_thing in (None, True, False):
        chosen = [id_ for id_, entry in CATEGORIES.items() if is_thing is None or entry["isthing"] == is_thing]
        assert panoptic_quality(total, chosen) == pytest.approx(expected.pq_average(CATEGORIES, is_thing)[0])


def test_by_hand():
    true_ids = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    ids = np.array([[7, 7, 7, 0, 8, 9, 9, 9]])
    truth = [{"id": 1, "category_id": 3, "area": 4, "iscrowd": 0}, {"id": 2, "category_id": 3, "area": 2, "iscrowd": 0}]
    segments = [{"id": 7, "category_id": 3}, {"id": 8, "category_id": 3}, {"id": 9, "category_id": 3}]
    # 7 matches 1 with IoU 3/4; 8 and 2 have IoU 1/2, which is too little; 9 is mostly void, and ignored.
    counts = match_segments(ids, segments, true_ids, truth)
    assert {category: values.tolist() for category, values in counts.items()} == {3: [0.75, 1, 1, 1]}
    assert panoptic_quality(counts, [3, 4]) == {"pq": 0.375, "sq": 0.75, "rq": 0.5, "n": 1}


def test_no_category():
    result = panoptic_quality({}, [1, 2])
    assert result["n"] == 0 and all(np.isnan(result[key]) for key in ("pq", "sq", "rq"))


def test_a_map_that_its_segments_do_not_list():
    ids = np.array([[7, 8]])
    with pytest.raises(ValueError, match=r"lists segments \[7\] but its map has \[7, 8\]"):
        match_segments(ids, [{"id": 7, "category_id": 1}], ids, [])
