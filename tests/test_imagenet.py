"""ImageNet backbones: the converted one must be the original's function of the image."""

import re

import huggingface_hub
import pytest
import torch
from detectron2.modeling.backbone import resnet
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.convnext import ConvNeXt
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck

from kmax_d2.checkpoint.imagenet import imagenet_to_state_dict, is_imagenet, load_timm
from kmax_d2.checkpoint.rules import rename
from kmax_d2.errors import UserError
from kmax_d2.modeling.backbones import KMaXConvNeXt, KMaXResNet

BLOCKS = (2, 1, 1, 1)
# With this scaling, which is ours, the zeros that pad the first convolution's input are one color on both sides.
OURS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
PIXELS = torch.full((2, 3, 1, 1), 127.5)  # the same as MODEL.PIXEL_MEAN and PIXEL_STD
INNER = (..., slice(5, -5), slice(5, -5))  # of stage 2: where the padding of the image does not reach
TIMM_NAME = "convnext_tiny.fb_in22k_ft_in1k_384"


def image(side=65):
    """Smooth enough to give the first layers something to tell apart; RGB, 0 to 255."""
    rough = torch.rand(2, 3, 17, 17) * torch.tensor([255.0, 200.0, 150.0]).view(3, 1, 1)
    return nn.functional.interpolate(rough, (side, side), mode="bilinear")


def scaled(x, mean, std):
    return (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
def with_statistics(model):
    """Sets gains, biases and running statistics of all batch norms to what training might leave."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    model.train()(scaled(image(), **OURS))
    norms[0].running_var.mul_(0.01)  # small variances are where epsilons differ
    return model.eval()


def torchvision_resnet():
    return with_statistics(ResNet(Bottleneck, list(BLOCKS)))


def torchvision_maps(net, x):
    maps = [net.maxpool(net.relu(net.bn1(net.conv1(x))))]
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        maps.append(stage(maps[-1]))
    return maps


def detectron2_resnet(norm):
    stages = resnet.ResNet.make_default_stages(50, norm=norm, stride_in_1x1=False)
    return resnet.ResNet(resnet.BasicStem(norm=norm), stages, out_features=["stem", "res2", "res3", "res4", "res5"])


def loaded(model, weights):
    """Our backbone with converted weights, which must be all of its weights and nothing else."""
    own = {f"backbone.{name}" for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert weights.keys() == own
    model.load_state_dict({name.removeprefix("backbone."): value for name, value in weights.items()}, strict=False)
    return model.eval()


def assert_same(ours, theirs):
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


@torch.no_grad()
def test_torchvision_resnet_is_the_same_function():
    net = torchvision_resnet()
    assert is_imagenet(net.state_dict())
    weights = imagenet_to_state_dict(net.state_dict(), *PIXELS, **OURS)
    backbone = loaded(KMaXResNet(blocks=BLOCKS, standard=True, norm="BN"), weights)
    x = scaled(image(), **OURS)
    for ours, theirs in zip(backbone(x).values(), torchvision_maps(net, x), strict=True):
        assert_same(ours, theirs)


@torch.no_grad()
def test_imagenet_scaling_is_folded_into_the_stem_of_a_resnet():
    net = torchvision_resnet()
    backbone = loaded(
        KMaXResNet(blocks=BLOCKS, standard=True, norm="BN"), imagenet_to_state_dict(net.state_dict(), *PIXELS)
    )
    x = image(129)
    theirs = torchvision_maps(net, scaled(x, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))[1]
    assert_same(backbone(scaled(x, **OURS))["stage2"][INNER], theirs[INNER])


@torch.no_grad()
def test_any_scaling_of_our_input_is_folded_in():
    net = torchvision_resnet()
    pixels = torch.tensor([[120.0, 110.0, 100.0], [60.0, 50.0, 70.0]]).view(2, 3, 1, 1)
    weights = imagenet_to_state_dict(net.state_dict(), *pixels)
    backbone = loaded(KMaXResNet(blocks=BLOCKS, standard=True, norm="BN"), weights)
    x = image(129)
    theirs = torchvision_maps(net, scaled(x, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))[1]
    assert_same(backbone((x - pixels[0]) / pixels[1])["stage2"][INNER], theirs[INNER])


@torch.no_grad()
def test_detectron2_resnet_is_the_same_function():
    net = with_statistics(detectron2_resnet("BN"))
    weights = net.state_dict() | {"stem.fc.weight": torch.zeros(1000, 2048), "stem.fc.bias": torch.zeros(1000)}
    assert is_imagenet(weights)
    backbone = loaded(KMaXResNet(standard=True, norm="BN"), imagenet_to_state_dict(weights, *PIXELS, **OURS))
    x = scaled(image(), **OURS)
    for ours, theirs in zip(backbone(x).values(), net(x).values(), strict=True):
        assert_same(ours, theirs)


def caffe2_name(name):
    """ "res2.0.conv1.norm.bias" to "res2_0_branch2a_bn_b", as in MSRA's file."""
    name = re.sub(r"^stem\.conv1\.norm", "res_conv1_bn", name).replace("stem.", "").replace("norm", "bn")
    name = re.sub(r"(res\d\.\d\.)conv([123])", lambda m: f"{m[1]}branch2{'abc'[int(m[2]) - 1]}", name)
    name = name.replace("shortcut", "branch1").replace("bn.weight", "bn.s")
    return re.sub(r"\.(w|b)(eight|ias)$", r".\1", name).replace(".", "_")


@torch.no_grad()
def test_caffe2_resnet_takes_bgr_and_has_affine_layers_for_norms():
    net = detectron2_resnet("FrozenBN").eval()
    for name, tensor in net.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("norm.bias"):
            tensor.uniform_(-0.5, 0.5)
    weights = {caffe2_name(name): value for name, value in net.state_dict().items() if "running" not in name}
    weights |= {"conv1_b": torch.zeros(64), "fc1000_w": torch.zeros(1000, 2048), "fc1000_b": torch.zeros(1000)}
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_bn_b", "res5_2_branch2c_w"} < weights.keys()
    assert is_imagenet(weights)
    backbone = loaded(KMaXResNet(standard=True, norm="BN"), imagenet_to_state_dict(weights, *PIXELS))
    x = image(129)
    theirs = net(x.flip(1) - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1))["res2"]
    assert_same(backbone(scaled(x, **OURS))["stage2"][INNER], theirs[INNER])


