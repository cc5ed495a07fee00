"""Exported files give what the model gives, in runtimes without PyTorch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import programs
import pytest
import reference
import torch
from detectron2.modeling import build_model
from PIL import ExifTags, Image

import kmax_d2
from kmax_d2.data.datasets import shapes
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError
from kmax_d2.export import NetworkGraph, PanopticGraph, merge
from kmax_d2.export.graph import count_pairs, sum_clusters
from kmax_d2.modeling.kmeans import kmeans_assign, kmeans_update
from kmax_d2.modeling.merging import MaskWiseMerging
from kmax_d2.speed import fold_batch_norms
from kmax_d2.tools import compare_runtimes, export

IS_THING = [True] * 3 + [False] * 4
ROOT = Path(__file__).parents[1]
SIZE = (72, 104)
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
needs_export = pytest.mark.skipif(torch.__version__ < "2.7", reason="exporting needs PyTorch 2.7")


def random_images(batch, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("tag", "num_classes"), [("coco", 133), ("cityscapes", 19)])
def test_merging_as_tensor_operations(tag, num_classes):
    arrays = reference.load(f"merge_{tag}")
    merging, class_logits, mask_logits = reference.merging_of(arrays, num_classes)
    size = tuple(arrays["image_size"].tolist())
    expected = merging(class_logits, mask_logits, size)
    ids, classes, scores = merge(merging, merging.is_thing, class_logits[None], mask_logits[None], size)
    assert torch.equal(ids[0].int(), expected.segment_ids)
    found = [(int(c), float(s)) for c, s in zip(classes[0], scores[0], strict=True)][: len(expected.segments)]
    assert found == [(segment["category_id"], pytest.approx(segment["score"])) for segment in expected.segments]


def test_merging_of_a_batch_with_overlaps():
    merging = MaskWiseMerging(IS_THING, 0.4, 0.3, 0.2, 0.6, thing_area_limit=20, stuff_area_limit=60)
    for _ in range(10):
        class_logits = 3 * torch.randn(2, 24, len(IS_THING) + 1)
        mask_logits = torch.nn.functional.interpolate(8 * torch.randn(2, 24, 4, 5), size=(17, 25), mode="bicubic")
        ids, classes, _ = merge(merging, merging.is_thing, class_logits, mask_logits, (65, 97))
        for image in range(2):
            expected = merging(class_logits[image], mask_logits[image], (65, 97))
            # The best of two equal logits may be another one.
            assert (ids[image] != expected.segment_ids).float().mean() < 1e-3
            found = classes[image, : len(expected.segments)].tolist()
            assert found == [segment["category_id"] for segment in expected.segments]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """The quickstart's model as ONNX, at one size."""
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    arguments = ["--format", "onnx", "--output", str(file), "--size", *map(str, SIZE)]
    export.main(["--config-file", "shapes/quickstart", *arguments])
    return str(file)


def expected_of(images, padded=False):
    predict = kmax_d2.load("shapes/quickstart", device="cpu", options=["MODEL.KMAX.TEST.PAD_TO_CROP", padded])
    inputs = [{"image": torch.from_numpy(image).permute(2, 0, 1)} for image in images]
    return [results["panoptic_seg"] for results in predict.segment(inputs)]


def assert_same(outputs, expected):
    ids, table = outputs
    assert ids.dtype == np.int32 and table.dtype == np.float32
    for image, (expected_ids, segments) in enumerate(expected):
        # Pixels at a threshold may fall on either side of it.
        assert np.mean(ids[image] != expected_ids.numpy()) < 1e-3
        for segment in segments:
            class_id, score, area = table[image, segment["id"] - 1]
            assert class_id == segment["category_id"] and score == pytest.approx(segment["score"], abs=1e-4)
            assert area == np.count_nonzero(ids[image] == segment["id"])
        assert np.count_nonzero(table[image, :, 2]) == len(segments)


def run_onnx(file, images):
    return onnxruntime.InferenceSession(file).run(None, {"images": images})


