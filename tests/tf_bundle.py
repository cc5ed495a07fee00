"""Writes TensorFlow checkpoints ("tensor bundles") byte by byte, sound or faulty, without TensorFlow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
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
    """Computes CRC-32C as textbooks do, byte by byte."""
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
    """Builds one block of a table, with its trailer."""
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
    """Builds a table: data blocks, an empty meta index, and the index."""
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
    """Builds a BundleEntryProto; zeros are left out, as TensorFlow does."""
    dims = b"".join(field(2, field(1, size) if size else b"") for size in shape)
    data = field(1, dtype) + field(2, dims)
    for number, value in ((3, shard), (4, offset), (5, len(content))):
        data += field(number, value) if value else b""
    return data + varint(6 << 3 | 5) + masked(content) + extra


def header(num_shards: int, endianness: bytes = b"") -> bytes:
    return field(1, num_shards) + endianness + field(3, field(1, 1))


def write_bundle(prefix: Path, tensors: dict[str, tuple[int, np.ndarray]], num_shards: int = 1) -> None:
    """Writes tensors, name -> (shard, array), one after the other without gaps."""
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
