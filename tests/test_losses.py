"""The sampling, the matching and the terms of the loss, against plain implementations of the formulas."""

import math
from itertools import permutations

import pytest
import reference
import torch
import torch.nn.functional as F
from random_batches import PIXELS, SIZE, areas_of, pairs_of, plain_dice, plain_terms, random_prediction, random_targets
from saved_tensors import kept_bytes

from kmax_d2.modeling import losses
from kmax_d2.modeling.criterion import make_targets
from kmax_d2.modeling.matcher import VOID, Targets, match

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
    pixels = losses.sample_pixels(random_targets(), 1000, 1.5)
    assert torch.equal(pixels.sort(dim=1).values, torch.arange(PIXELS).expand(2, -1))


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


@pytest.mark.parametrize("num_samples", [25, PIXELS])
@pytest.mark.parametrize("size", [SIZE, (3, 4)])
def test_instance_discrimination_is_cross_entropy_of_explicit_targets(num_samples, size):
    targets = random_targets()
    pixels = losses.sample_pixels(targets, num_samples, 1.5)
    if num_samples == PIXELS:
        assert (targets.segment_ids.gather(1, pixels) == VOID).any()
    # Not of unit length: the loss must not normalize again.
    ours = (torch.randn(2, 6, *size) * 0.5).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    features = losses.sample_features(ours, pixels, SIZE)
    value = losses.instance_discrimination_loss(features, pixels, targets)
    resized = F.interpolate(theirs, SIZE, mode="bilinear", align_corners=True).flatten(2)
    expected = plain_instance_loss(resized, pixels, targets)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.tensor([1.0, -2.0])
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    assert theirs.grad.abs().max() > 1e-2
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-6)


def test_samples_of_several_blocks_are_compared_with_each_other():
    """Blocks of the similarity matrix, of which the last is smaller than the others."""
    targets = random_targets(pixels=1100)
    pixels = losses.sample_pixels(targets, 1100, 1.5)
    feature = F.normalize(torch.randn(2, 6, 1100), dim=1)
    ours, theirs = feature.clone().requires_grad_(), feature.double().requires_grad_()
    features = ours.gather(2, pixels[:, None].expand(-1, 6, -1)).transpose(1, 2)
    value = losses.instance_discrimination_loss(features, pixels, targets)
    expected = plain_instance_loss(theirs, pixels, targets)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("small", "size"), [((5, 7), (5, 7)), ((5, 7), (17, 25)), ((1, 3), (4, 9)), ((4, 1), (13, 1)), ((1, 1), (1, 1))]
)
def test_sampled_features_are_those_of_the_resized_map(small, size):
    feature = torch.randn(2, 6, *small)
    pixels = torch.stack([torch.randperm(size[0] * size[1]) for _ in range(2)])
    resized = F.interpolate(feature, size, mode="bilinear", align_corners=True).flatten(2)
    expected = torch.stack([image[:, chosen].T for image, chosen in zip(resized, pixels, strict=True)])
    torch.testing.assert_close(losses.sample_features(feature, pixels, size), expected, rtol=1e-4, atol=1e-5)


def test_semantic_loss_is_cross_entropy_of_sampled_pixels():
    targets = random_targets()
    logits = torch.randn(2, 8, PIXELS)
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
    """Makes logits (1, K, P) with the given cross-entropy at each pixel, whose classes are (P,)."""
    logits = torch.zeros(1, num_classes, len(classes))
    for pixel, (loss, category) in enumerate(zip(losses_, classes, strict=True)):
        logits[0, category, pixel] = -math.log((math.exp(loss) - 1) / (num_classes - 1))
    return logits.requires_grad_()


