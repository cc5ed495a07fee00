"""Semantic and instance results of a prediction, against plain loops at full size."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import options

from kmax_d2.checkpoint import KMaXCheckpointer
from kmax_d2.data.datasets import shapes
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError
from kmax_d2.modeling import top_two
from kmax_d2.modeling.kmax_deeplab import KMaXDeepLab
from kmax_d2.modeling.merging import MaskWiseMerging
from kmax_d2.modeling.postprocess import Postprocessor, query_classes
from kmax_d2.modeling.top_two import marginal_classes

QUICKSTART = Path(__file__).parents[1] / "kmax_d2" / "assets" / "quickstart.pth"
IS_THING = torch.tensor([True, False, True, False])
SIZE, REAL, ORIGINAL = (33, 41), (25, 41), (50, 82)  # padded, without padding, of the result


@pytest.fixture(params=range(6))
def prediction(request):
    """Class logits (9, 5) and mask logits (9, 9, 11) of blobs that overlap, some of one class."""
    generator = np.random.RandomState(request.param)
    rows, columns = np.mgrid[:9, :11]
    centers = generator.uniform(0, 1, (9, 2)) * (9, 11)
    distance = (rows - centers[:, :1, None]) ** 2 + (columns - centers[:, 1:, None]) ** 2
    mask_logits = 9 * np.exp(-distance / generator.uniform(2, 12, 9)[:, None, None])
    mask_logits += generator.normal(0, 0.3, mask_logits.shape)
    class_logits = generator.normal(0, 3, (9, 5))
    return torch.from_numpy(class_logits).float(), torch.from_numpy(mask_logits).float()


@pytest.fixture(params=["crop", "original"])
def case(request, prediction):
    """The prediction, where to merge (size, extent), the part that is real there, and the size of the result."""
    if request.param == "crop":
        return *prediction, (SIZE, (1.0, 1.0)), REAL, ORIGINAL
    extent = tuple((real - 1) / (padded - 1) for real, padded in zip(REAL, SIZE, strict=True))
    return *prediction, (ORIGINAL, extent), ORIGINAL, ORIGINAL


def merging(**changes):
    settings = {"thing_threshold": 0.3, "stuff_threshold": 0.3, "overlap_threshold": 0.5}
    limits = {"thing_area_limit": 0, "stuff_area_limit": 0}
    return MaskWiseMerging(IS_THING.tolist(), **settings | limits | changes)


def instances(kind, merged, real, size, is_thing=IS_THING, max_instances=100):
    """Those of a Postprocessor, "panoptic" or "query"."""
    postprocessor = Postprocessor(MaskWiseMerging(is_thing), max_instances=max_instances)
    return getattr(postprocessor, f"{kind}_instances")(merged, real, size)


def full_probability(mask_logits, place):
    """(N, H, W) mask probabilities where the merging looks at them."""
    size, extent = place
    if extent == (1.0, 1.0):
        return F.interpolate(mask_logits[None], size, mode="bilinear", align_corners=True)[0].softmax(0)
    grid = torch.meshgrid(*(torch.linspace(-1, 2 * e - 1, n) for n, e in zip(size, extent, strict=True)), indexing="ij")
    grid = torch.stack(grid[::-1], -1)[None]
    return F.grid_sample(mask_logits[None], grid, mode="bilinear", align_corners=True)[0].softmax(0)


def resized(labels, real, size):
    """Nearest pixel centers, by PyTorch."""
    labels = labels[..., : real[0], : real[1]]
    return F.interpolate(labels[None, None].double(), size, mode="nearest-exact")[0, 0]


def test_semantic_classes(case):
    """Officially the best query's class; else the largest sum over the queries."""
    class_logits, mask_logits, place, _, _ = case
    merged = merging()(class_logits, mask_logits, *place)
    probability = full_probability(mask_logits, place)
    classes = class_logits.softmax(1)[:, :-1]
    for found, score in (
        (query_classes(merged), None),
        (marginal_classes(class_logits, mask_logits, *place), torch.einsum("nhw,nk->khw", probability, classes)),
    ):
        if score is None:
            expected = classes.argmax(1)[probability.argmax(0)]
            best = probability.topk(2, dim=0).values
        else:
            expected = score.argmax(0)
            best = score.topk(2, dim=0).values
        clear = best[0] - best[1] > 1e-4
        assert clear.float().mean() > 0.99
        assert torch.equal(found[clear], expected[clear])


