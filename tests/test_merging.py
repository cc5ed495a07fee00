"""Mask-wise merging: against the official results, and against a loop over the queries at full size."""

from collections import Counter

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from kmax_d2.errors import UserError
from kmax_d2.modeling.merging import MaskWiseMerging, count_values, count_without_waiting
from kmax_d2.modeling.top_two import top_two_queries


def same_partition(first, second):
    """Whether two id maps cut the pixels into the same parts, whatever the ids."""
    pairs = set(zip(np.asarray(first).ravel().tolist(), np.asarray(second).ravel().tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def class_and_instance_map(result):
    """(H, W) classes, -1 for void, and ids of things, 0 for stuff and void."""
    classes = np.full(len(result.segments) + 1, -1)
    instances = np.zeros(len(result.segments) + 1, dtype=int)
    for segment in result.segments:
        classes[segment["id"]] = segment["category_id"]
        instances[segment["id"]] = segment["id"] if segment["isthing"] else 0
    ids = result.segment_ids.numpy()
    return classes[ids], instances[ids]


# --- official results ---


@pytest.mark.parametrize(("tag", "num_classes"), [("coco", 133), ("cityscapes", 19)])
def test_official_result(tag, num_classes):
    arrays = reference.load(f"merge_{tag}")
    merging, *logits = reference.merging_of(arrays, num_classes)
    result = merging(*logits, tuple(arrays["image_size"].tolist()))
    classes, instances = class_and_instance_map(result)
    np.testing.assert_array_equal(classes, arrays["class_map"])
    assert (instances > 0).any()
    np.testing.assert_array_equal(instances > 0, arrays["instance_map"] > 0)
    assert same_partition(instances, arrays["instance_map"])


# --- a loop over the queries ---


def placed(size, crop):
    """How to ask for the first rows and columns alone: their size, and the share of the map that they span."""
    if crop is None:
        return size, (1.0, 1.0)
    return crop, tuple((part - 1) / (whole - 1) for part, whole in zip(crop, size, strict=True))


def plain_probability(mask_logits, size, crop=None):
    """(N, H, W) softmax of the upsampled logits, all at once."""
    full = F.interpolate(mask_logits[None], size, mode="bilinear", align_corners=True)[0].softmax(0)
    rows, columns = crop or size
    return full[:, :rows, :columns]


def merge_plainly(class_logits, mask_logits, size, crop, is_thing, options, events):
    """The merging as its description reads; counts in `events` what happened. Gives a class and a segment map."""
    confidence, category = class_logits.softmax(1)[:, :-1].max(1)
    small = mask_logits.softmax(0)
    score = []
    for query in range(len(small)):
        inside = small[query] > options["pixel_threshold"]
        score.append(small[query][inside].mean().item() if inside.any() else 0.0)
    powers = options["class_power"], options["mask_power"]
    value = [c ** powers[0] * s ** powers[1] for c, s in zip(confidence.tolist(), score, strict=True)]
    probability = plain_probability(mask_logits, size, crop)
    free = torch.ones(probability.shape[1:], dtype=torch.bool)
    class_map = torch.full(probability.shape[1:], -1)
    segment_map = torch.zeros(probability.shape[1:], dtype=torch.int64)
    for query in sorted(range(len(small)), key=lambda q: -value[q]):
        label = category[query].item()
        mask = probability[query] > options["pixel_threshold"]
        if not mask.any():
            continue
        if confidence[query] < options["thing_threshold" if is_thing[label] else "stuff_threshold"]:
            events["not confident"] += 1
            continue
        new = mask & free
        if new.sum().item() <= options["overlap_threshold"] * mask.sum().item():
            events["overlapped"] += 1
            continue
        events["cut"] += int((new != mask).any())
        events["joined stuff"] += int(not is_thing[label] and (class_map == label).any())
        class_map[new] = label
        # Things have an id each, stuff has one for its class.
        segment_map[new] = 1000 + query if is_thing[label] else 1 + label
        free &= ~mask
    for segment in segment_map.unique().tolist():
        limit = options["thing_area_limit" if segment >= 1000 else "stuff_area_limit"]
        if segment > 0 and (segment_map == segment).sum() < limit:
            events["too small"] += 1
            class_map[segment_map == segment] = -1
            segment_map[segment_map == segment] = 0
    events["segments"] += len(segment_map.unique()) - 1
    return class_map.numpy(), segment_map.numpy()


def random_case(seed):
    """Logits of overlapping blobs, sizes, and thresholds that no probability is close to."""
    generator = np.random.RandomState(seed)
    queries = int(generator.randint(2, 30))
    height, width = (int(generator.randint(5, 20)) for _ in range(2))
    size = (4 * (height - 1) + 1, 4 * (width - 1) + 1)
    if seed % 4 == 0:
        size = tuple(int(generator.randint(side, 5 * side)) for side in (height, width))
    crop = None
    if seed % 3 == 0:
        crop = tuple(int(generator.randint(side // 2 + 1, side + 1)) for side in size)
    rows, columns = np.mgrid[:height, :width]
    centers = generator.uniform(0, 1, (queries, 2)) * (height, width)
    radius = generator.uniform(1, 4, queries)
    distance = (rows - centers[:, :1, None]) ** 2 + (columns - centers[:, 1:, None]) ** 2
    # Flat on top, so that two of them are as good as each other where they meet.
    blobs = np.minimum(2 * np.exp(-distance / radius[:, None, None] ** 2), 1)
    mask_logits = 8 * blobs + generator.normal(0, 0.3, distance.shape)
    if queries > 4:
        # Twins, so that masks do overlap much.
        twins = queries // 5
        mask_logits[-twins:] = mask_logits[:twins] + generator.normal(0, 0.15, distance[:twins].shape)
    mask_logits = torch.from_numpy(mask_logits.astype(np.float32))
    class_logits = torch.from_numpy(generator.normal(0, 3, (queries, 7)).astype(np.float32))
    # Probabilities are rounded differently by different ways of computing them: keep the threshold off them.
    threshold = generator.uniform(0.345, 0.6)
    near = plain_probability(mask_logits, size).flatten()
    near = near[(near - threshold).abs() < 0.01].sort().values.double()
    near = torch.cat([torch.tensor([threshold - 0.01]).double(), near, torch.tensor([threshold + 0.01]).double()])
    gap = near.diff().argmax()
    options = {
        "pixel_threshold": ((near[gap] + near[gap + 1]) / 2).item(),
        "thing_threshold": generator.uniform(0.2, 0.7),
        "stuff_threshold": generator.uniform(0.2, 0.5),
        "overlap_threshold": generator.uniform(0.3, 0.95),
        "class_power": float(generator.choice([0.0, 1.0, 2.0])),
        "mask_power": float(generator.choice([0.0, 1.0, 0.5])),
        "thing_area_limit": int(generator.choice([0, 20])),
        "stuff_area_limit": int(generator.choice([0, 60])),
    }
    return class_logits, mask_logits, size, crop, options


IS_THING = [True, False, True, False, False, True]


@pytest.fixture(scope="module")
def cases():
    """For each of many cases our result, the plain class and segment maps, and what happened in all of them."""
    events = Counter()
    results = []
    for seed in range(40):
        class_logits, mask_logits, size, crop, options = random_case(seed)
        merged = MaskWiseMerging(IS_THING, **options)(class_logits, mask_logits, *placed(size, crop))
        results.append((merged, *merge_plainly(class_logits, mask_logits, size, crop, IS_THING, options, events)))
    return results, events


@pytest.mark.parametrize("index", range(40))
def test_equals_the_loop_over_queries(cases, index):
    merged, classes, segments = cases[0][index]
    np.testing.assert_array_equal(class_and_instance_map(merged)[0], classes)
    ids = merged.segment_ids.numpy()
    np.testing.assert_array_equal(ids == 0, segments == 0)
    assert same_partition(ids, segments)


def test_cases_hold_every_kind_of_event(cases):
    """Else the comparison above would say little."""
    events = cases[1]
    for event in ("not confident", "overlapped", "cut", "joined stuff", "too small"):
        assert events[event] >= 10, events
    assert events["segments"] >= 100, events


@pytest.mark.parametrize("index", range(40))
def test_segments_describe_the_map(cases, index):
    merged = cases[0][index][0]
    areas = Counter(merged.segment_ids.flatten().tolist())
    del areas[0]
    assert {segment["id"]: segment["area"] for segment in merged.segments} == areas
    assert sorted(areas) == list(range(1, len(merged.segments) + 1))
    assert all(segment["isthing"] == IS_THING[segment["category_id"]] for segment in merged.segments)
    stuff = [segment["category_id"] for segment in merged.segments if not segment["isthing"]]
    assert len(stuff) == len(set(stuff))


def two_masks_that_share_pixels():
    """Masks of four pixels each in a row of six, sharing two; the first is the surer one."""
    mask_logits = torch.zeros(3, 1, 6)
    mask_logits[0, 0, :4] = 10
    mask_logits[1, 0, 2:] = 10
    class_logits = torch.zeros(3, 7)
    class_logits[0, 0], class_logits[1, 2], class_logits[2, -1] = 10, 8, 10
    return class_logits, mask_logits


@pytest.mark.parametrize(("threshold", "expected"), [(0.49, [1, 1, 1, 1, 2, 2]), (0.5, [1, 1, 1, 1, 0, 0])])
def test_share_of_free_pixels_must_exceed_its_threshold(threshold, expected):
    merging = MaskWiseMerging(IS_THING, overlap_threshold=threshold, thing_area_limit=0)
    assert merging(*two_masks_that_share_pixels(), (1, 6)).segment_ids.tolist() == [expected]


@pytest.mark.parametrize(("limit", "expected"), [(2, [1, 1, 1, 1, 2, 2]), (3, [1, 1, 1, 1, 0, 0]), (5, [0] * 6)])
def test_segments_below_the_area_limit_become_void(limit, expected):
    merging = MaskWiseMerging(IS_THING, overlap_threshold=0.0, thing_area_limit=limit)
    result = merging(*two_masks_that_share_pixels(), (1, 6))
    assert result.segment_ids.tolist() == [expected]
    assert [segment["area"] for segment in result.segments] == [n for n in (expected.count(1), expected.count(2)) if n]


@pytest.mark.parametrize(("label", "scale"), [(-1, 10), (0, 0)], ids=["query", "mask"])
def test_nothing_confident_gives_void(label, scale):
    class_logits = torch.zeros(5, 7)
    class_logits[:, label] = 10.0
    merging = MaskWiseMerging(IS_THING, thing_area_limit=0, stuff_area_limit=0)
    result = merging(class_logits, torch.randn(5, 9, 9) * scale, (33, 33))
    assert result.segments == []
    assert result.segment_ids.shape == (33, 33)
    assert not result.segment_ids.any()
    assert result.query_score.any() == (scale > 0)


def test_query_scores():
    class_logits, mask_logits, size, _, options = random_case(1)
    result = MaskWiseMerging(IS_THING, **options)(class_logits, mask_logits, size)
    confidence, category = class_logits.softmax(1)[:, :-1].max(1)
    assert torch.equal(result.query_class, category)
    for query, probability in enumerate(mask_logits.softmax(0)):
        inside = probability > options["pixel_threshold"]
        score = probability[inside].mean().item() if inside.any() else 0.0
        assert result.query_score[query].item() == pytest.approx(score * confidence[query].item(), rel=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.333])
def test_pixel_threshold_below_a_third_is_refused(threshold):
    with pytest.raises(UserError, match="1/3"):
        MaskWiseMerging(IS_THING, pixel_threshold=threshold)


# --- on a GPU ---


def test_counts_without_waiting():
    values = torch.randint(0, 30, (2, 41, 53)).clamp_min(3)
    expected = torch.bincount(values.flatten(), minlength=35)
    assert expected[:3].sum() == 0 and expected[3] > 300
    assert torch.equal(count_values(values, 35), expected)
    assert torch.equal(count_without_waiting(values, 35), expected)


@pytest.mark.skipif(
    torch.__version__ < "2.6" and not torch.cuda.is_available(), reason="fake CUDA tensors of PyTorch 2.4 need a GPU"
)
def test_nothing_waits_for_a_gpu_but_the_one_transfer():
    """A fake tensor has a device and no values, so whatever asks for one fails."""
    merging = MaskWiseMerging(IS_THING)
    with FakeTensorMode():
        mask_logits = torch.empty(6, 9, 11, device="cuda")
        with pytest.raises(DynamicOutputShapeException):
            mask_logits.nonzero()
        assert merging._mask_score(mask_logits).shape == (6,)
        top_two = top_two_queries(mask_logits, (33, 41), (1.0, 1.0))
        masks = top_two.query
        area, overlap = merging._counts(masks, 6)
        assert area.shape == (6,) and overlap.shape == (6, 6)
        maps = merging._paint(masks, torch.zeros(3, 7, dtype=torch.int64, device="cuda"))
        for found in (*top_two, masks, area, overlap, *maps):
            assert found.is_cuda
        assert [found.shape for found in maps] == [(33, 41)] * 2
