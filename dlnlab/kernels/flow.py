"""Gradient flow of the diagonal linear network as an ODE in n unknowns.

With w+(t) = w+(0) exp(e), w-(t) = w-(0) exp(-e) and e = X^T nu, the flow of the 2d factors is that of n numbers,

    nu' = -(X beta - y)/n,    beta = alpha^2 sinh(2 X^T nu + z),    alpha^2 = |w+(0) w-(0)|,  z = ln|w+(0)/w-(0)|,

so the imbalance alpha^2 and the mirror form hold whatever the integrator's error, and nothing under- or overflows: only
logarithms of the factors are ever computed. It is stiff (its rates are those of X diag(2 sqrt(beta^2 + alpha^4)) X^T/n,
and every feature that is learnt brings a rate of its own), hence LSODA, which takes a step size and an order per member.

Reference: derived here; the mirror form is even2023's and woodworth2020's.
"""

import numpy as np
import torch
from scipy.integrate import LSODA
from torch import Tensor

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)
_LATE, _STAGE = 1e-5, 1e-2
"""Where the residual has fallen to the first part of what it was, late stages begin; each lasts until the second part."""
_SPEED_ERROR, _LOOSEST = 1e-4, 1e-6
"""In a late stage: error of the velocity, relative, and of X^T nu."""
_LARGEST_EXPONENT = 650.0
"""A trial step may ask for the exponential of anything; what is refused must still be a number, and its square too."""


class DualFlow:
    """Members of the diagonal network under gradient flow of the full loss 1/(2n) |X beta - y|^2.

    A member's path is a function of its problem, its start, `end` and `tol` alone, whatever times are asked for.

    Args:
        x: Inputs (P, N, D).
        y: Targets (P, N).
        problem: The problem of each member, int64 (E,).
        w_plus: w+(0), (E, D).
        w_minus: w-(0), likewise.
        end: The last time that will be asked for.
        tol: Local error per step of nu, relative and absolute, in units of the largest row and of the least of 1 and
            what nu changes by.
    """

    def __init__(
        self, x: Tensor, y: Tensor, problem: Tensor, w_plus: Tensor, w_minus: Tensor, end: float, tol: float
    ) -> None:
        x, y = (tensor.double().cpu().numpy() for tensor in (x, y))
        self._like = w_plus
        self._signs = torch.sign(w_plus).double(), torch.sign(w_minus).double()
        smallest = torch.finfo(torch.float64).tiny  # a factor that is 0 stays so: its sign is 0
        self._logs = tuple(w.abs().double().clamp(min=smallest).log() for w in (w_plus, w_minus))
        log_plus, log_minus = (logs.cpu().numpy() for logs in self._logs)
        self._members = [
            _Member(x[p], y[p], log_plus[i], log_minus[i], end, tol) for i, p in enumerate(problem.tolist())
        ]

    def at(self, members: Tensor, time: float) -> tuple[Tensor, Tensor, Tensor]:
        """Where some members are at a time, not earlier than any asked for before.

        Args:
            members: Their numbers, int64 (G,).
            time: The time t.

        Returns:
            w+(t) and w-(t), (G, D), and the integral of the loss from 0 to t, (G,), all float64.

        Raises:
            RuntimeError: If the integrator gives up on a member.
        """
        found = [self._members[i].at(time) for i in members.tolist()]
        exponent = torch.from_numpy(np.stack([exponent for exponent, _ in found])).to(self._like.device)
        integral = torch.tensor([integral for _, integral in found], dtype=torch.float64, device=self._like.device)
        plus, minus = (
            sign[members] * torch.exp(log[members] + way * exponent)
            for way, sign, log in zip((1, -1), self._signs, self._logs, strict=True)
        )
        return plus, minus, integral


