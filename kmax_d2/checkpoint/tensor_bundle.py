"""Reads TensorFlow's checkpoints ("tensor bundles") without TensorFlow.

`PREFIX.index` is a sorted table in LevelDB's format: of each tensor its type, shape and place. The numbers lie in
`PREFIX.data-00000-of-00001` and so on. The formats are public: LevelDB's doc/table_format.md, TensorFlow's
tensor_bundle.proto and types.proto.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .crc32c import masked_crc32c

_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_FOOTER_SIZE = 48
_TRAILER_SIZE = 5  # of a block: a byte for its compression, then the checksum
_SNAPPY = 1

_BFLOAT16 = 14
_FLOATING = (1, 2, _BFLOAT16, 19)
# TensorFlow's numbers of types. NumPy has no bfloat16: it is read as the upper halves of float32.
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", _BFLOAT16: "<u2", 19: "<f2"}

_VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"


class _Entry(NamedTuple):
    """Where a tensor lies, and as what; `offset` and `size` in bytes."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    sliced: bool


def _take(data: bytes, start: int, size: int) -> bytes:
    if start + size > len(data):
        raise ValueError("it is cut short")
    return data[start : start + size]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits a byte, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = _take(data, position, 1)[0]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def _handle(data: bytes, position: int) -> tuple[int, int, int]:
    """A block's offset and size in bytes, and the position after them."""
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return offset, size, position


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block of the table."""
    block = _take(table, offset, size)
    trailer = _take(table, offset + size, _TRAILER_SIZE)
    if masked_crc32c(block + trailer[:1]) != int.from_bytes(trailer[1:], "little"):
        raise ValueError(f"the checksum of its block at byte {offset} is wrong")
    if trailer[0] == _SNAPPY:
        raise UserError("its index is compressed with Snappy, which is not read here: write it uncompressed")
    if trailer[0]:
        raise ValueError(f"its block at byte {offset} has the unknown compression {trailer[0]}")
    # The list of restart points and its length at the end serve a search, not a full scan.
    end = size - 4 * (1 + int.from_bytes(block[-4:], "little"))
    if end < 0:
        raise ValueError(f"its block at byte {offset} has no room for its restart points")
    key, position = b"", 0
    while position < end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        if shared > len(key):
            raise ValueError(f"its block at byte {offset} has a key that continues none")
        key = key[:shared] + _take(block, position, unshared)
        position += unshared
        yield key, _take(block, position, length)
        position += length


def _table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All keys and values of a table."""
    footer = table[-_FOOTER_SIZE:]
    if len(footer) < _FOOTER_SIZE or not footer.endswith(_MAGIC):
        raise ValueError("it is no index of a TensorFlow checkpoint, or cut short")
    _, _, position = _handle(footer, 0)  # of the meta index, empty in a checkpoint
    offset, size, _ = _handle(footer, position)
    for _, handle in _block(table, offset, size):
        offset, size, _ = _handle(handle, 0)
        yield from _block(table, offset, size)


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """The values of a serialised protocol buffer by field number."""
    fields = defaultdict(list)
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
        elif kind == 2:
            size, position = _varint(message, position)
            value = _take(message, position, size)
            position += size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value = int.from_bytes(_take(message, position, size), "little")
            position += size
        else:
            raise ValueError(f"it holds a field of the unknown kind {kind}")
        fields[tag >> 3].append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], field: int) -> int:
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"its field {field} is no number")
    return value


def _messages(fields: dict[int, list[int | bytes]], field: int) -> list[dict[int, list[int | bytes]]]:
    values = fields.get(field, [])
    if not all(isinstance(value, bytes) for value in values):
        raise ValueError(f"its field {field} is no message")
    return [_fields(value) for value in values]


def _entry(value: bytes, num_shards: int) -> _Entry:
    """Parses a BundleEntryProto."""
    fields = _fields(value)
    shape = tuple(_number(dim, 1) for message in _messages(fields, 2) for dim in _messages(message, 2))
    dtype, shard, offset, size, checksum = (_number(fields, field) for field in (1, 3, 4, 5, 6))
    sliced = 7 in fields
    if shard >= num_shards:
        raise ValueError(f"it places a tensor in shard {shard} of {num_shards}")
    if dtype in _DTYPES and not sliced and size != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ValueError(f"it gives {size} bytes to a tensor of shape {shape}")
    return _Entry(dtype, shape, shard, offset, size, checksum, sliced)


