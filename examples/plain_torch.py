"""GainSGD in a bare torch loop, without Lightning: the gain of a diagonal network and the identity behind it."""

import torch

from dlnlab.optim import GainSGD

torch.manual_seed(0)
x = torch.randn(20, 30, dtype=torch.float64)
y = x[:, :3].sum(1)  # a sparse teacher: three ones
u = torch.full((30,), 0.1, dtype=torch.float64, requires_grad=True)
v = torch.zeros(30, dtype=torch.float64, requires_grad=True)
before = (u**2 - v**2).detach()

optimizer = GainSGD([(u, v)], lr=0.05)  # a pair of factors; any other parameter is stepped without a gain
for _ in range(2000):
    row = torch.randint(20, (1,))
    optimizer.zero_grad()
    loss = (x[row] @ (u * v) - y[row]).square().sum() / 2
    loss.backward()
    optimizer.step()

gain = optimizer.gain
print(f"loss of the last row    {loss.item():.1e}")
print(f"gain on the support     {gain[:3].mean():.4f}")
print(f"gain off the support    {gain[3:].mean():.4f}")

# Every step multiplies u^2 - v^2 by 1 - (lr g)^2, so the gain is how far the imbalance has shrunk.
error = (gain + torch.log((u**2 - v**2).abs() / before.abs())).abs().max()
print(f"gain - log imbalance    {error.item():.0e}")
assert error < 1e-9
