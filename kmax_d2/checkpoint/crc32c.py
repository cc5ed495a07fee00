"""CRC-32C, the checksum of TensorFlow's checkpoints, at more than a gigabyte per second in NumPy."""

from __future__ import annotations

import functools

import numpy as np

# x^32 + x^28 + ... + 1, Castagnoli's polynomial. As everywhere here, the lowest bit is the highest power.
_POLYNOMIAL = 0x82F63B78

# x^5685 + x^1362 + x^426 + 1 is a multiple of the polynomial, found by search. Its eighth power has the same exponents
# times 8, so a byte at position i may be added (XOR) to those at i + 4323, i + 5259 and i + 5685 instead: it stays the
# same modulo the polynomial, and many bytes move in one operation.
_DEGREE = 5685
_SHIFTS = (_DEGREE - 1362, _DEGREE - 426, _DEGREE)

# A CRC begins with a register of ones. These bytes bring a register of zeros there.
_START = b"\x54\x64\x1f\x64"

_PIECE = 1 << 18  # bytes, few enough for a cache


@functools.cache
def _powers() -> np.ndarray:
    """(8 * 5685,) uint32: what each bit of a message that is as long adds to its remainder."""
    powers = np.empty(8 * _DEGREE, np.uint32)
    power = _POLYNOMIAL
    for i in reversed(range(len(powers))):
        powers[i] = power
        power = power >> 1 ^ (_POLYNOMIAL if power & 1 else 0)
    return powers


def _fold(message: np.ndarray) -> np.ndarray:
    """Brings `message`, uint8 and overwritten, to at most 5685 bytes with the same remainder."""
    end = max(len(message) - _DEGREE, 0)
    for start in range(0, end, _SHIFTS[0]):
        head = message[start : min(start + _SHIFTS[0], end)]
        for shift in _SHIFTS:
            message[start + shift : start + shift + len(head)] ^= head
    return message[end:]


def crc32c(data: bytes | np.ndarray) -> int:
    """The CRC-32C of `data`: bytes, or a contiguous array's bytes in memory order."""
    data = np.frombuffer(data, np.uint8)
    message = np.frombuffer(_START, np.uint8)
    for start in range(0, len(data), _PIECE):
        message = _fold(np.concatenate([message, data[start : start + _PIECE]]))
    bits = np.unpackbits(message, bitorder="little").view(bool)
    return int(np.bitwise_xor.reduce(_powers()[-len(bits) :][bits])) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """As TensorFlow stores it: rotated, and a constant added, so that a checksum of checksums is sound."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
