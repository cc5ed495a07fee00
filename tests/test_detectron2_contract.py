"""What Detectron2 allows works here: its backbones, options, outputs, dataset names, and parts of the user's own."""

import gc
import logging
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.engine import hooks
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, DatasetEvaluators, inference_on_dataset
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from detectron2.modeling.backbone import Backbone, SwinTransformer
from detectron2.solver import LRMultiplier
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from fvcore.common.param_scheduler import MultiStepParamScheduler
from layouts import registered
from layouts.coco import miniature_coco
from runs import arguments, write_own_data
from small import build, options
from torch import nn

from kmax_d2.data import MAPPER_REGISTRY, panoptic_png
from kmax_d2.data.mapper import PanopticTrainMapper
from kmax_d2.engine import Trainer, load_config, setup
from kmax_d2.engine.train_loop import TrainLoop
from kmax_d2.errors import UserError
from kmax_d2.evaluation.panoptic import PanopticEvaluator
from kmax_d2.images import read_rgb
from kmax_d2.modeling import CRITERION_REGISTRY, MERGING_REGISTRY, PIXEL_BLOCK_REGISTRY, Criterion, MaskWiseMerging

RESNET = ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.RESNETS.DEPTH", 18]
RESNET += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN"]
FPN = ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 16, *RESNET]


@BACKBONE_REGISTRY.register()
class StridedBackbone(Backbone):
    """A user's backbone with names of its own."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        assert input_shape.channels == 3
        self.steps = nn.ModuleList(
            nn.Conv2d(8 * step or input_shape.channels, 8 * step + 8, 3, 2, 1) for step in range(5)
        )
        self._out_features = ["fine", "middle", "coarse", "coarsest"]
        self._out_feature_strides = dict(zip(self._out_features, (4, 8, 16, 32), strict=True))
        self._out_feature_channels = dict(zip(self._out_features, (16, 24, 32, 40), strict=True))

    def forward(self, x):
        maps = []
        for step in self.steps:
            x = step(x).relu()
            maps.append(x)
        return dict(zip(self._out_features, maps[1:], strict=True))


@BACKBONE_REGISTRY.register()
def build_small_swin(cfg, input_shape):
    """Detectron2's Swin, which has no builder for yacs configs."""
    return SwinTransformer(in_chans=input_shape.channels, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))


@BACKBONE_REGISTRY.register()
class SquareBackbone(StridedBackbone):
    """A backbone that takes squares of one size, as Detectron2's ViT does."""

    padding_constraints = {"square_size": 128}  # noqa: RUF012

    def forward(self, x):
        assert x.shape[-2:] == (128, 128)
        return super().forward(x)


def training_batch(size=(65, 65)):
    ids = torch.zeros(size, dtype=torch.int16)
    ids[20:40, 20:40] = 1
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    return [{"image": image, "segment_ids": ids, "segment_classes": torch.tensor([5, 100])}] * 2


