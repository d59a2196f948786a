"""CompletionBaselines: what other methods make of the same observed entries."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import checks, theory
from dlnlab.callbacks.base import Measurement
from dlnlab.data.base import Problems
from dlnlab.models import LinearNetwork


class CompletionBaselines(Measurement):
    """Completes every member's matrix without a network: by nuclear norm, and by least squares at the true rank.

    Logged, the mean squared error over the entries that are not observed, as `distance` is: `distance_min_nuclear`, of the
    interpolator of least nuclear norm; `distance_best_nuclear`, of nuclear-norm-regularised completion at the best of
    some penalties, chosen by this very error: an oracle; `distance_true_rank`, of least squares among matrices of the
    teacher's rank, an oracle of another kind. They belong to the member's problem and stand for all its members.

    Cost: about a second for each problem of 10 x 10, once.

    Args:
        penalties: The penalties tried, in units of the least that makes the solution zero; each in (0, 1).
        every_n_steps: A period in optimizer steps; without a schedule, the last step only.
        at: A list of steps.

    Raises:
        ValueError: If a penalty is out of range, or the data are no observed entries of a known matrix.
    """

    last_only: ClassVar[bool] = True

    def __init__(
        self,
        penalties: list[float] | None = None,
        every_n_steps: int | None = None,
        at: Any = None,
    ) -> None:
        super().__init__(every_n_steps, at)
        self.penalties = [10 ** (-k / 4) for k in range(1, 13)] if penalties is None else penalties
        for i, penalty in enumerate(self.penalties):
            if checks.positive(f"penalties[{i}]", penalty) >= 1:
                raise ValueError(f"penalties[{i}] = {penalty:g}: must be below 1, where the solution is zero")
        self._of: tuple[Problems, dict[str, Tensor]] | None = None

    def check(self, model: Any) -> None:
        """Raise ValueError where no matrix is to be completed."""
        if not isinstance(model, LinearNetwork) or not callable(model.variables()["distance"]):
            raise ValueError("CompletionBaselines: there is no matrix whose entries that are not observed are known")
        if model.problems.matrix_shape is None:
            raise ValueError("CompletionBaselines: the data are inputs and not entries of a matrix")

    def names(self, model: Any) -> tuple[str, ...]:
        """See `Measurement.names`; nothing is solved for it."""
        del model
        return _NAMES

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """All of the above, (E,) each."""
        del batch
        if self._of is None or self._of[0] is not model.problems:
            problems = model.problems.to(torch.float64)
            rows = [self._solve(problems, p) for p in range(len(problems.y))]
            found = torch.tensor(rows, dtype=torch.float64, device=model.device)
            self._of = model.problems, dict(zip(_NAMES, found.T, strict=True))
        return {name: value[model.problem_index] for name, value in self._of[1].items()}

    def _solve(self, problems: Problems, p: int) -> list[float]:
        """The errors on one problem."""
        places, y, teacher = problems.x[p].cpu(), problems.y[p].cpu(), problems.teacher[p].cpu()
        unseen = torch.ones(teacher.shape, dtype=torch.bool)
        unseen[places[:, 0], places[:, 1]] = False

        def error(matrix: Tensor) -> float:
            return float((matrix - teacher)[unseen].square().mean())

        observed = torch.zeros_like(teacher)
        observed[places[:, 0], places[:, 1]] = y
        zero_from = 2 / len(y) * float(torch.linalg.matrix_norm(observed, 2))
        shape, rank = tuple(teacher.shape), int(torch.linalg.matrix_rank(teacher))
        # 1e-6 of the loss at zero is far below what two penalties differ by.
        nuclear = [theory.nuclear_norm_completion(places, y, shape, c * zero_from, tol=1e-6)[0] for c in self.penalties]
        return [
            error(theory.min_nuclear_norm(places, y, shape, tol=1e-6)[0]),
            min(error(matrix) for matrix in nuclear),
            error(theory.rank_least_squares(places, y, shape, rank)[0]),
        ]


_NAMES = ("distance_min_nuclear", "distance_best_nuclear", "distance_true_rank")
