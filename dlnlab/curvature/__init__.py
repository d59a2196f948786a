"""Curvature of any loss: operators, their extreme eigenpairs, spectral density and trace. Knows nothing else of dlnlab."""

from dlnlab.curvature.critical import CriticalSharpness, critical_sharpness
from dlnlab.curvature.eigen import Eigenpairs, eigenpairs
from dlnlab.curvature.operators import Matrix, Operator, Preconditioned
from dlnlab.curvature.products import LossOperator, gauss_newton, hessian
from dlnlab.curvature.spectrum import SpectralDensity, Trace, spectral_density, trace

__all__ = [
    "CriticalSharpness",
    "Eigenpairs",
    "LossOperator",
    "Matrix",
    "Operator",
    "Preconditioned",
    "SpectralDensity",
    "Trace",
    "critical_sharpness",
    "eigenpairs",
    "gauss_newton",
    "hessian",
    "spectral_density",
    "trace",
]