@pytest.mark.parametrize(
    "name, more",
    [
        ("build_resnet_backbone", RESNET),
        ("build_resnet_fpn_backbone", FPN),
        ("StridedBackbone", []),
        ("SquareBackbone", []),
        ("build_small_swin", ["MODEL.KMAX.PIXEL_DECODER.IN_FEATURES", ["p3", "p2", "p1", "p0"]]),
    ],
)
@pytest.mark.parametrize("head", ["ASPPSemanticHead", "PointwiseSemanticHead"])
def test_any_backbone_trains_and_predicts(name, more, head):
    changes = {"MODEL.BACKBONE.NAME": name, "MODEL.KMAX.SEMANTIC_HEAD.NAME": head, "MODEL.KMAX.NORM": "BN"}
    cfg = load_config("coco/base", [*options(), *(part for pair in changes.items() for part in pair), *more])
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        losses = model(training_batch())
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert any(weight.grad.abs().sum() > 0 for weight in model.backbone.parameters() if weight.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    output = model.eval()([{"image": torch.zeros(3, 50, 70), "height": 100, "width": 140}])[0]
    assert output["sem_seg"].shape == (133, 100, 140)


def test_maps_of_a_padded_backbone_are_those_of_the_unpadded_image():
    """Without norms and with zero padding, more zeros at the border change nothing that is kept."""
    model = build("coco/base", MODEL__BACKBONE__NAME="StridedBackbone").eval()
    for step in model.backbone.steps:
        nn.init.zeros_(step.bias)
    images = torch.rand(1, 3, 60, 60) * 255
    expected = model.predict(images)["mask_logits"]
    model.backbone.size_divisibility_ = 32
    type(model.backbone).size_divisibility = property(lambda self: getattr(self, "size_divisibility_", 0))
    try:
        torch.testing.assert_close(model.predict(images)["mask_logits"], expected, rtol=1e-4, atol=1e-4)
    finally:
        del type(model.backbone).size_divisibility


def test_a_backbone_without_the_needed_maps_is_one_line():
    with pytest.raises(UserError, match=r"no map stage5, of stride 32, but res4 \(stride 16\).*RESNETS.OUT_FEATURES"):
        build_model(load_config("coco/base", [*options(), "MODEL.BACKBONE.NAME", "build_resnet_backbone"]))


def test_options_are_open(caplog):
    """Detectron2's unused options are one warning; those of the user need none, and misspelt ones are errors."""
    with caplog.at_level(logging.WARNING):
        cfg = load_config("coco/base", ["SOLVER.STEPS", (10, 20), "SOLVER.GAMMA", 0.3, "MODEL.FPN.OUT_CHANNELS", 64])
    assert cfg.SOLVER.STEPS == (10, 20) and cfg.MODEL.FPN.OUT_CHANNELS == 64
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "MODEL.FPN.OUT_CHANNELS, SOLVER.GAMMA, SOLVER.STEPS" in warning
    with pytest.raises(UserError) as error:
        load_config("coco/base", ["SOLVER.BASE_RL", 1e-3, "SEED", "x", "MODEL.KMAX.TEST.PIXEL_THRESHOLD", 2.0, "LONE"])
    message = str(error.value)
    assert "LONE has no value" in message
    with pytest.raises(UserError) as error:
        load_config("coco/base", ["SOLVER.BASE_RL", 1e-3, "SEED", "x", "MODEL.KMAX.TEST.PIXEL_THRESHOLD", 2.0])
    message = str(error.value)
    assert message.startswith("3 faults: ") and "did you mean SOLVER.BASE_LR?" in message
    assert "SEED is x" in message and "PIXEL_THRESHOLD is 2.0" in message


def predict(model, size=(60, 80)):
    return model([{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)}])[0]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    changes = {f"MODEL__KMAX__TEST__{kind}_THRESHOLD": 0.0 for kind in ("THING", "STUFF")}
    changes |= {f"MODEL__KMAX__TEST__{kind}_AREA_LIMIT": 0 for kind in ("THING", "STUFF")}
    return build("coco/base", MODEL__KMAX__TRANSFORMER_DECODER__NUM_QUERIES=2, **changes).eval()


def test_outputs_are_dicts(model):
    output = predict(model)
    names = ["panoptic_seg", "semantic", "sem_seg", "instances"]
    assert isinstance(output, dict) and list(output) == list(output.keys()) == names and len(output) == 4
    assert output.get("proposals") is None and "sem_seg" in output
    for make in (dict, lambda o: {**o}, lambda o: o.copy(), lambda o: o | {}, lambda o: pickle.loads(pickle.dumps(o))):
        output = predict(model)
        plain = make(output)
        assert type(plain) is dict and list(plain) == names
        assert isinstance(plain["instances"], Instances) and isinstance(plain["sem_seg"], torch.Tensor)
    output = predict(model)
    assert [type(value) for value in output.values()] == [type(value) for _, value in output.items()]
    assert torch.equal(output.pop("sem_seg").argmax(0), output["semantic"])
    assert list(output) == ["panoptic_seg", "semantic", "instances"]


