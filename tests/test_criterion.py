"""The whole loss: official values, weights, targets, and batches that lack something."""

import pytest
import reference
import torch
import torch.nn.functional as F
from random_batches import CLASSES, PIXELS, SIZE, areas_of, pairs_of, plain_terms, random_prediction, random_targets

from kmax_d2.modeling.criterion import Criterion, make_targets
from kmax_d2.modeling.matcher import VOID, Targets, match
from kmax_d2.modeling.predictor import Prediction

TERMS = {
    "loss_pq_class": "pq_style_loss_class_term",
    "loss_pq_mask": "pq_style_loss_mask_dice_term",
    "loss_mask_id": "mask_id_cross_entropy_loss",
    "loss_instance": "instance_discrimination_loss",
}


# --- official values ---


@pytest.fixture(scope="module", params=["coco", "cityscapes"])
def official(request):
    """Returns our losses by name, and the arrays of the reference file."""
    final, auxiliary, semantic, targets, arrays = reference.loss_inputs(request.param)
    # The official samples took every pixel.
    options = {"num_samples": targets.segment_ids.shape[1]}
    if request.param == "cityscapes":
        is_thing = [trained >= 11 for trained in range(19)]
        options |= {"instance_temperature": 0.6, "semantic_hard_share": 0.2}
        options |= {"is_thing": is_thing, "small_instance_area": 4096, "small_instance_weight": 3.0}
    return Criterion(**options)(final, auxiliary, targets, semantic), arrays


@pytest.mark.parametrize("prediction", ["final", *range(6)])
@pytest.mark.parametrize("term", TERMS)
def test_official_value(official, term, prediction):
    ours, arrays = official
    if prediction == "final":
        name, theirs = term, f"loss/{TERMS[term]}"
    else:
        name, theirs = f"{term}_{prediction}", f"loss/aux_{prediction}{TERMS[term]}"
    assert ours[name].item() == pytest.approx(arrays[theirs].mean(), rel=1e-5)


def test_official_semantic_value(official):
    ours, arrays = official
    assert ours["loss_semantic"].item() == pytest.approx(arrays["loss/semantic_loss"].mean(), rel=1e-5)
    assert len(ours) == 4 * 7 + 1


def test_every_term_has_its_weight():
    prediction, targets = random_prediction(), random_targets()
    inputs = prediction, [prediction], targets, torch.randn(2, CLASSES + 1, *SIZE)
    weights = {"pq_weight": 1, "mask_id_weight": 1, "instance_weight": 1, "semantic_weight": 1}
    plain = Criterion(**weights, num_samples=PIXELS)(*inputs)
    weights = {"pq_weight": 2, "mask_id_weight": 3, "instance_weight": 5, "semantic_weight": 7}
    weighted = Criterion(**weights, num_samples=PIXELS)(*inputs)
    assert len(plain) == len(weighted) == 4 * 2 + 1
    for name, weight in {"pq_class": 2, "pq_mask": 2, "mask_id": 3, "instance": 5, "semantic": 7}.items():
        for key in [f"loss_{name}"] + [f"loss_{name}_0"] * (name != "semantic"):
            assert weighted[key].item() == pytest.approx(weight * plain[key].item(), rel=1e-5)


def test_no_semantic_head_gives_no_semantic_loss():
    losses = Criterion()(random_prediction(), [], random_targets())
    assert list(losses) == list(TERMS)


# --- sampling ---


def sampled_pixels(gradient):
    """Lists the pixels of the first image to which a gradient (B, C, H, W) flows."""
    return (gradient[0].abs().sum(0) > 0).flatten().nonzero()[:, 0].tolist()


def test_every_prediction_draws_its_own_sample():
    predictions, targets = [random_prediction() for _ in range(3)], random_targets(void=0)
    semantic = torch.randn(2, CLASSES + 1, *SIZE, requires_grad=True)
    losses = Criterion(num_samples=20)(predictions[0], predictions[1:], targets, semantic)
    sum(losses.values()).backward()
    samples = [sampled_pixels(x.grad) for x in (*(p.pixel_feature for p in predictions), semantic)]
    assert [len(sample) for sample in samples] == [20] * 4
    assert len(set(map(tuple, samples))) == 4


