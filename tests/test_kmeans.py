"""The k-means step against the product with the one-hot assignment."""

import pytest
import torch
import torch.nn.functional as F
from small import plain_norm, randomize_norms

from kmax_d2.modeling.kmeans import KMeansCrossAttention, kmeans_assign, kmeans_update
from kmax_d2.modeling.layers import norm_vectors


def plain_update(mask_logits, values):
    """A · v with A (B, N, H · W) the one-hot argmax over the clusters."""
    assignment = F.one_hot(mask_logits.argmax(1), mask_logits.shape[1]).flatten(1, 2).transpose(1, 2)
    return assignment.to(values.dtype) @ values.flatten(2).transpose(1, 2)


def test_assignment_is_the_best_cluster():
    mask_logits = torch.randn(2, 5, 3, 4)
    assignment = kmeans_assign(mask_logits)
    assert assignment.shape == (2, 3, 4)
    best = mask_logits.amax(1, keepdim=True)
    assert torch.equal(mask_logits.gather(1, assignment[:, None]), best)


def test_update_is_the_one_hot_product():
    mask_logits = torch.randn(3, 7, 6, 5)
    ours = torch.randn(3, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    update = kmeans_update(kmeans_assign(mask_logits), ours, 7)
    expected = plain_update(mask_logits, theirs)
    assert update.shape == (3, 7, 4)
    torch.testing.assert_close(update, expected)
    weight = torch.randn_like(expected)
    (update * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_passes_a_norm(batch, training):
    """The batch norm of some PyTorch releases misreads a gradient of unusual strides, silently."""
    norm = torch.nn.BatchNorm2d(4).train(training)
    mask_logits = torch.randn(batch, 7, 6, 5)
    ours = torch.randn(batch, 4, 6, 5, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    weight = torch.randn(batch, 7, 4)
    (kmeans_update(kmeans_assign(mask_logits), norm(ours), 7) * weight).sum().backward()
    mean, variance = torch.zeros(4), torch.ones(4)
    if training:
        mean, variance = theirs.mean((0, 2, 3)), theirs.var((0, 2, 3), unbiased=False)
    normalised = (theirs - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    (plain_update(mask_logits, normalised) * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_cluster_without_pixels_gets_zero():
    mask_logits = torch.randn(2, 5, 4, 4)
    mask_logits[0, 3] -= 100
    mask_logits[1, [0, 4]] -= 100
    update = kmeans_update(kmeans_assign(mask_logits), 1 + torch.rand(2, 6, 4, 4), 5)
    empty = ~update.any(dim=2)
    assert empty[0].nonzero().flatten().tolist() == [3]
    assert empty[1].nonzero().flatten().tolist() == [0, 4]


def attention(channels=8):
    return randomize_norms(KMeansCrossAttention(channels, key_channels=4, num_heads=2, norm="BN"))


def inputs(size=4):
    """Centers, pixels and mask logits."""
    return torch.randn(2, 5, 8), torch.randn(2, 8, size, size), torch.randn(2, 5, size, size)


def test_step_starts_at_zero():
    module = KMeansCrossAttention(8, key_channels=4, num_heads=2, norm="BN")
    assert not module(*inputs()).any()


def test_step_is_value_update_norm_and_projection():
    module = attention().eval()
    centers, pixels, mask_logits = inputs()
    values = plain_norm(module.value.norm, pixels.movedim(1, 3) @ module.value.conv.weight[:, :, 0, 0].T).movedim(3, 1)
    expected = plain_norm(module.norm, plain_update(mask_logits, values)) @ module.projection.linear.weight.T
    update = module(centers, pixels, mask_logits)
    torch.testing.assert_close(update, plain_norm(module.projection.norm, expected), rtol=1e-4, atol=1e-4)


def test_gradient_reaches_pixels_but_not_mask_logits():
    centers, pixels, mask_logits = (x.requires_grad_() for x in inputs())
    update = attention()(centers, pixels, mask_logits)
    (update * torch.randn_like(update)).sum().backward()
    assert mask_logits.grad is None
    assert (pixels.grad.abs().sum(1) > 0).all()


def test_sums_in_float32_under_autocast():
    module = attention().eval()
    centers, pixels, mask_logits = inputs(64)
    mask_logits = mask_logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = module.value(pixels)
        update = module(centers, pixels, mask_logits)
    assert values.dtype == torch.bfloat16
    sums = plain_update(mask_logits.float(), values.float())
    # Sums of hundreds of pixels in bfloat16 would be wrong in their third digit.
    torch.testing.assert_close(update, module.projection(norm_vectors(module.norm, sums)), rtol=1e-4, atol=1e-3)
