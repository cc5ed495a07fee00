"""What several test files share."""

import pytest
import reference
import torch

# The tensors are small: more threads would only wait for each other, for minutes where the machine is busy.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def official_state_dict():
    """The reference's values of the official COCO ResNet-50 variables, by our names."""
    return reference.official_state_dict()


@pytest.fixture(scope="session")
def coco_model(official_state_dict):
    """ResNet-50 on COCO at full size, in inference mode, with the reference's values. Tests must leave it as it is."""
    model = reference.coco_model()
    unloaded = model.load_state_dict(official_state_dict, strict=False)
    assert not unloaded.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in unloaded.missing_keys)
    return model.eval()
