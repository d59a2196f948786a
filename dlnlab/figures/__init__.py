"""Recorded results -> figures."""

from dlnlab.figures.base import Figure
from dlnlab.figures.edge import EdgeFigure
from dlnlab.figures.step_size import StepSizeFigure

__all__ = [
    "EdgeFigure",
    "Figure",
    "StepSizeFigure",
]
