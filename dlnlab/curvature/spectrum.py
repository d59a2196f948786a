"""Spectral density and trace of an operator from random probes, each with its error."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dlnlab.curvature.operators import Matrix, Operator


@dataclass(frozen=True)
class Trace:
    """An estimated trace.

    Args:
        value: The estimate, () or (E,).
        error: Its standard error, of the same shape; 0 where it is exact.
        num_products: Products with the operator.
    """

    value: Tensor
    error: Tensor
    num_products: int


@dataclass(frozen=True)
class SpectralDensity:
    """An estimated spectral density.

    Args:
        grid: Points, (num_points,) or (E, num_points).
        density: The density there, which integrates to 1.
        error: Its standard error over probes.
        nodes: Quadrature nodes of every probe, (num_probes, steps) or (E, num_probes, steps).
        weights: Their weights, which sum to 1 for every probe.
        width: Standard deviation of the Gaussians that smooth the density, () or (E,).
        num_products: Products with the operator.
    """

    grid: Tensor
    density: Tensor
    error: Tensor
    nodes: Tensor
    weights: Tensor
    width: Tensor
    num_products: int


def trace(operator: Operator | Tensor, num_products: int = 60, seed: int = 0) -> Trace:
    """The trace of a symmetric operator, by Hutch++: exact on a sketched range, probed by random signs on the rest.

    Args:
        operator: An `Operator` or a symmetric matrix.
        num_products: Products to spend, at least 6; with as many as its size the trace is exact.
        seed: Of the probes.

    Returns:
        The estimate and its error.

    Raises:
        ValueError: If there are too few products.

    Example:
        >>> found = trace(torch.diag(torch.tensor([3.0, -1.0, 0.5])))
        >>> float(found.value), float(found.error)
        (2.5, 0.0)

    Reference:
        Meyer, Musco, Musco and Woodruff 2021 (Hutch++).
    """
    if num_products < 6:
        raise ValueError(f"num_products = {num_products}: must be at least 6")
    operator = Matrix(operator) if isinstance(operator, Tensor) else operator
    *members, size, _ = operator.shape
    if size <= num_products:
        value = operator.dense().diagonal(dim1=-2, dim2=-1).sum(-1)
        return Trace(value, torch.zeros_like(value), size)
    third = num_products // 3
    generator = torch.Generator().manual_seed(seed)
    sketch, probes = _signs(operator, generator, third), _signs(operator, generator, third)
    basis = torch.linalg.qr(_by_member(operator.matvec(sketch), members).mT).Q.mT  # ([E,] third, n)
    images = _by_member(operator.matvec(_by_member(basis, members)), members)
    known = (basis * images).sum((-2, -1))
    probes = _by_member(probes, members)
    probes = probes - probes @ basis.mT @ basis
    samples = (probes * _by_member(operator.matvec(_by_member(probes, members)), members)).sum(-1)
    return Trace(known + samples.mean(-1), samples.std(-1) / math.sqrt(third), 3 * third)


def spectral_density(
    operator: Operator | Tensor,
    num_probes: int = 8,
    num_steps: int = 60,
    num_points: int = 500,
    width: float = 0.01,
    seed: int = 0,
) -> SpectralDensity:
    r"""The density of eigenvalues, by stochastic Lanczos quadrature with full reorthogonalisation.

    .. math:: \rho(t) = \frac1n \sum_i N(t; \lambda_i, \sigma^2)

    Args:
        operator: An `Operator` or a symmetric matrix.
        num_probes: Random vectors, at least 2; the error falls as one over its square root.
        num_steps: Lanczos steps, products of each probe.
        num_points: Points of the grid, which spans the spectrum and 5 sigma at each end.
        width: sigma, as a part of the spectrum's extent.
        seed: Of the probes.

    Returns:
        The density, its error and the quadrature, with which any other function of the spectrum is averaged.

    Raises:
        ValueError: If there are fewer than two probes.

    Reference:
        Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019.
    """
    if num_probes < 2:
        raise ValueError(f"num_probes = {num_probes}: must be at least 2, or there is no error estimate")
    operator = Matrix(operator) if isinstance(operator, Tensor) else operator
    *members, size, _ = operator.shape
    steps = min(num_steps, size)
    generator = torch.Generator().manual_seed(seed)
    vector = _by_member(torch.randn(num_probes, size, generator=generator, dtype=torch.float64).to(operator.device)
                        .to(operator.dtype)[:, None].expand(-1, math.prod(members), -1)
                        .reshape(num_probes, *members, size), members)  # fmt: skip
    vector = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    lead = vector.shape[:-1]
    rows = vector.new_zeros(*lead, steps, size)
    diagonal, off = (torch.zeros(*lead, steps, dtype=torch.float64, device=vector.device) for _ in range(2))
    for step in range(steps):
        rows[..., step, :] = vector
        image = _by_member(operator.matvec(_by_member(vector, members)), members)
        diagonal[..., step] = (vector * image).sum(-1).double()
        known = rows[..., : step + 1, :]
        for _ in range(2):
            image = image - ((known @ image[..., None]).mT @ known)[..., 0, :]
        norm = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        # A probe whose space is exhausted goes on with nothing: zero weight.
        left = norm > 100 * torch.finfo(operator.dtype).eps * diagonal.abs().amax(-1, keepdim=True)
        off[..., step] = torch.where(left, norm, 0)[..., 0].double()
        vector = torch.where(left, image / norm, 0)
    tridiagonal = torch.diag_embed(diagonal) + torch.diag_embed(off[..., :-1], 1) + torch.diag_embed(off[..., :-1], -1)
    nodes, coefficients = torch.linalg.eigh(tridiagonal)
    weights = coefficients[..., 0, :].square()
    seen = weights > 1e-14  # zeros of exhausted probes are no eigenvalues
    low = torch.where(seen, nodes, torch.inf).flatten(len(members)).amin(-1)
    high = torch.where(seen, nodes, -torch.inf).flatten(len(members)).amax(-1)
    largest = torch.maximum(low.abs(), high.abs())
    extent = torch.where(high - low > 1e-6 * largest, high - low, torch.where(largest > 0, largest, 1))
    sigma = width * extent
    place = torch.linspace(0, 1, num_points, dtype=torch.float64, device=nodes.device)
    grid = (low - 5 * sigma)[..., None] + place * (high - low + 10 * sigma)[..., None]
    distance = (grid[..., None, :, None] - nodes[..., None, :]) / sigma[..., None, None, None]
    bells = torch.exp(-distance.square() / 2) / (sigma[..., None, None, None] * math.sqrt(2 * math.pi))
    densities = (bells * weights[..., None, :]).sum(-1)
    error = densities.std(-2) / math.sqrt(num_probes)
    return SpectralDensity(grid, densities.mean(-2), error, nodes, weights, sigma, num_probes * steps)


def _signs(operator: Operator, generator: torch.Generator, count: int) -> Tensor:
    """Random signs (count, [E,] n), the same for every member."""
    *members, size, _ = operator.shape
    signs = torch.randint(2, (count, *[1] * len(members), size), generator=generator) * 2.0 - 1
    return signs.to(operator.device, operator.dtype).expand(count, *members, size)


def _by_member(vectors: Tensor, members: list[int]) -> Tensor:
    """(rows, E, n) <-> (E, rows, n); vectors without members stay as they are."""
    return vectors.transpose(0, 1) if members else vectors
