"""Copy-paste follows the official rule, image and labels agree, and paste sources come from the dataset."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetFromList
from detectron2.data.common import ToIterableDataset
from PIL import Image
from small import options
from torch.utils.data import SequentialSampler

from kmax_d2.data import PanopticTrainMapper, WithPasteSource
from kmax_d2.data.copy_paste import copy_paste
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError

THINGS = {0, 1}


@pytest.fixture(autouse=True)
def numpy_seeded():
    np.random.seed(0)


def sample(labels, classes, value):
    """An image whose pixels are `value` + their label, with the labels and classes."""
    labels = np.array(labels, np.int16)
    return np.stack([labels + value] * 3).astype(np.uint8), labels, classes


def test_all_things_and_a_uniform_number_of_stuff_are_pasted():
    first = sample([[0, 0, 0, 0, 0, 0]], [], 100)
    second = sample([[-1, 0, 1, 2, 3, 4]], [0, 7, 8, 9], 200)
    pasted = np.array([copy_paste(first, second, THINGS)[1][0] > 0 for _ in range(6000)])
    assert not pasted[:, :2].any(), "padding or void was pasted"
    assert pasted[:, 2].all()
    stuff = pasted[:, 3:]
    # n is uniform from 0 to N, and n of N are kept: one with probability 1/2, two with 1/3, three and none with 1/4.
    np.testing.assert_allclose(stuff.mean(0), 1 / 2, atol=0.02)
    np.testing.assert_allclose((stuff[:, :2].all(1)).mean(), 1 / 3, atol=0.02)
    np.testing.assert_allclose(np.bincount(stuff.sum(1)) / 6000, 1 / 4, atol=0.02)


def test_the_distribution_of_stuff_does_not_depend_on_other_segments():
    """The official rule, which also counts things, void and padding, keeps stuff with the same distribution."""
    counts = np.zeros(4)
    for _ in range(6000):
        segments = np.random.permutation(["void", "thing", "thing", "stuff", "stuff", "stuff"])
        counts[(segments[: np.random.randint(7)] == "stuff").sum()] += 1
    np.testing.assert_allclose(counts / 6000, 1 / 4, atol=0.02)


def test_image_labels_and_classes_agree_after_pasting():
    first = sample([[1, 1, 2, 2], [1, 1, 0, -1]], [7, 0], 100)
    second = sample([[1, 2, 2, 0], [1, -1, 2, 3]], [7, 1, 8], 200)
    seen = set()
    for _ in range(50):
        image, labels, classes = copy_paste(first, second, THINGS)
        # The first image and its labels remain where nothing was pasted.
        own = image[0] < 200
        assert np.array_equal(own, image[0] == first[0][0])
        np.testing.assert_array_equal(labels[own], first[1][own])
        source = image[0][~own].astype(int) - 200
        assert [classes[label - 1] for label in labels[~own]] == [second[2][label - 1] for label in source]
        assert classes.count(7) == 1, "stuff of one class is one mask"
        assert (labels[0, 1], labels[0, 2], labels[1, 2]) == (3, 3, 3), "a thing is a mask of its own"
        seen.add(tuple(image.flatten()))
    assert len(seen) == 4
    assert first[1].tolist() == [[1, 1, 2, 2], [1, 1, 0, -1]], "the input was changed"


def record(folder, name, size, color, category, isthing):
    Image.new("RGB", size, color).save(folder / f"{name}.png")
    Image.new("RGB", size, (9, 0, 0)).save(folder / f"{name}_ids.png")
    return {
        "file_name": str(folder / f"{name}.png"),
        "pan_seg_file_name": str(folder / f"{name}_ids.png"),
        "segments_info": [{"id": 9, "category_id": category, "isthing": isthing}],
    }


def mapper(**changes):
    return PanopticTrainMapper(
        load_config("", options(INPUT__SCALE_RANGE=[1.0, 1.0], INPUT__COLOR_POLICY=False, **changes))
    )


def test_the_paste_source_goes_through_the_pipeline_at_half_the_scale(tmp_path):
    first = record(tmp_path, "first", (20, 20), (10, 20, 30), 5, False)
    source = record(tmp_path, "source", (40, 40), (40, 50, 60), 2, True)
    joint = mapper()(first | {"paste_source": source})
    assert "paste_source" not in joint
    assert joint["segment_classes"].tolist() == [5, 2]
    assert (joint["segment_ids"] == 1).sum() == 32 * 32  # half of the crop's 65
    assert joint["image"].dtype == torch.uint8, "padding of the paste source was pasted"
    colors = torch.tensor([[10, 20, 30], [40, 50, 60]], dtype=torch.uint8)
    assert torch.equal(joint["image"], colors[joint["segment_ids"].long()].permute(2, 0, 1))
    offsets = {tuple((mapper()(first | {"paste_source": source})["segment_ids"] == 1).nonzero()[0]) for _ in range(4)}
    assert len(offsets) > 1


def test_a_mask_that_is_wholly_covered_disappears(tmp_path):
    small = record(tmp_path, "small", (20, 20), (10, 20, 30), 0, True)
    source = record(tmp_path, "source", (40, 40), (40, 50, 60), 1, True)
    covering = mapper()
    covering.augmentations, covering.paste_augmentations = covering.paste_augmentations, covering.augmentations
    joint = covering(small | {"paste_source": source})
    assert joint["segment_classes"].tolist() == [1]
    assert (joint["segment_ids"] == 0).all()


def test_padding_covered_by_a_segment_is_no_longer_padding(tmp_path):
    wide = record(tmp_path, "wide", (60, 20), (10, 20, 30), 5, False)
    joint = mapper()(wide | {"paste_source": record(tmp_path, "source", (40, 40), (40, 50, 60), 1, True)})
    padding = joint["segment_ids"] == -1
    assert (joint["image"][:, padding] == 127.5).all()
    assert not (joint["image"][:, ~padding] == 127.5).any()
    assert ((joint["image"][0] == 40) == (joint["segment_ids"] == joint["segment_classes"].tolist().index(1))).all()


def test_paste_sources_are_drawn_from_all_records_without_copies_of_them():
    records = [{"file_name": str(index)} for index in range(4)]
    dataset = WithPasteSource(records)
    drawn = [dataset[2]["paste_source"] for _ in range(2000)]
    assert all(any(source is one for one in records) for source in drawn)
    counts = np.bincount([int(source["file_name"]) for source in drawn]) / 2000
    np.testing.assert_allclose(counts, 1 / 4, atol=0.04)
    assert dataset[3]["file_name"] == "3"
    assert records[2] == {"file_name": "2"}


def test_a_dataset_of_one_image_pastes_from_itself(tmp_path):
    dataset = WithPasteSource(DatasetFromList([record(tmp_path, "only", (20, 20), (10, 20, 30), 1, True)]))
    sample = mapper()(dataset[0])
    assert sample["segment_classes"].tolist() == [1, 1]
    assert (sample["segment_ids"] == 1).sum() == 32 * 32


def test_an_iterable_dataset_is_refused():
    with pytest.raises(UserError, match=r"set INPUT\.COPY_PASTE False"):
        WithPasteSource(ToIterableDataset([], SequentialSampler([])))
