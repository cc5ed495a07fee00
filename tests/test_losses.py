"""The loss terms: against the official values, and against plain implementations of the formulas."""

import math
from itertools import permutations

import pytest
import reference
import torch
import torch.nn.functional as F

from kmax_d2.errors import UserError
from kmax_d2.modeling import losses
from kmax_d2.modeling.criterion import Criterion, make_targets
from kmax_d2.modeling.matcher import VOID, Targets, match
from kmax_d2.modeling.predictor import Prediction

TERMS = {
    "loss_pq_class": "pq_style_loss_class_term",
    "loss_pq_mask": "pq_style_loss_mask_dice_term",
    "loss_mask_id": "mask_id_cross_entropy_loss",
    "loss_instance": "instance_discrimination_loss",
}


def random_targets(batch=2, pixels=60, segments=5, classes=7, void=0.2):
    """Targets whose last image has one mask less than the others."""
    counts = torch.full((batch,), segments)
    counts[-1] -= 1
    ids = torch.stack([torch.randint(count, (pixels,)) for count in counts.tolist()])
    ids[torch.rand(batch, pixels) < void] = VOID
    labels = torch.randint(classes, (batch, segments))
    labels[torch.arange(segments) >= counts[:, None]] = VOID
    return Targets(ids, labels, areas_of(ids, segments))


def areas_of(ids, segments):
    """(B, S) pixels of each mask of id maps (B, P)."""
    return (ids[:, :, None] == torch.arange(segments)).sum(1)


def random_prediction(batch=2, queries=8, classes=7, pixels=60, channels=6):
    class_logits = torch.randn(batch, queries, classes + 1) * 2
    mask_logits = torch.randn(batch, queries, pixels) * 2
    feature = F.normalize(torch.randn(batch, channels, pixels), dim=1)
    return Prediction(class_logits.requires_grad_(), mask_logits.requires_grad_(), feature.requires_grad_())


def all_losses(criterion, final, auxiliary, semantic, targets):
    """The criterion's losses by name, that of semantic logits too."""
    losses = criterion(final, auxiliary, targets)
    return losses | {"loss_semantic": criterion.semantic_loss(semantic, targets, final.mask_logits.shape[-2:])}


# --- official values ---


@pytest.fixture(scope="module", params=["coco", "cityscapes"])
def official(request):
    """Our losses by name, and the file's arrays."""
    final, auxiliary, semantic, targets, arrays = reference.loss_inputs(request.param)
    # The official samples took every pixel.
    options = {"num_samples": targets.segment_ids.shape[1]}
    if request.param == "cityscapes":
        is_thing = [trained >= 11 for trained in range(19)]
        options |= {"instance_temperature": 0.6, "semantic_hard_share": 0.2}
        options |= {"is_thing": is_thing, "small_instance_area": 4096, "small_instance_weight": 3.0}
    return all_losses(Criterion(**options), final, auxiliary, semantic, targets), arrays


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
    prediction = prediction._replace(
        mask_logits=prediction.mask_logits.unflatten(2, (6, 10)),
        pixel_feature=prediction.pixel_feature.unflatten(2, (6, 10)),
    )
    semantic = torch.randn(2, 8, 6, 10)
    criterion = Criterion(pq_weight=1, mask_id_weight=1, instance_weight=1, semantic_weight=1, num_samples=60)
    plain = all_losses(criterion, prediction, [prediction], semantic, targets)
    criterion = Criterion(pq_weight=2, mask_id_weight=3, instance_weight=5, semantic_weight=7, num_samples=60)
    weighted = all_losses(criterion, prediction, [prediction], semantic, targets)
    weights = {"pq_class": 2, "pq_mask": 2, "mask_id": 3, "instance": 5, "semantic": 7}
    for name, weight in weights.items():
        for key in [f"loss_{name}"] + [f"loss_{name}_0"] * (name != "semantic"):
            assert weighted[key].item() == pytest.approx(weight * plain[key].item(), rel=1e-5)


# --- sampling ---


