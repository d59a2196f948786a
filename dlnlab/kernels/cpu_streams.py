"""The integer streams of `dlnlab.streams` inside compiled kernels, bit for bit; normal numbers up to the last bit.

Words are 32 bits held in uint64.
"""

import math

import numpy as np
from numba import njit

REPLACEMENT, SUBSET, EPOCHS = range(3)  # the order of `dlnlab.streams.SAMPLINGS`

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_MASK, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
_FIVE, _SIX = np.uint64(5), np.uint64(6)


@njit(error_model="numpy")
def philox(key0, key1, c0, c1, c2, c3):
    """Four words of Philox-4x32-10; all arguments are uint64 below 2^32."""
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1 = (product1 >> _WORD) ^ c1 ^ key0, product1 & _MASK
        c2, c3 = (product0 >> _WORD) ^ c3 ^ key1, product0 & _MASK
        key0, key1 = (key0 + _W0) & _MASK, (key1 + _W1) & _MASK
    return c0, c1, c2, c3


@njit(error_model="numpy")
def _words(key, position, step):
    """The four words at one position of a step."""
    now = np.uint64(step)
    return philox(np.uint64(key[0]), np.uint64(key[1]), np.uint64(position), np.uint64(0), now & _MASK, now >> _WORD)


@njit(error_model="numpy")
def _below(word, high):
    """A word as an integer in [0, high)."""
    return np.int64((word * np.uint64(high)) >> _WORD)


@njit(error_model="numpy")
def _shuffle(key, step, count, size, order):
    """Put `count` distinct indices out of `size` first in `order`: a partial Fisher-Yates shuffle."""
    for i in range(size):
        order[i] = i
    for first in range(0, count, 4):
        words = _words(key, first // 4, step)
        for i in range(first, min(first + 4, count)):
            pick = i + _below(words[i - first], size - i)
            order[i], order[pick] = order[pick], order[i]


@njit(error_model="numpy")
def draw_rows(sampling, key, start, stop, count, size, rows, order):
    """The mini-batches of the steps start, ..., stop - 1, one after another in `rows`.

    Args:
        sampling: REPLACEMENT, SUBSET or EPOCHS.
        key: The member's sampling key, two words.
        start: First step.
        stop: Step after the last.
        count: Batch size.
        size: Number of samples.
        rows: Filled with (stop - start) count indices.
        order: Scratch (size + 1,). The last entry is the epoch that the rest is the permutation of; -1 before the first
            call, then left alone, so that a permutation is drawn once.
    """
    if sampling == REPLACEMENT and count == 1:
        for step in range(start, stop):  # one word a step: the compiler does several steps at once
            rows[step - start] = _below(_words(key, 0, step)[0], size)
    elif sampling == REPLACEMENT:
        for step in range(start, stop):
            at = (step - start) * count
            for first in range(0, count, 4):
                words = _words(key, first // 4, step)
                for i in range(first, min(first + 4, count)):
                    rows[at + i] = _below(words[i - first], size)
    elif sampling == SUBSET:
        for step in range(start, stop):
            _shuffle(key, step, count, size, order)
            for i in range(count):
                rows[(step - start) * count + i] = order[i]
    else:
        length = size // count
        for step in range(start, stop):
            epoch, place = step // length, step % length
            if order[size] != epoch:
                _shuffle(key, epoch, size, size, order)
                order[size] = epoch
            for i in range(count):
                rows[(step - start) * count + i] = order[place * count + i]


@njit(error_model="numpy")
def draw_normals(key, step, count, std, out, first, stride):
    """Write `std` times `count` standard normal numbers of a step to out[first], out[first + stride], ..."""
    for pair in range((count + 1) // 2):
        w0, w1, w2, w3 = _words(key, pair, step)
        radius = math.sqrt(-2.0 * math.log1p(-_uniform(w0, w1)))
        angle = 2.0 * math.pi * _uniform(w2, w3)
        out[first + 2 * pair * stride] = std * radius * math.cos(angle)
        if 2 * pair + 1 < count:
            out[first + (2 * pair + 1) * stride] = std * radius * math.sin(angle)


@njit(error_model="numpy")
def _uniform(high, low):
    """53 bits of two words as a number in [0, 1)."""
    return (np.float64(np.int64(high >> _FIVE)) * 67108864.0 + np.float64(np.int64(low >> _SIX))) * 2.0**-53
