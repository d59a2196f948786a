"""Recorded results -> figures."""

from dlnlab.figures.base import Figure
from dlnlab.figures.coordinate_paths import CoordinatePathsFigure
from dlnlab.figures.coordinates import CoordinatesFigure
from dlnlab.figures.final_value import FinalValueFigure
from dlnlab.figures.oscillation import OscillationFigure
from dlnlab.figures.step_size import StepSizeFigure

__all__ = [
    "CoordinatePathsFigure",
    "CoordinatesFigure",
    "Figure",
    "FinalValueFigure",
    "OscillationFigure",
    "StepSizeFigure",
]
