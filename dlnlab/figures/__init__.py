"""Recorded results -> figures."""

from dlnlab.figures.base import Figure
from dlnlab.figures.coordinate import CoordinateFigure
from dlnlab.figures.curve import CurveFigure
from dlnlab.figures.step_size import StepSizeFigure

__all__ = [
    "CoordinateFigure",
    "CurveFigure",
    "Figure",
    "StepSizeFigure",
]
