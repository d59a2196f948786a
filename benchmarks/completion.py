"""How fast is SGD on single entries of a matrix, through `Trainer.fit`, beside a NumPy loop?

    python benchmarks/completion.py [--seconds 3]

One thread. Rows: L = 3, n x n matrices half observed, width n, weight decay. NumPy takes the same kind of step for one
member: a column of W_1, two products with W_2, a row of W_3, and the decay of all three. Each number is the best of three.
"""

import argparse
import os
import time
import warnings
from functools import partial

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import torch
from lightning.pytorch import Trainer

from dlnlab import Ensemble
from dlnlab.callbacks import MemberGuard
from dlnlab.data import LowRankCompletion
from dlnlab.models import DeepLinearNetwork
from dlnlab.optim import GainSGD

LR, KAPPA = 0.01, 1e-3


def numpy_loop(n: int, steps: int) -> float:
    """Seconds per step."""
    rng = np.random.default_rng(0)
    w1, w2, w3 = rng.normal(size=(3, n, n)) / n**0.5
    places, y, keep = rng.integers(0, n, size=(steps, 2)), rng.normal(size=steps), 1 - 2 * LR * KAPPA
    began = time.perf_counter()
    for (i, j), target in zip(places, y, strict=True):
        h1, g2 = w1[:, j].copy(), w3[i].copy()
        h2, g1 = w2 @ h1, g2 @ w2
        along = 2 * LR * (g2 @ h2 - target)
        w1 *= keep
        w2 *= keep
        w3 *= keep
        w1[:, j] -= along * g1
        w2 -= along * np.outer(g2, h1)
        w3[i] -= along * h2
    return (time.perf_counter() - began) / steps


def fit(n: int, members: int, steps: int) -> float:
    """Seconds per member and step of a whole fit, set-up left out by taking the difference to a short one."""

    def run(count: int) -> float:
        ensemble = Ensemble(seed=members, batch_size=[1])
        network = DeepLinearNetwork(ensemble=ensemble, optimizer=partial(GainSGD, lr=LR, weight_decay=KAPPA))
        data = LowRankCompletion(shape=(n, n), observed_fraction=0.5, noise_std=0.3)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        guard = MemberGuard(every_n_steps=1000)
        trainer = Trainer(max_steps=count, callbacks=[guard], enable_model_summary=False, accelerator="cpu", **quiet)
        began = time.perf_counter()
        trainer.fit(network, data)
        return time.perf_counter() - began

    run(10)
    short, long = run(1000), run(1000 + steps)
    return (long - short) / steps / members


def main(seconds: float = 3.0) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| n = width | members | ns per member-step | NumPy, ns | ratio |")
    print("|---|---|---|---|---|")
    for n, members, guess in ((10, 1, 2e-7), (30, 1, 5e-7), (30, 100, 5e-7), (100, 1, 5e-6), (100, 100, 5e-6)):
        steps = max(2000, int(seconds / 3 / guess / members) // 1000 * 1000)
        ours = min(fit(n, members, steps) for _ in range(3))
        theirs = min(numpy_loop(n, 2000) for _ in range(3))
        print(f"| {n} | {members} | {ours * 1e9:,.0f} | {theirs * 1e9:,.0f} | {theirs / ours:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="a row's fits, about")
    main(**vars(parser.parse_args()))
