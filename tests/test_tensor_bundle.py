"""TensorFlow's checkpoints are read bit for bit, and damage is told."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from kmax_d2.checkpoint.crc32c import crc32c
from kmax_d2.checkpoint.tensor_bundle import TensorBundle
from kmax_d2.errors import UserError

CHECKPOINT = Path(__file__).parent / "data" / "tf_checkpoint"
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
KERNEL = f"transformer_mask_head/_conv/kernel{SUFFIX}"
DTYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "int64": 9, "bool": 10}
DTYPES |= {"float16": 19}


def _plain_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


PLAIN_TABLE = _plain_table()


def plain_crc32c(data: bytes) -> int:
    """The textbook's loop, byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ PLAIN_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = plain_crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")


def varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + varint(value >> 7)) if value > 0x7F else bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(entries: list[tuple[bytes, bytes]], restart_interval: int = 4, compression: int = 0) -> bytes:
    """A block of a table with its trailer."""
    data, restarts, previous = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart_interval:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        else:
            restarts.append(len(data))
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    for number in [*restarts, len(restarts)]:
        data += number.to_bytes(4, "little")
    data += bytes([compression])
    return data + masked(data)


def table(entries: dict[bytes, bytes], entries_per_block: int = 7, compression: int = 0) -> bytes:
    """A table of several data blocks, an empty meta index and the index."""
    data, index = b"", []

    def append(content: bytes) -> bytes:
        nonlocal data
        handle = varint(len(data)) + varint(len(content) - 5)
        data += content
        return handle

    ordered = sorted(entries.items())
    for i in range(0, len(ordered), entries_per_block):
        part = ordered[i : i + entries_per_block]
        index.append((part[-1][0], append(block(part, compression=compression))))
    footer = append(block([])) + append(block(index, restart_interval=1))
    return data + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def entry(dtype: int, shape: tuple[int, ...], shard: int, offset: int, content: bytes, extra: bytes = b"") -> bytes:
    """A BundleEntryProto; zeros are left out, as TensorFlow does."""
    dims = b"".join(field(2, field(1, size) if size else b"") for size in shape)
    data = field(1, dtype) + field(2, dims)
    for number, value in ((3, shard), (4, offset), (5, len(content))):
        data += field(number, value) if value else b""
    return data + varint(6 << 3 | 5) + masked(content) + extra


def header(num_shards: int, endianness: bytes = b"") -> bytes:
    return field(1, num_shards) + endianness + field(3, field(1, 1))


def write_bundle(prefix: Path, tensors: dict[str, tuple[int, np.ndarray]], num_shards: int = 1) -> None:
    """Writes each of `tensors`, name -> (shard, array), one after the other without gaps."""
    shards = [b""] * num_shards
    entries = {b"": header(num_shards)}
    for name, (shard, array) in tensors.items():
        content = array.tobytes()
        entries[name.encode()] = entry(DTYPES[array.dtype.name], array.shape, shard, len(shards[shard]), content)
        shards[shard] += content
    Path(f"{prefix}.index").write_bytes(table(entries))
    for i, content in enumerate(shards):
        Path(f"{prefix}.data-{i:05d}-of-{num_shards:05d}").write_bytes(content)


def write_entry(prefix: Path, name: str, value: bytes, content: bytes, head: bytes | None = None) -> None:
    Path(f"{prefix}.index").write_bytes(table({b"": head or header(1), name.encode(): value}))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(content)


def expected() -> dict[str, np.ndarray]:
    with np.load(CHECKPOINT / "expected.npz") as arrays:
        return {name.replace("|", "/"): array for name, array in arrays.items()}


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
    """A bundle of two shards and several blocks, with every type and unaligned tensors; its prefix and arrays."""
    rng = np.random.default_rng(0)
    arrays = {}
    for i, dtype in enumerate(DTYPES):
        for shape in ((), (3,), (2, 5), (0, 4), (1, 3, 1, 7)):
            arrays[f"part{i % 3}/{dtype}/{len(shape)}"] = (rng.standard_normal(shape) * 50).astype(dtype)
    prefix = tmp_path / "model.ckpt-7"
    write_bundle(prefix, {name: (i % 2, array) for i, (name, array) in enumerate(arrays.items())}, num_shards=2)
    return prefix, arrays


def test_reads_a_checkpoint_of_tensorflow_bit_for_bit():
    bundle = TensorBundle(str(CHECKPOINT / "ckpt-1"))
    arrays = expected()
    assert bundle.names() == sorted([*arrays, "_CHECKPOINTABLE_OBJECT_GRAPH"])
    for name, array in arrays.items():
        assert bundle.shape(name) == array.shape
        assert_same(bundle.read(name), array)