def hardest(losses_, ids, weights, share):
    """Returns the loss and its gradient (K, P) where mask s has class s % 3."""
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
    # Mask 0 has 3 · 2 and 3 · 3. Mask 1's 4 and 5 are smaller, and void's 9 does not count.
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
    """Four of ten pixels are chosen, of which only three are not void."""
    value, _ = hardest([2.0, 4.0, 6.0] + [9.0] * 7, [0, 1, 0] + [-1] * 7, [1.0, 1.0], 0.4)
    assert value == pytest.approx(4.0, rel=1e-5)


def test_only_small_things_weigh_more():
    """Areas are counted for each instance and in the whole crop, not in the pixels that are read."""
    ids = torch.full((65, 65), VOID)
    ids[:10, :10] = 0  # a thing of 100 pixels
    ids[:10, 10:20] = 1  # another of its class
    ids[:10, 20:30] = 2  # stuff of 100 pixels
    ids[20:30, :11] = 3  # a thing of 110 pixels
    ids[63:, 63:] = 4  # a thing of which a single pixel is read
    targets = make_targets([ids], [torch.tensor([1, 1, 0, 2, 1])], (17, 17), 4)
    assert targets.areas.tolist() == [[100, 100, 100, 110, 4]]
    is_thing = torch.tensor([False, True, True])
    for area, expected in ((101, [3, 3, 1, 1, 3]), (100, [1, 1, 1, 1, 3]), (4096, [3, 3, 1, 3, 3])):
        assert losses.small_instance_weights(targets, is_thing, area, 3.0).tolist() == [expected]


def test_official_semantic_weights():
    """At every pixel of the whole crop except void, where the official weights are not defined."""
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


# --- matching, PQ-style terms and mask-id ---


def test_matching_is_the_best_of_all():
    prediction, targets = random_prediction(queries=5), random_targets(segments=3)
    matching = match(prediction.class_logits, prediction.mask_logits.flatten(2), targets)
    for image in range(2):
        probability = prediction.mask_logits[image].flatten(1).softmax(0)
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


@pytest.mark.parametrize("size", [SIZE, (11, 19)])
def test_matched_log_probability_is_a_log_softmax_of_resized_logits(size):
    prediction, targets = random_prediction(), random_targets()
    matching = match(prediction.class_logits, prediction.mask_logits.flatten(2), targets)
    logits = torch.randn(2, 8, *SIZE, requires_grad=True)
    before = logits.detach().clone()
    ours = losses.matched_log_probability(logits, matching, size)
    resized = F.interpolate(logits, size, mode="bilinear", align_corners=True).flatten(2)
    theirs = resized.log_softmax(1)[matching.image, matching.query]
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((value * weight).sum(), logits)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


def test_little_is_kept_for_the_backward_pass():
    """The similarity of a pair of samples once, with two blocks for three quarters, and no resized logits."""
    targets = random_targets(pixels=1000)
    pixels = losses.sample_pixels(targets, 1000, 1.5)
    features = torch.randn(2, 1000, 6, requires_grad=True)
    kept = kept_bytes(lambda: losses.instance_discrimination_loss(features, pixels, targets))
    assert kept < 0.8 * features.element_size() * 2 * 1000 * 1000

    prediction, targets = random_prediction(), random_targets()
    matching = match(prediction.class_logits, prediction.mask_logits.flatten(2), targets)
    kept = kept_bytes(lambda: losses.matched_log_probability(prediction.mask_logits, matching, (61, 101)))
    assert kept < 0.1 * prediction.mask_logits.element_size() * 2 * 8 * 61 * 101


@pytest.mark.parametrize("queries", [8, 5])
@pytest.mark.parametrize("term", [0, 1, 2], ids=["class", "mask", "mask_id"])
def test_terms_equal_their_formulas(term, queries):
    prediction, targets = random_prediction(queries=queries), random_targets()
    matching = match(prediction.class_logits, prediction.mask_logits.flatten(2), targets)
    log_probability = losses.matched_log_probability(prediction.mask_logits, matching, SIZE)
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
            # All weights are constants: each term has a gradient to one input only.
            assert gradient is None and other is None
        else:
            assert other.abs().max() > 1e-4
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
