r"""Gradient flow of the diagonal linear network as an ODE in n unknowns.

With w+(t) = w+(0) exp(e), w-(t) = w-(0) exp(-e) and e = X^T nu, the flow of the 2d factors is that of n numbers,

    nu' = -(X beta - y)/n,    beta = alpha^2 sinh(2 X^T nu + z),    alpha^2 = |w+(0) w-(0)|,  z = ln|w+(0)/w-(0)|,

so the imbalance alpha^2 and the mirror form hold whatever the integrator's error, and nothing under- or overflows: only
logarithms of the factors are ever computed. It is integrated in units in which X and y are of order 1, and in the left
singular vectors of X, where each unknown's velocity is rounded to a part of itself, however small. It is stiff (its rates
are those of X diag(2 sqrt(beta^2 + alpha^4)) X^T/n, and every feature that is learnt brings a rate of its own), hence
LSODA, which takes a step size and an order per member.

Reference: derived here; the mirror form is even2023's and woodworth2020's.
"""

import math

import numpy as np
from scipy.integrate import LSODA

from dlnlab.theory.inputs import CONSISTENT

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)
_LATE, _STAGE = 1e-5, 1e-2
"""Where the residual has fallen to the first part of what it was, late stages begin; each lasts until the second part."""
_SPEED_ERROR, _TIGHTEST, _LOOSEST = 1e-4, 1e-12, 1e-8
"""In a late stage: error of the velocity, relative, and bounds on that of X^T nu, in units of the least of 1 and what it
changes by."""
_LARGEST_EXPONENT = 650.0
"""A trial step may ask for the exponential of anything; what is refused must still be a number, and its square too."""
_LAST_TIME = 1e300
"""In units of the problem: no flow that comes to rest in floating point takes as long."""