def test_convnext_by_the_names_of_its_authors():
    """Their repository's names are those that timm converts."""
    weights = ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16)).state_dict()
    rules = [
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"\.blocks\.", "."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
    ]
    theirs = {rename(name, rules): weight for name, weight in weights.items()}
    assert not theirs.keys() & {name for name in weights if name.startswith(("stem", "stages.0.blocks"))}
    assert is_imagenet(theirs)
    expected, converted = (imagenet_to_state_dict(state, *PIXELS) for state in (weights, theirs))
    assert expected.keys() == converted.keys()
    assert all(torch.equal(weight, converted[name]) for name, weight in expected.items())


@torch.no_grad()
def test_imagenet_scaling_is_folded_into_the_stem_of_a_convnext():
    shape = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    net = ConvNeXt(**shape).eval()
    for parameter in net.parameters():
        parameter.normal_()
    assert is_imagenet(net.state_dict())
    backbone = KMaXConvNeXt(depths=shape["depths"], widths=shape["dims"], drop_path=0.0)
    backbone = loaded(backbone, imagenet_to_state_dict(net.state_dict(), *PIXELS))
    x = image()
    # Ours pads by one pixel in front, so that its second patch begins at pixel 3.
    theirs = net.stem(scaled(x[..., 3:, 3:], IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    assert theirs.shape == (2, 8, 15, 15)
    assert_same(backbone(scaled(x, **OURS))["stage1"][..., 1:16, 1:16], theirs)


def test_other_weights_are_not_imagenets():
    own = KMaXResNet(blocks=BLOCKS, standard=True, norm="BN").state_dict()
    assert not is_imagenet(own)
    assert not is_imagenet({f"backbone.{name}" for name in own})
    assert not is_imagenet({"backbone.stem.0.weight", "backbone.stages.0.blocks.0.conv_dw.weight"})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache and no network; gives the folder of TIMM_NAME's cached files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub" / f"models--timm--{TIMM_NAME}"


def test_timm_weights_that_cannot_be_downloaded(hub):
    with pytest.raises(UserError, match=r"no pretrained weights convnext_tinny - did you mean convnext_tiny"):
        load_timm("convnext_tinny", *PIXELS)
    with pytest.raises(UserError) as error:
        load_timm(TIMM_NAME, *PIXELS)
    for part in (
        f"timm://{TIMM_NAME}: cannot download",
        f"copy {hub.name} from another machine's Hugging Face cache to {hub.parent}",
        'MODEL.WEIGHTS ""',
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_timm_weights_in_the_cache(hub):
    snapshot = hub / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("1234")
    file = snapshot / "model.safetensors"
    net = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    save_file(net.state_dict(), file)
    expected = imagenet_to_state_dict(net.state_dict(), *PIXELS)
    weights = load_timm(TIMM_NAME, *PIXELS)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{file} is damaged"):
        load_timm(TIMM_NAME, *PIXELS)
    save_file({"patch_embed.proj.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="neither a ResNet nor a ConvNeXt"):
        load_timm(TIMM_NAME, *PIXELS)
