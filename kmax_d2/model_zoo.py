"""The models and their trained weights by config name; used like detectron2.model_zoo."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .checkpoint import KMaXCheckpointer
from .engine.setup import CHECKPOINT, config_file, load_config, load_model, ready_config
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
# By config name; the last ones come with the package.
WEIGHTS = {
    f"{dataset}/{backbone}": f"{ADDRESS}/kmax_{official}_{dataset}_train.tar.gz"
    for dataset in ("coco", "cityscapes")
    for backbone, official in _BACKBONES.items()
}
WEIGHTS |= {
    f"ade20k/{backbone}_{side}": f"{ADDRESS}/kmax_{_BACKBONES[backbone]}_res{side}_ade20k_train.tar.gz"
    for backbone in ("r50", "convnext_l")
    for side in (641, 1281)
}
WEIGHTS["coco/convnext_l_unlabeled"] = f"{ADDRESS}/kmax_convnext_large_coco_train_unlabeled.tar.gz"
_ASSETS = Path(__file__).parent / "assets"
WEIGHTS |= {"shapes/quickstart": str(_ASSETS / "quickstart.pth"), "camvid/street": str(_ASSETS / "street.pth")}
DEFAULT = "coco/r50"  # the model to use if none is named
OFFLINE = "camvid/street"  # the included model to use where the default's weights cannot be downloaded


def _relative(name: str) -> str:
    return name.removeprefix("configs/").removesuffix(".yaml")


def get_config_file(name: str) -> str:
    """Returns the path of a config, such as that of "coco/r50". Raises UserError for an unknown name."""
    return str(config_file(name))


def has_weights(name: str) -> bool:
    """Returns whether weights for a model are published, or included as for "shapes/quickstart"."""
    return _relative(name) in WEIGHTS


def get_checkpoint_url(name: str) -> str:
    """Returns the URL of a model's published weights, or the path of included ones.

    Raises UserError if the model is unknown or has no weights.
    """
    relative = _relative(name)
    if relative in WEIGHTS:
        return WEIGHTS[relative]
    get_config_file(name)  # an unknown name is a different error
    hint = did_you_mean(relative, WEIGHTS) or "."
    raise UserError(f"no weights of {name} are published{hint} Weights exist for {', '.join(sorted(WEIGHTS))}")


def get_config(name: str, trained: bool = False) -> CfgNode:
    """Returns the config of a model as it is written; MODEL.WEIGHTS are trained ones, or those to start training from.

    Raises UserError if the model is unknown or has no trained weights.
    """
    return load_config(*_trained(name)) if trained else load_config(get_config_file(name))


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Builds a model and loads its weights; like all Detectron2 models, it comes in training mode.

    Args:
        name: such as "coco/r50".
        trained: whether to load the trained weights, which are downloaded once unless they are included; else those
            that training starts from.
        device: such as "cpu"; None uses a GPU if there is one.

    Raises:
        UserError: the model is unknown, or its weights cannot be downloaded.
    """
    file, options = _trained(name) if trained else (name, [])
    cfg = ready_config(file, options if device is None else [*options, "MODEL.DEVICE", device])
    if trained:
        return load_model(cfg)
    model = build_model(cfg)
    KMaXCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def _trained(name: str) -> tuple[str, list[str]]:
    """Returns a config and options for the trained weights: included ones are a checkpoint that knows its config."""
    weights = get_checkpoint_url(name)
    return (weights, []) if weights.endswith(CHECKPOINT) else (get_config_file(name), ["MODEL.WEIGHTS", weights])