def test_outputs_are_freed_without_the_garbage_collector(model):
    output = predict(model)
    output["instances"], output["sem_seg"]
    seen = [weakref.ref(output), weakref.ref(output["panoptic_seg"][0]), weakref.ref(output["sem_seg"])]
    gc.disable()
    try:
        del output
        assert [reference() for reference in seen] == [None] * 3
    finally:
        gc.enable()


def test_detectron2_evaluators_and_visualizer(model, tmp_path):
    miniature_coco(tmp_path)
    name = "coco_2017_val_panoptic"
    with registered(tmp_path):
        metadata = MetadataCatalog.get(name)
        records = DatasetCatalog.get(name)
        instances_json = str(tmp_path / "coco/annotations/instances_val2017.json")
        MetadataCatalog.get("instances").set(json_file=instances_json)
        thing_classes = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
        MetadataCatalog.get("instances").set(thing_dataset_id_to_contiguous_id=thing_classes)
        images = [
            record | {"image": torch.from_numpy(read_rgb(record["file_name"]).transpose(2, 0, 1).copy())}
            for record in records
        ]
        evaluators = DatasetEvaluators(
            [
                COCOPanopticEvaluator(name, str(tmp_path / "out")),
                COCOEvaluator("instances", ("segm",), output_dir=None, use_fast_impl=False),
            ]
        )
        results = inference_on_dataset(model, [[image] for image in images], evaluators)
        assert 0 <= results["panoptic_seg"]["PQ"] <= 100 and "AP" in results["segm"]
        output = model(images[:1])[0]
        image = read_rgb(records[0]["file_name"])
        drawn = Visualizer(image, metadata).draw_panoptic_seg(*output["panoptic_seg"])
        assert drawn.get_image().shape == image.shape
        MetadataCatalog.remove("instances")


def truth_as(output_of, name):
    """Evaluates COCO's truth, in another model's form of output, with our evaluator of a dataset."""
    evaluator = PanopticEvaluator(name)
    evaluator.reset()
    for record in DatasetCatalog.get("coco_2017_val_panoptic"):
        ids = panoptic_png.read(record["pan_seg_file_name"])
        evaluator.process([record], [{"panoptic_seg": output_of(ids, record["segments_info"])}])
    return evaluator.evaluate()["panoptic_seg"]


def as_panoptic_deeplab(ids, segments):
    """Category · 1000 + instance, -1 for void, and no list of segments."""
    labels = np.full(ids.shape, -1, np.int32)
    for number, segment in enumerate(segments):
        labels[ids == segment["id"]] = segment["category_id"] * 1000 + number * segment["isthing"]
    return torch.from_numpy(labels), None


def as_mask2former(ids, segments):
    """Ids from 1, and a list without areas."""
    labels = np.zeros(ids.shape, np.int32)
    for number, segment in enumerate(segments, start=1):
        labels[ids == segment["id"]] = number
    keys = "category_id", "isthing"
    found = [{"id": number} | {key: s[key] for key in keys} for number, s in enumerate(segments, start=1)]
    return torch.from_numpy(labels), found


@pytest.mark.parametrize("form", [as_panoptic_deeplab, as_mask2former])
def test_our_evaluator_takes_other_models_outputs(form, tmp_path):
    miniature_coco(tmp_path)
    with registered(tmp_path):
        assert truth_as(form, "coco_2017_val_panoptic")["PQ"] == 100


def as_panoptic_fpn(ids, segments):
    """Ids from 1, and separate numbers: 80 things from 0, and 53 stuff classes from 1."""
    labels, found = as_mask2former(ids, segments)
    return labels, [s | {"category_id": s["category_id"] - (0 if s["isthing"] else 79)} for s in found]


