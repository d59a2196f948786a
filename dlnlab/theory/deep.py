"""Deep linear networks A = W_L ... W_1 with the penalty kappa |theta|^2, and what their rank is compared with.

Weights are lists [W_1, ..., W_L] of tensors (..., H_l, H_{l-1}); leading axes are members. The data term is that of
`DeepLinearNetwork`: scale times the sum over observed entries of (A_ij - Y_ij)^2, scale = 1/N unless said otherwise.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dlnlab.theory.inputs import unit

# Norms and balance ---------------------------------------------------------------------------------------------------


def representation_cost(matrix: Tensor, depth: int) -> Tensor:
    r"""The least sum of squared weights of a network of given depth that computes a matrix, wide enough.

    .. math:: \min \{ |\theta|^2 : W_L \cdots W_1 = A \} = L \sum_i s_i(A)^{2/L}

    Singular values that are rounding of the largest, below eps max(K, D) of it, count as zero, as for a rank: their
    2/L-th powers would not be small.

    Args:
        matrix: A (..., K, D).
        depth: L, at least 1.

    Returns:
        (...).

    Raises:
        ValueError: If depth is below 1.

    Reference:
        wang2024 (as L times the 2/L-Schatten norm); the equality itself is classical.

    Example:
        >>> representation_cost(torch.diag(torch.tensor([8.0, 1.0])), 3)
        tensor(15.)
    """
    if depth < 1:
        raise ValueError(f"depth = {depth}: must be at least 1")
    s = torch.linalg.svdvals(matrix)
    rounding = torch.finfo(s.dtype).eps * max(matrix.shape[-2:]) * s[..., :1]
    return depth * (torch.where(s > rounding, s, 0) ** (2 / depth)).sum(-1)


def layer_imbalance(weights: Sequence[Tensor]) -> list[Tensor]:
    """D_l = W_{l+1}^T W_{l+1} - W_l W_l^T, (..., H_l, H_l) for l = 1, ..., L - 1; zero is balanced.

    Gradient flow conserves them; with weight decay kappa they shrink as exp(-4 kappa t).

    Args:
        weights: W_1, ..., W_L.

    Reference:
        Classical for kappa = 0; with weight decay derived here.
    """
    return [b.mT @ b - a @ a.mT for a, b in pairwise(weights)]


def entry_gradients(weights: Sequence[Tensor], row: Tensor, column: Tensor) -> tuple[Tensor, list[Tensor]]:
    """An entry of the product, and its gradient in every layer, G_l = (W_L...W_{l+1})^T e_i (W_{l-1}...W_1 e_j)^T.

    Args:
        weights: W_1, ..., W_L, (E, H_l, H_{l-1}).
        row: i, int64 (E,).
        column: j, likewise.

    Returns:
        A_ij (E,) and G_1, ..., G_L of the weights' shapes.
    """
    members = torch.arange(len(row), device=row.device)
    forward = [torch.zeros_like(weights[0][:, 0]).index_put_((members, column), weights[0].new_ones(()))]
    for w in weights:
        forward.append((w @ forward[-1][..., None]).squeeze(-1))
    backward = [torch.zeros_like(forward[-1]).index_put_((members, row), weights[0].new_ones(()))]
    for w in reversed(weights[1:]):
        backward.insert(0, (backward[0][:, None] @ w).squeeze(1))
    gradients = [g[..., None] * h[:, None] for g, h in zip(backward, forward[:-1], strict=True)]
    return forward[-1][members, row], gradients


def next_layer_imbalance(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: Tensor, weight_decay: Tensor
) -> list[Tensor]:
    r"""What one step makes of the imbalance, exactly.

    .. math:: D_l' = (1 - 2 \eta\kappa)^2 D_l + \eta^2 (F_{l+1}^\top F_{l+1} - F_l F_l^\top)

    for the step W_l <- (1 - 2 eta kappa) W_l - eta F_l along the gradients F_l of any batch (2 r G_l for one entry with
    residual r).

    Args:
        weights: W_1, ..., W_L before the step, (..., H_l, H_{l-1}).
        gradients: F_1, ..., F_L of the data loss.
        lr: eta, (...).
        weight_decay: kappa, (...).

    Returns:
        D_1', ..., D_{L-1}'.

    Reference:
        Derived here.
    """
    lr, kappa = (torch.as_tensor(value, dtype=weights[0].dtype)[..., None, None] for value in (lr, weight_decay))
    old, new = layer_imbalance(weights), layer_imbalance([lr * f for f in gradients])
    return [(1 - 2 * lr * kappa) ** 2 * d + f for d, f in zip(old, new, strict=True)]


def next_square_norm(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], pull: Tensor, lr: Tensor, weight_decay: Tensor
) -> Tensor:
    r"""What one step makes of the sum of squared weights, exactly.

    .. math:: |\theta'|^2 = (1 - 2 \eta\kappa)^2 |\theta|^2 - 2 \eta (1 - 2 \eta\kappa) L p + \eta^2 \sum_l |F_l|^2

    with p = <F_l, W_l>, the same for every layer: 2 r A_ij for one entry, 2/b times the sum of r A_ij for a mean over b.

    Args:
        weights: W_1, ..., W_L before the step.
        gradients: F_1, ..., F_L of the data loss.
        pull: p, (...).
        lr: eta, (...).
        weight_decay: kappa, (...).

    Returns:
        (...).

    Reference:
        Derived here.
    """
    keep = 1 - 2 * lr * weight_decay
    steps = [torch.as_tensor(lr)[..., None, None] * f for f in gradients]
    before, added = (sum(w.square().sum((-1, -2)) for w in each) for each in (weights, steps))
    return keep**2 * before - 2 * lr * keep * len(weights) * pull + added


def absorbing_norm(weight_decay: Tensor, largest: Tensor, depth: int, scale: float = 1.0) -> Tensor:
    r"""From this C on the ball of parameters with |theta|^2 <= C is absorbing at small step sizes (`absorbing_lr`).

    .. math:: C > L c Y^2 / (4 \kappa)

    for steps along the gradient of c times the mean of (A_ij - Y_ij)^2 over any entries, with penalty kappa |theta|^2.

    Args:
        weight_decay: kappa (...).
        largest: Y, the largest |Y_ij| (...).
        depth: L.
        scale: c.

    Returns:
        (...), infinite without weight decay.

    Reference:
        wang2024 gives rates, among them C of the order of 1/kappa; this constant is derived here.
    """
    return depth * scale * largest**2 / (4 * weight_decay)


def absorbing_lr(norm_squared: Tensor, weight_decay: Tensor, largest: Tensor, depth: int, scale: float = 1.0) -> Tensor:
    r"""At step sizes up to this no step leaves the ball of parameters with |theta|^2 <= C, whatever entries it is on.

    .. math:: \eta \le \frac{4 \kappa C - L c Y^2}
        {4 \kappa^2 C + 4 c^2 L (Y + (C/L)^{L/2})^2 (C/(L-1))^{L-1}}

    Args:
        norm_squared: C (...), above `absorbing_norm`.
        weight_decay: kappa (...).
        largest: Y, the largest |Y_ij| (...).
        depth: L, at least 2.
        scale: c of the loss, see `absorbing_norm`.

    Returns:
        (...), negative where C is too small.

    Reference:
        Derived here; sufficient, and far from necessary.
    """
    # In units in which C = c = 1; then no power of C is ever taken alone.
    size = norm_squared ** (depth / 2)
    rate = scale * size * (size / norm_squared)
    decay, largest = weight_decay / rate, largest / size
    residual = largest + depth ** (-depth / 2)
    gradients = depth * (depth - 1) ** (1 - depth)
    return (4 * decay - depth * largest**2) / (4 * decay**2 + 4 * residual**2 * gradients) / rate


# Ranks ---------------------------------------------------------------------------------------------------------------


def effective_rank(singular_values: Tensor) -> Tensor:
    """Exp of the entropy of the singular values over their sum, (..., R) -> (...); between 1 and R, NaN for zero.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]))
        tensor(3.)
    """
    share = singular_values / singular_values.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(share, share).sum(-1))


def stable_rank(singular_values: Tensor) -> Tensor:
    """|W|_F^2/|W|^2, (..., R) descending -> (...); at most the rank, NaN for zero."""
    return (singular_values / singular_values[..., :1]).square().sum(-1)


def smooth_rank(singular_values: Tensor, alpha: float) -> Tensor:
    """The sum of f(s) = s (2 alpha - s)/alpha^2 up to alpha and 1 beyond, (..., R) -> (...).

    Args:
        singular_values: Not negative.
        alpha: Positive; below it a singular value counts as less than one.

    Reference:
        wang2024 defines such a sum; this f is recollected.

    Example:
        >>> smooth_rank(torch.tensor([3.0, 0.5, 0.0]), 1.0)
        tensor(1.7500)
    """
    s = singular_values.clamp(max=alpha) / alpha
    return (s * (2 - s)).sum(-1)


def in_absorbing_set(
    weights: Sequence[Tensor],
    rank: int,
    alpha: float,
    rank_slack: float,
    balance: float | None = None,
    bound: float | None = None,
) -> Tensor:
    """Whether parameters lie in B_r: sum f(s_i(W_l)) <= r + eps2, |D_l|_F^2 <= eps1 and |W_l|_F^2 <= C in all layers.

    Args:
        weights: W_1, ..., W_L.
        rank: r.
        alpha: Of f, see `smooth_rank`.
        rank_slack: eps2.
        balance: eps1; None leaves the condition out.
        bound: C; likewise.

    Returns:
        Boolean (...); False where a weight is not finite.

    Reference:
        wang2024 (such sets are absorbing for SGD at small step sizes and kappa); the formula is recollected.
    """
    finite = torch.stack([w.isfinite().flatten(-2).all(-1) for w in weights]).all(0)
    weights = [torch.where(finite[..., None, None], w, torch.zeros_like(w)) for w in weights]
    inside = finite
    for w in weights:
        inside = inside & (smooth_rank(torch.linalg.svdvals(w), alpha) <= rank + rank_slack)
        if bound is not None:
            inside = inside & (w.square().sum((-1, -2)) <= bound)
    for d in layer_imbalance(weights) if balance is not None else ():
        inside = inside & (d.square().sum((-1, -2)) <= balance)
    return inside


def critical_singular_value(weight_decay: float, residual: float, depth: int) -> float:
    """Below it a singular value of balanced, aligned factors shrinks: s* = (kappa/|r|)^(1/(L-2)).

    Infinite where the residual is 0 (all shrink), 0 without weight decay (none does).

    Args:
        weight_decay: kappa.
        residual: The largest |A_ij - Y_ij|.
        depth: L, at least 3: with two layers a small one grows whenever |r| > kappa, whatever its size.

    Raises:
        ValueError: If depth is below 3.

    Reference:
        Derived here.
    """
    if depth < 3:
        raise ValueError(f"depth = {depth}: must be at least 3, no singular value is small enough with two layers")
    if weight_decay == 0 or residual == 0:
        return math.inf if weight_decay > 0 else 0.0
    return (weight_decay / residual) ** (1 / (depth - 2))


# Completion without a network ----------------------------------------------------------------------------------------


def nuclear_norm_completion(
    places: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    penalty: float,
    scale: float | None = None,
    tol: float = 1e-10,
    max_steps: int = 100_000,
) -> tuple[Tensor, float]:
    r"""The matrix that minimises a convex loss: what L = 2 layers with weight decay kappa = penalty/2 converge to.

    .. math:: \min_A \; c \sum_{(i, j)} (A_{ij} - Y_{ij})^2 + \lambda |A|_*

    Accelerated proximal gradient steps with restarts; each is a singular value decomposition.

    Args:
        places: (row, column) of the entries, int64 (N, 2).
        values: Y, (N,).
        shape: (K, D).
        penalty: lambda, positive; 2 kappa for a network of two layers.
        scale: c; None is 1/N.
        tol: On the duality gap, relative to the loss at A = 0.
        max_steps: At most so many steps.

    Returns:
        A (K, D), and its duality gap relative to the loss at A = 0: at most so much above the minimum.

    Raises:
        ValueError: If the penalty is not positive.

    Reference:
        Equality with L = 2: wang2024 (the representation cost at L = 2). The method is FISTA; the gap: derived here.
    """
    if not penalty > 0:
        raise ValueError(f"penalty = {penalty}: must be positive; for none see `min_nuclear_norm`")
    # In units in which the values and c are of order 1.
    size = float(unit(values.double(), -1))
    values = values.double() / size
    penalty = penalty / size * (len(values) if scale is None else 1 / scale)
    rows, columns = places[:, 0], places[:, 1]
    at_zero = float(values.square().sum())
    matrix = torch.zeros(shape, dtype=torch.float64)
    ahead, momentum, best, best_gap = matrix, 1.0, matrix, torch.inf
    for count in range(max_steps):
        moved = ahead.clone()
        moved[rows, columns] = values
        u, s, vh = torch.linalg.svd(moved, full_matrices=False)
        s = (s - penalty / 2).clamp(min=0)
        new = (u * s) @ vh
        if count % 10 == 0:
            gap = _duality_gap(new, float(s.sum()), rows, columns, values, penalty) / max(at_zero, 1e-300)
            if gap < best_gap:
                best, best_gap = new, gap
            if gap <= tol:
                break
        if float(((ahead - new) * (new - matrix)).sum()) > 0:
            momentum = 1.0  # the momentum points uphill: begin anew
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * (new - matrix)
        matrix, momentum = new, following
    return best * size, best_gap


def _duality_gap(matrix, nuclear, rows, columns, values, penalty) -> float:
    """Loss minus its dual at the residuals, shrunk until they are feasible: |2 residual matrix| <= lambda, c = 1."""
    residual = values - matrix[rows, columns]
    dual = torch.zeros_like(matrix)
    dual[rows, columns] = 2 * residual
    shrink = min(1.0, penalty / max(float(torch.linalg.matrix_norm(dual, 2)), 1e-300))
    p = 2 * shrink * residual
    lower = float((p * values).sum() - p.square().sum() / 4)
    return float(residual.square().sum()) + penalty * nuclear - lower


def min_nuclear_norm(places: Tensor, values: Tensor, shape: tuple[int, int], tol: float = 1e-9) -> tuple[Tensor, float]:
    """The interpolator of least nuclear norm: the limit of `nuclear_norm_completion` as the penalty goes to zero.

    Douglas and Rachford's splitting: soft thresholding of singular values and setting the observed entries.

    Args:
        places: (row, column) of the entries, int64 (N, 2).
        values: Y, (N,).
        shape: (K, D).
        tol: On the relative change of the splitting's variable in a step.

    Returns:
        A (K, D), exact on the observed entries, and by how much its nuclear norm is above its dual bound, relatively.

    Reference:
        Classical (Candes and Recht 2009 pose the programme).
    """
    largest = float(unit(values.double(), -1))
    rows, columns, values = places[:, 0], places[:, 1], values.double() / largest
    hidden = torch.zeros(shape, dtype=torch.float64)
    hidden[rows, columns] = values
    size = max(float(torch.linalg.matrix_norm(hidden, 2)), 1e-300)
    threshold, matrix = 0.3 * size, hidden
    for _ in range(50_000):
        matrix = hidden.clone()
        matrix[rows, columns] = values
        u, s, vh = torch.linalg.svd(2 * matrix - hidden, full_matrices=False)
        change = (u * (s - threshold).clamp(min=0)) @ vh - matrix
        hidden = hidden + change
        if float(change.norm()) <= tol * size:
            break
    # At the fixed point (matrix - hidden)/threshold is a subgradient that lives on the observed entries.
    dual = (matrix - hidden)[rows, columns] / threshold
    full = torch.zeros(shape, dtype=torch.float64)
    full[rows, columns] = dual
    lower = abs(float((dual * values).sum())) / max(1.0, float(torch.linalg.matrix_norm(full, 2)))
    nuclear = float(torch.linalg.svdvals(matrix).sum())
    return matrix * largest, (nuclear - lower) / max(nuclear, 1e-300)


def rank_least_squares(
    places: Tensor, values: Tensor, shape: tuple[int, int], rank: int, starts: int = 5, sweeps: int = 5000
) -> tuple[Tensor, float]:
    """Least squares on the observed entries among matrices of a given rank: the oracle that knows it.

    Alternating least squares from the spectral start and from random ones, the best of them; no method finds the minimum
    for certain.

    Args:
        places: (row, column) of the entries, int64 (N, 2).
        values: Y, (N,).
        shape: (K, D).
        rank: r.
        starts: How many starts.
        sweeps: At most so many alternations from each.

    Returns:
        A (K, D) and its mean squared error on the observed entries.
    """
    largest = float(unit(values.double(), -1))
    rows, columns, values = places[:, 0], places[:, 1], values.double() / largest
    filled = torch.zeros(shape, dtype=torch.float64)
    filled[rows, columns] = values * (shape[0] * shape[1] / len(values))
    mask = torch.zeros(shape, dtype=torch.float64)
    mask[rows, columns] = 1
    target = torch.zeros(shape, dtype=torch.float64)
    target[rows, columns] = values
    generator = torch.Generator().manual_seed(0)
    best, best_error = filled, torch.inf
    for start in range(starts):
        if start == 0:
            right = torch.linalg.svd(filled, full_matrices=False).Vh[:rank].mT
        else:
            right = torch.randn(shape[1], rank, generator=generator, dtype=torch.float64)
        error = torch.inf
        for _ in range(sweeps):
            left = _solve_rows(mask, target, right)
            right = _solve_rows(mask.mT, target.mT, left)
            before, error = error, float(((left @ right.mT)[rows, columns] - values).square().mean())
            if before - error <= 1e-12 * error or error < 1e-28:
                break
        if error < best_error:
            best, best_error = left @ right.mT, error
    return best * largest, best_error * largest**2


def _solve_rows(mask: Tensor, target: Tensor, right: Tensor) -> Tensor:
    """The least-squares left factor, row by row: the minimum norm one where a row has too few entries."""
    return (torch.linalg.pinv(mask[..., None] * right, rtol=1e-10) @ target[..., None]).squeeze(-1)
