"""Some entries of a matrix of low rank."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dlnlab import checks
from dlnlab.data.base import SyntheticData
from dlnlab.streams import Stream

FACTORS = ("signs", "gaussian")


class LowRankCompletion(SyntheticData):
    r"""Observed entries of a matrix of low rank, `Y_ij = A*_ij + noise_std * N(0, 1)`.

    .. math:: A^* = \sum_{k \le r} u_k v_k^\top

    with entries of u_k and v_k that are signs or standard normal numbers; where a spectrum is given, the u_k and v_k are
    orthonormalised and its values are the singular values of A*. The entries that are not observed, without noise, are
    the test set, and `distance` is the mean squared error over them.

    Args:
        shape: (K, D), rows and columns.
        rank: r of A*. May be an axis unless there is a spectrum.
        spectrum: The r singular values of A*, positive; None leaves them to the factors (rank 1, `signs`: sqrt(K D)).
        factors: `signs` or `gaussian`.
        observed_fraction: Share of the entries that is observed, in (0, 1].
        num_observed: N, their number, instead of the share.
        min_observed: So many entries at least are observed in every row and every column; N must be at least
            min_observed (K + D), or all entries. Otherwise they are drawn uniformly.
        noise_std: Standard deviation of the noise on the observed entries, not negative. May be an axis.
        fullest_columns: Of the observed entries train on those only that lie in so many columns, the ones with the most:
            the first N fullest_columns/D of them, rounded up, which are always there. All others are the test set.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        wang2024 (the task, whose sizes could not be confirmed; that drawing entries of r columns only leads to rank r).
    """

    axes: ClassVar[tuple[str, ...]] = ("rank", "noise_std")

    def __init__(
        self,
        shape: tuple[int, int] = (10, 10),
        rank: int = 1,
        spectrum: list[float] | None = None,
        factors: Literal["signs", "gaussian"] = "signs",
        observed_fraction: float = 0.6,
        num_observed: int | None = None,
        min_observed: int = 1,
        noise_std: float = 0.0,
        fullest_columns: int | None = None,
    ) -> None:
        if not isinstance(shape, list | tuple) or len(shape) != 2:
            raise ValueError(f"shape = {checks.shown(shape)}: must be two numbers, rows and columns")
        height, dim = (checks.integer("shape", size, at_least=1) for size in shape)
        if checks.positive("observed_fraction", observed_fraction) > 1:
            raise ValueError(f"observed_fraction = {observed_fraction}: must be at most 1")
        if num_observed is None:
            num_observed = max(1, round(observed_fraction * height * dim))
        else:
            checks.integer("num_observed", num_observed, at_least=1, at_most=height * dim)
        self.fullest_columns = fullest_columns
        self.num_trained = num_observed
        if fullest_columns is not None:
            checks.integer("fullest_columns", fullest_columns, at_least=1, at_most=dim)
            self.num_trained = -(-num_observed * fullest_columns // dim)
        super().__init__(height * dim - self.num_trained)
        self.matrix_shape = height, dim
        self.shape = height, dim
        self.rank = rank
        self.spectrum = None if spectrum is None else [checks.positive("spectrum", value) for value in spectrum]
        self.factors = checks.one_of("factors", factors, FACTORS)
        self.num_observed = num_observed
        self.min_observed = checks.integer("min_observed", min_observed, at_most=min(height, dim))
        if num_observed < min(min_observed * (height + dim), height * dim):
            raise ValueError(
                f"min_observed = {min_observed}: with {num_observed} of {height} x {dim} entries observed it must be at "
                f"most {num_observed // (height + dim)}"
            )
        self.noise_std = noise_std
        self.check({name: getattr(self, name) for name in self.axes})

    def check(self, values: dict[str, Any]) -> None:
        """Raise ValueError where a data axis is out of range."""
        checks.integer("rank", values["rank"], at_least=1, at_most=min(self.shape))
        if self.spectrum is not None and len(self.spectrum) != values["rank"]:
            raise ValueError(f"spectrum has {len(self.spectrum)} values: must have rank = {values['rank']} of them")
        checks.number("noise_std", values["noise_std"], at_least=0)

    def bytes_per_problem(self) -> int:
        """Of the places, the values and the matrix."""
        return 8 * 4 * self.shape[0] * self.shape[1]

    def sample(self, stream: Stream, values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """One problem; see the class."""
        (height, dim), rank = self.shape, values["rank"]
        draw = stream.signs if self.factors == "signs" else stream.normals
        # A factor for each step of the stream, so that a higher rank adds to a lower one.
        factors = torch.stack([draw("teacher", (height + dim,), k) for k in range(rank)], dim=1)
        u, v = factors[:height], factors[height:]
        if self.spectrum is not None:
            u, v = torch.linalg.qr(u).Q, torch.linalg.qr(v).Q
            u = u * torch.tensor(self.spectrum, dtype=torch.float64, device=u.device)
        matrix = u @ v.T
        order = self._order(stream)
        places = torch.stack((order // dim, order % dim), dim=1)
        noise = torch.zeros(len(order), dtype=torch.float64, device=order.device)
        noise[: self.num_observed] = values["noise_std"] * stream.normals("noise", (self.num_observed,))
        if self.fullest_columns is not None:
            chosen = self._in_fullest_columns(places)
            places, noise = places[chosen], noise[chosen]
        noise[self.num_trained :] = 0
        return places, matrix[places[:, 0], places[:, 1]] + noise, matrix

    def _order(self, stream: Stream) -> Tensor:
        """All places as numbers, the observed first."""
        height, dim = self.shape
        # Lots are drawn for the places. The `min_observed` lowest of each row and column come before the others: where
        # the lowest lots of all are enough of every row and column, these come first anyway.
        lots = stream.uniforms("inputs", (height, dim))
        first = torch.zeros_like(lots, dtype=torch.bool)
        for axis in (0, 1):
            lowest = lots.argsort(dim=axis, stable=True).narrow(axis, 0, self.min_observed)
            first |= torch.zeros_like(first).scatter_(axis, lowest, True)
        return torch.where(first, lots - 1, lots).flatten().argsort(stable=True)

    def _in_fullest_columns(self, places: Tensor) -> Tensor:
        """An order of the places, those to train on first."""
        counts = places[: self.num_observed, 1].bincount(minlength=self.shape[1])
        fullest = counts.argsort(descending=True, stable=True)[: self.fullest_columns]
        there = torch.isin(places[:, 1], fullest)
        there[self.num_observed :] = False
        return (~there).to(torch.int8).argsort(stable=True)
