"""The paper's models by the names of their configs, with their published weights; used like detectron2.model_zoo."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .checkpoint import KMaXCheckpointer, load_weights
from .engine.setup import choose_device, config_file, load_config, prepare_datasets
from .errors import UserError, did_you_mean

# The official repository's archives of TensorFlow checkpoints.
ADDRESS = "https://storage.googleapis.com/gresearch/tf-deeplab/checkpoint"
_BACKBONES = {
    "r50": "resnet50",
    "maxs": "maxs_gelu",
    "convnext_t": "convnext_tiny",
    "convnext_s": "convnext_small",
    "convnext_b": "convnext_base",
    "convnext_l": "convnext_large",
}
_ARCHIVES = {
    f"{dataset}/{backbone}": f"kmax_{official}_{dataset}_train"
    for dataset in ("coco", "cityscapes")
    for backbone, official in _BACKBONES.items()
}
_ARCHIVES |= {
    f"ade20k/{backbone}_{side}": f"kmax_{_BACKBONES[backbone]}_res{side}_ade20k_train"
    for backbone in ("r50", "convnext_l")
    for side in (641, 1281)
}
_ARCHIVES["coco/convnext_l_unlabeled"] = "kmax_convnext_large_coco_train_unlabeled"


def _relative(name: str) -> str:
    return name.removeprefix("configs/").removesuffix(".yaml")


def get_config_file(name: str) -> str:
    """The path of a config, such as that of "coco/r50". Raises UserError for a name that the project does not have."""
    return str(config_file(name))


def has_weights(name: str) -> bool:
    """Whether weights of a model are published."""
    return _relative(name) in _ARCHIVES


def get_checkpoint_url(name: str) -> str:
    """The address of a model's published weights. Raises UserError for an unknown model and for one without any."""
    relative = _relative(name)
    if not has_weights(name):
        get_config_file(name)  # an unknown name is another error
        raise UserError(
            f"no weights of {name} are published{did_you_mean(relative, _ARCHIVES)} "
            f"There are those of {', '.join(sorted(_ARCHIVES))}"
        )
    return f"{ADDRESS}/{_ARCHIVES[relative]}.tar.gz"


def get_config(name: str, trained: bool = False) -> CfgNode:
    """The config of a model.

    Args:
        name: such as "coco/r50".
        trained: whether MODEL.WEIGHTS is to be the published weights; else it is what training starts from.
    """
    cfg = load_config(get_config_file(name))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(name)
    return cfg


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """A model with weights, in training mode as Detectron2's models come.

    Args:
        name: such as "coco/r50".
        trained: whether it has its published weights, downloaded once; else those that training starts from.
        device: such as "cpu"; None takes the GPU if there is one.
    """
    cfg = get_config(name, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    prepare_datasets(cfg)
    choose_device(cfg)
    model = build_model(cfg)
    if trained:
        load_weights(model, cfg.MODEL.WEIGHTS)
    else:
        KMaXCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
