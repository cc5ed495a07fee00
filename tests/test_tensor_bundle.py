"""TensorFlow checkpoints are read bit for bit, and damage is reported."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tf_bundle import DTYPES, SUFFIX, entry, field, header, masked, table, write_bundle, write_entry

from kmax_d2.checkpoint.tensor_bundle import masked_crc32c, read_variables
from kmax_d2.errors import UserError

CHECKPOINT = Path(__file__).parent / "data" / "tf_checkpoint"
KERNEL = "transformer_mask_head/_conv/kernel"
X = f"x{SUFFIX}"


def is_of_model(name: str) -> bool:
    heads = ("semantic_last_layer/", "transformer_class_head/", "transformer_mask_head/", "pixel_space_")
    return name.startswith(heads) and ".OPTIMIZER_SLOT" not in name


def expected() -> dict[str, np.ndarray]:
    """The model's variables in TensorFlow's checkpoint; the file also has counters and the optimizer's."""
    with np.load(CHECKPOINT / "expected.npz") as arrays:
        everything = {name.replace("|", "/"): array for name, array in arrays.items()}
    return {name.removesuffix(SUFFIX): everything[name] for name in everything if is_of_model(name)}


def assert_same(actual: np.ndarray, array: np.ndarray) -> None:
    assert (actual.dtype, actual.shape) == (array.dtype, array.shape)
    assert actual.tobytes() == array.tobytes()


