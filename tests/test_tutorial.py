"""The tutorial notebook, run cell by cell, without Jupyter."""

import json
import logging
import os

import programs
import pytest
from PIL import Image

NOTEBOOK = programs.ROOT / "demo" / "tutorial.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def names(cells, tmp_path_factory):
    """What the cells define, after all of them ran in a folder of their own."""
    previous, names = os.getcwd(), {}
    os.chdir(tmp_path_factory.mktemp("tutorial"))
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
        yield names
    finally:
        os.chdir(previous)
        logging.disable(logging.NOTSET)


def test_it_is_small_and_has_no_errors(cells):
    assert NOTEBOOK.stat().st_size < 400_000
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 3
    assert all(output["output_type"] in ("stream", "display_data", "execute_result") for output in outputs)


def test_it_finds_segments_and_clusters(names):
    result = names["result"]
    assert {"sky", "water", "star"} <= {segment.class_name for segment in result.panoptic.segments}
    assert len(result.clusters) == 4 and result.clusters[-1].shape == names["final"].shape


def test_it_learns_its_own_data(names):
    assert names["predict_own"].class_names == ["disk", "ground"]
    assert names["metrics"]["panoptic_seg"]["PQ_st"] > 60
    assert {segment.class_name for segment in names["own"].panoptic.segments} >= {"ground"}
    with Image.open("output/tutorial/data/val/panoptic/0.png") as png:
        assert png.size == names["own"].image.shape[1::-1]
