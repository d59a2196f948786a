"""Replay: a fit's members run again, with other step sizes or for what was not recorded, outside of the fit."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dlnlab import kernels
from dlnlab.kernels import Factors, Guard, Records
from dlnlab.kernels.guard import bound_of
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.optim import GainSGD


class Replay:
    """Gradient descent of a diagonal network's members from where their fit began, on the batches that they drew.

    Args:
        model: A network that `check` accepts, set up for a fit.
    """

    def __init__(self, model: DiagonalLinearNetwork) -> None:
        optimizer = model._optimizer
        factors = optimizer.factors(optimizer.pairs[0])
        self.start = factors.initial_plus, factors.initial_minus  # (E, D) each
        self.problem, self.problems, self.batches = model.problem_index, model.problems, model.kernel_batches()
        self._kernel = model.kernel
        self._device = torch.device("cpu") if isinstance(self._kernel, str) else model.device
        if isinstance(self._kernel, str):
            self._kernel = kernels.diagonal_kernel(self.problems.x.cpu(), self.problems.y.cpu())

    @staticmethod
    def check(name: str, model: Any) -> None:
        """Raise ValueError unless the model is a diagonal network under plain (S)GD, without noise or decay."""
        if not isinstance(model, DiagonalLinearNetwork):
            raise ValueError(f"{name}: needs a DiagonalLinearNetwork, got {type(model).__name__}")
        if not isinstance(model._optimizer, GainSGD):
            raise ValueError(f"{name}: needs the optimizer GainSGD, got {type(model._optimizer).__name__}")
        if (reason := model.closed_form_refusal()) is not None:
            raise ValueError(f"{name}: needs the closed form of the diagonal network, but {reason}")
        decay = torch.as_tensor(model._optimizer.param_groups[0]["weight_decay"])
        if bool((decay != 0).any()) or any(model.per_member("label_noise")):
            raise ValueError(f"{name}: is not defined with weight_decay or label_noise; they must be 0")

    def distinct(self, batches: bool = True) -> tuple[Tensor, Tensor]:
        """Members that differ in more than their step size: in problem, start and, unless told otherwise, batches.

        Returns:
            One of each kind, (K,), and the kind of every member, (E,).
        """
        _, start = torch.unique(torch.cat(self.start, -1), dim=0, return_inverse=True)
        columns = [self.problem[:, None], start[:, None]]
        if batches:
            drawn = (self.batches.size > 0)[:, None]
            kinds = torch.stack((self.batches.size, self.batches.sampling), -1)
            columns += [kinds * drawn, self.batches.sampling_key * drawn]
        _, kind = torch.unique(torch.cat(columns, 1), dim=0, return_inverse=True)
        members = torch.full((int(kind.max()) + 1,), len(kind), device=kind.device)
        members.scatter_reduce_(0, kind, torch.arange(len(kind), device=kind.device), "amin")
        return members, kind

    def losses(self, members: Tensor, factors: Factors) -> Tensor:
        """The full loss of members in some state, (T,), float64."""
        beta = (factors.w_plus.double().square() - factors.w_minus.double().square()).to(members.device) / 2
        x, y = self.problems.x[self.problem[members]].double(), self.problems.y[self.problem[members]].double()
        return ((x @ beta[..., None])[..., 0] - y).square().mean(-1) / 2

    def begin(self, members: Tensor) -> Factors:
        """Members as their fit began, (T, D); a member may be named more than once."""
        dtype = self.problems.x.dtype
        return Factors.start(*(w[members].to(device=self._device, dtype=dtype) for w in self.start))

    def advance(
        self,
        members: Tensor,
        factors: Factors,
        lr: Tensor,
        start: int,
        stop: int,
        tol: float = 0.0,
        bound: float = 1e10,
        status: Tensor | None = None,
        records: Records | None = None,
    ) -> Tensor:
        """Take members from step `start` to step `stop`, in place.

        Args:
            members: Their numbers, (T,).
            factors: Their state, as `begin` made it.
            lr: Their step sizes, (T,).
            start: The first step.
            stop: The step after the last.
            tol: Members stop below this full loss ...
            bound: ... or above this many times the larger of the first loss and the zero predictor's, as `Guard` says.
            status: What `advance` returned before; None if all run.
            records: What to write on the way.

        Returns:
            0 running, 1 converged, 2 diverged, int8 (T,), on the factors' device.
        """
        index = members.to(self._device)
        if status is None:
            status = torch.zeros(len(index), dtype=torch.int8, device=self._device)
        batches = replace(self.batches, **{k: v.to(self._device)[index] for k, v in vars(self.batches).items()})
        kept = factors.map(torch.clone)
        targets = self.problems.y[self.problem[members]].double()
        first = torch.maximum(self.losses(members, self.begin(members)), targets.square().mean(-1) / 2)
        guard = Guard(tol, bound_of(first, bound), 100, kept)
        self._kernel.advance(
            factors, lr.to(self._device), None, self.problem.to(self._device)[index], batches, start, stop, status,
            torch.full_like(index, -1), guard, records, num_threads=kernels.num_threads(),
        )  # fmt: skip
        return status
