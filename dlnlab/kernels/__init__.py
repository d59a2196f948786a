"""k-step trajectories of the networks whose updates have a closed form."""

from dlnlab.kernels.factors import Factors
from dlnlab.kernels.reference import diagonal_steps

__all__ = ["Factors", "diagonal_steps"]