def test_our_evaluator_takes_separate_numbers_of_things_and_stuff(tmp_path):
    miniature_coco(tmp_path)
    with registered(tmp_path):
        coco = MetadataCatalog.get("coco_2017_val_panoptic")
        separated = MetadataCatalog.get("numbers_are_separate")
        separated.set(panoptic_json=coco.panoptic_json, panoptic_root=coco.panoptic_root)
        separated.set(**_get_builtin_metadata("coco_panoptic_separated"))
        assert truth_as(as_panoptic_fpn, "numbers_are_separate")["PQ"] == 100
        MetadataCatalog.remove("numbers_are_separate")


MASK2FORMER = """
from detectron2.data import DatasetCatalog, MetadataCatalog
for split in ("train", "val"):
    DatasetCatalog.register(f"ade20k_panoptic_{split}", lambda: ["another project's"])
    MetadataCatalog.get(f"ade20k_panoptic_{split}").set(stuff_classes=["theirs"])
"""
THEIRS = """
from kmax_d2.data.datasets import register_all
register_all("datasets")
assert DatasetCatalog.get("ade20k_panoptic_val") == ["another project's"]
assert MetadataCatalog.get("ade20k_panoptic_val").stuff_classes == ["theirs"]
"""


@pytest.mark.parametrize("order", ["import kmax_d2" + MASK2FORMER, MASK2FORMER + "import kmax_d2"])
def test_dataset_names_of_another_project(order):
    subprocess.run([sys.executable, "-c", order + THEIRS], check=True)


def test_our_dataset_names_are_registered_when_a_config_needs_them():
    code = "import kmax_d2\nfrom detectron2.data import DatasetCatalog\nassert 'coconut_b_panoptic' in DatasetCatalog\n"
    code += "kmax_d2.model_zoo.get_config('ade20k/r50_641')\nfrom kmax_d2.engine import ready_config\n"
    code += "ready_config('ade20k/r50_641')\nassert 'ade20k_panoptic_val' in DatasetCatalog"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- parts of the user's own, each in a few lines ---


@CRITERION_REGISTRY.register()
class FocusedCriterion(Criterion):
    """Another loss and another matcher."""

    matched = 0

    @classmethod
    def match(cls, class_logits, masks, targets):
        cls.matched += 1
        return Criterion.match(class_logits, masks, targets)

    def forward(self, *arguments):
        return {"loss_focused": sum(super().forward(*arguments).values())}


@MERGING_REGISTRY.register()
class MergingWithoutStuff(MaskWiseMerging):
    def __call__(self, *arguments):
        merged = super().__call__(*arguments)
        return merged._replace(segments=[], segment_ids=torch.zeros_like(merged.segment_ids))


@PIXEL_BLOCK_REGISTRY.register()
class PlainBlock(nn.Sequential):
    def __init__(self, channels, width, norm):
        super().__init__(nn.Conv2d(channels, 4 * width, 3, padding=1), nn.ReLU())


@MAPPER_REGISTRY.register()
class GrayMapper(PanopticTrainMapper):
    def __call__(self, record):
        sample = super().__call__(record)
        return sample | {"image": sample["image"].float().mean(0, keepdim=True).expand(3, -1, -1)}


@META_ARCH_REGISTRY.register()
class OneSegment(nn.Module):
    """A meta-architecture of nothing but Detectron2's interface."""

    def __init__(self, cfg):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, device=cfg.MODEL.DEVICE))

    def forward(self, batch):
        if self.training:
            return {"loss_scale": self.scale.square().sum()}
        return [self.output(x["height"], x["width"]) for x in batch]

    def output(self, height, width):
        ids = torch.ones(height, width, dtype=torch.int32)
        return {"panoptic_seg": (ids, [{"id": 1, "category_id": 0, "isthing": False}])}


class CountingLoop(TrainLoop):
    def run_step(self):
        super().run_step()
        self.storage_of_user = self.iter


