"""What does the largest eigenvalue cost, in products and in time, cold and along a path, and what does tracking it?

    python benchmarks/curvature.py             # writes benchmarks/results/curvature.md; about half an hour on one core
    python benchmarks/curvature.py --quick     # one snapshot of one problem: does it run?

Every contender gets the same snapshots of a gradient-descent path at the edge of stability, ten steps apart, and counts
its own products; where it reports no residual, one is computed afterwards. Those that are not installed are left out:
PyHessian, hessian-eigenthings and curvlinops are no dependencies of dlnlab. Two LOBPCG are warm-started and have the same
products as ours: SciPy's with a block of three, and one written here as the code of "central flows" (Cohen et al. 2024)
uses it, with a block of one, which multiplies all of its basis anew in every iteration. Process time on one thread; the
contenders of a snapshot take turns, three times, and the median counts.
"""

import argparse
import logging
import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # read when NumPy is imported

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh, lobpcg
from torch import Tensor, nn

from dlnlab.callbacks import Sharpness
from dlnlab.curvature import eigenpairs, hessian

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.sharpness_mlp import DigitsMLP

RESULTS = Path(__file__).parent / "results"
REPEATS = 3


# Problems ------------------------------------------------------------------------------------------------------------


class Diagonal(nn.Module):
    """X (u*v), d = 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.full((1000,), 0.3)), nn.Parameter(torch.zeros(1000))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.u * self.v))[:, None]


class Block(nn.Module):
    """Pre-norm attention, written out, so that every contender can differentiate it twice."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, width))
        return x + self.mlp(self.second(x))


