"""Fixtures shared by several test files."""

import signal

import pytest
import reference
import torch

from kmax_d2.checkpoint import deeplab2_to_state_dict

# A shell starts background jobs with it ignored, and so would be the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The tensors are small: more threads would only wait for each other, for minutes on a busy machine.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keeps the tests of a file in one process, for its fixtures, except where they are marked otherwise."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def coco_model():
    """ResNet-50 on COCO at full size, in inference mode, with the reference's values. Tests must not change it."""
    state_dict = deeplab2_to_state_dict(reference.official_variables("coco_r50"))
    return reference.load_all(reference.build("coco/r50"), state_dict)


@pytest.fixture(scope="session")
def shapes_cache(tmp_path_factory):
    """A folder in which the embedded dataset is drawn once per session."""
    return tmp_path_factory.mktemp("shapes_cache")
