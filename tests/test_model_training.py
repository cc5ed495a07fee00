"""Training steps of the small model: losses of every size and batch, gradients, drop query."""

import itertools

import pytest
import torch
from scenes import DETERMINISTIC, NUM_CLASSES, SIZES, THINGS, build_model, sample, without_dropout
from small import CITYSCAPES
from torch import nn

from kmax_d2.engine import load_config
from kmax_d2.modeling.kmax_decoder import KMaXDecoderLayer


@pytest.fixture(params=[{}, CITYSCAPES], ids=["coco", "cityscapes"])
def model(request):
    return build_model(**request.param)


def seen_by_criterion(model):
    """Returns a list to which each training step appends its final and auxiliary predictions, as one list."""
    seen = []
    model.criterion.register_forward_pre_hook(lambda _, inputs: seen.append([inputs[0], *inputs[1]]))
    return seen


def smallest_gap(mask_logits):
    """Distance of the best query's logit from the next one's, at the pixel (B, N, H, W) where it is smallest."""
    best, second = mask_logits.detach().topk(2, dim=1).values.unbind(1)
    return (best - second).min().item()


# --- losses ---


@pytest.mark.parametrize("sizes", [[size] for size in SIZES] + [[(65, 65), (50, 71)], [(17, 17), (33, 64)]], ids=str)
def test_training_on_any_size(model, sizes):
    losses = model([sample(*size, seed=seed) for seed, size in enumerate(sizes)])
    assert len(losses) == 4 * 7 + 1
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_hardest_pixels_of_the_whole_model():
    """The semantic loss computed from the inputs: every pixel at stride 32, those of small things three times."""
    model = build_model(MODEL__KMAX__LOSS__SMALL_INSTANCE_AREA=100, **CITYSCAPES)
    logits = []
    model.semantic_head.register_forward_hook(lambda _, inputs, output: logits.append(output))
    inputs = [sample(97, 129, 0), sample(97, 97, 1)]
    value = model(inputs)["loss_semantic"]
    assert logits[0].shape == (2, NUM_CLASSES, 4, 5)
    expected = []
    for x, image in zip(inputs, logits[0], strict=True):
        ids = x["segment_ids"]
        terms = [0.0] * 20
        for index, (row, column) in enumerate(itertools.product(range(4), range(5))):
            if 32 * column >= ids.shape[1] or ids[32 * row, 32 * column] < 0:
                continue
            segment = ids[32 * row, 32 * column]
            category = x["segment_classes"][segment].item()
            small = category in THINGS and (ids == segment).sum() < 100
            terms[index] = (3 if small else 1) * -image[:, row, column].log_softmax(0)[category].item()
        expected.append(sum(sorted(terms)[-4:]) / 4)
    assert value.item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_last_map_at_stride_2():
    model = build_model(**CITYSCAPES)
    seen = seen_by_criterion(model)
    model([sample(65, 97)])
    assert seen[0][0].mask_logits.shape[-2:] == (33, 49)


def test_semantic_head_is_left_out_without_its_weight():
    model = build_model(MODEL__KMAX__LOSS__SEMANTIC_WEIGHT=0.0)
    assert model.semantic_head is None
    assert "loss_semantic" not in model([sample(65, 65)])


def test_training_under_autocast_is_close_to_float32():
    model = without_dropout(build_model(**DETERMINISTIC))
    inputs = [sample(65, 65, seed) for seed in range(2)]
    expected = model(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs)
    assert all(value.dtype == torch.float32 for value in losses.values())
    # Single terms may differ more: rounding moves some pixels to other clusters.
    assert sum(losses.values()).item() == pytest.approx(sum(expected.values()).item(), rel=0.03)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# --- running statistics ---