def test_samples_are_without_replacement():
    targets = random_targets(batch=3, pixels=200)
    pixels = losses.sample_pixels(targets, 120, 1.5)
    assert pixels.shape == (3, 120)
    assert all(len(set(row)) == 120 for row in pixels.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_void_is_sampled_only_last(temperature):
    targets = random_targets(batch=3, pixels=200, void=0.5)
    pixels = losses.sample_pixels(targets, 150, temperature)
    valid = (targets.segment_ids != VOID).sum(1)
    is_void = targets.segment_ids.gather(1, pixels) == VOID
    assert torch.equal((~is_void).sum(1), valid)
    assert torch.equal(is_void, torch.arange(150) >= valid[:, None])


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 2.0])
def test_temperature_prefers_small_masks(temperature):
    """The first pixel drawn has probability area^-T / Σ area^-T, over pixels."""
    batch, small, large = 3000, 20, 180
    ids = torch.cat([torch.zeros(small, dtype=torch.int64), torch.ones(large, dtype=torch.int64)]).repeat(batch, 1)
    pixels = losses.sample_pixels(
        Targets(ids, torch.zeros(batch, 2, dtype=torch.int64), areas_of(ids, 2)), 1, temperature
    )
    share = (pixels < small).float().mean().item()
    expected = small ** (1 - temperature) / (small ** (1 - temperature) + large ** (1 - temperature))
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / batch)


def test_more_samples_than_pixels_give_each_pixel_once():
    pixels = losses.sample_pixels(random_targets(pixels=60), 1000, 1.5)
    assert torch.equal(pixels.sort(dim=1).values, torch.arange(60).expand(2, -1))


def test_every_prediction_draws_its_own_sample(monkeypatch):
    drawn = []

    def sample_pixels(targets, num_samples, temperature, sample=losses.sample_pixels):
        drawn.append((temperature, sample(targets, num_samples, temperature)))
        return drawn[-1][1]

    monkeypatch.setattr("kmax_d2.modeling.criterion.sample_pixels", sample_pixels)
    prediction = random_prediction()
    prediction = prediction._replace(
        mask_logits=prediction.mask_logits.unflatten(2, (6, 10)),
        pixel_feature=prediction.pixel_feature.unflatten(2, (6, 10)),
    )
    criterion = Criterion(num_samples=20, instance_temperature=1.2, semantic_temperature=2.3)
    all_losses(criterion, prediction, [prediction] * 2, torch.randn(2, 8, 6, 10), random_targets())
    assert [temperature for temperature, _ in drawn] == [1.2, 2.3]
    samples = [*drawn[0][1].chunk(3), drawn[1][1]]
    assert len({tuple(pixels.flatten().tolist()) for pixels in samples}) == 4


# --- instance discrimination and semantic term ---


def plain_instance_loss(feature, pixels, targets):
    result = []
    for image, chosen in enumerate(pixels):
        f = feature[image].T[chosen]
        ids = targets.segment_ids[image, chosen]
        target = ((ids[:, None] == ids[None, :]) & (ids[:, None] != VOID)).to(f.dtype)
        target = target / target.sum(1, keepdim=True).clamp_min(1)
        rows = -(target * F.log_softmax(f @ f.T / 0.3, dim=1)).sum(1)
        result.append(rows.sum() / (rows != 0).sum().clamp_min(1))
    return torch.stack(result)