class DualPath:
    """The flow of one problem from one start, under the full loss 1/(2n) |X beta - y|^2.

    The path is a function of the problem, the start, `end` and `tol` alone, whatever times are asked for.

    Args:
        x: Inputs (N, D).
        y: Targets (N,).
        log_plus: ln|w+(0)|, (D,).
        log_minus: ln|w-(0)|, (D,).
        end: The last time that will be asked for.
        tol: Local error per step of X^T nu, relative and absolute, in units of the least of 1 and what it changes by.
        rest: The flow rests once the residual has fallen to this part of what it was; None is `tol`.
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        log_plus: np.ndarray,
        log_minus: np.ndarray,
        end: float,
        tol: float,
        rest: float | None = None,
    ) -> None:
        x_exponent = _exponent(x)
        x = np.ldexp(x, -x_exponent)
        self._scale, self._shift = log_plus + log_minus, log_plus - log_minus
        start = _scaled_sinh(self._scale, self._shift)
        y_exponent = _exponent(np.concatenate((y, np.ldexp(x @ start, x_exponent))))
        y = np.ldexp(y, -y_exponent)
        self._scale = self._scale + (x_exponent - y_exponent) * math.log(2)
        self._per_time, self._per_beta = x_exponent + y_exponent, y_exponent - x_exponent
        left, sizes, right = np.linalg.svd(x, full_matrices=False)
        kept = sizes > max(x.shape) * np.finfo(float).eps * sizes[0]
        self._left, self._sizes = left[:, kept], sizes[kept]
        self._x, self._y = self._sizes[:, None] * right[kept], y @ self._left
        outside = self._left @ self._y - y  # the flow never changes this part of the residual
        self._outside = outside if np.linalg.norm(outside) > CONSISTENT * np.linalg.norm(y) else np.zeros_like(y)
        nearest = self._y / self._sizes @ right[kept]
        with np.errstate(all="ignore"):
            # In the kernel regime, alpha^2 >> |beta|, the whole path of X^T nu is as short as asinh(beta/alpha^2)/2.
            reach = 0.5 * np.arcsinh(np.abs(nearest).max() * np.exp(-self._scale.max()))
        self._reach = min(1.0, float(reach)) if reach > 0 else 1.0
        self._tol, self._atol = max(tol, 1e-13), tol * self._reach
        self._end = self._own_time(end)
        self._squares = np.zeros(len(y) + x.shape[1])  # to the beginning of the solver's last step: of r, then of g
        self._origin, self._basis = np.zeros(len(self._y)), np.eye(len(self._y))
        whole = float(np.linalg.norm(self._y) + np.linalg.norm(self._residual(self._origin)))
        self._at_rest, self._next_stage = (tol if rest is None else rest) * whole, _LATE * whole
        self._rested = 0.0 if whole == 0 else None
        if self._rested is None:
            self._begin(0.0, self._origin, self._atol / self._sizes)

    def at(self, time: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The path at a time, not earlier than any asked for before.

        Args:
            time: The time t.

        Returns:
            X^T nu, (D,), and the integrals from 0 to t of r_j^2, (N,), and of g_i^2, (D,).

        Raises:
            RuntimeError: If the integrator gives up.
        """
        time = self._own_time(time)
        while self._rested is None and self._solver.t < time:
            self.step()
        dual, squares = self._origin, self._squares
        if self._rested is not None:
            squares = squares + np.pad(self._outside**2, (0, len(squares) - len(self._outside))) * (time - self._rested)
        elif self._dense is not None:
            dual = dual + (self._solver.y if time == self._solver.t else self._dense(time)) @ self._basis
            squares = squares + self._squares_over(self._solver.t_old, time)
        of_residual, of_gradient = np.split(squares, [len(self._outside)])
        return dual @ self._x, np.ldexp(of_residual, self._per_beta), np.ldexp(of_gradient, self._per_time)

    @property
    def time(self) -> float:
        """How far the integrator has come."""
        return float(np.ldexp(self._solver.t if self._rested is None else self._rested, -self._per_time))

    def step(self) -> None:
        """Take a step of the integrator, or come to rest.

        Raises:
            RuntimeError: If the integrator gives up.
        """
        if self._dense is not None:
            self._squares += self._squares_over(self._solver.t_old, self._solver.t)
            dual = self._origin + self._solver.y @ self._basis
            left = float(np.linalg.norm(self._residual(dual)))
            # What is left is below the tolerance, and rounding would make the solver's work grow with time.
            if left <= self._at_rest:
                self._origin, self._rested = dual, self._solver.t
                return
            if left < self._next_stage:
                self._next_stage = left * _STAGE
                self._begin_late_stage()
        with np.errstate(over="ignore", invalid="ignore"):
            message = self._solver.step()
        if self._solver.status == "failed" and self._solver.t > self._begun:
            self._begin_late_stage()  # its history is no use where it has failed
            return
        if self._solver.status == "failed":
            raise RuntimeError(f"gradient flow: LSODA gave up at time {self.time:g}: {message}")
        self._dense = self._solver.dense_output()

    def _own_time(self, time: float) -> float:
        with np.errstate(over="ignore"):
            return min(float(np.ldexp(time, self._per_time)), _LAST_TIME)

    def _begin(self, time: float, dual: np.ndarray, atol: np.ndarray, first: float | None = None) -> None:
        """Integrate from here on, with a first step, in the coordinates (dual - origin) of the basis."""
        self._origin, self._dense, self._begun = dual, None, time
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
        self._basis = vectors.T
        lengths = np.linalg.norm(self._basis * self._sizes, axis=1)  # of X^T nu as each coordinate moves by 1
        with np.errstate(divide="ignore"):
            atol = _SPEED_ERROR * speed / np.abs(rates)
        tightest, loosest = min(_TIGHTEST * self._reach, self._atol), max(_LOOSEST * self._reach, self._atol)
        atol = np.clip(atol, tightest / lengths, loosest / lengths)
        # LSODA's own guess is where it would be accurate, and its first method, an explicit one, not stable.
        self._begin(self._solver.t, dual, atol, min(0.1 / float(np.abs(rates).max()), self._end - self._solver.t))

    def _squares_over(self, start: float, stop: float) -> np.ndarray:
        # The solver's own interpolant has its order; six nodes integrate its square without further error.
        half = (stop - start) / 2
        residual = self._residual(self._origin + self._dense(start + half * (1 + _NODES)).T @ self._basis)
        both = np.concatenate(
            (residual @ self._left.T + self._outside, residual @ self._x / len(self._outside)), axis=1
        )
        return half * (_WEIGHTS @ np.square(both))

    def _residual(self, dual: np.ndarray) -> np.ndarray:
        return _scaled_sinh(self._scale, 2 * (dual @ self._x) + self._shift) @ self._x.T - self._y

    def _velocity(self, dual: np.ndarray) -> np.ndarray:
        return -self._residual(dual) / len(self._outside)

    def _jacobian(self, dual: np.ndarray) -> np.ndarray:
        size = np.abs(2 * (dual @ self._x) + self._shift)
        curve = np.exp(np.minimum(self._scale + size, _LARGEST_EXPONENT)) * (1 + np.exp(-2 * size)) / 2
        return (self._x * curve) @ self._x.T * (-2 / len(self._outside))


def _exponent(values: np.ndarray) -> int:
    """The power of two next to the largest entry; 0 where there is none but 0."""
    return int(np.frexp(np.abs(values).max())[1])


def _scaled_sinh(log_scale: np.ndarray, z: np.ndarray) -> np.ndarray:
    """exp(log_scale) sinh(z) as one exponential: the scale alone may be below the range of numbers."""
    size = np.abs(z)
    return np.sign(z) * np.exp(np.minimum(log_scale + size, _LARGEST_EXPONENT)) * (-np.expm1(-2 * size)) / 2
