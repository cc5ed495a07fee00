"""Options and configs that do not fit, or that nothing reads, are one line that says so."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from PIL import Image
from programs import one_line
from small import options

from kmax_d2 import add_kmax_config, model_zoo
from kmax_d2.data import PanopticTestMapper
from kmax_d2.data.datasets import shapes
from kmax_d2.engine import load_config, load_predictor, ready_config
from kmax_d2.option_rules import RULES
from kmax_d2.options import default_config, option_values

OPTIONS = dict(option_values(default_config()))
READ = {name: rule for name, rule in RULES.items() if name in OPTIONS}  # Detectron2 0.6 lacks some
# What no option of a type may be.
NEVER = {
    bool: ["1", "yes", "None", "[True]", "''"],
    int: ["-2", "1.5", "many", "None", "[1]", "nan", "''", "True"],
    float: ["-0.5", "much", "None", "[1.0]", "nan", "1e400", "''", "True"],
    str: ["None", "[1]"],
    list: ["1", "None", "some", "[None]", "{}", "[-1]", "[[1]]"],
    tuple: ["1", "None", "some", "[None]", "[1]"],
}
FREE_TEXT = {
    name for name, value in OPTIONS.items() if isinstance(value, str) and RULES.get(name, "") and RULES[name].holds("?")
}


def refusal(*pairs):
    """The line with which the defaults with these options are refused; None if they are not."""
    return one_line(load_config, "", pairs)


def test_every_option_of_ours_has_a_rule_and_its_default_follows_it():
    detectron2 = {name for name, _ in option_values(get_cfg())}
    assert OPTIONS.keys() - detectron2 <= RULES.keys()
    assert [name for name, rule in READ.items() if not rule.holds(OPTIONS[name])] == []


@pytest.mark.parametrize("name", sorted(READ.keys() - FREE_TEXT - {"TEST.EXPECTED_RESULTS"}))
def test_values_that_an_option_never_has(name):
    for value in NEVER[type(OPTIONS[name])]:
        line = refusal(name, value)
        assert line and line.startswith(f"error: {name} is ") and ", but must be " in line, value


def test_options_of_detectron2_that_nothing_here_reads_are_one_warning(caplog):
    names = sorted(OPTIONS.keys() - RULES.keys())
    for name in names:
        old = OPTIONS[name]
        more = {bool: not old, str: f"{old}x", type(None): 0.5}
        value = more[type(old)] if type(old) in more else [*old, 7] if isinstance(old, (list, tuple)) else old + 1
        caplog.clear()
        load_config("", [name, value])
        assert [record.getMessage().split(":")[0] for record in caplog.records] == [
            f"kmax_d2 itself does not read {name}"
        ]


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("SOLVER.MAX_ITER", "-1", "a whole number of at least 1"),
        ("SOLVER.BASE_LR", "1e30", "a number from 0 to 1"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "a whole number of at least 1"),
        ("SOLVER.EMA.DECAY", "1.0", "a number from 0 to 0.999999999"),
        ("SOLVER.AMP.PRECISION", "bf16", "one of bfloat16, float16, float32 - did you mean bfloat16?"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model", "one of value, norm"),
        ("INPUT.CROP_SIZE", "[0, 0]", "a list of 2 values, each a whole number from 1 to 32768"),
        ("INPUT.CROP_SIZE", "97", "a list of 2 values, each a whole number from 1 to 32768"),
        ("INPUT.SCALE_RANGE", "[0.5]", "a list of 2 values, each a number from 0.01 to 100"),
        ("INPUT.FORMAT", "BGR", "RGB"),
        ("INPUT.RANDOM_FLIP", "horizontally", "one of none, horizontal, vertical - did you mean horizontal?"),
        ("DATASETS.TRAIN", "shapes_train", "a list, each a text"),
        ("DATASETS.OWN_TEST", "['images', 'pngs']", "a list of 0 or 3 values, each a text"),
        ("DATALOADER.SAMPLER_TRAIN", "TrainSampler", "did you mean TrainingSampler?"),
        ("MODEL.DEVICE", "cuda:99", "a device of this machine, such as cpu, cuda, or cuda:0"),
        ("MODEL.DEVICE", "gpu", "a device of this machine, such as cpu, cuda, or cuda:0"),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "KMaXDeepLab or a model of your own"),
        ("MODEL.PIXEL_STD", "[1.0, 1.0, 0.0]", "a list of 3 values, each a number above 0"),
        ("MODEL.KMAX.NORM", "SyncBn", "did you mean SyncBN?"),
        ("MODEL.KMAX.COMPILE", "defualt", "did you mean default?"),
        ("MODEL.KMAX.LOSS.NUM_SAMPLES", "0", "a whole number of at least 1"),
        ("MODEL.KMAX.LOSS.INSTANCE_TEMPERATURE", "-1.0", "a number above 0"),
        ("MODEL.KMAX.LOSS.PQ_WEIGHT", "-3", "a number of at least 0"),
        ("MODEL.KMAX.LOSS.SEMANTIC_HARD_SHARE", "20", "a number from 0 to 1"),
        ("MODEL.KMAX.TEST.THING_THRESHOLD", "1.1", "a number from 0 to 1"),
        ("MODEL.KMAX.TEST.INSTANCE", "panoptics", "one of query, panoptic - did you mean panoptic?"),
        ("VERSION", "new", "2"),
        ("SOLVER", "3", "a section of options"),
    ],
)
def test_the_line_says_what_fits(name, value, wanted):
    line = refusal(name, value)
    assert line and line.startswith(f"error: {name} is ") and line.endswith(wanted)


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        (["SOLVER.BASELR", "1"], "no option SOLVER.BASELR - did you mean SOLVER.BASE_LR?"),
        (["SOLVER.EMA.DECAYS", "1"], "no option SOLVER.EMA.DECAYS - did you mean SOLVER.EMA.DECAY?"),
        (["SEED.a", "1"], "no option SEED.a - did you mean SEED?"),
        (["_BASE_", "a.yaml"], "no option _BASE_"),
        (["SEED"], "options must be NAME VALUE pairs; SEED has no value"),
        (
            ["INPUT.SCALE_RANGE", "[2.0, 0.5]"],
            "INPUT.SCALE_RANGE is in the wrong order, but must be (smallest, largest)",
        ),
        (["MODEL.KMAX.TRANSFORMER_DECODER.NUM_HEADS", "3"], "NUM_HEADS must divide KEY_CHANNELS and CHANNELS"),
        (["MODEL.KMAX.PIXEL_DECODER.BLOCKS", "[1, 1]"], "must have one value for each stage"),
        (["INPUT.MIN_SIZE_TEST", "400"], "leave it out, or set it to 1281"),
    ],
)
def test_names_and_relations(pairs, line):
    found = refusal(*pairs)
    assert found and line in found


def test_values_are_read_as_they_are_meant():
    pairs = ["SOLVER.BASE_LR", "1", "INPUT.CROP_SIZE", "(65, 97)", "DATASETS.TRAIN", "['a']", "OUTPUT_DIR", "2024"]
    cfg = load_config("", [*pairs, "MODEL.WEIGHTS", "''"])
    assert (cfg.SOLVER.BASE_LR, type(cfg.SOLVER.BASE_LR)) == (1.0, float)
    assert (cfg.INPUT.CROP_SIZE, cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == (
        [65, 97],
        ("a",),
        "2024",
        "",
    )


def test_a_backbone_of_detectron2_reads_its_options(caplog):
    pairs = ["MODEL.RESNETS.DEPTH", "101"]
    load_config("", pairs)
    assert "MODEL.RESNETS.DEPTH" in caplog.text
    caplog.clear()
    load_config("", [*pairs, "MODEL.BACKBONE.NAME", "build_resnet_backbone"])
    assert not caplog.records


def test_a_dumped_config_is_the_same_config(tmp_path):
    cfg = ready_config("coco/r50", options())
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = ready_config(str(tmp_path / "config.yaml"))
    assert json.dumps(dict(option_values(again))) == json.dumps(dict(option_values(cfg)))  # tuples as lists


CODE = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{file}]]"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"OUTPUT_DIR: {CODE}", "is not valid YAML: could not determine a constructor for the tag"),
        (f"_BASE_: {CODE}", "is not valid YAML: could not determine a constructor for the tag"),
        (f"_BASE_: code.yaml\nX: {CODE}", "is not valid YAML: could not determine a constructor for the tag"),
        ("_BASE_: code.yaml", "code.yaml is not valid YAML: could not determine a constructor for the tag"),
        ("_BASE_: missing.yaml", "cannot read the config {folder}/missing.yaml: No such file or directory"),
        ("_BASE_: .", "cannot read the config {folder}: Is a directory"),
        ("_BASE_: 3", "_BASE_ in {folder}/own.yaml is 3, but must be a config file"),
        ("_BASE_: [base.yaml, 3]", "_BASE_ in {folder}/own.yaml is 3, but must be a config file"),
        ("_BASE_: own.yaml", "the config {folder}/own.yaml includes itself through _BASE_"),
        ("_BASE_: circle.yaml", "the config {folder}/own.yaml includes itself through _BASE_"),
        ("", "the config {folder}/own.yaml must contain options"),
        ("3", "the config {folder}/own.yaml must contain options"),
        ("- SEED", "the config {folder}/own.yaml must contain options"),
        ("SEED: [1", "{folder}/own.yaml is not valid YAML: "),
        ("\x00", "{folder}/own.yaml is not valid YAML: "),
        ("VERSION: text", "VERSION is text, but must be 2"),
        ("3: 4", "no option 3"),
        ("MODEL: {KMAX: {LOSS: {MASK_IDWEIGHT: 1.0}}}", "MASK_IDWEIGHT - did you mean MODEL.KMAX.LOSS.MASK_ID_WEIGHT?"),
        ("SOLVER:\n  EMA: 3", "SOLVER.EMA is 3, but must be a section of options"),
        (
            "MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN",
            "MODEL.META_ARCHITECTURE is GeneralizedRCNN, but must be KMaX",
        ),
        ("SEED: 2024-01-01", "SEED is 2024-01-01, but must be a whole number"),
    ],
)
def test_configs_that_cannot_be_used_and_none_that_runs_code(tmp_path, text, line):
    ran = tmp_path / "ran"
    for name, content in {
        "own": text,
        "code": f"SEED: {CODE}",
        "base": "SEED: 1",
        "circle": "_BASE_: own.yaml",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(content.replace("{file}", str(ran)))
    found = one_line(load_config, str(tmp_path / "own.yaml"))
    assert found and found.startswith("error: ") and line.replace("{folder}", str(tmp_path)) in found
    assert refusal("OUTPUT_DIR", CODE.replace("{file}", str(ran))) is None and not ran.exists()


def test_bases_are_merged_in_order(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 5}\nOUTPUT_DIR: a")
    (tmp_path / "b.yaml").write_text("SEED: 2\nOUTPUT_DIR: b")
    (tmp_path / "own.yaml").write_text("_BASE_: [a.yaml, b.yaml]\nOUTPUT_DIR: own")
    cfg = load_config(str(tmp_path / "own.yaml"))
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.OUTPUT_DIR) == (2, 5, "own")


def test_detectron2s_predictor_gives_what_the_mapper_gives(tmp_path):
    shapes.write_split(tmp_path, "val", 1, 5)
    cfg = model_zoo.get_config("shapes/quickstart", trained=True)
    cfg.MODEL.DEVICE = "cpu"
    file = str(tmp_path / "val" / "0000.jpg")
    found = DefaultPredictor(cfg)(np.asarray(Image.open(file))[:, :, ::-1])
    model = load_predictor(
        ready_config("shapes/quickstart", ["MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, "MODEL.DEVICE", "cpu"])
    )
    with torch.no_grad():
        expected = model([PanopticTestMapper(cfg)({"file_name": file})])[0]
    assert len(found["panoptic_seg"][1]) > 2
    assert (found["panoptic_seg"][0] == expected["panoptic_seg"][0]).float().mean() > 0.999

    plain = get_cfg()  # without load_config, which sets the size
    add_kmax_config(plain)
    plain.merge_from_other_cfg(cfg)
    plain.INPUT.MIN_SIZE_TEST = plain.INPUT.MAX_SIZE_TEST = OPTIONS["INPUT.MIN_SIZE_TEST"]
    with pytest.raises(ValueError):
        DefaultPredictor(plain)(np.zeros((9, 9, 3), np.uint8))


@pytest.mark.parametrize(
    ("crop", "fit", "sizes"), [([97, 97], True, (97, 97)), ([193, 257], True, (193, 257)), ([65, 97], False, (0, 0))]
)
def test_sizes_of_detectron2s_predictor(crop, fit, sizes):
    inputs = load_config("", ["INPUT.CROP_SIZE", crop, "INPUT.FIT_CROP", fit]).INPUT
    found = inputs.MIN_SIZE_TEST, inputs.MAX_SIZE_TEST
    assert found == sizes