@pytest.mark.parametrize("num_samples", [25, 60])
@pytest.mark.parametrize("size", [(6, 10), (3, 4)])
def test_instance_discrimination_is_cross_entropy_of_explicit_targets(num_samples, size):
    targets = random_targets()
    pixels = losses.sample_pixels(targets, num_samples, 1.5)
    if num_samples == 60:
        assert (targets.segment_ids.gather(1, pixels) == VOID).any()
    # Not of unit length: nothing in the loss normalises again.
    ours = (torch.randn(2, 6, *size) * 0.5).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    features = losses.sample_features(ours, pixels, (6, 10))
    value = losses.instance_discrimination_loss(features, pixels, targets)
    resized = F.interpolate(theirs, (6, 10), mode="bilinear", align_corners=True).flatten(2)
    expected = plain_instance_loss(resized, pixels, targets)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.tensor([1.0, -2.0])
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    assert theirs.grad.abs().max() > 1e-2
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("small", "size"), [((5, 7), (5, 7)), ((5, 7), (17, 25)), ((1, 3), (4, 9)), ((4, 1), (13, 1)), ((1, 1), (1, 1))]
)
def test_sampled_features_are_those_of_the_resized_map(small, size):
    feature = torch.randn(2, 6, *small)
    pixels = torch.stack([torch.randperm(size[0] * size[1]) for _ in range(2)])
    resized = F.interpolate(feature, size, mode="bilinear", align_corners=True).flatten(2)
    expected = torch.stack([image[:, chosen].T for image, chosen in zip(resized, pixels, strict=True)])
    torch.testing.assert_close(losses.sample_features(feature, pixels, size), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [losses.SIMILARITIES_AT_ONCE, 30])
def test_row_log_sum_exp_gradient(monkeypatch, at_once):
    monkeypatch.setattr(losses, "SIMILARITIES_AT_ONCE", at_once)
    features = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses._RowLogSumExp.apply, features)


def test_semantic_loss_is_cross_entropy_of_sampled_pixels():
    targets = random_targets()
    logits = torch.randn(2, 8, 60)
    pixels = losses.sample_pixels(targets, 58, 2.0)
    sampled = torch.stack([image[:, chosen].T for image, chosen in zip(logits, pixels, strict=True)])
    value = losses.semantic_loss(sampled, pixels, targets)
    for image in range(2):
        terms = []
        for pixel in pixels[image].tolist():
            segment = targets.segment_ids[image, pixel].item()
            if segment != VOID:
                category = targets.classes[image, segment].item()
                terms.append(-logits[image, :, pixel].log_softmax(0)[category].item())
        assert 0 < len(terms) < 58
        assert value[image].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


# --- the hardest pixels' semantic term ---


def logits_of(losses_, classes, num_classes=3):
    """(1, K, P) logits whose cross-entropy against each pixel's class (P,) is the wanted one, above log K."""
    logits = torch.zeros(1, num_classes, len(classes))
    for pixel, (loss, category) in enumerate(zip(losses_, classes, strict=True)):
        logits[0, category, pixel] = -math.log((math.exp(loss) - 1) / (num_classes - 1))
    return logits.requires_grad_()


def hardest(losses_, ids, weights, share):
    """Value and gradient (K, P) where mask s has class s % 3."""
    ids = torch.tensor([ids])
    labels = torch.arange(len(weights)) % 3
    targets = Targets(ids, labels[None], areas_of(ids, len(weights)))
    logits = logits_of(losses_, labels[ids[0].clamp_min(0)].tolist())
    value = losses.hardest_semantic_loss(logits, ids, targets, torch.tensor([weights]), share)
    value.sum().backward()
    return value.item(), logits.grad[0]


def test_hardest_pixels_are_chosen_after_weighting():
    values = [2.0, 3.0, 4.0, 5.0, 9.0]
    value, grad = hardest(values, [0, 0, 1, 1, -1], [3.0, 1.0], 0.4)
    # 3 · 2 and 3 · 3 of mask 0; mask 1's 4 and 5 are less, and void's 9 does not count.
    assert value == pytest.approx((6 + 9) / 2, rel=1e-5)
    assert torch.equal(grad.abs().sum(0) > 0, torch.tensor([True, True, False, False, False]))
    value, _ = hardest(values, [0, 0, 1, 1, -1], [1.0, 1.0], 0.4)
    assert value == pytest.approx((5 + 4) / 2, rel=1e-5)


@pytest.mark.parametrize(("pixels", "share", "count"), [(12, 0.2, 2), (13, 0.2, 3), (4, 0.2, 1), (8, 1.0, 8)])
def test_share_of_the_hardest_pixels_is_rounded(pixels, share, count):
    values = [2.0 + index for index in range(pixels)]
    value, grad = hardest(values, [0] * pixels, [1.0], share)
    assert value == pytest.approx(sum(values[-count:]) / count, rel=1e-5)
    assert torch.equal(grad.abs().sum(0) > 0, torch.arange(pixels) >= pixels - count)


