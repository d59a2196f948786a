"""Optimizers that expose what the theory is about."""

from dlnlab.optim.gain_sgd import GainSGD
from dlnlab.optim.gradient_flow import GradientFlow
from dlnlab.optim.stochastic_gradient_flow import StochasticGradientFlow

__all__ = ["GainSGD", "GradientFlow", "StochasticGradientFlow"]