def test_variables_are_those_of_the_model():
    variables = TensorBundle(str(CHECKPOINT / "ckpt-1")).variables()
    batch_norm = ("beta", "gamma", "moving_mean", "moving_variance")
    names = [f"pixel_space_{part}_batch_norm/{kind}" for part in ("feature", "mask") for kind in batch_norm]
    names += [f"transformer_mask_head/_batch_norm/{kind}" for kind in batch_norm]
    names += [
        f"{head}/{kind}"
        for head in ("semantic_last_layer", "transformer_class_head/_conv")
        for kind in ("bias", "kernel")
    ]
    names += ["transformer_mask_head/_conv/kernel"]
    assert list(variables) == sorted(names)
    assert len(variables) == len(names) == 17
    assert "save_counter" not in variables
    arrays = expected()
    for name, array in variables.items():
        assert_same(array, arrays[name + SUFFIX])


def test_variables_are_read_only_when_asked_for(copy, shard):
    variables = TensorBundle(str(copy)).variables()
    content = bytearray(shard.read_bytes())
    content[42196] ^= 1  # the mask head's kernel
    shard.write_bytes(content)
    assert "transformer_mask_head/_conv/kernel" in variables
    assert variables["semantic_last_layer/bias"].shape == (19,)
    with pytest.raises(UserError, match="transformer_mask_head/_conv/kernel"):
        variables["transformer_mask_head/_conv/kernel"]


def test_writing_to_an_array_leaves_the_file(copy, shard):
    content = shard.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that are not writable
        tensor = torch.from_numpy(TensorBundle(str(copy)).read(KERNEL))
    tensor.zero_()
    assert shard.read_bytes() == content


def test_an_aligned_tensor_is_not_copied():
    array = TensorBundle(str(CHECKPOINT / "ckpt-1")).read(KERNEL)
    assert isinstance(array, np.memmap) and not array.flags.owndata


def test_reads_several_shards_and_blocks(two_shards):
    prefix, arrays = two_shards
    bundle = TensorBundle(str(prefix))
    assert bundle.names() == sorted(arrays)
    for name, array in arrays.items():
        assert_same(bundle.read(name), array)
        assert bundle.read(name).flags.aligned


def test_reads_bfloat16_as_float32(tmp_path):
    values = torch.tensor([[1.0, -2.5, 3e38], [1e-30, 0.0, torch.inf]], dtype=torch.bfloat16)
    content = values.view(torch.int16).numpy().tobytes()
    write_entry(tmp_path / "c", f"x{SUFFIX}", entry(14, (2, 3), 0, 0, content), content)
    assert_same(TensorBundle(str(tmp_path / "c")).variables()["x"], values.float().numpy())


def test_crc32c_of_the_standard_vector():
    assert crc32c(b"123456789") == plain_crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0


# Around the length that is folded, a step of the folding, and the pieces of a long message.
@pytest.mark.parametrize("length", [5681, 5685, 4323 + 5681, 2 * 4323 + 5681, 1 << 18, (1 << 19) + 5681])
def test_crc32c_of_long_messages(length):
    data = np.random.default_rng(length).integers(0, 256, length + 2, dtype=np.uint8).tobytes()
    for size in range(length - 2, length + 3):
        assert crc32c(data[:size]) == plain_crc32c(data[:size]), size


def test_crc32c_of_short_messages():
    data = np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8).tobytes()
    for size in range(301):
        assert crc32c(data[:size]) == plain_crc32c(data[:size]), size


def test_crc32c_leaves_its_data():
    data = np.arange(20000, dtype=np.int32)
    assert crc32c(data) == plain_crc32c(data.tobytes())
    assert np.array_equal(data, np.arange(20000))


def test_no_index(tmp_path):
    with pytest.raises(UserError, match=r"ckpt-9\.index is missing: give .* such as DIR/ckpt-150000"):
        TensorBundle(str(tmp_path / "ckpt-9"))


def test_no_shard(two_shards):
    prefix, _ = two_shards
    prefix.with_name("model.ckpt-7.data-00001-of-00002").unlink()
    with pytest.raises(UserError, match=r"model\.ckpt-7\.data-00001-of-00002 is missing: .* download"):
        TensorBundle(str(prefix))


@pytest.mark.parametrize("size", [0, 20, 47, 48, 1000, 2030])
def test_truncated_index(copy, index, size):
    index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(UserError, match=r"ckpt-1\.index is damaged: it is no index .* or cut short; download it again"):
        TensorBundle(str(copy))


def test_not_a_table(copy, index):
    index.write_bytes(b"<html>404: not found</html>" * 100)
    with pytest.raises(UserError, match=r"ckpt-1\.index is damaged: it is no index of a TensorFlow checkpoint"):
        TensorBundle(str(copy))