def test_hardest_share_counts_void_but_does_not_divide_by_it():
    """Of ten pixels the share is four, of which only three are not void."""
    value, _ = hardest([2.0, 4.0, 6.0] + [9.0] * 7, [0, 1, 0] + [-1] * 7, [1.0, 1.0], 0.4)
    assert value == pytest.approx(4.0, rel=1e-5)


def test_only_small_things_weigh_more():
    """Areas are those of the whole crop, not of the pixels that are read, and of each instance alone."""
    ids = torch.full((65, 65), VOID)
    ids[:10, :10] = 0  # a thing of 100 pixels
    ids[:10, 10:20] = 1  # another of its class
    ids[:10, 20:30] = 2  # stuff of 100 pixels
    ids[20:30, :11] = 3  # a thing of 110 pixels
    ids[63:, 63:] = 4  # a thing of which no pixel is read but one
    targets = make_targets([ids], [torch.tensor([1, 1, 0, 2, 1])], (17, 17), 4)
    assert targets.areas.tolist() == [[100, 100, 100, 110, 4]]
    is_thing = torch.tensor([False, True, True])
    for area, expected in ((101, [3, 3, 1, 1, 3]), (100, [1, 1, 1, 1, 3]), (4096, [3, 3, 1, 3, 3])):
        assert losses.small_instance_weights(targets, is_thing, area, 3.0).tolist() == [expected]


def test_official_semantic_weights():
    """Of every pixel of the whole crop but void, which the official weights do not show."""
    arrays = reference.load("loss_cityscapes")
    ids = torch.from_numpy(arrays["segment_id"]).long() - 1
    labels = arrays["segment_class"]
    size = tuple(ids.shape[1:])
    targets = make_targets(list(ids), [torch.from_numpy(row[row >= 0]).long() for row in labels], size, 1)
    is_thing = torch.arange(19) >= 11
    weights = losses.small_instance_weights(targets, is_thing, 4096, 3.0)
    ours = weights.gather(1, targets.segment_ids.clamp_min(0)).view_as(ids)
    valid = ids != VOID
    assert torch.equal(ours[valid], torch.from_numpy(arrays["semantic_weight"])[valid])
    assert {1.0, 3.0} == set(ours[valid].tolist())


def test_semantic_targets_are_read_at_the_semantic_maps_positions():
    """Every pixel of the semantic map against its place in the crop, whatever the stride of the masks."""
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
        prediction = random_prediction(classes=3, pixels=size[0] * size[1])
        prediction = prediction._replace(
            mask_logits=prediction.mask_logits.unflatten(2, size),
            pixel_feature=prediction.pixel_feature.unflatten(2, size),
        )
        criterion = Criterion(num_samples=20, semantic_hard_share=1.0, is_thing=[True] * 3)
        values = all_losses(criterion, prediction, [], semantic, make_targets(list(ids), labels, size, stride))
        assert values["loss_semantic"].item() == pytest.approx(sum(expected) / 2, rel=1e-5)


@pytest.mark.parametrize("share", [-0.1, 20.0])
def test_share_that_is_none(share):
    with pytest.raises(UserError, match=f"from 0 to 1, not {share}"):
        Criterion(semantic_hard_share=share)


# --- matching, PQ-style terms and mask-id ---


def plain_dice(probability, mask, valid):
    """Of matching: one query's probabilities and one mask, both (P,)."""
    return 2 * (mask * probability).sum() / (mask.sum() + (probability * valid).sum() + 2e-5)


