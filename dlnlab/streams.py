"""(root, purpose, member seed, step) -> random numbers, without any generator state.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a function of a key and a counter,
so a draw depends on nothing but what it is for: not on the ensemble, the chunk, the device or what was drawn before.

- The key of a member's stream is the first two words of Philox(key = (root, purpose), counter = (seed low, seed high,
  0, 0)).
- The counter of a draw is (position, 0, step low, step high). Number j of a step is word j mod 4 of position j div 4.
- An index in [0, n) is the high 32 bits of word * n; a uniform takes 53 bits of two words; two uniforms make two normals
  (Box-Muller).

Integers are the same on every device; floats may differ in the last bit. Words are 32 bits held in int64 tensors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dlnlab import checks

PURPOSES = {
    purpose: number
    for number, purpose in enumerate(
        ("inputs", "teacher", "noise", "test", "init", "sampling", "label_noise", "flow"),
    )
}
SAMPLINGS = ("replacement", "subset", "epochs")

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of Philox-4x32-10.

    Args:
        key: Two words, int64 tensors with values in [0, 2^32), broadcast with the counter.
        counter: Four such words.

    Returns:
        Four words, each of the broadcast shape.

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [hex(int(word)) for word in philox((zero, zero), (zero, zero, zero, zero))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    key0, key1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # int64 multiplication wraps, which leaves the 64 product bits right; the shift is arithmetic, hence the mask.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & _MASK, high0 ^ c3 ^ key1, product0 & _MASK
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def keys(root: int, purpose: str, seeds: Tensor) -> Tensor:
    """The stream keys of members.

    Args:
        root: The root of all streams, in [0, 2^32).
        purpose: One of `PURPOSES`.
        seeds: Member seeds, int64 of shape (...,), not negative.

    Returns:
        Keys of shape (..., 2).

    Raises:
        ValueError: If the root is out of range or the purpose unknown.
    """
    checks.integer("seed", root, at_most=_MASK)
    number = PURPOSES[checks.one_of("purpose", purpose, PURPOSES)]
    zero = torch.zeros_like(seeds)
    first, second, _, _ = philox((zero + root, zero + number), (seeds & _MASK, seeds >> 32, zero, zero))
    return torch.stack((first, second), dim=-1)


def words(key: Tensor, steps: Tensor, count: int) -> Tensor:
    """The first `count` words of every step.

    Args:
        key: Stream keys (..., 2).
        steps: Steps (T,), int64.
        count: Words per step.

    Returns:
        Words (..., T, count).
    """
    positions = torch.arange(-(-count // 4), device=key.device)
    step = steps.to(key.device)[:, None]
    zero = torch.zeros_like(positions)
    key0, key1 = key[..., 0, None, None], key[..., 1, None, None]
    four = torch.stack(philox((key0, key1), (positions, zero, step & _MASK, step >> 32)), dim=-1)
    return four.flatten(-2)[..., :count]


def indices(key: Tensor, steps: Tensor, count: int, high: int | Tensor) -> Tensor:
    """Integers in [0, high), shape (..., T, count); `high` may differ along `count`."""
    return (words(key, steps, count) * high) >> 32


def uniforms(key: Tensor, steps: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) with 53 random bits, float64 of shape (..., T, count)."""
    pairs = words(key, steps, 2 * count).unflatten(-1, (count, 2))
    return ((pairs[..., 0] >> 5) * 2**26 + (pairs[..., 1] >> 6)).to(torch.float64) * 2.0**-53


def normals(key: Tensor, steps: Tensor, count: int) -> Tensor:
    """Standard normal numbers, float64 of shape (..., T, count)."""
    even = count + count % 2
    pairs = uniforms(key, steps, even).unflatten(-1, (even // 2, 2))
    radius = torch.sqrt(-2 * torch.log1p(-pairs[..., 0]))
    angle = 2 * math.pi * pairs[..., 1]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)[..., :count]


def subsets(key: Tensor, steps: Tensor, count: int, size: int) -> Tensor:
    """`count` distinct indices out of `size`, in random order, drawn afresh at every step.

    A partial Fisher-Yates shuffle: the i-th of them is swapped in from a place in [i, size).

    Returns:
        Indices (..., T, count).
    """
    remaining = size - torch.arange(count, device=key.device)
    picks = indices(key, steps, count, remaining) + torch.arange(count, device=key.device)
    order = torch.arange(size, device=key.device).expand(*picks.shape[:-1], size).clone()
    for i in range(count):
        chosen = picks[..., i : i + 1]
        here = order[..., i : i + 1].clone()
        order[..., i : i + 1] = order.gather(-1, chosen)
        order.scatter_(-1, chosen, here)
    return order[..., :count]


def sample(sampling: str, key: Tensor, start: int, stop: int, count: int, size: int) -> Tensor:
    """The mini-batches of the steps start, ..., stop - 1.

    Args:
        sampling: `replacement` (independent indices), `subset` (distinct ones, drawn afresh each step) or `epochs` (a
            fresh permutation every floor(size / count) steps; what is left over of it is not used).
        key: Sampling keys (..., 2).
        start: First step.
        stop: Step after the last.
        count: Batch size, at most `size`.
        size: Number of samples.

    Returns:
        Indices (..., T, count) with T = stop - start.
    """
    steps = torch.arange(start, stop, device=key.device)
    if sampling == "replacement":
        return indices(key, steps, count, size)
    if sampling == "subset":
        return subsets(key, steps, count, size)
    length = size // count
    epochs = torch.arange(start // length, (stop - 1) // length + 1, device=key.device)
    batches = subsets(key, epochs, size, size)[..., : length * count]
    batches = batches.unflatten(-1, (length, count)).flatten(-3, -2)  # (..., all steps of these epochs, count)
    first = start - int(epochs[0]) * length
    return batches[..., first : first + stop - start, :]


class Stream:
    """All streams of one seed: what `SyntheticData.sample` draws its problem from.

    Each purpose starts anew at every call: two calls with the same purpose and `step` give the same numbers, and a
    longer draw begins with the shorter one.

    Args:
        root: The root of all streams.
        seed: The seed of this problem.
        device: Where the numbers are made.
    """

    def __init__(self, root: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.root = root
        self.seed = torch.tensor(seed, dtype=torch.int64, device=device)
        self.device = torch.device(device)

    def _key_and_step(self, purpose: str, step: int) -> tuple[Tensor, Tensor]:
        return keys(self.root, purpose, self.seed), torch.tensor([step], device=self.device)

    def normals(self, purpose: str, shape: Sequence[int], step: int = 0) -> Tensor:
        """Standard normal numbers of the given shape, float64."""
        return normals(*self._key_and_step(purpose, step), math.prod(shape)).reshape(*shape)

    def uniforms(self, purpose: str, shape: Sequence[int], step: int = 0) -> Tensor:
        """Uniform numbers in [0, 1) of the given shape, float64."""
        return uniforms(*self._key_and_step(purpose, step), math.prod(shape)).reshape(*shape)

    def signs(self, purpose: str, shape: Sequence[int], step: int = 0) -> Tensor:
        """Independent fair signs, -1.0 or 1.0, of the given shape, float64."""
        bits = indices(*self._key_and_step(purpose, step), math.prod(shape), 2)
        return (2.0 * bits.double() - 1.0).reshape(*shape)

    def subset(self, purpose: str, count: int, size: int, step: int = 0) -> Tensor:
        """`count` distinct indices out of `size`, in random order, int64."""
        return subsets(*self._key_and_step(purpose, step), count, size)[0]