def test_running_statistics_take_in_a_hundredth_of_each_batch():
    model = build_model()
    layer, outputs = model.pixel_decoder.stages[0][0].conv1, []
    layer.conv.register_forward_hook(lambda _, inputs, output: outputs.append(output.detach()))
    before = [layer.norm.running_mean.clone(), layer.norm.running_var.clone()]
    model([sample(65, 65, seed) for seed in range(2)])
    (x,) = outputs
    for statistic, old, new in (
        (layer.norm.running_mean, before[0], x.mean((0, 2, 3))),
        (layer.norm.running_var, before[1], x.var((0, 2, 3))),
    ):
        torch.testing.assert_close(statistic, 0.99 * old + 0.01 * new)
        assert not torch.equal(statistic, old)


def test_one_image_in_training_leaves_the_pooled_norm_in_order():
    """A single pooled pixel has no variance: it must neither crash nor pull the running variance to zero."""
    model = build_model()
    norm = model.semantic_head.aspp.pool.norm
    before = norm.running_mean.clone(), norm.running_var.clone()
    for _ in range(5):
        model([sample(65, 65)])
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])
    model([sample(65, 65, seed) for seed in range(2)])
    assert not torch.equal(norm.running_var, before[1])


# --- gradients ---


# Adds a constant to all queries or positions under a softmax, or to all values under a norm: nothing can be learned.
NO_EFFECT = (
    "mask_norm.bias",
    "norm_logits.bias",
    "predictor.pixel_projection.bias",
    "cross_attention.norm.bias",
    "height_attention.norm_values.bias",
)


@pytest.mark.parametrize("options", [{}, CITYSCAPES], ids=["coco", "cityscapes"])
def test_gradients_reach_every_parameter(options):
    model = without_dropout(build_model(MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH=0.0, **options))
    sum(model([sample(129, 97, seed) for seed in range(2)]).values()).backward()
    largest = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        largest[name] = parameter.grad.abs().max().item()
    no_effect = [name for name in largest if name.endswith(NO_EFFECT)]
    assert {ending for ending in NO_EFFECT for name in no_effect if name.endswith(ending)} == set(NO_EFFECT)
    assert {name: value for name, value in largest.items() if name not in no_effect and value < 3e-5} == {}
    # Rounding errors, beside the gradient of the layer's weight.
    for name in no_effect:
        assert largest[name] < 2e-4 * largest[name.removesuffix("bias") + "weight"], name


def test_gradient_of_a_decoder_is_its_slope():
    """For each output of a decoder, along one direction in the centers and one in the pixels."""
    torch.manual_seed(5)
    options = {"ffn_channels": 32, "key_channels": 16, "num_heads": 8, "feature_channels": 8, "drop_path": 0.0}
    layer = KMaXDecoderLayer(8, 16, 5, cross_attention="KMeansCrossAttention", norm="BN", **options).eval()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    layer.predictor.class_head.weight.data.mul_(30)
    centers, pixels = torch.randn(1, 4, 16), torch.randn(1, 8, 3, 3)
    updated, prediction = layer(centers, pixels, True)
    weights = [torch.randn_like(output) for output in (updated, *prediction)]
    # No step of the numeric slope moves a pixel to another cluster.
    assert smallest_gap(prediction.mask_logits) > 0.1

    def weighted(centers, pixels):
        updated, prediction = layer(centers, pixels, True)
        outputs = (updated, *prediction)
        return torch.stack([(weight * output).sum() for weight, output in zip(weights, outputs, strict=True)])

    def slopes(function, x):
        direction, step = torch.randn_like(x), 1e-3
        jacobian = torch.autograd.functional.jacobian(function, x).flatten(1)
        with torch.no_grad():
            numeric = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
        return jacobian @ direction.flatten(), numeric

    for function, x in ((lambda c: weighted(c, pixels), centers), (lambda p: weighted(centers, p), pixels)):
        exact, numeric = slopes(function, x)
        assert (exact.abs() > 0.1).sum() == 3  # classes do not read pixels, and features do not read centers
        torch.testing.assert_close(exact, numeric, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["KMeansCrossAttention", "SoftmaxCrossAttention", "SharedSoftmaxCrossAttention"])