def test_matching_is_the_best_of_all():
    prediction, targets = random_prediction(queries=5), random_targets(segments=3)
    matching = match(prediction.class_logits, prediction.mask_logits, targets)
    for image in range(2):
        probability = prediction.mask_logits[image].softmax(0)
        class_probability = prediction.class_logits[image].softmax(1)
        valid = (targets.segment_ids[image] != VOID).float()
        labels = targets.classes[image][targets.classes[image] != VOID].tolist()
        masks = [(targets.segment_ids[image] == segment).float() for segment in range(len(labels))]
        dice = [[plain_dice(probability[query], mask, valid).item() for query in range(5)] for mask in masks]
        share = [[class_probability[query, label].item() for query in range(5)] for label in labels]
        total = {
            queries: sum(dice[s][q] * share[s][q] for s, q in enumerate(queries))
            for queries in permutations(range(5), len(labels))
        }
        assert sorted(pairs_of(matching, image)) == list(enumerate(max(total, key=total.get)))
        mine = matching.image == image
        pairs = pairs_of(matching, image)
        assert matching.dice[mine].tolist() == pytest.approx([dice[s][q] for s, q in pairs], rel=1e-5)
        assert matching.class_probability[mine].tolist() == pytest.approx([share[s][q] for s, q in pairs], rel=1e-5)
        void_share = (probability * (1 - valid)).sum(1) / (probability.sum(1) + 1e-5)
        torch.testing.assert_close(matching.void_share[image], void_share)


def pairs_of(matching, image):
    return [
        (segment, query)
        for i, segment, query in zip(
            matching.image.tolist(), matching.segment.tolist(), matching.query.tolist(), strict=True
        )
        if i == image
    ]


def plain_terms(prediction, targets, matching):
    """Class, mask and mask-id term of each image, with the softmax over all queries written out."""
    class_terms, mask_terms, id_terms = [], [], []
    queries, classes = prediction.class_logits.shape[1], prediction.class_logits.shape[2] - 1
    for image in range(len(targets.classes)):
        pairs = pairs_of(matching, image)
        log_classes = prediction.class_logits[image].log_softmax(1)
        log_probability = prediction.mask_logits[image].log_softmax(0)
        probability = log_probability.exp()
        ids = targets.segment_ids[image]
        valid = (ids != VOID).float()
        label = dict.fromkeys(range(queries), classes)
        weight = {
            q: 0.25 * max(((probability[q] * (1 - valid)).sum() / (probability[q].sum() + 1e-5)).item(), 1e-5)
            for q in range(queries)
        }
        mask_term = torch.zeros(())
        cross_entropies = []
        for segment, query in pairs:
            mask = (ids == segment).float()
            label[query] = targets.classes[image, segment].item()
            weight[query] = 0.75 * plain_dice(probability[query], mask, valid).item()
            p = probability[query] * valid
            dice = (2 * (mask * p).sum() + 1) / (mask.sum() + p.sum() + 1)
            mask_term = mask_term + (1 - dice) * log_classes[query, label[query]].exp().item()
            cross_entropies.append(-log_probability[query][ids == segment])
        class_terms.append(-sum(weight[q] * log_classes[q, label[q]] for q in range(queries)) / queries)
        mask_terms.append(mask_term * 0.75 / queries)
        cross_entropies = torch.cat(cross_entropies)
        id_terms.append(cross_entropies.sum() / len(cross_entropies))
    return torch.stack(class_terms), torch.stack(mask_terms), torch.stack(id_terms)