class _Member:
    """One member's solver, kept between the times it is asked for."""

    def __init__(
        self, x: np.ndarray, y: np.ndarray, log_plus: np.ndarray, log_minus: np.ndarray, end: float, tol: float
    ) -> None:
        self._size = max(float(np.sqrt((x * x).sum(1).max())), np.finfo(float).tiny)
        self._x, self._y, self._rows = x, y, x / self._size
        self._scale, self._shift = log_plus + log_minus, log_plus - log_minus
        with np.errstate(all="ignore"):
            # In the kernel regime, alpha^2 >> |beta|, the whole path of X^T nu is as short as asinh(beta/alpha^2)/2.
            reach = 0.5 * np.arcsinh(np.abs(np.linalg.pinv(x) @ y).max() * np.exp(-self._scale.max()))
        self._tol, self._atol = max(tol, 1e-13), tol * min(1.0, float(reach)) if reach > 0 else tol
        self._end, self._integral = end, 0.0  # the integral of the loss up to the beginning of the solver's last step
        self._origin, self._basis = np.zeros(len(y)), np.eye(len(y))
        whole = float(np.linalg.norm(y) + np.linalg.norm(self._residual(self._origin)))
        self._at_rest, self._resting, self._next_stage = tol * whole, False, _LATE * whole
        self._begin(0.0, self._origin, self._atol)

    def _begin(self, time: float, dual: np.ndarray, atol: float | np.ndarray, first: float | None = None) -> None:
        """Integrate from here on, with a first step, in the coordinates (dual - origin) of the basis."""
        self._origin, self._dense = dual, None
        basis = self._basis
        self._solver = LSODA(
            lambda _, at: basis @ self._velocity(dual + at @ basis), time, np.zeros(len(dual)), self._end,
            rtol=self._tol, atol=atol, first_step=first,
            jac=lambda _, at: basis @ self._jacobian(dual + at @ basis) @ basis.T,
        )  # fmt: skip

    def _begin_late_stage(self) -> None:
        """Go on where the residual has become small, each direction to the error that matters there.

        Features that are still next to nothing move slowly, and the slower the less of the velocity there is above its
        rounding; held to the first tolerance in these directions, the steps would end at about tol over rounding.
        """
        dual = self._origin + self._solver.y @ self._basis
        rates, vectors = np.linalg.eigh(self._jacobian(dual))
        speed = float(np.linalg.norm(self._velocity(dual)))
        with np.errstate(divide="ignore"):
            atol = np.clip(_SPEED_ERROR * speed / np.abs(rates), self._atol, max(_LOOSEST, self._atol))
        self._basis = vectors.T
        # LSODA's own guess is where it would be accurate, and its first method, an explicit one, not stable.
        self._begin(self._solver.t, dual, atol, min(0.1 / float(np.abs(rates).max()), self._end - self._solver.t))

    def at(self, time: float) -> tuple[np.ndarray, float]:
        """X^T nu (D,) and the integral of the loss at a time."""
        while self._solver.t < time and not self._resting:
            if self._dense is not None:
                self._integral += self._loss_over(self._solver.t_old, self._solver.t)
                left = float(np.linalg.norm(self._residual(self._origin + self._solver.y @ self._basis)))
                # What is left is below the tolerance, and rounding would make the solver's work grow with time.
                self._resting = left <= self._at_rest
                if self._resting:
                    break
                if left < self._next_stage:
                    self._next_stage = left * _STAGE
                    self._begin_late_stage()
            with np.errstate(over="ignore", invalid="ignore"):
                message = self._solver.step()
            if self._solver.status == "failed":
                raise RuntimeError(f"gradient flow: LSODA gave up at time {self._solver.t:g}: {message}")
            self._dense = self._solver.dense_output()
        if self._dense is None or self._resting:
            return (self._origin + self._solver.y @ self._basis) @ self._rows, self._integral
        at = self._solver.y if time == self._solver.t else self._dense(time)
        integral = self._integral + self._loss_over(self._solver.t_old, time)
        return (self._origin + at @ self._basis) @ self._rows, integral

    def _loss_over(self, start: float, stop: float) -> float:
        # The solver's own interpolant has its order; six nodes integrate its square without further error.
        half = (stop - start) / 2
        residuals = self._residual(self._origin + self._dense(start + half * (1 + _NODES)).T @ self._basis)
        return half * float(_WEIGHTS @ np.square(residuals).sum(-1)) / (2 * len(self._y))

    def _residual(self, dual: np.ndarray) -> np.ndarray:
        z = 2 * (dual @ self._rows) + self._shift
        size = np.abs(z)
        # alpha^2 sinh(z) as one exponential: alpha^2 alone may be below the range of numbers.
        beta = np.sign(z) * np.exp(np.minimum(self._scale + size, _LARGEST_EXPONENT)) * (-np.expm1(-2 * size)) / 2
        return beta @ self._x.T - self._y

    def _velocity(self, dual: np.ndarray) -> np.ndarray:
        return self._residual(dual) * (-self._size / len(dual))

    def _jacobian(self, dual: np.ndarray) -> np.ndarray:
        size = np.abs(2 * (dual @ self._rows) + self._shift)
        curve = np.exp(np.minimum(self._scale + size, _LARGEST_EXPONENT)) * (1 + np.exp(-2 * size)) / 2
        return (self._x * curve) @ self._rows.T * (-2 * self._size / len(dual))