def test_the_two_semantic_ways_differ():
    """Two queries of one class outvote the best one of another."""
    class_logits = torch.tensor([[9.0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0], [0, 9.0, 0, 0, 0]])
    mask_logits = torch.tensor([2.0, 1.8, 1.8])[:, None, None].expand(3, 2, 2)
    assert query_classes(merging()(class_logits, mask_logits, (5, 5))).unique().tolist() == [0]
    assert marginal_classes(class_logits, mask_logits, (5, 5)).unique().tolist() == [1]


def plain_instances(merged, class_logits, probability, real, size):
    """For each pair of a thing class and a pasted query its score and mask, one after the other."""
    confidence, category = class_logits.softmax(1)[:, :-1].max(1)
    best, top = probability.max(0)
    pasted = resized(merged.pasted_query, real, size)
    classes = resized(category[top], real, size)
    confidences, best = resized(confidence[top], real, size), resized(best, real, size)
    found = []
    for label in range(len(IS_THING)):
        for query in range(len(class_logits)):
            mask = (classes == label) & (pasted == query)
            if IS_THING[label] and mask.any():
                found.append((confidences[mask].mean().item() * best[mask].mean().item(), label, mask))
    return sorted(found, key=lambda entry: -entry[0])


def test_panoptic_instances(case):
    class_logits, mask_logits, place, real, size = case
    merged = merging()(class_logits, mask_logits, *place)
    found = instances("panoptic", merged, real, size)
    expected = plain_instances(merged, class_logits, full_probability(mask_logits, place), real, size)
    assert len(found) == len(expected) > 0
    for index, (score, label, mask) in enumerate(expected):
        assert found.scores[index].item() == pytest.approx(score, rel=1e-4)
        assert found.pred_classes[index].item() == label
        assert torch.equal(found.pred_masks[index], mask)
    assert found.pred_masks.sum(0).max() == 1
    few = instances("panoptic", merged, real, size, max_instances=1)
    assert torch.equal(few.pred_masks, found.pred_masks[:1])


def test_pasted_queries_are_those_of_the_segments_before_the_area_limits(prediction):
    free = merging()(*prediction, SIZE)
    assert torch.equal(free.pasted_query >= 0, free.segment_ids > 0)
    for query in free.pasted_query.unique().tolist()[1:]:
        (segment,) = free.segment_ids[free.pasted_query == query].unique().tolist()
        assert free.segments[segment - 1]["category_id"] == free.query_class[query]
    limited = merging(thing_area_limit=10**6, stuff_area_limit=10**6)(*prediction, SIZE)
    assert not limited.segments
    assert torch.equal(limited.pasted_query, free.pasted_query)
    found, other = (instances("panoptic", merged, REAL, ORIGINAL) for merged in (free, limited))
    assert torch.equal(found.pred_masks, other.pred_masks)


def test_query_instances(case):
    class_logits, mask_logits, place, real, size = case
    merged = merging()(class_logits, mask_logits, *place)
    found = instances("query", merged, real, size)
    probability = full_probability(mask_logits, place)
    confidence, category = class_logits.softmax(1)[:, :-1].max(1)
    expected = []
    for query in range(len(class_logits)):
        inside = (small := mask_logits.softmax(0)[query])[small > 0.4]
        mask = resized(probability[query] > 0.4, real, size) > 0
        if IS_THING[category[query]] and len(inside) and mask.any():
            expected.append((inside.mean().item() * confidence[query].item(), category[query].item(), mask))
    expected.sort(key=lambda entry: -entry[0])
    assert len(found) == len(expected) > 0
    for index, (score, label, mask) in enumerate(expected):
        assert found.scores[index].item() == pytest.approx(score, rel=1e-4)
        assert found.pred_classes[index].item() == label
        assert (found.pred_masks[index] != mask).sum() <= 1  # a probability at the threshold


