"""Sparse linear regression, y = X beta* + noise with few non-zero entries in beta*."""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dlnlab import checks
from dlnlab.data.base import SyntheticData
from dlnlab.streams import Stream

DISTRIBUTIONS = ("gaussian", "rademacher", "uniform", "student_t", "lognormal", "correlated")
SIGNALS = ("ones", "signs", "gaussian")
_T_DEGREES = 3
_SMALLEST_GAUSSIAN = 0.1


class SparseRegression(SyntheticData):
    r"""Linear regression on a sparse teacher, `y_i = <beta*, x_i> + noise_std * N(0, 1)`.

    The entries of x have variance 1 before `row_scale`, `input_mean` and `normalize_columns`; student_t (3 degrees of
    freedom) and lognormal are heavy-tailed, lognormal skewed too. The test rows are drawn like the training rows, but
    without noise on y.

    Args:
        num_samples: n, training rows.
        dim: d, features.
        sparsity: s, non-zero entries of the teacher, at most dim; their places are drawn at random. May be an axis.
        noise_std: Standard deviation of the noise on y, not negative. May be an axis.
        input_distribution: `gaussian`, `rademacher` (signs), `uniform`, `student_t`, `lognormal` (exp of N(0, 1), less
            its mean, over its standard deviation), or `correlated`: Gaussian with covariance correlation^|i - j|. May be
            an axis.
        correlation: Of neighbouring features, in [0, 1), for `correlated`. May be an axis.
        input_mean: A number added to every entry of x. May be an axis.
        row_scale: Row i of n is multiplied by row i of n evenly spaced values from the first to the second number, in
            the training and the test set alike: heteroscedastic inputs.
        signal: The teacher's entries: `ones`, `signs` or `gaussian`, whose magnitudes below 0.1 are drawn again from
            the rest of the distribution.
        signal_scale: Multiplies the teacher.
        normalize_columns: Divide each feature by its root mean square over the training rows.
        num_test_samples: Rows of the test set.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        even2023, section 4; pesme2021 (row_scale).
    """

    axes: ClassVar[tuple[str, ...]] = ("sparsity", "noise_std", "input_mean", "correlation", "input_distribution")

    def __init__(
        self,
        num_samples: int = 20,
        dim: int = 30,
        sparsity: int = 3,
        noise_std: float = 0.0,
        input_distribution: Literal[
            "gaussian", "rademacher", "uniform", "student_t", "lognormal", "correlated"
        ] = "gaussian",
        correlation: float = 0.5,
        input_mean: float = 0.0,
        row_scale: list[float] | None = None,
        signal: Literal["ones", "signs", "gaussian"] = "ones",
        signal_scale: float = 1.0,
        normalize_columns: bool = False,
        num_test_samples: int = 1000,
    ) -> None:
        super().__init__(num_test_samples)
        self.num_samples = checks.integer("num_samples", num_samples, at_least=1)
        self.dim = checks.integer("dim", dim, at_least=1)
        self.sparsity = sparsity
        self.noise_std = noise_std
        self.input_distribution = input_distribution
        self.correlation = correlation
        self.input_mean = input_mean
        if row_scale is not None:
            if len(row_scale) != 2:
                raise ValueError(f"row_scale = {row_scale}: must be two numbers, the first and the last row's scale")
            row_scale = [checks.positive("row_scale", scale) for scale in row_scale]
        self.row_scale = row_scale
        self.signal = checks.one_of("signal", signal, SIGNALS)
        self.signal_scale = checks.positive("signal_scale", signal_scale)
        self.normalize_columns = checks.flag("normalize_columns", normalize_columns)
        self.check({name: getattr(self, name) for name in self.axes})

    def check(self, values: dict[str, Any]) -> None:
        """Raise ValueError where a data axis is out of range."""
        checks.integer("sparsity", values["sparsity"], at_least=1)
        if values["sparsity"] > self.dim:
            raise ValueError(f"sparsity = {values['sparsity']}: must be at most dim = {self.dim}")
        checks.number("noise_std", values["noise_std"], at_least=0)
        checks.number("input_mean", values["input_mean"])
        checks.one_of("input_distribution", values["input_distribution"], DISTRIBUTIONS)
        if not 0 <= checks.number("correlation", values["correlation"]) < 1:
            raise ValueError(f"correlation = {values['correlation']}: must be at least 0 and below 1")

    def bytes_per_problem(self) -> int:
        """Of x, y and the teacher in float64."""
        return 8 * ((self.num_samples + self.num_test_samples) * (self.dim + 1) + self.dim)

    def bytes_to_draw(self) -> int:
        """Three normal numbers make one of student_t; `correlated` has a covariance and its factor, (D, D)."""
        ensemble = self._ensemble()
        kinds = ensemble.axes.get("input_distribution", [self.input_distribution])
        beside = 2 if "student_t" in kinds else 1
        covariance = 4 * 8 * self.dim**2 if "correlated" in kinds else 0
        return beside * super().bytes_to_draw() + covariance

    def sample(self, stream: Stream, values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """One problem; see the class."""
        teacher = self._teacher(stream, values["sparsity"])
        x = self._inputs(stream, "inputs", self.num_samples, values)
        x_test = self._inputs(stream, "test", self.num_test_samples, values)
        if self.normalize_columns:
            scale = x.square().mean(0).sqrt()
            if (scale == 0).any():
                raise ValueError(f"normalize_columns: column {int((scale == 0).nonzero()[0])} of x is zero")
            x, x_test = x / scale, x_test / scale
        noise = values["noise_std"] * stream.normals("noise", (self.num_samples,))
        return torch.cat((x, x_test)), torch.cat((x @ teacher + noise, x_test @ teacher)), teacher

    def _teacher(self, stream: Stream, sparsity: int) -> Tensor:
        # All dim places and values are drawn, so that a larger support contains a smaller one.
        support = stream.subset("teacher", self.dim, self.dim)[:sparsity]
        if self.signal == "ones":
            entries = torch.ones(self.dim, dtype=torch.float64, device=stream.device)
        elif self.signal == "signs":
            entries = stream.signs("teacher", (self.dim,), step=1)
        else:
            # A normal number conditioned on |z| >= smallest, by inversion of its distribution function.
            half = torch.special.ndtr(torch.tensor(-_SMALLEST_GAUSSIAN, dtype=torch.float64, device=stream.device))
            tail = half * (1 - stream.uniforms("teacher", (self.dim,), step=2))
            entries = -torch.special.ndtri(tail) * stream.signs("teacher", (self.dim,), step=1)
        teacher = torch.zeros(self.dim, dtype=torch.float64, device=stream.device)
        teacher[support] = self.signal_scale * entries[:sparsity]
        return teacher

    def _inputs(self, stream: Stream, purpose: str, rows: int, values: dict[str, Any]) -> Tensor:
        shape, kind = (rows, self.dim), values["input_distribution"]
        if kind == "rademacher":
            x = stream.signs(purpose, shape)
        elif kind == "uniform":
            x = (2 * stream.uniforms(purpose, shape) - 1) * 3**0.5
        elif kind == "student_t":
            # t = N(0, 1)/sqrt(chi^2/degrees), of variance degrees/(degrees - 2).
            chi_squared = stream.normals(purpose, (rows, self.dim, _T_DEGREES), step=1).square().sum(-1)
            x = stream.normals(purpose, shape) * torch.sqrt((_T_DEGREES - 2) / chi_squared)
        elif kind == "lognormal":
            # exp(z) has mean e^(1/2) and variance (e - 1) e.
            x = (torch.exp(stream.normals(purpose, shape)) - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)
        else:
            x = stream.normals(purpose, shape)
        if kind == "correlated":
            distance = torch.arange(self.dim, device=x.device)
            covariance = float(values["correlation"]) ** (distance[:, None] - distance).abs().double()
            x = x @ torch.linalg.cholesky(covariance).T
        if self.row_scale is not None:
            x = x * torch.linspace(*self.row_scale, rows, dtype=torch.float64, device=x.device)[:, None]
        return x + values["input_mean"]