def run_openvino(file, images):
    results = openvino.Core().compile_model(file, "CPU", EXACT)({"images": images})
    return [results[index] for index in range(2)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Images of the quickstart's kind at SIZE: (2, H, W, 3)."""
    folder = tmp_path_factory.mktemp("drawn")
    shapes.write_split(folder, "val", 2, 4)
    return np.stack([np.asarray(Image.open(f).resize(SIZE[::-1])) for f in sorted((folder / "val").iterdir())])


@needs_export
@pytest.mark.parametrize("run", [run_onnx, run_openvino])
def test_from_image_to_panoptic_result(onnx_file, drawn, run):
    expected = expected_of(drawn)
    assert sum(len(segments) for _, segments in expected) > 3
    for index, image in enumerate(drawn):
        assert_same(run(onnx_file, image[None]), expected[index : index + 1])


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["detectron2"] = None  # importing them fails
runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
"""


@needs_export
def test_the_demo_needs_no_pytorch(onnx_file, drawn, tmp_path):
    Image.fromarray(drawn[0]).save(tmp_path / "image.png")
    script, image, output = ROOT / "demo" / "onnx_demo.py", tmp_path / "image.png", tmp_path / "out.png"
    command = [sys.executable, "-c", WITHOUT_TORCH, script, onnx_file, image, output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((_, segments),) = expected_of(drawn[:1])
    lines = [f"segment {s['id']}: class {s['category_id']}, score {s['score']:.2f}, " for s in segments]
    assert all(line.startswith(start) for line, start in zip(done.stdout.splitlines(), lines, strict=True))
    assert Image.open(output).size == SIZE[::-1]
    done = subprocess.run([*command[:-2], tmp_path / "none.png", output], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_torchscript_and_half_precision(drawn, tmp_path):
    arguments = ["--config-file", "shapes/quickstart", "--size", *map(str, SIZE), "--format", "torchscript"]
    export.main([*arguments, "--output", str(tmp_path / "model.ts")])
    with torch.no_grad():
        found = torch.jit.load(tmp_path / "model.ts")(torch.from_numpy(drawn[:1]))
    assert_same([each.numpy() for each in found], expected_of(drawn[:1]))
    half = ["--precision", "bfloat16", "--what", "network"]
    export.main([*arguments, *half, "--output", str(tmp_path / "half.ts")])
    assert (tmp_path / "half.ts").stat().st_size < 0.7 * (tmp_path / "model.ts").stat().st_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--format onnx --output model.pt2", "in the format onnx must end in .onnx"),
        ("--format torchscript --output model.ts --dynamic", "TorchScript keeps the size"),
        ("--format onnx --output model.onnx --precision bfloat16", "takes bfloat16 from the runtime"),
        ("--format onnx --output model.onnx --precision int8", "needs --format onnx or openvino, and --images"),
        ("--format pt2 --output model.pt2 --precision int8 --images .", "needs --format onnx or openvino"),
        ("--format onnx --output model.onnx --size 0 5", "--size is 0, but must be"),
    ],
)
def test_what_cannot_be_exported(arguments, message):
    with pytest.raises(UserError, match=message):
        export.main(["--config-file", "shapes/quickstart", *arguments.split()])


@pytest.mark.parametrize(("kind", "name"), [("onnx", "model.onnx"), ("openvino", "model.bin")])
def test_an_existing_file_stays(tmp_path, kind, name):
    (tmp_path / name).write_text("mine")
    output = tmp_path / name.replace(".bin", ".xml")
    with pytest.raises(UserError, match=f"{name} exists: choose another name, or add --overwrite"):
        export.main(["--config-file", "shapes/quickstart", "--format", kind, "--output", str(output)])
    assert (tmp_path / name).read_text() == "mine"


@needs_export
@pytest.mark.slow
@pytest.mark.parametrize("kind, ending, run", [("onnx", "onnx", run_onnx), ("openvino", "xml", run_openvino)])
def test_any_size_and_batch(drawn, tmp_path, kind, ending, run):
    file = str(tmp_path / f"model.{ending}")
    export.main(["--config-file", "shapes/quickstart", "--dynamic", "--format", kind, "--output", file])
    for images in (drawn, drawn[:1, :50, :90], drawn.repeat(2, 1)):
        assert_same(run(file, images), expected_of(images))


@needs_export
@pytest.mark.slow
def test_runtimes_side_by_side(capsys):
    compare_runtimes.main(["--config-file", "shapes/quickstart", "--sizes", "65", "--repeats", "1"])
    rows = [row.split("|")[1:4] for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    table = {name.strip(): (float(seconds), float(ratio)) for name, seconds, ratio in rows[1:]}
    runtimes = {"ONNX Runtime, float32", *(f"OpenVINO, {precision}" for precision in ("float32", "bfloat16", "int8"))}
    assert table.keys() > runtimes
    body, one = table["ResNet-50 body"]
    assert one == 1
    for seconds, ratio in table.values():  # to three digits and two
        assert seconds > 0 and seconds == pytest.approx(ratio * body, abs=0.001 * (1 + ratio) + 0.01 * body)


def few_blocks(config):
    """A model with the widths and options of a config and one block a stage."""
    few = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.KMAX.NORM", "BN", "MODEL.KMAX.TIMM.PRETRAINED", False]
    cfg = load_config(config, few)
    kmax = cfg.MODEL.KMAX
    kmax.RESNET.BLOCKS = kmax.MAXS.BLOCKS = kmax.CONVNEXT.DEPTHS = [1, 1, 1, 1]
    kmax.PIXEL_DECODER.BLOCKS = [1] * len(kmax.PIXEL_DECODER.BLOCKS)
    if kmax.NUM_CLASSES == 0:  # the classes are the data's
        kmax.NUM_CLASSES, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = 5, (), ("shapes_val",)
    return build_model(cfg).eval()


@needs_export
@pytest.mark.slow
@pytest.mark.parametrize("config", ["coco/r50", "coco/convnext_t", "camvid/street", "coco/vit_b_dinov3"])
def test_half_precision_in_onnx(config, tmp_path):
    model, images = few_blocks(config), torch.from_numpy(random_images(1, 65, 65))
    graph = NetworkGraph(fold_batch_norms(model, torch.float16), torch.float16).eval()
    with torch.no_grad(), export.quiet():
        onnx.save(export.to_onnx(graph, images, False, export.OUTPUTS["network"]), tmp_path / "model.onnx")
        expected = [each.numpy() for each in NetworkGraph(model).eval()(images)]
    for one, other in zip(run_onnx(str(tmp_path / "model.onnx"), images.numpy()), expected, strict=True):
        assert np.abs(one - other).max() <= 0.02 * np.abs(other).max()


FAMILIES = ["coco/r50", "coco/maxs", "cityscapes/convnext_t", "coco/vit_b_dinov3", "camvid/street"]


def nodes_of(graph):
    """All nodes of a graph, with those of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from nodes_of(subgraph)


def assert_no_scatter_adds(file):
    """Runtimes add the duplicates of a scatter from several threads without a lock."""
    proto = onnx.load(file)
    nodes = [node for graph in (proto.graph, *proto.functions) for node in nodes_of(graph)]
    assert {node.op_type for node in nodes} >= {"MatMul", "Conv"}
    for node in nodes:
        reductions = [onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "reduction"]
        assert reductions in ([], [b"none"]), node


@needs_export
def test_no_exported_graph_adds_by_scattering(onnx_file):
    assert_no_scatter_adds(onnx_file)


def test_counts_and_sums_are_those_of_the_model():
    one, other = torch.randint(0, 5, (2, 3, 37, 41)).unbind()
    expected = torch.zeros(3, 6, 5)
    for image in range(3):
        for pair in zip(one[image].flatten().tolist(), other[image].flatten().tolist(), strict=True):
            expected[(image, *pair)] += 1
    assert torch.equal(count_pairs(one, other, (6, 5)), expected)
    assignment, values = kmeans_assign(torch.randn(2, 7, 9, 11)), torch.randint(-50, 50, (2, 4, 9, 11)).float()
    assert torch.equal(sum_clusters(assignment, values, 7), kmeans_update(assignment, values, 7))


@needs_export
@pytest.mark.slow
@pytest.mark.parametrize("config", FAMILIES)
def test_every_family_in_both_runtimes_whatever_the_threads(config, tmp_path):
    """Its widths and options with one block a stage: 25 runs with 2 and 4 threads under load give one result."""
    model, images = few_blocks(config), random_images(1, 65, 97)
    file = str(tmp_path / "model.onnx")
    for graph_of, names in ((NetworkGraph, export.OUTPUTS["network"]), (PanopticGraph, export.OUTPUTS["panoptic"])):
        graph = graph_of(model).eval()
        with torch.no_grad(), export.quiet():
            onnx.save(export.to_onnx(graph, torch.from_numpy(images), False, names), file)
            expected = [each.numpy() for each in graph(torch.from_numpy(images))]
        assert_no_scatter_adds(file)
        for run in (run_onnx, run_openvino):
            for one, other in zip(run(file, images), expected, strict=True):
                if names == export.OUTPUTS["network"]:
                    assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max()
                elif one.ndim == 3 and one.dtype == np.int32:
                    assert np.mean(one != other) < 1e-3
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        found = set()
        for threads in (2, 4):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(file, options)
            found |= {session.run(None, {"images": images})[0].tobytes() for _ in range(25)}
        assert len(found) == 1
    finally:
        for process in load:
            process.kill()


@needs_export
def test_the_demo_writes_over_nothing_and_reads_only_what_it_understands(onnx_file, drawn, tmp_path):
    image, output = tmp_path / "image.png", tmp_path / "out.png"
    Image.fromarray(drawn[0]).save(image)
    Image.fromarray(drawn[0][..., 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    before = image.read_bytes()
    demo = programs.load(ROOT / "demo" / "onnx_demo.py").main
    output.write_bytes(b"a user's file")
    for arguments, line in [
        ([image, image, "--overwrite"], "exists: choose another name"),
        ([image, output], "exists: choose another name, or add --overwrite"),
        ([image, tmp_path / "out.txt"], "must end as a picture does"),
        ([tmp_path / "deep.png", tmp_path / "new.png"], "more than 8 bits per channel"),
    ]:
        assert line in programs.one_line(demo, [onnx_file, *map(str, arguments)])
    assert image.read_bytes() == before and output.read_bytes() == b"a user's file"
    demo([onnx_file, str(image), str(output), "--overwrite"])
    assert Image.open(output).size == Image.open(image).size


@needs_export
def test_the_demo_turns_photos_upright(onnx_file, drawn, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.rot90(drawn[0])).save(tmp_path / "photo.png", exif=exif)
    demo = programs.load(ROOT / "demo" / "onnx_demo.py").main
    demo([onnx_file, str(tmp_path / "photo.png"), str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == SIZE[::-1]