def test_strips_give_what_the_whole_gives(case, monkeypatch):
    class_logits, mask_logits, place, real, size = case

    def compute():
        merged = merging()(class_logits, mask_logits, *place)
        found = [instances(kind, merged, real, size) for kind in ("panoptic", "query")]
        maps = [*merged[:1], *merged[2:], query_classes(merged)]
        maps += [marginal_classes(class_logits, mask_logits, *place)]
        maps += [x for one in found for x in (one.pred_masks, one.pred_boxes.tensor, one.pred_classes, one.scores)]
        return [*maps, torch.tensor([segment["area"] for segment in merged.segments])]

    whole = compute()
    monkeypatch.setattr(top_two, "PIXELS_AT_ONCE", 5 * size[1] + 3)  # the last strip has fewer rows
    monkeypatch.setattr(top_two, "LOGITS_PER_THREAD", 9 * 3 * size[1])
    for one, other in zip(whole, compute(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["panoptic", "query"])
def test_boxes_bound_their_masks_tightly(case, kind):
    class_logits, mask_logits, place, real, size = case
    found = instances(kind, merging()(class_logits, mask_logits, *place), real, size)
    assert len(found) > 0
    for mask, box in zip(found.pred_masks, found.pred_boxes.tensor.tolist(), strict=True):
        rows, columns = mask.nonzero().unbind(1)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_no_things_give_no_instances(prediction):
    merged = merging()(*prediction, SIZE)
    for kind in ("panoptic", "query"):
        found = instances(kind, merged, REAL, ORIGINAL, is_thing=[False] * 4)
        assert len(found) == 0
        assert found.pred_masks.shape == (0, *ORIGINAL) and found.pred_boxes.tensor.shape == (0, 4)


# --- the options ---


@pytest.fixture(scope="module")
def quickstart():
    """The trained model that the project ships, and an image of its dataset."""
    model = KMaXDeepLab(load_config("shapes/quickstart", ["MODEL.DEVICE", "cpu", "MODEL.KMAX.NORM", "BN"])).eval()
    KMaXCheckpointer(model, complete=True).load(str(QUICKSTART))
    image = torch.from_numpy(shapes.draw(5, 2)[0]).permute(2, 0, 1)
    return model, F.interpolate(image[None].float(), (77, 96), mode="bilinear", antialias=True)[0]


@pytest.mark.parametrize("at_crop", [True, False])
def test_options_of_the_model(quickstart, at_crop, monkeypatch):
    """Each way is what its function gives of the network's prediction, at the original size, without the padding."""
    model, image = quickstart
    padded = model.pixel_mean.repeat(1, 97, 97)  # zero once it is scaled
    padded[:, :77, :96] = image
    raw = model.predict(padded[None])
    class_logits, mask_logits = raw["class_logits"][0], raw["mask_logits"][0]
    size = (129, 160)
    place = ((97, 97), (1.0, 1.0)) if at_crop else (size, (76 / 96, 95 / 96))
    real = (77, 96) if at_crop else size
    merged, postprocessor = model.merging(class_logits, mask_logits, *place), model.postprocessor
    expected = {
        "query": (query_classes(merged), postprocessor.query_instances(merged, real, size)),
        "marginal": (marginal_classes(class_logits, mask_logits, *place), None),
        "panoptic": (None, postprocessor.panoptic_instances(merged, real, size)),
    }
    monkeypatch.setattr(model.postprocessor, "merge_at_crop", at_crop)
    for semantic in ("query", "marginal"):
        for instance in ("query", "panoptic"):
            monkeypatch.setattr(model.postprocessor, "semantic", semantic)
            monkeypatch.setattr(model.postprocessor, "instance", instance)
            with torch.no_grad():
                (result,) = model([{"image": image, "height": size[0], "width": size[1]}])
            classes = resized(expected[semantic][0], real, size)
            assert (result["semantic"] == classes).float().mean() > 0.999
            assert torch.equal(result["sem_seg"].argmax(0), result["semantic"])
            assert (result["sem_seg"].sum(0) == 1).all()
            found, wanted = result["instances"], expected[instance][1]
            assert len(found) == len(wanted) > 2
            torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-3, atol=1e-4)
            assert found.pred_classes.tolist() == wanted.pred_classes.tolist()
            assert (found.pred_masks == wanted.pred_masks).float().mean() > 0.999
    assert (expected["query"][0] != expected["marginal"][0]).any()


@pytest.mark.parametrize(("option", "known"), [("SEMANTIC", "query, marginal"), ("INSTANCE", "query, panoptic")])
def test_unknown_way(option, known):
    with pytest.raises(UserError, match=f"MODEL.KMAX.TEST.{option} is best, but must be one of {known}"):
        KMaXDeepLab(load_config("", options(**{f"MODEL__KMAX__TEST__{option}": "best"})))
