"""k-step trajectories of the networks whose updates have a closed form."""

from dlnlab.kernels.deep import DeepGuard, EntryLoss, deep_kernel, deep_step
from dlnlab.kernels.diagonal import Batches, Guard, Kernel, Records, diagonal_kernel, num_threads
from dlnlab.kernels.diffusion import Diffusion
from dlnlab.kernels.factors import Factors
from dlnlab.kernels.flow import DualFlow
from dlnlab.kernels.rates import Rates
from dlnlab.kernels.reference import diagonal_steps
from dlnlab.kernels.shallow import Course, Log, Multipliers, Rule, shallow_kernel

__all__ = [
    "Batches",
    "Course",
    "DeepGuard",
    "Diffusion",
    "DualFlow",
    "EntryLoss",
    "Factors",
    "Guard",
    "Kernel",
    "Log",
    "Multipliers",
    "Rates",
    "Records",
    "Rule",
    "deep_kernel",
    "deep_step",
    "diagonal_kernel",
    "diagonal_steps",
    "num_threads",
    "shallow_kernel",
]
