"""The cross-attentions of the ablation, against plain formulations and inside a small model."""

import pytest
import torch
import torch.nn.functional as F
from scenes import sample
from small import build, plain_norm, randomize_norms
from torch import nn

from kmax_d2.modeling import CROSS_ATTENTION_REGISTRY
from kmax_d2.modeling.cross_attention import GumbelCrossAttention, SharedSoftmaxCrossAttention, SoftmaxCrossAttention
from kmax_d2.modeling.kmeans import KMeansCrossAttention

NAMES = ["KMeansCrossAttention", "GumbelCrossAttention", "SoftmaxCrossAttention", "SharedSoftmaxCrossAttention"]


# --- softmax over pixels, and over pixels and centers ---


def plain_attention(layer, query, pixels, training, shared):
    """The update, head by head and image by image."""
    positions = pixels.flatten(2).transpose(1, 2)

    def projected(part, x):
        weight = part.linear.weight if hasattr(part, "linear") else part.conv.weight[:, :, 0, 0]
        return plain_norm(part.norm, x @ weight.T, training)

    q, k, v = projected(layer.query, query), projected(layer.key, positions), projected(layer.value, positions)
    if shared:
        k = torch.cat([k, projected(layer.center_key, query)], dim=1)
        v = torch.cat([v, projected(layer.center_value, query)], dim=1)
    heads = layer.num_heads
    width, value_width = q.shape[2] // heads, v.shape[2] // heads

    def of_head(x, head, channels):
        return x[:, :, head * channels : (head + 1) * channels]

    logits = torch.stack([of_head(q, h, width) @ of_head(k, h, width).transpose(1, 2) for h in range(heads)], dim=1)
    # One gain and bias for each head.
    logits = plain_norm(layer.norm_logits, logits.flatten(2).transpose(1, 2), training).transpose(1, 2).view_as(logits)
    weights = logits.exp() / logits.exp().sum(3, keepdim=True)
    retrieved = torch.cat([weights[:, h] @ of_head(v, h, value_width) for h in range(heads)], dim=2)
    return projected(layer.projection, plain_norm(layer.norm, retrieved, training))


@pytest.mark.parametrize("shared", [False, True], ids=["softmax", "shared"])
@pytest.mark.parametrize("training", [False, True], ids=["test", "training"])
@pytest.mark.parametrize("batch", [1, 2])
def test_softmax_equals_its_formula(shared, training, batch):
    kind = SharedSoftmaxCrossAttention if shared else SoftmaxCrossAttention
    layer = randomize_norms(kind(12, key_channels=8, num_heads=4, norm="BN")).double().train(training)
    inputs = [torch.randn(batch, 5, 12).double(), torch.randn(batch, 12, 3, 7).double()]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    expected = plain_attention(layer, *theirs, training, shared)  # first: the layer's statistics change in training
    update = layer(*ours, torch.randn(batch, 5, 3, 7))
    assert update.shape == (batch, 5, 12)
    torch.testing.assert_close(update, expected)
    weight = torch.randn_like(expected)
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad((update * weight).sum(), ours + parameters)
    others = torch.autograd.grad((expected * weight).sum(), theirs + parameters)
    assert all(other.abs().max() > 1e-3 for other in others[:2])
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other)


def test_shared_softmax_of_centers_alone_and_of_pixels_alone():
    """If the logits of one kind of key are far above the other's, only that kind is read."""
    layer = randomize_norms(SharedSoftmaxCrossAttention(8, key_channels=8, num_heads=2, norm="BN")).eval()
    with torch.no_grad():
        for part in (layer.query, layer.key, layer.center_key):
            part.norm.weight.zero_()
            part.norm.bias.fill_(1.0)
        query, pixels = torch.randn(1, 3, 8), torch.randn(1, 8, 2, 4)
        values = {"pixels": layer.value(pixels).mean((2, 3)), "centers": layer.center_value(query).mean(1)}
        for part, kind in ((layer.key, "pixels"), (layer.center_key, "centers")):
            part.norm.bias.fill_(100.0)
            retrieved = values[kind][:, None].expand(1, 3, 8)
            expected = layer.projection(layer.norm(retrieved.reshape(3, 8, 1, 1)).view(1, 3, 8))
            update = layer(query, pixels, torch.randn(1, 3, 2, 4))
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-4)
            part.norm.bias.fill_(1.0)


# --- Gumbel-softmax ---


