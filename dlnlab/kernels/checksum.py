"""The checksum of every record in TensorBoard's event files, compiled: TensorBoard's own takes most of writing one."""

import numpy as np
from numba import njit


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and shifted as event files have it."""
    crc = int(_crc32c(np.frombuffer(data, np.uint8)))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _remainders() -> np.ndarray:
    """Of every byte, modulo the polynomial (reflected)."""
    found = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        found = found >> 1 ^ np.where(found & 1, np.uint32(0x82F63B78), np.uint32(0))
    return found


_TABLE = _remainders()


@njit(cache=True)
def _crc32c(data):
    crc = np.uint32(0xFFFFFFFF)
    for byte in data:
        crc = _TABLE[(crc ^ byte) & np.uint32(0xFF)] ^ crc >> np.uint32(8)
    return crc ^ np.uint32(0xFFFFFFFF)
