"""The real training loader: reproducible, resumable without repetition, memory shared, broken files skipped."""

import argparse
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from small import options

from kmax_d2.data import MAPPER_REGISTRY, PanopticTrainMapper
from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.data.loading import skip_samples
from kmax_d2.engine import Trainer, load_config, setup
from kmax_d2.errors import UserError

IMAGES = 5


@pytest.fixture
def data(tmp_path):
    shapes.write_split(tmp_path, "train", IMAGES, 3)
    return [str(tmp_path / "train"), str(tmp_path / "panoptic_train"), str(tmp_path / "panoptic_train.json")]


def config(data, **changes):
    arguments = argparse.Namespace(config_file="", opts=options(**changes), train_data=data, test_data=data)
    return setup(arguments)


def loader_of(cfg):
    seed_all_rng(cfg.SEED)
    return Trainer.build_train_loader(cfg)


def batches(loader, number):
    return list(itertools.islice(loader, number))


def same(first, second):
    """Tells whether two lists of batches hold the same samples."""
    return len(first) == len(second) > 0 and all(
        torch.equal(a["image"], b["image"])
        and torch.equal(a["segment_ids"], b["segment_ids"])
        and torch.equal(a["segment_classes"], b["segment_classes"])
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def names(batch_list):
    return [record["file_name"] for batch in batch_list for record in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_determined_by_the_seed(data, workers):
    changes = {"DATALOADER__NUM_WORKERS": workers}
    first, again = (batches(loader_of(config(data, **changes)), 4) for _ in range(2))
    assert same(first, again)
    other = batches(loader_of(config(data, **changes, SEED=2)), 4)
    assert not same(first[:1], other[:1])
    assert names(first) != names(other)


@pytest.fixture
def one_image(data):
    """A dataset whose records are all of one image, so that samples differ only by augmentation."""
    records = coco_panoptic.load(data[2], data[0], data[1])[:1] * 4
    name = "one_image"
    metadata = MetadataCatalog.get(config(data).DATASETS.TRAIN[0])
    DatasetCatalog.register(name, lambda: records)
    copied = ("stuff_classes", "thing_dataset_id_to_contiguous_id")
    MetadataCatalog.get(name).set(**{part: metadata.get(part) for part in copied})
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_workers_differ(one_image):
    cfg = load_config("", options(DATASETS__TRAIN=(one_image,), DATALOADER__NUM_WORKERS=3))
    for one, other in itertools.combinations(batches(loader_of(cfg), 3), 2):  # one batch of each worker
        assert not same([one], [other])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_can_start_at_any_sample_of_the_run(data, workers):
    cfg = config(data, DATALOADER__NUM_WORKERS=workers)
    whole = batches(loader_of(cfg), 6)
    loader = loader_of(cfg)
    skip_samples(loader, 6)
    assert same(batches(loader, 3), whole[3:])
    assert not same(whole[:3], whole[3:])


def test_annotations_are_read_once_for_images_paste_sources_and_all_workers(data, tmp_path):
    log = tmp_path / "reads"

    def records():
        with log.open("a") as file:
            file.write("read\n")
        return coco_panoptic.load(data[2], data[0], data[1])

    cfg = config(data, DATALOADER__NUM_WORKERS=2)
    name = cfg.DATASETS.TRAIN[0]
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, records)
    assert len(batches(loader_of(cfg), 4)) == 4
    assert log.read_text() == "read\n"


def test_a_registered_mapper_needs_only_the_config_and_gets_one_record(data):
    class Counting:
        def __init__(self, cfg):
            self.size = cfg.INPUT.CROP_SIZE

        def __call__(self, record):
            return {"name": record["file_name"], "size": self.size}

    MAPPER_REGISTRY._do_register("Counting", Counting)
    try:
        loaded = batches(loader_of(config(data, INPUT__DATASET_MAPPER_NAME="Counting")), IMAGES)
    finally:
        MAPPER_REGISTRY._obj_map.pop("Counting")
    every = [sample["name"] for batch in loaded for sample in batch]
    assert sorted(every) == sorted(2 * [str(file) for file in Path(data[0]).iterdir()])


def test_copy_paste_can_be_turned_off(data):
    areas = []
    for paste in (True, False):
        changes = {"INPUT__COPY_PASTE": paste, "INPUT__COLOR_POLICY": False, "INPUT__SCALE_RANGE": [1.0, 1.0]}
        loaded = batches(loader_of(config(data, **changes)), 4)
        areas.append(np.mean([len(sample["segment_classes"]) for batch in loaded for sample in batch]))
    assert areas[0] > areas[1] + 1


def spoil(data, number):
    files = sorted(Path(data[0]).iterdir())[:number]
    for file in files:
        file.write_bytes(file.read_bytes()[:300])
    return [str(file) for file in files]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_stops_the_loader_with_its_name(data, workers):
    broken = spoil(data, IMAGES)
    with pytest.raises(UserError) as failure:
        batches(loader_of(config(data, DATALOADER__NUM_WORKERS=workers)), 1)
    assert any(f"cannot read the image {file}" in str(failure.value) for file in broken)


def test_broken_samples_are_skipped_with_a_count_where_asked_for(data, caplog):
    broken = spoil(data, IMAGES - 1)
    with caplog.at_level(logging.WARNING, "kmax_d2"):
        loaded = batches(loader_of(config(data, INPUT__SKIP_BROKEN=True)), 10)
    (whole,) = {str(file) for file in Path(data[0]).iterdir()} - set(broken)
    assert names(loaded) == [whole] * 20
    lines = [record.getMessage() for record in caplog.records if "skipped a broken sample" in record.getMessage()]
    assert len(lines) == len(broken), "each fault is logged once"
    assert lines[-1].startswith(f"skipped a broken sample, number {len(broken)} in this process: cannot read the image")
    assert all(any(file in line for line in lines) for file in broken)


def test_nothing_but_broken_samples_is_an_error(data):
    spoil(data, IMAGES)
    with pytest.raises(UserError, match=f"all {IMAGES} training samples are broken, the last: cannot read the image"):
        batches(loader_of(config(data, INPUT__SKIP_BROKEN=True)), 1)


def test_the_model_trains_on_compact_id_maps_as_on_long_ones(data):
    changes = {"SEMANTIC_HEAD__NAME": "PointwiseSemanticHead", "LOSS__SEMANTIC_HARD_SHARE": 0.2}
    changes |= {"LOSS__SMALL_INSTANCE_AREA": 100, "LOSS__SMALL_INSTANCE_WEIGHT": 3.0}
    changes = {f"MODEL__KMAX__{name}": value for name, value in changes.items()}
    cfg = config(data, **changes, INPUT__SCALE_RANGE=[0.5, 0.9])
    model = Trainer.build_model(cfg)
    (batch,) = batches(loader_of(cfg), 1)
    assert {sample["image"].dtype for sample in batch} == {torch.float16}
    long = [
        sample | {"segment_ids": sample["segment_ids"].long(), "image": sample["image"].float()} for sample in batch
    ]
    losses = []
    for inputs in (batch, long):
        torch.manual_seed(0)
        losses.append({name: loss.item() for name, loss in model(inputs).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_own_data_in_a_config_load_as_on_the_command_line(data):
    cfg = config(None, DATASETS__OWN_TRAIN=data, DATASETS__OWN_TEST=data)
    assert isinstance(MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg), PanopticTrainMapper)
    assert same(batches(loader_of(cfg), 2), batches(loader_of(config(data)), 2))
