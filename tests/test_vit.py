"""Vision transformers of timm with a simple pyramid: timm's own features, learning rates by layer, and training."""

import pytest
import small
import timm
import torch
from saved_tensors import kept_bytes
from scenes import sample
from torch.nn import functional as F

from kmax_d2.engine import load_config
from kmax_d2.engine.optimizer import build_optimizer
from kmax_d2.errors import UserError
from kmax_d2.modeling.backbones import KMaXTimm
from kmax_d2.speed import checkpoint

TINY = {"MODEL__BACKBONE__NAME": "KMaXTimm", "MODEL__KMAX__TIMM__NAME": "vit_tiny_patch16_224"}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_maps_come_from_timms_own_last_features(name):
    backbone = KMaXTimm(name).eval()
    net, image = backbone.net.pyramid.net, torch.randint(256, (1, 3, 65, 97)).float()
    theirs = timm.create_model(name, patch_size=16, dynamic_img_size=True, num_classes=0, global_pool="").eval()
    assert {n: v.shape for n, v in net.vit.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    theirs.load_state_dict(net.vit.state_dict())
    padded = F.pad(image, (0, 31, 0, 31), value=127.5)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        last = net((padded / 255 - mean) / std)["last"]
        tokens = theirs.forward_features((padded / 255 - mean) / std)[:, theirs.num_prefix_tokens :]
        torch.testing.assert_close(last.flatten(2).transpose(1, 2), tokens, rtol=1e-3, atol=1e-3)
        maps = backbone((image - 127.5) / 127.5)
    assert list(maps) == list(backbone.output_shape()) == ["stage2", "stage3", "stage4", "stage5"]
    for stage, shape in backbone.output_shape().items():
        assert maps[stage].shape == (1, shape.channels, 64 // shape.stride + 1, 96 // shape.stride + 1)


def test_two_iterations_with_rates_that_fall_by_layer():
    changes = {"SOLVER__LAYER_DECAY": 0.5, "SOLVER__BACKBONE_MULTIPLIER": 0.1, "SOLVER__BASE_LR": 0.001}
    model = small.build("coco/base", **TINY, **changes)
    cfg = load_config("coco/base", small.options(**TINY, **changes))
    optimizer = build_optimizer(cfg, model)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    vit = model.backbone.net.pyramid.net.vit
    top = rate[id(vit.norm.weight)]
    assert top == pytest.approx(1e-4)
    assert rate[id(vit.blocks[11].attn.qkv.weight)] == pytest.approx(top)
    assert rate[id(vit.blocks[0].attn.qkv.weight)] == pytest.approx(top / 2**11)
    assert rate[id(vit.pos_embed)] == pytest.approx(top / 2**12)
    assert (
        rate[id(model.backbone.net.pyramid.simfp_2[0].weight)] == rate[id(model.transformer_decoder.centers)] == 0.001
    )
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norm, kernel = model.backbone.net.pyramid.simfp_2[1], vit.blocks[0].mlp.fc1.weight  # the norm is Detectron2's own
    assert [decay[id(p)] for p in (norm.weight, vit.pos_embed, kernel)] == [0, 0, 0.05]
    before = vit.pos_embed.detach().clone()
    for seed in range(2):
        optimizer.zero_grad()
        sum(model([sample(65, 65, seed), sample(65, 65, seed + 2)]).values()).backward()
        # Distributed training needs a gradient for every parameter.
        assert [name for name, value in model.named_parameters() if value.grad is None] == []
        optimizer.step()
    assert not torch.equal(before, vit.pos_embed)
    assert all(value.isfinite().all() for value in model.predict(torch.randint(256, (1, 3, 65, 97))).values())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_blocks_are_checkpointed(name, monkeypatch):
    monkeypatch.setattr(checkpoint, "SMALLEST", 0)
    net, image = KMaXTimm(name).net, torch.randn(1, 3, 64, 96)
    gradients, kept = [], []
    for prepare in (lambda x: x, checkpoint.checkpoint_blocks):
        prepare(net)
        net.zero_grad()
        net(image)[0].square().sum().backward()
        gradients.append(net.pyramid.net.vit.patch_embed.proj.weight.grad.clone())
        kept.append(kept_bytes(lambda: net(image)[0]))
    torch.testing.assert_close(*gradients)
    assert kept[1] < 0.8 * kept[0]


def test_layer_decay_needs_layers():
    cfg = load_config("", small.options(SOLVER__LAYER_DECAY=0.5, MODEL__KMAX__NORM="BN"))
    with pytest.raises(UserError, match="LAYER_DECAY is for a vision transformer in KMaXTimm"):
        build_optimizer(cfg, small.build())