class Transformer(nn.Module):
    """Two blocks on 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(32, 48), nn.Parameter(0.02 * torch.randn(16, 48))
        self.blocks, self.norm, self.read = nn.Sequential(Block(), Block()), nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read(self.norm(self.blocks(self.embed(tokens) + self.place)).mean(1))


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean() / 2


@dataclass
class Problem:
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    lr: float
    burn_in: int

    def value(self) -> Tensor:
        return self.loss(self.model(self.x), self.y)

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def step(self) -> None:
        gradients = torch.autograd.grad(self.value(), self.params)
        with torch.no_grad():
            for param, gradient in zip(self.params, gradients, strict=True):
                param -= self.lr * gradient


def problem(name: str) -> Problem:
    torch.manual_seed(0)
    if name == "diagonal":
        x = torch.randn(200, 1000)
        return Problem(Diagonal(), squares, x, x[:, :5].sum(1, keepdim=True), 1.02, 300)
    if name == "linear":
        x = torch.randn(400, 100)
        model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(3)))
        for layer in model:
            nn.init.normal_(layer.weight, std=0.1)
        return Problem(model, squares, x, x @ torch.randn(100, 100) / 10, 0.08, 300)
    if name == "mlp":
        x, labels = torch.randn(1000, 32), torch.randint(10, (1000,))
        widths = (nn.Linear(32, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10))
        return Problem(nn.Sequential(*widths), squares, x, nn.functional.one_hot(labels, 10).float(), 0.2, 1200)
    tokens, labels = torch.randint(32, (96, 16)), torch.randint(10, (96,))
    return Problem(Transformer(), nn.functional.cross_entropy, tokens, labels, 0.1, 150)


# Contenders ----------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    value: float
    vector: Any
    products: int
    state: Any = None


def ours(problem: Problem, tol: float, state: Any) -> Found:
    found = eigenpairs(hessian(problem.value, problem.params), tol=tol, start=state, max_products=600)
    return Found(float(found.values), found.vectors[0], found.num_products, found)


def counted(problem: Problem) -> tuple[LinearOperator, list[int]]:
    """Our products as SciPy takes them."""
    operator, count = hessian(problem.value, problem.params), [0]

    def matvec(vector: np.ndarray) -> np.ndarray:
        count[0] += 1
        return operator.matvec(torch.from_numpy(np.ascontiguousarray(vector).ravel()).to(operator.dtype)).numpy()

    kind = np.float64 if operator.dtype == torch.float64 else np.float32
    return LinearOperator(operator.shape, matvec=matvec, dtype=kind), count


def eigsh_ours(problem: Problem, tol: float, state: Any) -> Found:
    operator, count = counted(problem)
    try:
        value, vector = eigsh(operator, 1, which="LA", tol=tol, v0=state, maxiter=60)
    except ArpackNoConvergence as failure:
        value, vector = failure.eigenvalues, failure.eigenvectors
    return Found(float(value[0]), torch.from_numpy(vector[:, 0]), count[0], vector[:, 0])


def lobpcg_ours(problem: Problem, tol: float, state: Any) -> Found:
    operator, count = counted(problem)
    generator = np.random.default_rng(0)
    start = generator.standard_normal((operator.shape[0], 3)) if state is None else state[0]
    scale = 1.0 if state is None else state[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, vectors = lobpcg(operator, start.astype(operator.dtype), largest=True, tol=tol * scale, maxiter=150)
    return Found(float(values[0]), torch.from_numpy(vectors[:, 0].copy()), count[0], (vectors, abs(float(values[0]))))


def lobpcg_afresh(problem: Problem, tol: float, state: Any) -> Found:
    """Locally optimal descent in span(x, last change, residual), all multiplied again: four products an iteration."""
    operator = hessian(problem.value, problem.params)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(operator.shape[0], generator=generator).to(operator.dtype) if state is None else state
    x, change, products = x / x.norm(), torch.zeros_like(x), 1
    image = operator.matvec(x)
    value = x @ image
    while products < 600:
        rest = image - value * x
        basis = torch.linalg.qr(torch.stack([x, rest, change], 1)).Q.T
        projected = basis @ operator.matvec(basis).T
        best = torch.linalg.eigh((projected + projected.T).double() / 2).eigenvectors[:, -1].to(basis)
        following = best @ basis
        x, change = following / following.norm(), following - (following @ x) * x
        image = operator.matvec(x)
        value, products = x @ image, products + len(basis) + 1
        if float((image - value * x).norm() / value.abs()) <= tol:
            break
    return Found(float(value), x, products, x)


def pyhessian(problem: Problem, tol: float, state: Any) -> Found:
    from pyhessian import hessian as PyHessian

    tool = PyHessian(problem.model, problem.loss, data=(problem.x, problem.y), cuda=False)
    count, product = [0], counting_pyhessian()
    value, vectors = product(count, lambda: tool.eigenvalues(maxIter=300, tol=tol, top_n=1))
    problem.model.train()
    for param in problem.params:
        param.grad = None
    return Found(value[0], torch.cat([part.detach().reshape(-1) for part in vectors[0]]), count[0])


def counting_pyhessian() -> Callable:
    """Count PyHessian's products, a function of its module."""
    module = import_module("pyhessian.hessian")

    def run(count: list[int], action: Callable) -> Any:
        plain = module.hessian_vector_product

        def product(*arguments: Any) -> Any:
            count[0] += 1
            return plain(*arguments)

        module.hessian_vector_product = product
        try:
            return action()
        finally:
            module.hessian_vector_product = plain

    return run


def eigenthings(problem: Problem, tol: float, state: Any) -> Found:
    from hessian_eigenthings import HessianOperator, lanczos

    batches = [(problem.x, problem.y)]
    operator = HessianOperator(problem.model, batches, lambda model, batch: problem.loss(model(batch[0]), batch[1]))
    steps = 20
    while True:  # it has no stopping rule: a person doubles the number of steps until it says converged
        found = lanczos(operator, k=1, max_iter=steps, which="LA", tol=tol, reorthogonalize=True)
        if bool(found.converged.all()) or steps >= 320:
            return Found(float(found.eigenvalues[0]), found.eigenvectors[0].reshape(-1), steps)
        steps *= 2


