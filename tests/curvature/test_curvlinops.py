"""Extreme eigenvalues against an independent implementation: curvlinops' operators, solved by SciPy (`oracle` extra)."""

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from dlnlab.curvature import eigenpairs, gauss_newton, hessian

curvlinops = pytest.importorskip("curvlinops", reason="needs the oracle extra")


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(23, 5)


def convolution():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 3)), torch.randn(23, 1, 6, 6)


@pytest.mark.parametrize("make", [mlp, convolution])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss()])
def test_both_ends_of_the_hessian_over_uneven_batches_and_the_top_of_gauss_newton_agree(make, loss):
    torch.manual_seed(4)
    model, x = make()
    model, x = model.double(), x.double()
    y = torch.randint(3, (23,)) if isinstance(loss, nn.CrossEntropyLoss) else torch.randn(23, 3, dtype=torch.float64)
    batches, params = list(zip(x.split(10), y.split(10), strict=True)), list(model.parameters())

    def oracle(operator, which):
        made = operator(model, loss, params, batches, check_deterministic=False).to_scipy()
        return float(eigsh(made, 1, which=which, tol=1e-10, return_eigenvectors=False)[0])

    ours = hessian(lambda batch: loss(model(batch[0]), batch[1]), params, batches)
    top, bottom = eigenpairs(ours, which="both", tol=1e-8).values.tolist()
    assert top == pytest.approx(oracle(curvlinops.HessianLinearOperator, "LA"), rel=1e-8)
    assert bottom == pytest.approx(oracle(curvlinops.HessianLinearOperator, "SA"), rel=1e-8)
    ours = gauss_newton(lambda batch: model(batch[0]), lambda found, batch: loss(found, batch[1]), params, batches)
    top = float(eigenpairs(ours, tol=1e-8).values)
    assert top == pytest.approx(oracle(curvlinops.GGNLinearOperator, "LA"), rel=1e-8)