@pytest.fixture
def copy(tmp_path) -> Path:
    """The prefix of a copy of TensorFlow's checkpoint that a test may damage."""
    for file in CHECKPOINT.glob("ckpt-1.*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "ckpt-1"


@pytest.fixture
def index(copy) -> Path:
    return copy.with_name("ckpt-1.index")


@pytest.fixture
def shard(copy) -> Path:
    return copy.with_name("ckpt-1.data-00000-of-00001")


@pytest.fixture
def two_shards(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A bundle of two shards and several blocks, with many types and unaligned tensors; its prefix and arrays."""
    rng = np.random.default_rng(0)
    arrays = {}
    for i, dtype in enumerate(DTYPES):
        for j, shape in enumerate([(), (3,), (2, 5), (0, 4), (1, 3, 1, 7)]):
            arrays[f"part{i % 3}/{dtype}/{j}{SUFFIX}"] = (rng.standard_normal(shape) * 50).astype(dtype)
    prefix = tmp_path / "model.ckpt-7"
    write_bundle(prefix, {name: (i % 2, array) for i, (name, array) in enumerate(arrays.items())}, num_shards=2)
    return prefix, arrays


def test_reads_a_checkpoint_of_tensorflow_bit_for_bit():
    variables = read_variables(str(CHECKPOINT / "ckpt-1"))
    arrays = expected()
    assert len(arrays) == 17
    assert list(variables) == sorted(arrays)
    for name, array in arrays.items():
        assert_same(variables[name], array)


def test_writing_to_an_array_leaves_the_file(copy, shard):
    content = shard.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that are not writable
        tensor = torch.from_numpy(read_variables(str(copy))[KERNEL])
    tensor.zero_()
    assert shard.read_bytes() == content


def test_an_aligned_tensor_is_not_copied():
    array = read_variables(str(CHECKPOINT / "ckpt-1"))[KERNEL]
    assert isinstance(array, np.memmap) and not array.flags.owndata


def test_reads_several_shards_and_blocks(two_shards):
    prefix, arrays = two_shards
    arrays = {name.removesuffix(SUFFIX): array for name, array in arrays.items() if array.dtype.kind == "f"}
    variables = read_variables(str(prefix))
    assert len(arrays) == 15
    assert list(variables) == sorted(arrays)
    for name, array in arrays.items():
        assert_same(variables[name], array)
        assert variables[name].flags.aligned


def test_variables_of_the_optimizer_are_left_out(tmp_path):
    one = (0, np.ones(1, np.float32))
    names = [X, f"optimizer/x{SUFFIX}", f"x/.OPTIMIZER_SLOT/optimizer/m{SUFFIX}", "x/.ATTRIBUTES/OTHER"]
    write_bundle(tmp_path / "c", dict.fromkeys(names, one))
    assert list(read_variables(str(tmp_path / "c"))) == ["x"]


def test_reads_bfloat16_as_float32(tmp_path):
    values = torch.tensor([[1.0, -2.5, 3e38], [1e-30, 0.0, torch.inf]], dtype=torch.bfloat16)
    content = values.view(torch.int16).numpy().tobytes()
    write_entry(tmp_path / "c", X, entry(14, (2, 3), 0, 0, content), content)
    assert_same(read_variables(str(tmp_path / "c"))["x"], values.float().numpy())


@pytest.mark.parametrize("length", [0, 1, 9, 4096, (1 << 18) + 3])
def test_masked_crc32c(length):
    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    assert masked_crc32c(data) == masked_crc32c(data.tobytes()) == int.from_bytes(masked(data.tobytes()), "little")


def test_crc32c_of_the_standard_vector():
    crc = 0xE3069283
    assert masked_crc32c(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_no_index(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*ckpt-9\.index: No such file"):
        read_variables(str(tmp_path / "ckpt-9"))


def test_no_shard(two_shards):
    prefix, _ = two_shards
    prefix.with_name("model.ckpt-7.data-00001-of-00002").unlink()
    with pytest.raises(UserError, match=r"model\.ckpt-7\.data-00001-of-00002 is missing: .* download"):
        read_variables(str(prefix))


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda content, size=size: content[:size] for size in (0, 20, 47, 48, 1000, 2030)),
        lambda content: content[-8:],  # only its mark
        lambda content: b"<html>404: not found</html>" * 100,
    ],
)
def test_what_is_no_whole_index(copy, index, damage):
    index.write_bytes(damage(index.read_bytes()))
    reason = "it is not the index of a TensorFlow checkpoint, or it is cut short|the checksum of its block"
    with pytest.raises(UserError, match=rf"ckpt-1\.index is damaged: ({reason}).*; download it again"):
        read_variables(str(copy))


@pytest.mark.parametrize("size", [0, 1, 42200])
def test_truncated_shard(copy, shard, size):
    shard.write_bytes(shard.read_bytes()[:size])
    message = rf"is cut short: it has {size} bytes, but .* ends at byte \d+; download" if size else "cannot read"
    with pytest.raises(UserError, match=message):
        read_variables(str(copy))


def test_wrong_checksum_in_the_index(copy, index):
    content = bytearray(index.read_bytes())
    content[300] ^= 4
    index.write_bytes(content)
    with pytest.raises(UserError, match=r"ckpt-1\.index is damaged: the checksum of its block at byte 0 is wrong"):
        read_variables(str(copy))


def test_wrong_checksum_of_a_tensor(copy, shard):
    content = bytearray(shard.read_bytes())
    content[42196 + 4 * 256 * 128 - 1] ^= 128  # the last byte of the mask head's kernel
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard.name} is damaged: the checksum of {KERNEL}.* is wrong; download it"):
        read_variables(str(copy))


EXTENTS = field(7, field(1, field(1, 0) + field(2, 2)))


@pytest.mark.parametrize(
    ("shape", "shard_id", "offset", "more", "head", "message"),
    [
        ((2,), 0, 1, b"", None, r"00000-of-00001 is cut short: it has 8 bytes, but x/.* ends at byte 9"),
        ((2,), 1, 0, b"", None, r"c\.data-00001-of-00001 is missing"),
        ((3,), 0, 0, b"", None, r"the index beside .* is damaged: it gives 8 bytes to x/.* \(3,\)"),
        ((2,), 0, 0, b"", header(1, field(2, 1)), "big-endian"),
        ((4, 2), 0, 0, EXTENTS, None, r"x/.* is stored in slices"),
    ],
)
def test_entries_that_cannot_be_read(tmp_path, shape, shard_id, offset, more, head, message):
    content = bytes(0 if more else 8)
    heads = [] if head is None else [head]
    write_entry(tmp_path / "c", X, entry(1, shape, shard_id, offset, content, more), content or bytes(1), *heads)
    with pytest.raises(UserError, match=message):
        read_variables(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table({b"": header(1)}, compression=1), "compressed with Snappy"),
        (table({b"x": entry(1, (2,), 0, 0, bytes(8))}), r"c\.index is damaged: it has no header"),
    ],
)
def test_indexes_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "c.index").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_variables(str(tmp_path / "c"))


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_gives_an_error_or_the_right_values(copy, index, shard, seed):
    rng = np.random.default_rng(seed)
    original = {path: path.read_bytes() for path in (index, shard)}
    arrays = expected()
    errors = 0
    for trial in range(80):
        path = (index, shard)[trial % 2]
        content = bytearray(original[path])
        if trial % 8 < 2:
            del content[rng.integers(len(content)) :]
        else:
            # Half of the damage to the index is to its footer, which has no checksum.
            first = len(content) - 48 if path == index and trial % 4 < 2 else 0
            for position in rng.integers(first, len(content), rng.integers(1, 4)):
                content[position] = rng.integers(256)
        path.write_bytes(content)
        try:
            variables = read_variables(str(copy))
        except UserError as error:
            assert "\n" not in str(error)
            errors += 1
        else:
            assert variables.keys() == arrays.keys()
            for name, array in arrays.items():
                assert_same(variables[name], array)
        path.write_bytes(original[path])
    assert errors > 40


def test_malformed_index_with_right_checksums(tmp_path):
    """A faulty program might write one: every block is whole, but its content is not. Errors are UserErrors."""
    rng = np.random.default_rng(0)
    prefix = tmp_path / "c"
    shapes = {f"x{i}{SUFFIX}": shape for i, shape in enumerate([(), (130,), (0, 3), (1, 2, 64)])}
    write_bundle(prefix, {name: (0, np.zeros(shape, np.float32)) for name, shape in shapes.items()})
    entries = {name.encode(): entry(1, shape, 0, 0, bytes(4 * int(np.prod(shape)))) for name, shape in shapes.items()}
    entries[b""] = header(1)
    errors = 0
    for trial in range(300):
        key = sorted(entries)[trial % len(entries)]
        value = bytearray(entries[key])
        value[rng.integers(len(value))] = rng.integers(256)
        prefix.with_suffix(".index").write_bytes(table({**entries, key: bytes(value)}))
        try:
            variables = read_variables(str(prefix))
        except UserError as error:
            assert "\n" not in str(error)
            errors += 1
        else:
            assert all(not array.any() for array in variables.values())
    assert 200 < errors < 300
