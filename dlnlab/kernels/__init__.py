"""k-step trajectories of the networks whose updates have a closed form."""

from dlnlab.kernels.diagonal import Batches, DiagonalState, Guard, Records, diagonal_kernel
from dlnlab.kernels.diffusion import Diffusion
from dlnlab.kernels.factors import Factors
from dlnlab.kernels.flow import DualFlow
from dlnlab.kernels.reference import diagonal_steps

__all__ = [
    "Batches",
    "DiagonalState",
    "Diffusion",
    "DualFlow",
    "Factors",
    "Guard",
    "Records",
    "diagonal_kernel",
    "diagonal_steps",
]