def curvlinops_eigsh(problem: Problem, tol: float, state: Any) -> Found:
    from curvlinops import HessianLinearOperator

    class Mean(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return problem.loss(outputs, targets)

    loss = nn.CrossEntropyLoss() if problem.loss is nn.functional.cross_entropy else nn.MSELoss()
    # Its losses are torch's: the mean over rows and outputs, of which ours is a multiple.
    factor = 1.0 if isinstance(loss, nn.CrossEntropyLoss) else problem.y.shape[1] / 2
    operator = HessianLinearOperator(problem.model, loss, problem.params, [(problem.x, problem.y)],
                                     check_deterministic=False)  # fmt: skip
    shell, count = operator.to_scipy(dtype=np.float64 if tol < 1e-5 else np.float32), [0]

    def matvec(vector: np.ndarray) -> np.ndarray:
        count[0] += 1
        return shell @ vector

    value, vector = eigsh(
        LinearOperator(shell.shape, matvec=matvec, dtype=shell.dtype), 1, which="LA", tol=tol, v0=state
    )
    return Found(factor * float(value[0]), torch.from_numpy(vector[:, 0]), count[0], vector[:, 0])


FITS = {
    "cohen2021/mlp": ({"lr": 0.6}, "hessian"),
    "cohen2021/adam": ({"lr": 0.002, "optimizer": "adam"}, "preconditioned"),
}
CONTENDERS: dict[str, tuple[Callable, str | None]] = {
    "dlnlab": (ours, None),
    "SciPy eigsh, our products": (eigsh_ours, None),
    "SciPy LOBPCG block 3, our products": (lobpcg_ours, None),
    "LOBPCG as in central flows, our products": (lobpcg_afresh, None),
    "curvlinops + eigsh": (curvlinops_eigsh, "curvlinops"),
    "hessian-eigenthings Lanczos": (eigenthings, "hessian_eigenthings"),
    "PyHessian (power iteration)": (pyhessian, "pyhessian"),
}


# Measurements --------------------------------------------------------------------------------------------------------


def snapshots(problem: Problem, count: int) -> list[list[Tensor]]:
    """Parameters along gradient descent, ten steps apart."""
    found = []
    for step in range(problem.burn_in + 10 * count):
        if step >= problem.burn_in and step % 10 == 0:
            found.append([param.detach().clone() for param in problem.params])
        problem.step()
    return found


def place(problem: Problem, values: list[Tensor]) -> None:
    with torch.no_grad():
        for param, value in zip(problem.params, values, strict=True):
            param.copy_(value)


def residual(problem: Problem, found: Found) -> float:
    operator = hessian(problem.value, problem.params)
    vector = torch.as_tensor(found.vector).to(operator.dtype)
    vector = vector / vector.norm()
    return float((operator.matvec(vector) - found.value * vector).norm() / abs(found.value))


def compare(name: str, tol: float, count: int, contenders: list[str]) -> list[str]:
    """Rows of the table of one problem."""
    there = problem(name)
    path = snapshots(there, count)
    if tol < 1e-5:
        there.model.double()
        there.x = there.x.double() if there.x.is_floating_point() else there.x
        there.y = there.y.double() if there.y.is_floating_point() else there.y
        path = [[value.double() for value in values] for values in path]
    measured: dict[str, list[tuple[int, float, float, float]]] = {label: [] for label in contenders}
    states: dict[str, Any] = {}
    for values in path:
        place(there, values)
        truth = float(eigenpairs(hessian(there.value, there.params), tol=min(tol / 50, 2e-5), max_products=600).values)
        times: dict[str, list[float]] = {label: [] for label in contenders}
        for _ in range(REPEATS):
            for label in contenders:
                begun = time.process_time()
                found = CONTENDERS[label][0](there, tol, states.get(label))
                times[label].append(time.process_time() - begun)
                place(there, values)
                if len(times[label]) == REPEATS:
                    error = abs(found.value / truth - 1)
                    seconds = statistics.median(times[label])
                    measured[label].append((found.products, seconds, residual(there, found), error))
                    states[label] = found.state
    rows = []
    reference = measured["dlnlab"]
    for label, runs in measured.items():
        cold, warm = runs[0], runs[1:] or runs
        products, seconds = (statistics.median(run[i] for run in warm) for i in (0, 1))
        ours_cold, ours_warm = reference[0][1], statistics.median(run[1] for run in (reference[1:] or reference))
        rows.append(
            f"| {name} | {label} | {cold[0]} | {1e3 * cold[1]:.0f} | {cold[1] / ours_cold:.1f} | {products:.0f} | "
            f"{1e3 * seconds:.0f} | {seconds / ours_warm:.1f} | {max(run[2] for run in runs):.0e} | "
            f"{max(run[3] for run in runs):.0e} |"
        )
        print(rows[-1], flush=True)
    return rows


class Clocked(Sharpness):
    """Adds up the process time its measurements take."""

    seconds, count = 0.0, 0

    def _measure(self, *arguments: Any, **options: Any) -> None:
        begun = time.process_time()
        super()._measure(*arguments, **options)
        self.seconds, self.count = self.seconds + time.process_time() - begun, self.count + 1


def fit_seconds(options: dict[str, Any], sharpness: Clocked | None, steps: int) -> float:
    """Process time of `steps` steps of the digits network, from half as many on: by then it is at the edge."""
    torch.manual_seed(0)
    module, warm_up = DigitsMLP(**options), steps // 2
    begun = 0.0

    def begin(*_: Any) -> None:
        nonlocal begun
        if trainer.global_step == warm_up:
            begun = time.process_time()
            if sharpness is not None:
                sharpness.seconds, sharpness.count = 0.0, 0

    module.on_train_batch_start = begin
    callbacks = [] if sharpness is None else [sharpness]
    trainer = Trainer(max_steps=warm_up + steps, callbacks=callbacks, logger=False, enable_checkpointing=False,
                      accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module)
    return time.process_time() - begun


def overhead(name: str, steps: int, repeats: int) -> str:
    """A row of the table of overheads: fits with and without the callback take turns."""
    options, operator = FITS[name]
    without, whole, share, each = [], {50: [], 100: []}, {50: [], 100: []}, []
    for _ in range(repeats):
        without.append(fit_seconds(options, None, steps))
        for every in whole:
            sharpness = Clocked(every_n_steps=every, operator=operator, max_share=None)
            seconds = fit_seconds(options, sharpness, steps)
            whole[every].append(seconds)
            share[every].append(sharpness.seconds / (seconds - sharpness.seconds))
            each.append(sharpness.seconds / sharpness.count)
    bare = statistics.median(without)
    clocked = [f"{100 * statistics.median(share[every]):+.0f} %" for every in share]
    fits = [f"{100 * (statistics.median(whole[every]) / bare - 1):+.0f} %" for every in whole]
    spread = f"{100 * (max(without) / min(without) - 1):.0f} %"
    times = [f"{1e3 * seconds:.1f}" for seconds in (bare / steps, statistics.median(each))]
    row = f"| {' | '.join([name, *times, *clocked, *fits, spread])} |"
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    present = [label for label, (_, module) in CONTENDERS.items() if module is None or find_spec(module) is not None]
    head = ["| problem | contender | cold products | cold ms | x ours | warm products | warm ms | x ours | worst "
            "residual | worst error |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    names = ["diagonal"] if arguments.quick else ["diagonal", "linear", "mlp", "transformer"]
    count = 2 if arguments.quick else 5
    text = ["# The largest eigenvalue: products and time", "", __doc__.split("\n\n")[2].replace("\n", " "), "",
            f"Load of the machine ({os.cpu_count()} cores) when this began: {os.getloadavg()[0]:.1f}.", "",
            "## Residual 1e-3, float32", "", *head]  # fmt: skip
    for name in names:
        text += compare(name, 1e-3, count, present)
    text += ["", "## Residual 1e-6, float64", "", *head]
    exact = [label for label in present if "PyHessian" not in label]  # its power iteration gets there on none of them
    for name in names:
        text += compare(name, 1e-6, min(count, 3), exact)
    text += ["", "## What tracking adds to a fit at the edge", "",
             "Clocked: what the measurements take over what the rest of the same fit takes. Fits: a fit with the callback "
             "over one without; spread is that of the fits without, and so the error.", "",
             "| fit | a step, ms | a measurement, ms | every 50, clocked | every 100, clocked | every 50, fits | "
             "every 100, fits | spread |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in FITS:
        text.append(overhead(name, *(200, 1) if arguments.quick else (1000, 5)))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "curvature.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
