"""The losses of a batch against sums written out."""

import pytest
import torch

from dlnlab.models import batch as module
from dlnlab.models.batch import Batch

E, N, D = 6, 5, 3


@pytest.mark.parametrize("errors", [1, 2**17], ids=["problem by problem", "at once"])
@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
@pytest.mark.parametrize("outputs", [(), (2,)], ids=["y a vector", "y a matrix"])
def test_losses_of_a_full_batch_are_half_the_mean_squares_however_many_errors_are_held(
    outputs, noisy, errors, monkeypatch
):
    monkeypatch.setattr(module, "_ERRORS", errors)
    random = torch.Generator().manual_seed(0)

    def normals(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x, y, predictor = normals(4, N, D), normals(4, N, *outputs), normals(E, *outputs, D)
    noise = normals(E, N, *outputs) if noisy else None
    problem = torch.tensor([2, 0, 0, 3, 2, 2])  # nobody has problem 1
    losses = Batch(x, y, torch.arange(E), problem, noise).losses(predictor)
    for m, p in enumerate(problem.tolist()):
        error = sum(x[p, :, j, None] * predictor[m].reshape(-1, D)[:, j] for j in range(D)).reshape(N, *outputs) - y[p]
        squares = (error if noise is None else error - noise[m]).square().sum()
        torch.testing.assert_close(losses[m], squares / (2 * N))
