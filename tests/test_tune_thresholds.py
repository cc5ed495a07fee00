"""Merging thresholds found on cached predictions."""

import dataclasses

import pytest
from runs import write_own_data
from test_pseudo_label import CONFIG, WEIGHTS

from kmax_d2.engine import Trainer, load_predictor, ready_config
from kmax_d2.inference import Predictor
from kmax_d2.tools.tune_thresholds import cache, main, quality, tune

ALONE = ["MODEL.KMAX.TEST.SEMANTIC_ON", False, "MODEL.KMAX.TEST.INSTANCE_ON", False]
CHANGES = {
    "thing_threshold": 0.6,
    "stuff_threshold": 0.9,
    "overlap_threshold": 0.5,
    "thing_area_limit": 144,
    "stuff_area_limit": 576,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_own_data(tmp_path_factory.mktemp("tuned"))["train"]


def config(data, *options):
    """At a size that is not the images', so that results are resized."""
    fixed = ["MODEL.WEIGHTS", WEIGHTS, "DATASETS.OWN_TEST", data, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0]
    return ready_config(CONFIG, [*fixed, "INPUT.CROP_SIZE", [81, 97], *options, *ALONE])


def evaluated(cfg):
    return Trainer.test(cfg, load_predictor(cfg))["panoptic_seg"]["PQ"]


@pytest.mark.parametrize("at_crop", [False, True])
def test_cached_quality_is_the_evaluations(data, at_crop):
    options = ["MODEL.KMAX.TEST.MERGE_AT_CROP", at_crop]
    cfg = config(data, *options)
    merging, images = cache(Predictor(cfg), cfg.DATASETS.TEST[0])
    before = evaluated(cfg)
    assert quality(merging, images) == pytest.approx(before, rel=1e-12)
    used = {name: value for name, value in CHANGES.items() if at_crop or "area" not in name}
    options += [part for name, value in used.items() for part in (f"MODEL.KMAX.TEST.{name.upper()}", value)]
    after = evaluated(config(data, *options))
    assert quality(dataclasses.replace(merging, **used), images) == pytest.approx(after, rel=1e-12)
    assert after != pytest.approx(before)
    candidates = {name: [value] for name, value in CHANGES.items()}
    tuned, best = tune(merging, images, candidates)
    assert best == quality(tuned, images) >= before
    for name, value in CHANGES.items():  # no single change helps
        assert quality(dataclasses.replace(tuned, **{name: value}), images) <= best + 1e-6


def test_printed_options_give_the_printed_quality(data, capsys):
    command = ["--config-file", CONFIG, "--weights", WEIGHTS, "--test-data", *data, "INPUT.CROP_SIZE", "[81, 97]"]
    main([*command, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "MODEL.KMAX.TEST.THING_THRESHOLD", "0.95"])
    output = capsys.readouterr().out
    _, before, after = (part.strip() for part in output[output.index("| PQ") :].splitlines()[0].strip("|").split("|"))
    options = output.partition("add these options: ")[2].split()
    assert float(before) < float(after) == pytest.approx(evaluated(config(data, *options)), abs=0.006)
    assert "6 images of " in output and len(options) == 6