class TensorBundle:
    """A TensorFlow checkpoint, read tensor by tensor.

    Args:
        prefix: the path of its files up to ".index", such as "kmax_resnet50_coco_train/ckpt-150000".

    Raises:
        UserError: a file is missing or damaged. The numbers themselves are checked when they are read.
    """

    def __init__(self, prefix: str):
        self._maps: dict[str, np.ndarray] = {}
        index = f"{prefix}.index"
        try:
            with open(index, "rb") as file:
                table = dict(_table(file.read()))
            header = _fields(table.pop(b""))
            if _number(header, 2):
                raise UserError("it was written on a big-endian machine, which is not read here: convert it there")
            self._num_shards = _number(header, 1)
            # A slice of a partitioned tensor has no name of text.
            self._entries = {
                key.decode(errors="backslashreplace"): _entry(value, self._num_shards) for key, value in table.items()
            }
        except FileNotFoundError as error:
            raise UserError(
                f"{index} is missing: give a TensorFlow checkpoint as its path up to '.index', such as DIR/ckpt-150000"
            ) from error
        except OSError as error:
            raise UserError(f"cannot read {index}: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"cannot read the TensorFlow checkpoint {prefix}: {error}") from error
        except KeyError as error:
            raise UserError(f"{index} is damaged: it has no header; download it again") from error
        except ValueError as error:
            raise UserError(f"{index} is damaged: {error}; download it again") from error
        self._prefix = prefix
        self._check_shards()

    def _shard(self, shard: int) -> str:
        return f"{self._prefix}.data-{shard:05d}-of-{self._num_shards:05d}"

    def _check_shards(self) -> None:
        """Raises UserError where a shard is missing or ends before one of its tensors does."""
        last = {}
        for name, entry in self._entries.items():
            end = entry.offset + entry.size
            last[entry.shard] = max(last.get(entry.shard, (0, "")), (end, name))
        for shard, (end, name) in sorted(last.items()):
            path = self._shard(shard)
            if not os.path.isfile(path):
                raise UserError(f"{path} is missing: put it beside {self._prefix}.index or download both again")
            if end > os.path.getsize(path):
                raise UserError(
                    f"{path} is cut short: it has {os.path.getsize(path)} bytes, but {name} ends at byte {end}; "
                    "download it again"
                )

    def names(self) -> list[str]:
        """The names of all tensors, sorted, those of text and of the optimizer too."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`. Raises KeyError where there is none."""
        return self._entries[name].shape

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor and verifies its checksum.

        Args:
            name: one of :meth:`names`.

        Returns:
            The tensor with its shape and type; bfloat16 comes as float32. It is writable, yet writing does not change
            the file: the memory is the file's own pages, mapped copy-on-write. Only a tensor that is not aligned
            in the file is copied.

        Raises:
            KeyError: there is no such tensor.
            UserError: its checksum is wrong, or it is of a kind that is not read, as text.
        """
        entry = self._entries[name]
        path = self._shard(entry.shard)
        if entry.sliced:
            raise UserError(f"{self._prefix}: {name} is stored in slices, which are not read here: save it whole")
        if entry.dtype not in _DTYPES:
            raise UserError(f"{self._prefix}: {name} is of TensorFlow's type {entry.dtype}, which is not read here")
        # Nothing cannot be mapped.
        data = self._map(path)[entry.offset : entry.offset + entry.size] if entry.size else np.empty(0, np.uint8)
        if masked_crc32c(data) != entry.checksum:
            raise UserError(f"{path} is damaged: the checksum of {name} is wrong; download it again")
        array = np.require(data.view(_DTYPES[entry.dtype]), requirements="A").reshape(entry.shape)
        return (array.astype(np.uint32) << 16).view(np.float32) if entry.dtype == _BFLOAT16 else array

    def _map(self, path: str) -> np.ndarray:
        """A shard's bytes. One map serves all its tensors: each map holds a file open, and their number is limited."""
        if path not in self._maps:
            try:
                self._maps[path] = np.memmap(path, np.uint8, "c")
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {path}: {error}") from error
        return self._maps[path]

    def variables(self) -> Mapping[str, np.ndarray]:
        """The model's variables by their official names, such as "encoder/_stem/_conv/kernel", read when asked for.

        These are the floating-point variables, for step counters are integers, without the optimizer's.
        """
        return _Variables(
            self,
            {
                name.removesuffix(_VARIABLE): name
                for name, entry in self._entries.items()
                if name.endswith(_VARIABLE)
                and entry.dtype in _FLOATING
                and "/.OPTIMIZER_SLOT/" not in name
                and not name.startswith("optimizer/")
            },
        )


class _Variables(Mapping):
    """Tensors of a bundle under other names; each is read when asked for."""

    def __init__(self, bundle: TensorBundle, names: dict[str, str]):
        self._bundle = bundle
        self._names = names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._bundle.read(self._names[name])

    def __contains__(self, name: object) -> bool:  # Mapping's own reads the tensor
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
