"""Curvature of any loss: operators, their extreme eigenpairs, spectral density and trace. Knows nothing else of dlnlab."""

from dlnlab.curvature.batch import BatchSharpness, batch_sharpness
from dlnlab.curvature.critical import CriticalSharpness, critical_sharpness
from dlnlab.curvature.eigen import Eigenpairs, eigenpairs
from dlnlab.curvature.operators import Matrix, Operator, Preconditioned
from dlnlab.curvature.products import LossOperator, gauss_newton, hessian, mean_loss
from dlnlab.curvature.spectrum import SpectralDensity, Trace, spectral_density, trace

__all__ = [
    "BatchSharpness",
    "CriticalSharpness",
    "Eigenpairs",
    "LossOperator",
    "Matrix",
    "Operator",
    "Preconditioned",
    "SpectralDensity",
    "Trace",
    "batch_sharpness",
    "critical_sharpness",
    "eigenpairs",
    "gauss_newton",
    "hessian",
    "mean_loss",
    "spectral_density",
    "trace",
]
