"""What the model is given by mistake: one sentence that names what is wanted and what came."""

import numpy as np
import pytest
import torch
from scenes import build_model, sample

from kmax_d2.errors import UserError

PICTURE = torch.zeros(3, 40, 50, dtype=torch.uint8)


@pytest.fixture(scope="module")
def model():
    return build_model().eval()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, 'the batch must be a list of dicts, each with an "image", but is missing'),
        ([], "but is a list of nothing"),
        ({"image": PICTURE}, "but is a dict"),
        (PICTURE[None], r"but is a Tensor \(1, 3, 40, 50\) of uint8 from 0 to 0"),
        ([PICTURE], "but is a list of Tensor"),
        ([{"image": PICTURE}, {"file_name": "a.png"}], '"image" of input 1 must be .*, but is missing'),
        ([{"image": "a.png"}], "but is 'a.png'"),
        ([{"image": np.zeros((40, 50, 3), np.uint8)}], r"but is a ndarray \(40, 50, 3\) of uint8"),
        ([{"image": PICTURE.permute(1, 2, 0)}], r"a tensor \(3, H, W\) of integers .*, but is a Tensor \(40, 50, 3\)"),
        ([{"image": PICTURE[:1]}], r"but is a Tensor \(1, 40, 50\)"),
        ([{"image": PICTURE[None]}], r"but is a Tensor \(1, 3, 40, 50\)"),
        ([{"image": PICTURE[..., :0]}], r"but is a Tensor \(3, 40, 0\) of uint8"),
        ([{"image": PICTURE.bool()}], "of bool"),
        ([{"image": PICTURE.cfloat()}], "of complex64"),
        ([{"image": PICTURE, "height": 0}], '"height" of input 0 must be a positive integer, .*, but is 0'),
        ([{"image": PICTURE, "width": -3}], '"width" of input 0 .*, but is -3'),
        ([{"image": PICTURE, "width": 2.5}], "but is 2.5"),
    ],
)
def test_bad_batch(model, batch, message):
    with pytest.raises(UserError, match=message) as raised:
        model(batch)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_ids": None}, r'"segment_ids" of input 0 must be a tensor .* \(40, 50\), .*, but is missing'),
        ({"segment_ids": torch.zeros(50, 40).long()}, r"but is a Tensor \(50, 40\) of int64"),
        ({"segment_ids": torch.zeros(40, 50)}, "of float32"),
        ({"segment_ids": torch.full((40, 50), 12)}, "from -1, void, to 11, the last segment, .*from 12 to 12"),
        ({"segment_ids": torch.full((40, 50), -2)}, "from -2 to -2"),
        ({"segment_classes": None}, r'"segment_classes" of input 0 must be a tensor \(S,\) .*, but is missing'),
        ({"segment_classes": torch.full((12,), 6)}, "integers from 0 to 5, .* of int64 from 6 to 6"),
        ({"segment_classes": [1, 2]}, "but is a list of int"),
    ],
)
def test_bad_targets(model, changes, message):
    model.train()
    try:
        with pytest.raises(UserError, match=message):
            model([sample(40, 50) | changes])
    finally:
        model.eval()


@pytest.mark.parametrize("images", [PICTURE, PICTURE[None, :2], PICTURE[None].numpy(), PICTURE[None, :, :0], None])
def test_bad_images_of_predict(model, images):
    with pytest.raises(UserError, match=r"images must be a tensor \(B, 3, H, W\) of integers or floats"):
        model.predict(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float64])
@torch.no_grad()
def test_images_of_any_real_type_and_layout(model, dtype):
    image = sample(40, 50)["image"]
    interleaved = image.to(dtype).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    (expected,), (found,) = model([{"image": image}]), model([{"image": interleaved, "height": np.int64(40)}])
    assert torch.equal(expected["semantic"], found["semantic"])
