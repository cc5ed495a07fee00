"""Reads TensorFlow checkpoints ("tensor bundles") without TensorFlow.

`PREFIX.index` is a sorted table in LevelDB's format that gives each tensor's type, shape, and location. The values are
in `PREFIX.data-00000-of-00001` and so on. The formats are public: LevelDB's doc/table_format.md, and TensorFlow's
tensor_bundle.proto, tensor_shape.proto, and types.proto.
"""

import math
from collections.abc import Iterator

import google_crc32c
import numpy as np
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from ..errors import UserError

_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_FOOTER_SIZE = 48
_SNAPPY = 1

_BFLOAT16 = 14
# Floating-point types by TensorFlow's DataType. NumPy has no bfloat16: its values are the upper halves of float32.
_DTYPES = {1: "<f4", 2: "<f8", _BFLOAT16: "<u2", 19: "<f2"}

_VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"

# The fields that are read here: name, number, type. Unsigned types keep damaged values from being negative.
_MESSAGES = {
    "Header": "num_shards 1 uint64, endianness 2 uint64",
    "Dim": "size 1 uint64",
    "Shape": "dims 2 Dim",
    "Entry": "dtype 1 uint64, shape 2 Shape, shard 3 uint64, offset 4 uint64, size 5 uint64, crc32c 6 fixed32, "
    "slices 7 bytes",
}
_REPEATED = ("dims", "slices")


def _message_classes() -> dict[str, type[Message]]:
    """Builds the classes of `_MESSAGES` in a pool of their own, apart from TensorFlow's."""
    file = FileDescriptorProto(name="tensor_bundle.proto", package="kmax_d2", syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, number, kind in map(str.split, fields.split(", ")):
            field = message.field.add(name=name, number=int(number))
            field.label = field.LABEL_REPEATED if name in _REPEATED else field.LABEL_OPTIONAL
            if kind in _MESSAGES:
                field.type, field.type_name = field.TYPE_MESSAGE, f".kmax_d2.{kind}"
            else:
                field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"kmax_d2.{name}")) for name in _MESSAGES}


_CLASSES = _message_classes()


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """Computes the CRC-32C of contiguous `data` as TensorFlow stores it: rotated, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varints(data: bytes, position: int, count: int) -> list[int]:
    """Reads `count` numbers, seven bits per byte, lowest first; also returns the position after them."""
    values = []
    for _ in range(count):
        value = shift = 0
        while data[position] & 0x80:
            value |= (data[position] & 0x7F) << shift
            shift += 7
            position += 1
        values.append(value | data[position] << shift)
        position += 1
    return [*values, position]


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of one block of the table."""
    block, compression = table[offset : offset + size], table[offset + size : offset + size + 1]
    checksum = table[offset + size + 1 : offset + size + 5]
    if masked_crc32c(block + compression) != int.from_bytes(checksum, "little"):
        raise ValueError(f"the checksum of its block at byte {offset} is wrong")
    if compression[0] == _SNAPPY:
        raise UserError("its index is compressed with Snappy, which is not supported: write it uncompressed")
    # The restart points at the end, and their count, serve a search; a full scan skips them.
    end = size - 4 * (1 + int.from_bytes(block[-4:], "little"))
    key, position = b"", 0
    while position < end:
        shared, unshared, length, position = _varints(block, position, 3)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def _table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields all keys and values of a table."""
    if not table.endswith(_MAGIC):
        raise ValueError("it is not the index of a TensorFlow checkpoint, or it is cut short")
    # Offset and size of the meta index, which is empty in a checkpoint, and of the index of blocks.
    _, _, offset, size, _ = _varints(table[-_FOOTER_SIZE:], 0, 4)
    for _, handle in _block(table, offset, size):
        offset, size, _ = _varints(handle, 0, 2)
        yield from _block(table, offset, size)


def _read_index(prefix: str) -> tuple[int, dict[str, Message]]:
    """Reads the number of shards and every tensor's Entry by its full name."""
    index = f"{prefix}.index"
    try:
        with open(index, "rb") as file:
            table = dict(_table(file.read()))
        if b"" not in table:
            raise ValueError("it has no header")
        header = _CLASSES["Header"].FromString(table.pop(b""))
        # The key of a slice of a partitioned tensor is not text.
        entries = {
            key.decode(errors="backslashreplace"): _CLASSES["Entry"].FromString(value) for key, value in table.items()
        }
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"cannot read the TensorFlow checkpoint {prefix}: {error}") from error
    except (ValueError, IndexError, DecodeError) as error:
        raise UserError(f"{index} is damaged: {error}; download it again") from error
    if header.endianness:
        raise UserError(f"cannot read the TensorFlow checkpoint {prefix}: it was written on a big-endian machine")
    return header.num_shards, entries


def _map(shard: str) -> np.memmap:
    """Maps a file's bytes copy-on-write."""
    try:
        return np.memmap(shard, np.uint8, "c")
    except FileNotFoundError as error:
        raise UserError(f"{shard} is missing: put it beside the checkpoint's index or download both again") from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"cannot read {shard}: {error}") from error


def _tensor(shard: np.memmap, name: str, entry: Message) -> np.ndarray:
    """Views a floating-point tensor in a mapped shard and verifies its checksum; bfloat16 becomes float32."""
    if entry.slices:
        raise UserError(f"{shard.filename}: {name} is stored in slices, which is not supported: save it whole")
    shape = tuple(dim.size for dim in entry.shape.dims)
    data = shard[entry.offset : entry.offset + entry.size]
    if len(data) < entry.size:
        raise UserError(
            f"{shard.filename} is cut short: it has {len(shard)} bytes, but {name} ends at byte "
            f"{entry.offset + entry.size}; download it again"
        )
    if len(data) != math.prod(shape) * np.dtype(_DTYPES[entry.dtype]).itemsize:
        raise UserError(f"the index beside {shard.filename} is damaged: it gives {len(data)} bytes to {name} {shape}")
    if masked_crc32c(data) != entry.crc32c:
        raise UserError(f"{shard.filename} is damaged: the checksum of {name} is wrong; download it again")
    array = np.require(data.view(_DTYPES[entry.dtype]), requirements="A").reshape(shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if entry.dtype == _BFLOAT16 else array


def read_variables(prefix: str) -> dict[str, np.ndarray]:
    """Reads the variables of the model in a TensorFlow checkpoint.

    These are the floating-point variables (step counters are integers) except the optimizer's. Raises UserError if a
    file is missing, damaged, or of an unsupported form of the format.

    Args:
        prefix: the path of its files up to ".index", such as "kmax_resnet50_coco_train/ckpt-150000".

    Returns:
        Arrays by official name, such as "encoder/_stem/_conv/kernel". They are views of the files' pages, except where
        a tensor is not aligned; writing to them does not change the files.
    """
    num_shards, entries = _read_index(prefix)
    shards: dict[int, np.memmap] = {}  # each holds a file open, and their number is limited
    variables = {}
    for name, entry in entries.items():
        is_model = not (name.startswith("optimizer/") or "/.OPTIMIZER_SLOT/" in name)
        if is_model and name.endswith(_VARIABLE) and entry.dtype in _DTYPES:
            if entry.shard not in shards:
                shards[entry.shard] = _map(f"{prefix}.data-{entry.shard:05d}-of-{num_shards:05d}")
            variables[name.removesuffix(_VARIABLE)] = _tensor(shards[entry.shard], name, entry)
    return variables
