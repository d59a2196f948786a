"""Architectures, each trained as an ensemble."""

from dlnlab.models.base import Guard, LinearNetwork
from dlnlab.models.batch import Batch
from dlnlab.models.deep import DeepLinearNetwork
from dlnlab.models.diagonal import DiagonalLinearNetwork
from dlnlab.models.shallow import ShallowLinearNetwork

__all__ = [
    "Batch",
    "DeepLinearNetwork",
    "DiagonalLinearNetwork",
    "Guard",
    "LinearNetwork",
    "ShallowLinearNetwork",
]