def test_truncated_shard(copy, shard):
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00000-of-00001 is cut short: .* 444545 bytes, but .* ends at byte 444546"):
        TensorBundle(str(copy))


def test_shard_truncated_after_opening(copy, shard):
    bundle = TensorBundle(str(copy))
    shard.write_bytes(shard.read_bytes()[:42200])
    with pytest.raises(UserError, match=f"{shard.name} is damaged: the checksum"):
        bundle.read(KERNEL)


def test_wrong_checksum_in_the_index(copy, index):
    content = bytearray(index.read_bytes())
    content[300] ^= 4
    index.write_bytes(content)
    with pytest.raises(UserError, match=r"ckpt-1\.index is damaged: the checksum of its block at byte 0 is wrong"):
        TensorBundle(str(copy))


def test_wrong_checksum_of_a_tensor(copy, shard):
    content = bytearray(shard.read_bytes())
    content[42196 + 4 * 256 * 128 - 1] ^= 128  # the last byte of the mask head's kernel
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard.name} is damaged: the checksum of {KERNEL} is wrong; download it"):
        TensorBundle(str(copy)).read(KERNEL)


def test_tensor_outside_of_its_shard(tmp_path):
    write_entry(tmp_path / "c", "x", entry(1, (2,), 0, 1, bytes(8)), bytes(8))
    with pytest.raises(UserError, match=r"00000-of-00001 is cut short: it has 8 bytes, but x ends at byte 9"):
        TensorBundle(str(tmp_path / "c"))


def test_shard_that_is_not_counted(tmp_path):
    write_entry(tmp_path / "c", "x", entry(1, (2,), 1, 0, bytes(8)), bytes(8))
    with pytest.raises(UserError, match=r"c\.index is damaged: it places a tensor in shard 1 of 1"):
        TensorBundle(str(tmp_path / "c"))


def test_shape_of_another_size(tmp_path):
    write_entry(tmp_path / "c", "x", entry(1, (3,), 0, 0, bytes(8)), bytes(8))
    with pytest.raises(UserError, match=r"c\.index is damaged: it gives 8 bytes to a tensor of shape \(3,\)"):
        TensorBundle(str(tmp_path / "c"))


def test_other_endianness(tmp_path):
    write_entry(tmp_path / "c", "x", entry(1, (2,), 0, 0, bytes(8)), bytes(8), header(1, field(2, 1)))
    with pytest.raises(UserError, match="big-endian"):
        TensorBundle(str(tmp_path / "c"))


def test_compressed_index(tmp_path):
    (tmp_path / "c.index").write_bytes(table({b"": header(1)}, compression=1))
    with pytest.raises(UserError, match="compressed with Snappy"):
        TensorBundle(str(tmp_path / "c"))


def test_no_header(tmp_path):
    (tmp_path / "c.index").write_bytes(table({b"x": entry(1, (2,), 0, 0, bytes(8))}))
    with pytest.raises(UserError, match="has no header"):
        TensorBundle(str(tmp_path / "c"))


def test_slices_and_text_are_not_read(tmp_path):
    extents = field(7, field(1, field(1, 0) + field(2, 2)))
    write_entry(tmp_path / "c", "x", entry(1, (4, 2), 0, 0, b"", extents), b"")
    with pytest.raises(UserError, match="x is stored in slices"):
        TensorBundle(str(tmp_path / "c")).read("x")
    graph = "_CHECKPOINTABLE_OBJECT_GRAPH"
    with pytest.raises(UserError, match=f"{graph} is of TensorFlow's type 7, which is not read"):
        TensorBundle(str(CHECKPOINT / "ckpt-1")).read(graph)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_gives_an_error_or_the_right_numbers(copy, index, shard, seed):
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
            bundle = TensorBundle(str(copy))
            assert len(bundle.names()) == 31
        except UserError:
            errors += 1
        else:
            for name, array in arrays.items():
                try:
                    assert_same(bundle.read(name), array)
                except UserError:
                    errors += 1
        path.write_bytes(original[path])
    assert errors > 50


def test_malformed_index_with_right_checksums(tmp_path):
    """As a faulty program might write it: every block is whole, what it says is not. Errors are UserErrors."""
    rng = np.random.default_rng(0)
    prefix = tmp_path / "c"
    shapes = {f"x{i}": shape for i, shape in enumerate([(), (130,), (0, 3), (1, 2, 64)])}
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
            bundle = TensorBundle(str(prefix))
            for name in bundle.names():
                assert bundle.read(name).shape == bundle.shape(name)
        except UserError:
            errors += 1
    assert 200 < errors < 300
