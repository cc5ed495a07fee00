"""timm's models as backbones: maps, input scaling, padding, norms, pre-trained weights and bad names."""

import pytest
import small
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from scenes import sample
from torch import nn
from torch.nn import functional as F

from kmax_d2.errors import UserError
from kmax_d2.modeling.backbones import KMaXTimm

FIVE = ["stage1", "stage2", "stage3", "stage4", "stage5"]


def scaled(image, pretrained_cfg):
    """What a model of timm sees of an image from 0 to 255."""
    mean, std = (torch.tensor(pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (image / 255 - mean) / std


@pytest.mark.parametrize(
    ("name", "stages", "multiple"),
    [
        ("resnet18", FIVE, 1),
        ("regnetx_002", FIVE, 1),
        ("efficientnet_lite0", FIVE, 1),
        ("convnext_atto", FIVE[1:], 32),
        ("swin_tiny_patch4_window7_224", FIVE[1:], 32),
        ("mobilevitv2_050", FIVE, 64),
        ("maxvit_rmlp_pico_rw_256", FIVE, 256),
    ],
)
def test_maps(name, stages, multiple):
    backbone = KMaXTimm(name, norm="BN").eval()
    image = torch.randint(256, (2, 3, 65, 97)).float()
    maps = backbone((image - 127.5) / 127.5)
    shapes = backbone.output_shape()
    assert backbone.multiple == multiple
    assert list(maps) == list(shapes) == stages
    assert [shape.stride for shape in shapes.values()] == [2, 4, 8, 16, 32][5 - len(stages) :]
    # The same as timm's own, given what it expects.
    padded = F.pad(image, (0, -97 % multiple, 0, -65 % multiple), value=127.5)
    with torch.no_grad():
        expected = backbone.net(scaled(padded, backbone.net.pretrained_cfg))
    if name.startswith("swin"):
        expected = [value.permute(0, 3, 1, 2) for value in expected]
    for (stage, value), theirs in zip(maps.items(), expected, strict=True):
        channels, stride = shapes[stage].channels, shapes[stage].stride
        assert value.shape == (2, channels, 64 // stride + 1, 96 // stride + 1)
        theirs = theirs[..., : value.shape[-2], : value.shape[-1]]
        torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    maps["stage5"].sum().backward()
    first = next(backbone.parameters())
    assert first.grad is not None and first.grad.abs().sum() > 0


def test_it_starts_in_training_mode_with_fresh_statistics():
    backbone = KMaXTimm("resnet18", norm="BN")
    assert all(module.training for module in backbone.modules())
    assert not backbone.net.bn1.running_mean.any()


def test_frozen_norms_keep_their_statistics_and_activations():
    plain, frozen = (KMaXTimm("mobilenetv3_small_050", norm=norm) for norm in ("BN", "FrozenBN"))
    frozen.load_state_dict(plain.state_dict(), strict=False)  # which counts no batches
    image = torch.randn(2, 3, 65, 65)
    before, maps, expected = frozen.net.bn1.running_mean.clone(), frozen(image), plain.eval()(image)
    assert frozen.net.bn1.running_mean.equal(before)
    torch.testing.assert_close(list(maps.values()), list(expected.values()), rtol=1e-4, atol=1e-5)


def test_synchronised_norms_keep_their_activations():
    plain = KMaXTimm("mobilenetv3_small_050", norm="BN").eval()
    synchronised = KMaXTimm("mobilenetv3_small_050", norm="SyncBN").eval()
    synchronised.load_state_dict(plain.state_dict())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronised.modules())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    image = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        for ours, theirs in zip(synchronised(image).values(), plain(image).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet_18", "no model resnet_18 - did you mean resnet"),
        ("resnet18.no_such_tag", "Invalid pretrained tag"),
        ("hiera_tiny_224", "does not take images of 32k"),
        ("mvitv2_tiny", "does not take images of 32k"),  # it takes small ones
    ],
)
def test_unsuitable_models_are_refused(name, message):
    with pytest.raises(UserError, match=message) as error:
        KMaXTimm(name, norm="BN")
    assert "\n" not in str(error.value)


def test_a_map_that_only_some_models_have():
    with pytest.raises(UserError, match="no maps for stage1 of MODEL"):
        KMaXTimm("test_convnext", required=FIVE[::-1], norm="BN")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """timm's download cache, empty, without a network."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def build_with(name, **changes):
    changes |= {"MODEL__BACKBONE__NAME": "KMaXTimm", "MODEL__KMAX__TIMM__NAME": name}
    return small.build("coco/base", **changes)


def test_pretrained_weights_are_taken_from_the_cache(hub_cache):
    weights = {name: torch.rand_like(v) for name, v in timm.create_model("test_resnet").state_dict().items() if v.ndim}
    repository = hub_cache / f"models--{timm.get_pretrained_cfg('test_resnet').hf_hub_id.replace('/', '--')}"
    folder = repository / "snapshots" / "0"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    save_file(weights, folder / "model.safetensors")
    own = {
        name: v for name, v in KMaXTimm("test_resnet", pretrained=True, norm="BN").net.state_dict().items() if v.ndim
    }
    assert set(weights) - set(own) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, weights[name]) for name, value in own.items())


def test_pretrained_weights_that_cannot_be_downloaded(hub_cache):
    with pytest.raises(UserError, match="weights of test_resnet cannot be downloaded") as error:
        build_with("test_resnet", MODEL__KMAX__TIMM__PRETRAINED=True)
    assert "\n" not in str(error.value)
    # A checkpoint replaces them.
    build_with("test_resnet", MODEL__KMAX__TIMM__PRETRAINED=True, MODEL__WEIGHTS="some.pth")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_training_and_predicting(name):
    model = build_with(name)
    inputs = [sample(65, 65, seed) for seed in range(2)]
    first = next(model.backbone.parameters())
    before = first.detach().clone()
    sum(model(inputs).values()).backward()
    torch.optim.SGD(model.parameters(), 1e-2).step()
    assert not torch.equal(first, before)
    # Distributed training needs a gradient for every parameter.
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    result = model.predict(torch.randint(256, (1, 3, 65, 97)))
    assert result["mask_logits"].shape == (1, 12, 17, 25)
    assert all(value.isfinite().all() for value in result.values())
