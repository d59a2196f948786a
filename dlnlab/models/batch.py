"""What a loss is computed on: rows of data for some members of the ensemble."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_ERRORS = 2**17
"""Errors of a full batch that are held at once, where no gradient keeps them: a large block of memory, freed and asked
for again between small ones, leaves holes that nothing fits into."""


class Layout:
    """Members sorted by the problem they share, so that each problem's x enters one matrix product.

    Args:
        problem: The problem of each of G members, int64 (G,).
    """

    def __init__(self, problem: Tensor) -> None:
        self.problems, row, counts = torch.unique(problem, return_inverse=True, return_counts=True)
        order = torch.argsort(row, stable=True)
        column = torch.arange(len(problem), device=problem.device) - (counts.cumsum(0) - counts)[row[order]]
        width = int(counts.max()) if len(counts) else 0
        # A problem with fewer members than the widest repeats its first one; repeats are computed and dropped.
        first = order[counts.cumsum(0) - counts]
        self.slots = first[:, None].expand(-1, width).clone()  # (P', M)
        self.slots[row[order], column] = order
        self.position = torch.empty_like(problem)
        self.position[order] = row[order] * width + column

    def spread(self, values: Tensor) -> Tensor:
        """(G, ...) -> (P', M, ...)."""
        return values[self.slots]

    def collect(self, values: Tensor) -> Tensor:
        """(P', M, ...) -> (G, ...), the inverse of `spread`."""
        return values.flatten(0, 1)[self.position]


@dataclass(frozen=True)
class Batch:
    """The rows that G members of one batch size see at one step.

    Mini-batches have rows of their own for each member: x (G, B, D), y (G, B[, K]). A full batch keeps the P problems
    as they are, x (P, N, D) and y (P, N[, K]), and says which one each member has. Where x holds whole numbers they are
    places (row, column) in the predictor, and y what is observed there (`dlnlab.data.base.Problems`).

    Attributes:
        x: Inputs, or places (..., 2).
        y: Targets.
        members: The members' numbers in the ensemble, int64 (G,).
        problem: For a full batch the row of x that each member sees, int64 (G,); otherwise None.
        noise: Label noise to be added to y, (G, B[, K]), or None.
    """

    x: Tensor
    y: Tensor
    members: Tensor
    problem: Tensor | None = None
    noise: Tensor | None = None

    @property
    def holds_places(self) -> bool:
        """Whether x says where in the predictor to look, and not what to apply it to."""
        return not self.x.is_floating_point()

    @cached_property
    def layout(self) -> Layout:
        """The full batch's members sorted by problem."""
        return Layout(self.problem)

    def predictions(self, predictor: Tensor) -> Tensor:
        """What linear predictors say on the batch, or what they hold at its places.

        Args:
            predictor: (G, D) or (G, K, D), one per member of the batch.

        Returns:
            (G, B) or (G, B, K).
        """
        if self.holds_places:
            places = self.x[..., 0] * predictor.shape[-1] + self.x[..., 1]
            return predictor.flatten(1).gather(1, places if self.problem is None else places[self.problem])
        if self.problem is None:
            if predictor.ndim == 3:
                return self.x @ predictor.mT
            return (self.x @ predictor[..., None]).squeeze(-1)
        spread = self.layout.spread(predictor)  # (P', M, [K,] D)
        x = self.x if len(self.layout.problems) == len(self.x) else self.x[self.layout.problems]
        if predictor.ndim == 3:
            return self.layout.collect(x[:, None] @ spread.mT)
        return self.layout.collect(spread @ x.mT)

    def losses(self, predictor: Tensor) -> Tensor:
        """1/(2B) times the sum of squared errors, (G,), for predictors as in `predictions`."""
        if self.problem is None or self.holds_places:
            return _half_mean_squares(self.predictions(predictor) - self.targets)
        spread = self.layout.spread(predictor)  # (P', M, [K,] D)
        noise = None if self.noise is None else self.layout.spread(self.noise)
        each = spread.shape[1] * self.y.shape[1:].numel()
        step, found = max(1, _ERRORS // max(1, each)), []
        for first in range(0, max(1, len(spread)), step):
            now = slice(first, first + step)
            problems = self.layout.problems[now]
            x, y = (self.x, self.y) if len(problems) == len(self.x) else (self.x[problems], self.y[problems])
            predicted = x[:, None] @ spread[now].mT if spread.ndim == 4 else spread[now] @ x.mT
            error = predicted - y[:, None]
            found.append(_half_mean_squares(error if noise is None else error - noise[now], 2))
        return self.layout.collect(torch.cat(found))

    @property
    def targets(self) -> Tensor:
        """Y as each member sees it, (G, B[, K])."""
        y = self.y if self.problem is None else self.y[self.problem]
        return y if self.noise is None else y + self.noise


class NullBatch(Batch):
    """The same rows for the zero predictor: inputs are zero, and so is every prediction."""

    @classmethod
    def of(cls, batch: Batch) -> "NullBatch":
        """Take over a batch; what are places in the predictor stay places."""
        x = batch.x if batch.holds_places else batch.x.new_zeros(()).expand(batch.x.shape)
        return cls(x, batch.y, batch.members, batch.problem, batch.noise)

    def predictions(self, predictor: Tensor) -> Tensor:
        """Zeros; see `Batch.predictions`."""
        return torch.zeros_like(super().predictions(predictor))

    def losses(self, predictor: Tensor) -> Tensor:
        """Those of the targets alone; see `Batch.losses`."""
        del predictor
        return _half_mean_squares(self.targets)


def _half_mean_squares(error: Tensor, axes: int = 1) -> Tensor:
    """Errors (..., B[, K]) behind a number of leading axes -> half the mean over B of the squared sums over K."""
    squares = error.square()
    return (squares if squares.ndim == axes + 1 else squares.sum(-1)).mean(-1) / 2