def test_one_image_learns_what_two_equal_ones_do(name):
    """Their batch statistics are the same, and so must be the gradients of a sum over all outputs of the decoders."""
    decoder = build_model(MODEL__KMAX__TRANSFORMER_DECODER__CROSS_ATTENTION=name, **DETERMINISTIC).transformer_decoder
    channels = [layer.pixel_projection.conv.in_channels for layer in decoder.layers[::2]] + [
        decoder.predictor.pixel_head.depthwise.conv.in_channels
    ]
    torch.manual_seed(5)
    maps = [torch.randn(1, width, side, side) for width, side in zip(channels, (5, 9, 17, 33), strict=True)]
    weights, gradients = None, []
    for count in (1, 2):
        inputs = [x.expand(count, -1, -1, -1).clone().requires_grad_() for x in maps]
        final, auxiliary = decoder(inputs)
        outputs = [output for prediction in (final, *auxiliary) for output in prediction]
        weights = weights or [torch.randn_like(output) for output in outputs]
        total = sum((weight * output).sum() / count for weight, output in zip(weights, outputs, strict=True))
        of_parameters = torch.autograd.grad(total, list(decoder.parameters()), retain_graph=True)
        of_maps = [gradient.sum(0) for gradient in torch.autograd.grad(total, inputs)]
        gradients.append([*of_parameters, *of_maps])
        # Rounding does not move a pixel to another cluster.
        assert min(smallest_gap(prediction.mask_logits) for prediction in auxiliary) > 1e-4
    largest = max(gradient.norm() for gradient in gradients[1])
    for alone, together in zip(*gradients, strict=True):
        assert (alone - together).norm() < 0.05 * together.norm() + 1e-4 * largest


def test_training_lowers_the_loss():
    model = without_dropout(build_model(**DETERMINISTIC))
    inputs = [sample(65, 65, seed) for seed in range(2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    totals = []
    for _ in range(15):
        total = sum(model(inputs).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.95 * totals[0]


# --- drop query ---


def test_drop_query_trains_a_random_part_of_the_queries():
    model = without_dropout(build_model(MODEL__KMAX__TRANSFORMER_DECODER__TRAINING_QUERIES=5, **DETERMINISTIC))
    small = without_dropout(build_model(MODEL__KMAX__TRANSFORMER_DECODER__NUM_QUERIES=5, **DETERMINISTIC))
    centers, drawn = model.transformer_decoder.centers, []
    model.transformer_decoder.layers[0].register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[0].detach()))
    seen, seen_by_small = seen_by_criterion(model), seen_by_criterion(small)
    inputs = [sample(65, 65, seed) for seed in range(2)]  # with more masks than five
    draws = set()
    for iteration in range(3):
        model.zero_grad()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        losses = model(inputs)
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) and value > 0 for value in losses.values())
        assert drawn[iteration].shape == (2, 5, centers.shape[1])
        chosen = drawn[iteration][0]
        order = [(centers == center).all(1).nonzero().item() for center in chosen]
        learning = (centers.grad.abs().sum(1) > 0).nonzero()[:, 0].tolist()
        assert learning == sorted(order)
        draws.add(tuple(learning))
        # The same as with a model that has no other queries.
        small.load_state_dict(state | {"transformer_decoder.centers": chosen})
        small(inputs)
        assert len(seen[iteration]) == 7
        for ours, theirs in zip(seen[iteration], seen_by_small[iteration], strict=True):
            assert ours.class_logits.shape[1] == ours.mask_logits.shape[1] == 5
            torch.testing.assert_close(ours.class_logits, theirs.class_logits, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(ours.mask_logits, theirs.mask_logits, rtol=1e-3, atol=1e-4)
    assert len(draws) > 1


def test_drop_query_of_the_paper():
    options = load_config("coco/convnext_l_256q").MODEL.KMAX.TRANSFORMER_DECODER
    assert (options.NUM_QUERIES, options.TRAINING_QUERIES) == (256, 128)
