"""Optimizers that expose what the theory is about."""

from dlnlab.optim.gain_sgd import GainSGD

__all__ = ["GainSGD"]
