"""Optimizers that expose what the theory is about, and what their step size may be a function of."""

from dlnlab.optim.base import per_member
from dlnlab.optim.gain_sgd import GainSGD
from dlnlab.optim.gradient_flow import GradientFlow
from dlnlab.optim.schedules import Cosine, Piecewise, StepSchedule
from dlnlab.optim.stochastic_gradient_flow import StochasticGradientFlow

__all__ = ["Cosine", "GainSGD", "GradientFlow", "Piecewise", "StepSchedule", "StochasticGradientFlow", "per_member"]
