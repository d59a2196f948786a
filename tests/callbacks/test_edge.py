"""The edge of every optimizer, against whether it diverges on a quadratic."""

import math

import pytest
import torch

from dlnlab.callbacks.edge import edge
from dlnlab.optim import GainSGD

PLAIN = {
    "gradient descent": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "dampened momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8, dampening=0.3),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "weight decay": lambda p, lr: torch.optim.SGD(p, lr, weight_decay=0.5),
    "momentum with weight decay": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.5),
    "GainSGD": lambda p, lr: GainSGD(p, lr, weight_decay=0.2),
}
# The second moments are set by hand and decay slowly, so that they stay what they are against tiny gradients.
SLOW = 1 - 1e-9
ADAPTIVE = {
    "Adam": lambda p, lr: torch.optim.Adam(p, lr, (0.9, SLOW), 0.1),
    "Adam with weight decay": lambda p, lr: torch.optim.Adam(p, lr, (0.9, SLOW), 0.1, weight_decay=0.5),
    "AMSGrad": lambda p, lr: torch.optim.Adam(p, lr, (0.9, SLOW), 0.1, amsgrad=True),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr, (0.8, SLOW), 0.1, weight_decay=0.3),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr, SLOW, 0.1),
    "centered RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr, SLOW, 0.1, centered=True),
    "RMSprop with momentum": lambda p, lr: torch.optim.RMSprop(p, lr, SLOW, 0.1, momentum=0.5, weight_decay=0.1),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr, eps=0.1),
}
MATRIX = torch.tensor([[3.0, 0.4, 0.0], [0.4, 1.0, 0.1], [0.0, 0.1, 0.2]], dtype=torch.float64)


def set_moments(optimizer, x):
    moments = torch.tensor([4.0, 0.25, 1.0], dtype=torch.float64)
    steps = 1e12  # no bias is left to correct
    state = {"step": torch.tensor(steps, dtype=torch.float64)}
    if isinstance(optimizer, torch.optim.RMSprop):
        state |= {"square_avg": moments, "momentum_buffer": torch.zeros(3, dtype=torch.float64),
                  "grad_avg": torch.tensor([0.5, 0.1, 0.0], dtype=torch.float64)}  # fmt: skip
    elif isinstance(optimizer, torch.optim.Adagrad):
        state |= {"sum": moments}
    else:
        state |= {"exp_avg": torch.zeros(3, dtype=torch.float64), "exp_avg_sq": moments,
                  "max_exp_avg_sq": moments.clone()}  # fmt: skip
    optimizer.state[x] = state


def effective_and_size(make, lr, steps):
    """Twice the largest eigenvalue over the threshold, and how far the iterate is after many steps."""
    x = torch.full((3,), 1e-6, dtype=torch.float64, requires_grad=True)
    optimizer = make([x], lr)
    if make in ADAPTIVE.values():
        set_moments(optimizer, x)
    limits = edge(optimizer, [x])
    root = torch.ones(3) if limits.preconditioner is None else limits.preconditioner[0].rsqrt()
    top = torch.linalg.eigvalsh(root[:, None] * (MATRIX + limits.shift * torch.eye(3)) * root)[-1]
    for _ in range(steps):
        optimizer.zero_grad()
        x.grad = MATRIX @ x.detach()
        optimizer.step()
        if not float(x.detach().abs().max()) < 1e-3:
            break
    return float(2 * top / limits.threshold), float(x.detach().abs().max())


@pytest.mark.parametrize("make", [*PLAIN.values(), *ADAPTIVE.values()], ids=[*PLAIN, *ADAPTIVE])
def test_an_optimizer_diverges_on_a_quadratic_just_above_two(make):
    low, high = 1e-4, 2.4 if make in PLAIN.values() else 1e3  # GainSGD takes no larger one with this decay
    for _ in range(60):
        middle = math.sqrt(low * high)
        if effective_and_size(make, middle, 0)[0] < 2:
            low = middle
        else:
            high = middle
    for factor, stable in ((0.97, True), (1.03, False)):
        effective, size = effective_and_size(make, factor * low, 2000)
        assert (effective < 2) == stable
        assert size < 1e-6 if stable else size > 1e-3


def test_the_bias_of_young_averages_is_corrected():
    x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], 0.1, betas=(0.9, 0.99), eps=1e-3)
    (x**2).sum().backward()
    optimizer.step()
    gradient = torch.tensor([2.0, 4.0], dtype=torch.float64)
    # After one step the corrected average of squares is the square itself.
    torch.testing.assert_close(edge(optimizer, [x]).preconditioner[0], 0.1 * (gradient + 1e-3))


def test_the_rate_of_adagrad_decays():
    x = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Adagrad([x], 0.5, lr_decay=0.1)
    for _ in range(3):
        x.grad = torch.ones(2)
        optimizer.step()
    # Step 4 has lr/(1 + 3 lr_decay).
    assert edge(optimizer, [x]).threshold == pytest.approx(2 * 1.3 / 0.5)


def test_members_have_each_their_own_edge():
    u, v = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    optimizer = GainSGD([(u, v)], torch.tensor([0.1, 0.5]), weight_decay=torch.tensor([0.0, 0.3]))
    found = edge(optimizer, [u, v])
    assert found.threshold.tolist() == pytest.approx([20, 4])
    assert found.shift.tolist() == pytest.approx([0, 0.6])


def test_an_unknown_optimizer_and_groups_that_differ_have_no_edge():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    for optimizer in (
        torch.optim.LBFGS([x]),
        torch.optim.SGD([x], 0.1, maximize=True),
        torch.optim.SGD([{"params": [x], "lr": 0.1}, {"params": [y], "lr": 0.2}]),
    ):
        assert math.isnan(edge(optimizer, [x, y]).threshold)
    assert edge(torch.optim.SGD([{"params": [x], "lr": 0.1}, {"params": [y], "lr": 0.2}]), [y]).threshold == 10
