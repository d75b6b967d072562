"""Integers in as many bits as they need, row by row.

Shape legend: N rows, K integers of a row.
"""

from __future__ import annotations

import numpy as np


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values_NK: np.ndarray, bits: int) -> np.ndarray:
    """Integers below 2^bits -> uint8 [N, packed_bytes(K, bits)]."""
    n, k = values_NK.shape
    width = _width(bits)
    octets = values_NK.astype(f">u{width // 8}").view(np.uint8).reshape(n, k, width // 8)
    wide = np.unpackbits(octets, axis=-1)[..., width - bits :]
    return np.packbits(wide.reshape(n, k * bits), axis=1)


def unpack(data: np.ndarray, bits: int, k: int) -> np.ndarray:
    """The reverse of `pack`: int64 [N, K]."""
    n, width = len(data), _width(bits)
    wide = np.zeros((n, k, width), dtype=np.uint8)
    wide[..., width - bits :] = np.unpackbits(data, axis=1, count=k * bits).reshape(n, k, bits)
    return np.packbits(wide, axis=-1).view(f">u{width // 8}")[..., 0].astype(np.int64)


def _width(bits: int) -> int:
    assert 0 <= bits <= 32
    return 8 if bits <= 8 else 16 if bits <= 16 else 32


class EliasFano:
    """K ascending integers below `bound`, in K (2 + log2(bound / K)) bits at most.

    Elias, Efficient storage and retrieval by content and address of static files, 1974; Fano, On
    the number of bits required to implement an associative memory, 1971. The low bits of each are
    kept as they are; the high ones in unary: bit (high + place) is set for each.
    """

    def __init__(self, k: int, bound: int) -> None:
        self.k = k
        self.low_bits = max(0, (bound // k).bit_length() - 1)
        self.high_length = k + ((bound - 1) >> self.low_bits)
        self.low_bytes = packed_bytes(k, self.low_bits)
        self.num_bytes = self.low_bytes + packed_bytes(self.high_length, 1)

    def encode(self, ids_NK: np.ndarray) -> np.ndarray:
        """uint8 [N, num_bytes]; the same integer may come several times."""
        low_NK = ids_NK & ((1 << self.low_bits) - 1)
        high = np.zeros((len(ids_NK), self.high_length), dtype=np.uint8)
        np.put_along_axis(high, (ids_NK >> self.low_bits) + np.arange(self.k), 1, axis=1)
        return np.concatenate([pack(low_NK, self.low_bits), np.packbits(high, axis=1)], axis=1)

    def decode(self, data: np.ndarray) -> np.ndarray:
        """The reverse: int64 [N, K]."""
        low, high = np.split(data, [self.low_bytes], axis=1)
        set_bits = np.nonzero(np.unpackbits(high, axis=1, count=self.high_length))[1]
        high_NK = set_bits.reshape(len(data), self.k) - np.arange(self.k)
        return (high_NK << self.low_bits) | unpack(low, self.low_bits, self.k)