class CustomTrainer(Trainer):
    """Optimizer, scheduler, loop, checkpointer, hooks, and evaluator as a user of Detectron2 would replace them."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.SGD(model.parameters(), cfg.SOLVER.BASE_LR)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        steps = MultiStepParamScheduler(
            [cfg.SOLVER.GAMMA**step for step in range(3)], milestones=cfg.SOLVER.STEPS, num_updates=4
        )
        return LRMultiplier(optimizer, steps, max_iter=4)

    @classmethod
    def build_train_loop(cls, cfg, model, data_loader, optimizer):
        return CountingLoop(model, data_loader, optimizer, cfg.SEED)

    @classmethod
    def build_checkpointer(cls, cfg, model, **checkpointables):
        checkpointer = super().build_checkpointer(cfg, model, **checkpointables)
        checkpointer.add_checkpointable("notes", Notes())
        return checkpointer

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOPanopticEvaluator(dataset_name, cfg.OUTPUT_DIR)

    def build_hooks(self):
        return [*super().build_hooks(), hooks.CallbackHook(after_step=lambda trainer: seen.append(trainer.iter))]


class Notes:
    def state_dict(self):
        return {"author": "user"}

    def load_state_dict(self, state):
        seen.append(state["author"])


seen = []


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    return write_own_data(tmp_path_factory.mktemp("data"))


def train(trainer_class, own_data, output, resume=False, **changes):
    cfg = setup(arguments(own_data, OUTPUT_DIR=str(output), TEST__EVAL_PERIOD=2, SOLVER__MAX_ITER=2, **changes))
    with EventStorage():
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=resume)
        return trainer, trainer.train()


@pytest.mark.parametrize(
    "changes",
    [
        {"MODEL__KMAX__LOSS__NAME": "FocusedCriterion"},
        {"MODEL__KMAX__TEST__MERGING": "MergingWithoutStuff"},
        {"MODEL__KMAX__PIXEL_DECODER__KINDS": ["axial", "axial", "PlainBlock", "bottleneck"]},
        {"INPUT__DATASET_MAPPER_NAME": "GrayMapper"},
        {"MODEL__META_ARCHITECTURE": "OneSegment", "MODEL__KMAX__TEST__INSTANCE_ON": False}
        | {"MODEL__KMAX__TEST__SEMANTIC_ON": False},
    ],
    ids=lambda changes: next(iter(changes.values())) if isinstance(next(iter(changes.values())), str) else "PlainBlock",
)
def test_a_registered_part_trains_evaluates_and_resumes(changes, own_data, tmp_path):
    _, results = train(Trainer, own_data, tmp_path, **changes)
    assert 0 <= results["panoptic_seg"]["PQ"] <= 100
    trainer, results = train(Trainer, own_data, tmp_path, resume=True, **changes | {"SOLVER__STEPS": (1,)})
    assert trainer.start_iter == 2


def test_a_trainer_with_other_parts(own_data, tmp_path):
    seen.clear()
    changes = {"SOLVER__STEPS": (1, 3), "SOLVER__GAMMA": 0.5}
    trainer, results = train(CustomTrainer, own_data, tmp_path, **changes)
    assert seen == [0, 1] and trainer._trainer.storage_of_user == 1
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * trainer.cfg.SOLVER.BASE_LR)
    assert type(trainer.optimizer) is torch.optim.SGD and 0 <= results["panoptic_seg"]["PQ"] <= 100
    trainer, _ = train(CustomTrainer, own_data, tmp_path, resume=True, **changes)
    assert seen[-1] == "user" and trainer.start_iter == 2


def test_the_examples_of_the_docs(own_data, tmp_path):
    names = {}
    text = (Path(__file__).parents[1] / "docs/extending.md").read_text()
    for example in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    changes = {"MODEL__KMAX__LOSS__NAME": "SmoothCriterion", "MODEL__BACKBONE__NAME": "build_swin_tiny"}
    changes["MODEL__KMAX__TRANSFORMER_DECODER__CROSS_ATTENTION"] = "MyCrossAttention"
    trainer, results = train(names["MyTrainer"], own_data, tmp_path, **changes)
    assert "PQ" in results["panoptic_seg"] and "loss_smooth" in trainer.storage.histories()