def test_gumbel_is_kmeans_at_test():
    first, second = (
        kind(8, key_channels=8, num_heads=2, norm="BN") for kind in (GumbelCrossAttention, KMeansCrossAttention)
    )
    second.load_state_dict(randomize_norms(first).state_dict())
    inputs = (torch.randn(2, 5, 8), torch.randn(2, 8, 4, 6), torch.randn(2, 5, 4, 6))
    assert torch.equal(first.eval()(*inputs), second.eval()(*inputs))


def drawn(mask_logits):
    """(B, N, P) assignment that Gumbel draws: the sums of values that are one-hot in the pixels."""
    batch, _, height, width = mask_logits.shape
    layer = GumbelCrossAttention(8, key_channels=8, num_heads=2, norm="BN").train()
    values = torch.eye(height * width).view(1, -1, height, width).expand(batch, -1, -1, -1)
    return layer.cluster_sums(mask_logits, values)


def test_gumbel_gives_each_pixel_to_one_cluster():
    assignment = drawn(torch.randn(3, 6, 5, 4))
    torch.testing.assert_close(assignment.amax(1), torch.ones(3, 20))
    torch.testing.assert_close(assignment.sum(1), torch.ones(3, 20))
    assert len(assignment.argmax(1).unique()) > 2


def test_gumbel_draws_with_the_probabilities_of_the_softmax():
    draws = 4000
    mask_logits = torch.randn(1, 4, 1, 3) * 1.5
    frequency = drawn(mask_logits.expand(draws, -1, -1, -1)).mean(0)
    expected = mask_logits[0, :, 0].softmax(0)
    assert ((frequency - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()
    # Pixels are drawn independently.
    together = drawn(torch.zeros(draws, 2, 1, 2)).prod(2).sum(1).mean().item()
    assert together == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradient_of_gumbel_is_that_of_the_relaxed_sample(batch):
    layer = GumbelCrossAttention(8, key_channels=8, num_heads=2, norm="BN").train()
    weight = torch.randn(batch, 5, 8)
    inputs = [torch.randn(batch, 5, 4, 6), torch.randn(batch, 8, 4, 6)]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    norm = randomize_norms(nn.BatchNorm2d(8))
    torch.manual_seed(1)
    (layer.cluster_sums(ours[0], norm(ours[1])) * weight).sum().backward()
    torch.manual_seed(1)
    relaxed = F.gumbel_softmax(theirs[0].flatten(2), dim=1)
    hard = F.one_hot(relaxed.argmax(1), 5).transpose(1, 2).float()
    values = plain_norm(norm, theirs[1].flatten(2).transpose(1, 2), training=True)
    torch.einsum("bnp,bpc,bnc->", relaxed, values.detach(), weight).backward()
    torch.einsum("bnp,bpc,bnc->", hard, values, weight).backward()
    assert ours[0].grad.abs().max() > 0.1
    for first, second in zip(ours, theirs, strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-4)


# --- in the model ---


def test_every_cross_attention_is_tested():
    assert {name for name, _ in CROSS_ATTENTION_REGISTRY} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_model_trains_and_predicts(name):
    choice = {"MODEL__KMAX__TRANSFORMER_DECODER__CROSS_ATTENTION": name}
    model = build(MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH=0.0, **choice)
    steps = [layer.cross_attention for layer in model.transformer_decoder.layers]
    assert {type(step).__name__ for step in steps} == {name}
    inputs = [sample(65, 65, cell=20)] * 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):  # the first step moves the last gain from zero, so the rest learns in the second
        losses = model(inputs)
        assert all(torch.isfinite(value) for value in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for step in steps:
        for kernel in (parameter for parameter in step.parameters() if parameter.ndim > 1):
            assert torch.isfinite(kernel.grad).all()
            assert kernel.grad.any()
    model.eval()
    first, second = (model.predict(inputs[0]["image"][None]) for _ in range(2))
    for key, value in first.items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value, second[key], rtol=1e-4, atol=1e-4)  # nothing is drawn at test
    (result,) = model([inputs[0]])
    assert result["panoptic_seg"][0].shape == (65, 65)


@pytest.mark.parametrize("decoders", [[1, 1, 1], [3], [0, 2, 1]])
def test_decoders_by_map(decoders):
    """The paper has a model with three decoders in total."""
    model = build(MODEL__KMAX__TRANSFORMER_DECODER__DECODERS=decoders)
    with torch.no_grad():
        auxiliary = model.predict(torch.rand(1, 3, 65, 65), True)["auxiliary"]
    maps = [prediction["mask_logits"].shape[-1] for prediction in auxiliary]
    assert maps == [side for side, count in zip((3, 5, 9), decoders, strict=False) for _ in range(count)]
    losses = model.train()([sample(65, 65)])
    assert len(losses) == 4 * 4 + 1
    assert all(torch.isfinite(value) for value in losses.values())
