"""Slow and obvious versions of what dlnlab does fast: Python integers, NumPy loops over one member, dense matrices.

Nothing here uses the code under test, except that `GivenData` is a data set for it.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch

from dlnlab.data.base import SyntheticData

# Random numbers: the rules of dlnlab/streams.py -----------------------------------------------------------------------

PURPOSES = {
    "inputs": 0,
    "teacher": 1,
    "noise": 2,
    "test": 3,
    "init": 4,
    "sampling": 5,
    "label_noise": 6,
    "flow": 7,
}


def philox(key, counter):
    """Philox-4x32-10 as in Salmon et al. 2011, section 3.3, on Python integers."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def stream_key(root, purpose, seed):
    return philox((root, PURPOSES[purpose]), (seed % 2**32, seed // 2**32, 0, 0))[:2]


def word(key, step, j):
    """Word j of a step."""
    return philox(key, (j // 4, 0, step % 2**32, step // 2**32))[j % 4]


def index(key, step, j, n):
    return word(key, step, j) * n // 2**32


def uniform(key, step, j):
    a, b = word(key, step, 2 * j) >> 5, word(key, step, 2 * j + 1) >> 6  # 27 and 26 bits
    return (a * 2**26 + b) / 2**53


def normal(key, step, j):
    first = j - j % 2
    radius = math.sqrt(-2 * math.log1p(-uniform(key, step, first)))
    angle = 2 * math.pi * uniform(key, step, first + 1)
    return radius * (math.sin(angle) if j % 2 else math.cos(angle))


def subset(key, step, count, size):
    """The first `count` of a Fisher-Yates shuffle of range(size)."""
    order = list(range(size))
    for i in range(count):
        j = i + index(key, step, i, size - i)
        order[i], order[j] = order[j], order[i]
    return order[:count]


def batch_rows(sampling, key, step, count, size):
    """The rows of the mini-batch of one step."""
    if sampling == "replacement":
        return [index(key, step, j, size) for j in range(count)]
    if sampling == "subset":
        return subset(key, step, count, size)
    per_epoch = size // count
    epoch, place = divmod(step, per_epoch)
    return subset(key, epoch, size, size)[place * count : (place + 1) * count]


# One member -----------------------------------------------------------------------------------------------------------


def member_batches(x, y, steps, batch_size="full", sampling="replacement", label_noise=0.0, root=0, seed=0):
    """What one member sees at each step: (rows of x, targets)."""
    n = len(x)
    sampling_key, noise_key = stream_key(root, "sampling", seed), stream_key(root, "label_noise", seed)
    for step in range(steps):
        rows = range(n) if batch_size == "full" else batch_rows(sampling, sampling_key, step, batch_size, n)
        targets = y[list(rows)].copy()
        if label_noise:
            targets += label_noise * np.array([normal(noise_key, step, j) for j in range(len(targets))])
        yield x[list(rows)], targets


def member_path(x, y, steps, lr, init_scale=0.1, weight_decay=0.0, **sampling):
    """(S)GD on the penalised loss of u*v from u = sqrt2 alpha, v = 0; the gain by one logarithm a step."""
    u, v = np.sqrt(2) * init_scale * np.ones(x.shape[1]), np.zeros(x.shape[1])
    gain, gain_plus, gain_minus = np.zeros((3, x.shape[1]))
    step_sum, decays = np.zeros(x.shape[1]), 0.0
    for rows, targets in member_batches(x, y, steps, **sampling):
        g = rows.T @ (rows @ (u * v) - targets) / len(rows)
        u, v = u - lr * (g * v + 2 * weight_decay * u), v - lr * (g * u + 2 * weight_decay * v)
        z = lr * g / (1 - 2 * lr * weight_decay)
        gain += -np.log(np.abs(1 - z**2))
        gain_plus += -2 * z - np.log((1 - z) ** 2)
        gain_minus += 2 * z - np.log((1 + z) ** 2)
        step_sum += z
        decays += math.log(1 - 2 * lr * weight_decay)
    return SimpleNamespace(
        u=u,
        v=v,
        beta=u * v,
        w_plus=(u + v) / np.sqrt(2),
        w_minus=(u - v) / np.sqrt(2),
        gain=gain,
        gain_plus=gain_plus,
        gain_minus=gain_minus,
        step_sum=step_sum,
        effective_init=init_scale * np.exp(-gain / 2 + decays),
    )


def member_path_extended(x, y, steps, lr, init_scale, rows):
    """SGD with one row a step in extended precision, the factors kept as sign and logarithm, which cannot underflow.

    Args:
        rows: The row of every step, integers (steps,).
    """
    x, y = np.asarray(x, np.longdouble), np.asarray(y, np.longdouble)
    log_plus = np.full(x.shape[1], np.log(np.longdouble(init_scale)))
    log_minus, gain = log_plus.copy(), np.zeros_like(log_plus)
    for row in rows[:steps]:
        beta = (np.exp(2 * log_plus) - np.exp(2 * log_minus)) / 2
        z = lr * x[row] * (x[row] @ beta - y[row])
        log_down, log_up = np.log(np.abs(1 - z)), np.log(np.abs(1 + z))
        log_plus += log_down
        log_minus += log_up
        gain -= log_down + log_up
    return SimpleNamespace(
        log_plus=log_plus,
        log_minus=log_minus,
        beta=(np.exp(2 * log_plus) - np.exp(2 * log_minus)) / 2,
        gain=gain,
    )


# Curvature ------------------------------------------------------------------------------------------------------------


def dense_hessian(loss, *tensors):
    """The Hessian of `loss(*tensors)` over all entries of the tensors in order, one column at a time."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    columns = [torch.autograd.grad(entry, tensors, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in column]) for column in columns])


def diagonal_hessian(x, y, u, v):
    """The Hessian of 1/(2n) |X (u*v) - y|^2 in (u, v), from its four blocks."""
    h, g = x.T @ x / len(x), np.diag(x.T @ (x @ (u * v) - y) / len(x))
    return np.block([[h * np.outer(v, v), h * np.outer(v, u) + g], [h * np.outer(u, v) + g, h * np.outer(u, u)]])


# Data -----------------------------------------------------------------------------------------------------------------


class GivenData(SyntheticData):
    """Problems given as arrays, one for each seed: x (S, N, D), y (S, N); member seed s has problem s."""

    def __init__(self, x, y, teacher=None):
        super().__init__()
        self.arrays = [None if array is None else torch.as_tensor(np.asarray(array)) for array in (x, y, teacher)]

    def sample(self, stream, values):
        return tuple(None if part is None else part[int(stream.seed)].to(stream.device) for part in self.arrays)