def test_each_sample_has_its_temperature():
    """Extreme temperatures draw the smaller mask first, or the larger one."""
    ids = (torch.arange(PIXELS) < 20).long().expand(2, -1)
    targets = Targets(ids, torch.zeros(2, 2, dtype=torch.int64), areas_of(ids, 2))
    prediction, semantic = random_prediction(), torch.randn(2, CLASSES + 1, *SIZE, requires_grad=True)
    criterion = Criterion(num_samples=20, instance_temperature=100, semantic_temperature=-100)
    sum(criterion(prediction, [], targets, semantic).values()).backward()
    assert sampled_pixels(prediction.pixel_feature.grad) == list(range(20))
    of_semantic = sampled_pixels(semantic.grad)
    assert len(of_semantic) == 20 and min(of_semantic) >= 20


# --- the semantic term ---


def test_semantic_targets_are_read_at_the_semantic_maps_positions():
    """Each position of the semantic map has the target at its pixel of the crop, whatever the stride of the masks."""
    ids = torch.randint(-1, 6, (2, 65, 97))
    labels = [torch.randint(3, (6,)) for _ in ids]
    semantic = torch.randn(2, 3, 3, 4)
    expected = []
    for image in range(2):
        small = ids[image, ::32, ::32]
        terms = [
            -semantic[image].log_softmax(0)[labels[image][small[y, x]], y, x].item()
            for y in range(3)
            for x in range(4)
            if small[y, x] != VOID
        ]
        expected.append(sum(terms) / len(terms))
    for stride in (2, 4, 8):
        size = (64 // stride + 1, 96 // stride + 1)
        prediction = random_prediction(classes=3, size=size)
        criterion = Criterion(num_samples=20, semantic_hard_share=1.0, is_thing=[True] * 3)
        values = criterion(prediction, [], make_targets(list(ids), labels, size, stride), semantic)
        assert values["loss_semantic"].item() == pytest.approx(sum(expected) / 2, rel=1e-5)


# --- targets ---


def test_targets_drop_masks_that_no_read_pixel_shows():
    ids = torch.full((9, 9), VOID)
    ids[0, 0] = 0
    ids[1:4, 1:4] = 1  # between the positions that are read
    ids[4:, 4:] = 2
    ids[8, 8] = 3
    targets = make_targets([ids], [torch.tensor([10, 11, 12, 13])], (3, 3), 4)
    assert targets.classes.tolist() == [[10, 12, 13]]
    assert targets.segment_ids.tolist() == [[0, -1, -1, -1, 1, 1, -1, 1, 2]]


def test_smaller_maps_are_padded_with_void():
    first, second = torch.zeros(9, 9, dtype=torch.int64), torch.ones(5, 7, dtype=torch.int64)
    targets = make_targets([first, second], [torch.tensor([3]), torch.tensor([4, 5])], (3, 3), 4)
    assert targets.segment_ids.view(2, 3, 3).tolist() == [[[0] * 3] * 3, [[0, 0, -1], [0, 0, -1], [-1] * 3]]
    assert targets.classes.tolist() == [[3], [5]]


def test_images_with_fewer_masks_are_padded_in_the_classes():
    ids = torch.arange(9).view(3, 3)
    targets = make_targets([ids, ids // 9], [torch.arange(9), torch.tensor([6])], (3, 3), 1)
    assert targets.classes.tolist() == [list(range(9)), [6] + [VOID] * 8]


# --- batches that lack something ---


HARDEST = {"semantic_hard_share": 0.2, "is_thing": [True, False] * 3 + [True], "small_instance_weight": 3.0}


def run_criterion(prediction, targets, **options):
    """Returns the losses and, for each, its gradients to class logits, mask logits, features and semantic logits."""
    semantic = torch.randn(len(targets.classes), CLASSES + 1, *SIZE, requires_grad=True)
    values = Criterion(num_samples=30, **options)(prediction, [prediction], targets, semantic)
    inputs = {**prediction._asdict(), "semantic": semantic}
    gradients = {}
    for name, value in values.items():
        found = torch.autograd.grad(value, list(inputs.values()), retain_graph=True, allow_unused=True)
        gradients[name] = {key: g for key, g in zip(inputs, found, strict=True) if g is not None}
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() for g in gradients[name].values())
    return values, gradients


@pytest.mark.parametrize("options", [{}, HARDEST], ids=["sampled", "hardest"])
def test_batch_without_any_mask(options):
    prediction = random_prediction()
    ids = [torch.full(SIZE, VOID)] * 2
    targets = make_targets(ids, [torch.zeros(0, dtype=torch.int64)] * 2, SIZE, 1)
    values, gradients = run_criterion(prediction, targets, **options)
    for name, value in values.items():
        if name.startswith("loss_pq_class"):
            # Every query lies on void alone, so that its target is void.
            cross_entropy = -prediction.class_logits.log_softmax(2)[..., -1].mean().item()
            assert value.item() == pytest.approx(3.0 * 0.25 * cross_entropy, rel=1e-4)
            assert gradients[name]["class_logits"].abs().max() > 0
        else:
            assert value == 0
            assert all(not g.any() for g in gradients[name].values())


def test_one_image_without_a_mask_leaves_the_other_alone():
    prediction = random_prediction()
    targets = random_targets()
    targets.segment_ids[1], targets.classes[1] = VOID, VOID
    alone = Targets(*(part[:1] for part in targets))
    values, gradients = run_criterion(prediction, targets)
    first, _ = run_criterion(Prediction(*(p[:1] for p in prediction)), alone)
    for name in ("loss_pq_mask", "loss_mask_id"):
        assert values[name].item() == pytest.approx(first[name].item() / 2, rel=1e-5)
        assert not gradients[name]["mask_logits"][1].any()
        assert gradients[name]["mask_logits"][0].any()
    assert not gradients["loss_instance"]["pixel_feature"][1].any()
    assert gradients["loss_instance"]["pixel_feature"][0].any()
    _, gradients = run_criterion(prediction, targets, **HARDEST)
    learning = gradients["loss_semantic"]["semantic"].abs().sum(1).flatten(1) > 0
    assert learning.sum(1).tolist() == [12, 0]  # a fifth of 60 pixels


def test_more_masks_than_queries():
    prediction, targets = random_prediction(queries=3), random_targets(segments=6)
    matching = match(prediction.class_logits, prediction.mask_logits.flatten(2), targets)
    for image in range(2):
        pairs = pairs_of(matching, image)
        assert sorted(query for _, query in pairs) == [0, 1, 2]
        assert len({segment for segment, _ in pairs}) == 3
    values, gradients = run_criterion(prediction, targets)
    _, mask, mask_id = plain_terms(prediction, targets, matching)
    assert values["loss_pq_mask"].item() == pytest.approx(3.0 * mask.mean().item(), rel=1e-4)
    assert values["loss_mask_id"].item() == pytest.approx(0.3 * mask_id.mean().item(), rel=1e-4)
    # Pixels of masks without a query have no gradient.
    for image in range(2):
        matched = torch.tensor([segment for segment, _ in pairs_of(matching, image)])
        learning = gradients["loss_mask_id"]["mask_logits"][image].abs().sum(0).flatten() > 0
        assert torch.equal(learning, torch.isin(targets.segment_ids[image], matched))


@pytest.mark.parametrize("options", [{}, HARDEST], ids=["sampled", "hardest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_under_autocast(dtype, options):
    """Half precision cannot even count the pixels of a large mask."""
    size = (300, 300)
    ids = torch.zeros(size, dtype=torch.int64)
    ids[250:] = 1
    ids[:, :20] = VOID
    targets = make_targets([ids], [torch.tensor([2, 3])], size, 1)
    mask_logits = torch.randn(1, 4, *size)
    mask_logits[0, 0] += 6 * (ids == 0)
    mask_logits[0, 1] += 6 * (ids == 1)
    prediction = Prediction(torch.randn(1, 4, 8), mask_logits, F.normalize(torch.randn(1, 6, *size), dim=1))
    semantic = torch.randn(1, 8, *size)
    torch.manual_seed(1)
    expected = Criterion(num_samples=500, **options)(prediction, [], targets, semantic)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        values = Criterion(num_samples=500, **options)(prediction, [], targets, semantic)
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6)
