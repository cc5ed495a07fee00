"""The standard form of ResNet-50 against torchvision's."""

import pytest
import torch
from small import randomize_norms
from torchvision.models import resnet50

from kmax_d2.modeling.backbones import KMaXResNet


def blocks_of(model):
    """The bottlenecks of either model as lists of (convolution, norm), the shortcut's last; the stem's come first."""
    if isinstance(model, KMaXResNet):
        yield [(model.stem.conv, model.stem.norm)]
        for stage in (model.stage2, model.stage3, model.stage4, model.stage5):
            for block in stage:
                units = [block.conv1, block.conv2, block.conv3, block.shortcut]
                yield [(unit.conv, unit.norm) for unit in units if hasattr(unit, "conv")]
    else:
        yield [(model.conv1, model.bn1)]
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                units = [(block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)]
                yield units + ([tuple(block.downsample)] if block.downsample is not None else [])


@pytest.mark.parametrize("size", [(65, 97), (50, 71)])
def test_equals_torchvision(size):
    theirs, ours = randomize_norms(resnet50(weights=None)).eval(), KMaXResNet(standard=True, norm="BN").eval()
    for our_block, their_block in zip(blocks_of(ours), blocks_of(theirs), strict=True):
        for (conv, norm), (their_conv, their_norm) in zip(our_block, their_block, strict=True):
            conv.load_state_dict(their_conv.state_dict())
            norm.load_state_dict(their_norm.state_dict())
            norm.eps = their_norm.eps
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = ours(image)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = {"stage1": x}
        for index, stage in enumerate((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), start=2):
            x = expected[f"stage{index}"] = stage(x)
    assert list(maps) == list(expected)
    for name, value in expected.items():
        assert maps[name].shape == value.shape
        assert (maps[name] - value).abs().max() < 1e-5 * value.abs().max(), name
