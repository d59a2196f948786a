"""SgdNoise: the covariance of SGD's noise against that of stochastic gradient flow."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab.callbacks.base import Measurement
from dlnlab.models import LinearNetwork


class SgdNoise(Measurement):
    r"""The covariance of a single row's gradient in beta, against the one that stochastic gradient flow gives it.

    .. math:: C = \frac1n \sum_i r_i^2 x_i x_i^T - g g^T, \qquad \hat C = \frac{2 L}{n} X^T X, \qquad r = X \beta - y

    Both lie in the span of the rows. In the results: `noise_error`, |C - C^|/|C^| (Frobenius norm); `noise_trace_ratio`,
    tr C/tr C^; `noise_directions`, (tr C)^2/|C|^2, the number of directions the noise has (n is the most there can be
    with n rows, and an interpolator has none); and `model_directions`, that of C^. Cost: an (n, n) matrix a member.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Reference:
        pesme2021 (the model; that mean residuals replace each row's own is derived here).
    """

    of_squared_loss: ClassVar[bool] = True

    def check(self, model: Any) -> None:
        """Raise ValueError for a module without a linear predictor of one output."""
        if not isinstance(model, LinearNetwork) or model.problems.y.ndim != 2:
            raise ValueError(f"SgdNoise: {type(model).__name__} is no linear network of one output")

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """The four values, (E,); NaN at an interpolator."""
        del batch
        x, y = model.problems.x.double(), model.problems.y.double()
        kernel, problem = x @ x.mT, model.problem_index
        n = x.shape[1]
        residual = (x[problem] @ model.predictor().double()[..., None])[..., 0] - y[problem]
        # C = X^T A X and C^ = X^T B X, so that traces and inner products are those of (n, n) matrices; in units of 2L.
        residual = residual / residual.square().mean(-1, keepdim=True).sqrt()
        own = torch.diag_embed(residual.square() / n) - residual[:, :, None] * residual[:, None] / n**2
        k = kernel[problem]
        left, right = own @ k, k / n
        trace, model_trace = _trace(left), _trace(right)
        square, cross, model_square = (_trace(a @ b) for a, b in ((left, left), (left, right), (right, right)))
        return {
            "noise_error": ((square - 2 * cross + model_square) / model_square).clamp(min=0).sqrt(),
            "noise_trace_ratio": trace / model_trace,
            "noise_directions": trace.square() / square,
            "model_directions": model_trace.square() / model_square,
        }


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
