"""RankTracker and RankJumps: what the rank of a product of matrices does while it is trained."""

from fnmatch import fnmatch
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dlnlab import checks, theory
from dlnlab.callbacks.base import Measurement
from dlnlab.models import LinearNetwork


class RankTracker(Measurement):
    r"""Singular values and ranks of a network's weight matrices and of their product.

    Works on any LightningModule: the matrices are the parameters whose names match, W_1 first, (out, in) each, with the
    members' axis in front for a `LinearNetwork`. What they multiply to is measured where their shapes allow it.

    Logged, of the product: `rank/rank`, with hysteresis (a singular value comes alive above `alive` times the largest and
    dies below `dead` times it; a plain threshold reports jumps up that are none), `rank/effective` (exp of the entropy of
    the singular values over their sum), `rank/stable` (|A|_F^2/|A|^2); of the factors: `rank/smooth`, the largest sum of
    f(s_i(W_l)) over layers. In the results also `singular_values` (descending) and, for each factor,
    `singular_values_<name>`. Cost: a singular value decomposition for each matrix and member.

    Args:
        pattern: Which parameters, by name: `*` stands for anything. Vectors and biases are passed over.
        alive: A singular value is counted from here on, relative to the largest.
        dead: Until it falls below this.
        zero: A matrix whose largest singular value is below this has rank 0.
        alpha: Of the smooth rank, f(s) = s (2 alpha - s)/alpha^2 up to alpha, then 1.
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Raises:
        ValueError: If a threshold is out of range, or no matrix has such a name.

    Reference:
        wang2024 (a sum of f; this f is recollected); the hysteresis: derived here.
    """

    def __init__(
        self,
        pattern: str = "*",
        alive: float = 0.02,
        dead: float = 1e-4,
        zero: float = 1e-6,
        alpha: float = 0.1,
        every_n_steps: int | None = None,
        at: Any = None,
    ) -> None:
        super().__init__(every_n_steps, at)
        self.pattern = pattern
        self.alive = checks.positive("alive", alive)
        self.dead = checks.positive("dead", dead)
        if dead > alive:
            raise ValueError(f"dead = {dead:g}: must be at most alive = {alive:g}")
        self.zero = checks.positive("zero", zero)
        self.alpha = checks.positive("alpha", alpha)
        self._rank: Tensor | None = None

    # The matrices -----------------------------------------------------------------------------------------------------

    def matrices(self, model: LightningModule) -> dict[str, Tensor]:
        """The weight matrices by name, (E, out, in)."""
        linear = isinstance(model, LinearNetwork)
        return {
            name.replace(".", "_"): parameter.detach() if linear else parameter.detach()[None]
            for name, parameter in model.named_parameters()
            if fnmatch(name, self.pattern) and parameter.ndim == 2 + linear
        }

    @staticmethod
    def product(matrices: list[Tensor]) -> Tensor:
        """W_L ... W_1, (E, K, D).

        Raises:
            ValueError: If the shapes do not allow it.
        """
        product = matrices[0]
        for matrix in matrices[1:]:
            if matrix.shape[-1] != product.shape[-2]:
                shapes = ", ".join(str(tuple(each.shape[1:])) for each in matrices)
                raise ValueError(f"matrices of shapes {shapes} have no product; give a pattern of those that have")
            product = matrix @ product
        return product

    def check(self, model: LightningModule) -> None:
        """Raise ValueError where there is nothing to measure."""
        found = self.matrices(model)
        if not found:
            raise ValueError(
                f"{type(self).__name__}: no weight matrix of {type(model).__name__} is called {self.pattern!r}"
            )
        try:
            self.product(list(found.values()))
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None

    # The rank ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit from step 0 has no rank yet."""
        if trainer.global_step == 0:
            self.forget()
        super().on_train_start(trainer, pl_module)

    def forget(self) -> None:
        """Begin anew."""
        self._rank = None

    def names(self, model: LightningModule) -> tuple[str, ...]:
        """See `Measurement.names`; asking leaves no trace."""
        before = self.state_dict()
        found = super().names(model)
        self.load_state_dict(before)
        return found

    def rank_of(self, singular_values: Tensor) -> Tensor:
        """The present rank (E,), given what it was: between those that are alive for certain and those not dead."""
        largest = singular_values[:, :1]
        something = largest >= self.zero
        alive = ((singular_values > self.alive * largest) & something).sum(-1)
        not_dead = ((singular_values >= self.dead * largest) & something).sum(-1)
        before = alive if self._rank is None else self._rank.to(alive.device)
        known = singular_values.isfinite().all(-1)
        self._rank = torch.where(known, torch.minimum(torch.maximum(before, alive), not_dead), before)
        return self._rank

    def measure(self, model: LightningModule, batch: Any) -> dict[str, Tensor]:
        """Singular values (E, R), ranks (E,)."""
        del batch
        found = self.matrices(model)
        values = singular_values(self.product(list(found.values())))
        factors = {name: singular_values(matrix) for name, matrix in found.items()}
        self.dims = {"singular_values": ["index"]}
        self.dims |= {f"singular_values_{name}": [f"index_{name}"] for name in factors}
        smooth = torch.stack([theory.smooth_rank(s, self.alpha) for s in factors.values()]).amax(0)
        return {
            "rank": self.rank_of(values).to(values.dtype),
            "effective_rank": theory.effective_rank(values),
            "stable_rank": theory.stable_rank(values),
            "smooth_rank": smooth,
            "singular_values": values,
            **{f"singular_values_{name}": s for name, s in factors.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """The rank so far."""
        return {**super().state_dict(), "rank": self._rank}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        super().load_state_dict(state_dict)
        self._rank = state_dict["rank"]


class RankJumps(RankTracker):
    """Counts how often the rank of a network's product falls and rises, and when.

    Logged: `rank/jumps_down` and `rank/jumps_up`, how many singular values have died and come alive since the start; with
    `set_rank` also `rank/in_set`, 1 where the parameters lie in the set B_r of that rank, and `rank/set_exits`, how often
    they have left it. In the results also `jump_steps`, for r = 1, 2, ... the step at which the rank was first seen below
    r, NaN before and where it began below; and `waiting_times`, the steps from one such jump to the next (the first
    from step 0). Cost: a singular value decomposition for each member, with `set_rank` one for each of its matrices.

    Args:
        pattern: See `RankTracker`.
        alive: Likewise.
        dead: Likewise.
        zero: Likewise.
        alpha: Of the set; a singular value of a factor below it counts as less than one.
        set_rank: r of the set B_r; None for no set.
        rank_slack: eps2: the sum of f(s_i(W_l)) is at most r + eps2 in every layer.
        balance: eps1: |W_{l+1}^T W_{l+1} - W_l W_l^T|_F^2 is at most this; None for no such condition.
        bound: C: |W_l|_F^2 is at most this; None for no such condition.
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's. Jumps between two looks are seen
            as one.
        at: A list of steps.

    Raises:
        ValueError: If an argument is out of range, or no matrix has such a name.

    Reference:
        wang2024 (jumps to lower rank, never back; the sets B_r, whose formula is recollected).
    """

    def __init__(
        self,
        pattern: str = "*",
        alive: float = 0.02,
        dead: float = 1e-4,
        zero: float = 1e-6,
        alpha: float = 0.1,
        set_rank: int | None = None,
        rank_slack: float = 0.5,
        balance: float | None = None,
        bound: float | None = None,
        every_n_steps: int | None = None,
        at: Any = None,
    ) -> None:
        super().__init__(pattern, alive, dead, zero, alpha, every_n_steps, at)
        self.set_rank = None if set_rank is None else checks.integer("set_rank", set_rank)
        self.rank_slack = checks.number("rank_slack", rank_slack, at_least=0)
        self.balance = None if balance is None else checks.positive("balance", balance)
        self.bound = None if bound is None else checks.positive("bound", bound)
        self._counts: dict[str, Tensor] = {}
        self._step = 0

    def forget(self) -> None:
        """Begin anew."""
        super().forget()
        self._counts = {}

    def _measure(self, trainer: Trainer, module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._step = trainer.global_step
        super()._measure(trainer, module, *args, **kwargs)

    def measure(self, model: LightningModule, batch: Any) -> dict[str, Tensor]:
        """Counts (E,), steps (E, R)."""
        del batch
        found = list(self.matrices(model).values())
        values = singular_values(self.product(found))
        before, now, counts = self._rank, self.rank_of(values), self._counts
        if before is None:
            before = now
        if not counts:
            nothing = torch.zeros(len(now), dtype=torch.float64, device=now.device)
            counts.update(jumps_down=nothing, jumps_up=nothing, jump_steps=torch.full_like(values, torch.nan).double())
            if self.set_rank is not None:
                counts.update(in_set=nothing, set_exits=nothing)
        change = (now - before.to(now.device)).double()
        counts["jumps_down"] = counts["jumps_down"] + (-change).clamp(min=0)
        counts["jumps_up"] = counts["jumps_up"] + change.clamp(min=0)
        r = torch.arange(1, values.shape[1] + 1, device=now.device)
        fallen = (before[:, None] >= r) & (now[:, None] < r) & counts["jump_steps"].isnan()
        counts["jump_steps"] = counts["jump_steps"].masked_fill(fallen, float(self._step))
        if self.set_rank is not None:
            inside = theory.in_absorbing_set(
                found, self.set_rank, self.alpha, self.rank_slack, self.balance, self.bound
            ).double()
            counts["set_exits"] = counts["set_exits"] + (counts["in_set"] > inside)
            counts["in_set"] = inside
        self.dims = {"jump_steps": ["index"], "waiting_times": ["index"]}
        steps = counts["jump_steps"]
        later = torch.cat((steps[:, 1:], torch.full_like(steps[:, :1], torch.nan)), dim=1)
        return {**counts, "waiting_times": steps - later.nan_to_num(nan=0.0)}

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {**super().state_dict(), "counts": dict(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state_dict)
        self._counts = dict(state_dict["counts"])


def singular_values(matrices: Tensor) -> Tensor:
    """Descending, (E, K, D) -> (E, R); NaN for a matrix that is not finite, which the decomposition refuses."""
    finite = matrices.isfinite().flatten(1).all(1)
    values = torch.linalg.svdvals(torch.where(finite[:, None, None], matrices, torch.zeros_like(matrices)))
    return torch.where(finite[:, None], values, torch.nan)