@pytest.mark.parametrize("size", [(6, 10), (11, 19)])
def test_matched_log_probability_is_a_log_softmax_of_resized_logits(size):
    prediction, targets = random_prediction(), random_targets()
    matching = match(prediction.class_logits, prediction.mask_logits, targets)
    logits = torch.randn(2, 8, 6, 10, requires_grad=True)
    before = logits.detach().clone()
    ours = losses.matched_log_probability(logits, matching, size)
    resized = F.interpolate(logits, size, mode="bilinear", align_corners=True).flatten(2)
    theirs = resized.log_softmax(1)[matching.image, matching.query]
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((value * weight).sum(), logits)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("queries", [8, 5])
@pytest.mark.parametrize("term", [0, 1, 2], ids=["class", "mask", "mask_id"])
def test_terms_equal_their_formulas(term, queries):
    prediction, targets = random_prediction(queries=queries), random_targets()
    matching = match(prediction.class_logits, prediction.mask_logits, targets)
    log_probability = losses.matched_log_probability(prediction.mask_logits[:, :, None], matching, (1, 60))
    ours = (
        losses.pq_class_loss(prediction.class_logits, targets, matching),
        losses.pq_mask_loss(log_probability, queries, targets, matching),
        losses.mask_id_loss(log_probability, targets, matching),
    )[term]
    theirs = plain_terms(prediction, targets, matching)[term]
    torch.testing.assert_close(ours, theirs)
    inputs = (prediction.class_logits, prediction.mask_logits)
    gradients = torch.autograd.grad(ours.sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(theirs.sum(), inputs, allow_unused=True)
    for gradient, other in zip(gradients, expected, strict=True):
        if other is None or gradient is None:
            # All weights are constants, so each term reaches one input only.
            assert gradient is None and other is None
        else:
            assert other.abs().max() > 1e-4
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


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


# --- the borders ---


HARDEST = {"semantic_hard_share": 0.2, "is_thing": [True, False] * 3 + [True], "small_instance_weight": 3.0}


def run_criterion(prediction, targets, size, **options):
    """Losses, and the gradients of class logits, mask logits, features and semantic logits for each of them."""
    semantic = torch.randn(len(targets.classes), 8, *size, requires_grad=True)
    maps = prediction._replace(
        mask_logits=prediction.mask_logits.unflatten(2, size), pixel_feature=prediction.pixel_feature.unflatten(2, size)
    )
    values = all_losses(Criterion(num_samples=30, **options), maps, [maps], semantic, targets)
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
    ids = [torch.full((6, 10), VOID)] * 2
    targets = make_targets(ids, [torch.zeros(0, dtype=torch.int64)] * 2, (6, 10), 1)
    values, gradients = run_criterion(prediction, targets, (6, 10), **options)
    for name, value in values.items():
        if name.startswith("loss_pq_class"):
            # Every query lies on void only, and shall say so.
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
    values, gradients = run_criterion(prediction, targets, (6, 10))
    first, _ = run_criterion(Prediction(*(p[:1] for p in prediction)), alone, (6, 10))
    for name in ("loss_pq_mask", "loss_mask_id"):
        assert values[name].item() == pytest.approx(first[name].item() / 2, rel=1e-5)
        assert not gradients[name]["mask_logits"][1].any()
        assert gradients[name]["mask_logits"][0].any()
    assert not gradients["loss_instance"]["pixel_feature"][1].any()
    assert gradients["loss_instance"]["pixel_feature"][0].any()
    _, gradients = run_criterion(prediction, targets, (6, 10), **HARDEST)
    learning = gradients["loss_semantic"]["semantic"].abs().sum(1).flatten(1) > 0
    assert learning.sum(1).tolist() == [12, 0]  # a fifth of 60 pixels


def test_more_masks_than_queries():
    prediction, targets = random_prediction(queries=3), random_targets(segments=6)
    matching = match(prediction.class_logits, prediction.mask_logits, targets)
    for image in range(2):
        pairs = pairs_of(matching, image)
        assert sorted(query for _, query in pairs) == [0, 1, 2]
        assert len({segment for segment, _ in pairs}) == 3
    values, gradients = run_criterion(prediction, targets, (6, 10))
    _, mask, mask_id = plain_terms(prediction, targets, matching)
    assert values["loss_pq_mask"].item() == pytest.approx(3.0 * mask.mean().item(), rel=1e-4)
    assert values["loss_mask_id"].item() == pytest.approx(0.3 * mask_id.mean().item(), rel=1e-4)
    # Pixels of masks that found no query have nothing to say to the mask logits.
    for image in range(2):
        matched = torch.tensor([segment for segment, _ in pairs_of(matching, image)])
        learning = gradients["loss_mask_id"]["mask_logits"][image].abs().sum(0) > 0
        assert torch.equal(learning, torch.isin(targets.segment_ids[image], matched))


@pytest.mark.parametrize("options", [{}, HARDEST], ids=["sampled", "hardest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_under_autocast(dtype, options):
    """Half precision can not even count the pixels of a large mask."""
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
    expected = all_losses(Criterion(num_samples=500, **options), prediction, [], semantic, targets)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        values = all_losses(Criterion(num_samples=500, **options), prediction, [], semantic, targets)
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6)
