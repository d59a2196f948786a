"""What does one step of SGD on single entries of a matrix cost?

    python benchmarks/completion.py            # writes benchmarks/results/completion.md; six minutes on one core
    python benchmarks/completion.py --quick    # a few seconds: does it run?

L = 3, width n, n x n matrices half of whose entries are observed, weight decay. Contenders take turns (`contest.py`).
Everybody has one thread, and steps with one entry drawn with replacement: a column of W_1, two products with W_2, a row of
W_3, and the decay of all three.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from contest import ALONE, Run, comparison, header, jax_run, one_thread, parser, train_everyone, write

from dlnlab import Ensemble, streams
from dlnlab.data import LowRankCompletion
from dlnlab.kernels import Batches, DeepGuard, EntryLoss, deep_kernel, deep_step
from dlnlab.models import DeepLinearNetwork
from dlnlab.optim import GainSGD

LR, KAPPA, DEPTH, EVERY = 0.01, 1e-3, 3, 1000
KEEP = 1 - 2 * LR * KAPPA
SIZES = [(30, 1), (30, 100), (100, 1), (100, 100)]


def start(n: int, members: int) -> np.ndarray:
    """W_1, W_2, W_3, (3, E, n, n)."""
    return np.random.default_rng(0).normal(size=(DEPTH, members, n, n)) / n**0.5


def entries(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the observed half, and their values."""
    rng = np.random.default_rng(1)
    flat = rng.permutation(n * n)[: n * n // 2]
    return np.stack((flat // n, flat % n), axis=-1), rng.normal(size=len(flat))


def numpy_loop(n: int, members: int) -> Run:
    """The shortest loop; entries drawn ahead."""
    del members  # one, whatever E
    (w1, w2, w3), (places, y) = start(n, 1)[:, 0].copy(), entries(n)
    rng = np.random.default_rng(2)

    def run(steps: int) -> None:
        for entry in rng.integers(0, len(y), size=steps):
            i, j = places[entry]
            h1, g2 = w1[:, j].copy(), w3[i].copy()
            h2, g1 = w2 @ h1, g2 @ w2
            along = 2 * LR * (g2 @ h2 - y[entry])
            np.multiply(w1, KEEP, out=w1)
            np.multiply(w2, KEEP, out=w2)
            np.multiply(w3, KEEP, out=w3)
            w1[:, j] -= along * g1
            w2[...] -= np.outer(along * g2, h1)
            w3[i] -= along * h2

    return run


def torch_batched(n: int, members: int, device: str = "cpu") -> Run:
    """All members at once, in eager torch: `dlnlab.kernels.deep_step`; entries drawn ahead."""
    places, y = (torch.from_numpy(part).to(device) for part in entries(n))
    weights = list(torch.from_numpy(start(n, members)).to(device))
    lr, keep = (y.new_full((members,), value) for value in (LR, KEEP))

    def run(steps: int) -> None:
        nonlocal weights
        for drawn in torch.randint(len(y), (steps, members, 1), device=device):
            weights = deep_step(weights, places[drawn], y[drawn], lr, keep, EntryLoss(1.0, True), False)

    return run


def jax_scan(n: int, members: int, autograd: bool) -> Run:
    """jit(scan(vmap)), the gradient by hand or by `jax.grad`; entries drawn once, outside the measurement."""
    import jax
    import jax.numpy as jnp

    places, y = (jnp.asarray(part) for part in entries(n))

    def loss(weights: tuple, i: int, j: int, target: float) -> float:
        w1, w2, w3 = weights
        return (w3[i] @ (w2 @ w1[:, j]) - target) ** 2

    def by_grad(weights: tuple, entry: int) -> tuple:
        gradients = jax.grad(loss)(weights, *places[entry], y[entry])
        return tuple(KEEP * w - LR * g for w, g in zip(weights, gradients, strict=True))

    def by_hand(weights: tuple, entry: int) -> tuple:
        w1, w2, w3 = weights
        i, j = places[entry]
        h1, g2 = w1[:, j], w3[i]
        h2, g1 = w2 @ h1, g2 @ w2
        along = 2 * LR * (g2 @ h2 - y[entry])
        return (
            (KEEP * w1).at[:, j].add(-along * g1),
            KEEP * w2 - along * jnp.outer(g2, h1),
            (KEEP * w3).at[i].add(-along * h2),
        )

    per_call = max(10, 30_000_000 // (members * n * n * DEPTH))
    drawn = jnp.asarray(np.random.default_rng(2).integers(0, len(y), size=(per_call, members)))
    everyone = jax.vmap(by_grad if autograd else by_hand)
    return jax_run(everyone, tuple(jnp.asarray(start(n, members))), drawn, per_call)


def kernel(n: int, members: int, device: str = "cpu") -> Run:
    """The bare kernel, with a check of every member every 1000 steps."""
    places, y = (torch.from_numpy(part)[None].to(device) for part in entries(n))
    weights = [w.contiguous() for w in torch.from_numpy(start(n, members)).to(device)]
    lazy = torch.zeros_like(weights[0]), torch.zeros_like(weights[-1])
    lr, keep = (y.new_full((members,), value) for value in (LR, KEEP))
    size, key = lr.long() + 1, streams.keys(0, "sampling", torch.arange(members)).to(device)
    problem = torch.zeros_like(size)
    batches = Batches(size, problem, key, key, torch.zeros_like(lr))
    guard = DeepGuard(0.0, 1e10, EVERY, [w.clone() for w in weights])
    engine, now = deep_kernel(places, y, [n] * (DEPTH + 1)), 0

    def run(steps: int) -> None:
        nonlocal now
        taken = engine.advance(weights, lazy, lr, keep, problem, batches, EntryLoss(1.0, True), now, now + steps,
                               guard=guard)  # fmt: skip
        assert taken == steps, "a member stopped: the rates would be wrong"
        now += steps

    run(1)  # compiles
    return run


def fit(n: int, members: int) -> Run:
    """This project, through `Trainer.fit`: guard, ten records, result segments and TensorBoard."""

    def run(steps: int) -> None:
        model = DeepLinearNetwork(
            DEPTH, ensemble=Ensemble(seed=members), batch_size=1, optimizer=partial(GainSGD, lr=LR, weight_decay=KAPPA)
        )
        data = LowRankCompletion(shape=(n, n), observed_fraction=0.5, noise_std=0.3)
        train_everyone(model, data, steps, {"every_n_steps": EVERY}, every_n_steps=max(1, steps // 10))

    return run


CONTENDERS: dict[str, Callable[[int, int], Run]] = {
    f"NumPy, {ALONE}": numpy_loop,
    "torch, eager and batched": torch_batched,
    "JAX jit(scan(vmap)), by hand": partial(jax_scan, autograd=False),
    "JAX jit(scan(vmap)), jax.grad": partial(jax_scan, autograd=True),
    "dlnlab, the kernel alone": kernel,
    "dlnlab, `Trainer.fit`": fit,
}
LONGER = 100


def main() -> None:
    arguments = parser(__doc__).parse_args()
    one_thread()
    sizes, rounds, seconds = ([(4, 1), (4, 20)], 1, 0.002) if arguments.quick else (SIZES, 3, 0.2)
    cases = {f"n={n} E={members}": (n, members) for n, members in sizes}
    lines = header("Matrix completion: one step on a single entry")
    note = (
        "L = 3, n x n matrices, width n, weight decay. All members are checked every 1000 steps; a fit records train_loss "
        "and distance ten times."
    )
    lines += comparison(CONTENDERS, cases, rounds, seconds, LONGER, note)
    write(arguments.output / "completion.md", lines)


if __name__ == "__main__":
    main()
