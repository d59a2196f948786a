"""Recorded results -> figures."""

from dlnlab.figures.axis import AxisFigure
from dlnlab.figures.base import Figure
from dlnlab.figures.scatter import ScatterFigure
from dlnlab.figures.step_size import StepSizeFigure
from dlnlab.figures.variant_distance import VariantDistanceFigure

__all__ = [
    "AxisFigure",
    "Figure",
    "ScatterFigure",
    "StepSizeFigure",
    "VariantDistanceFigure",
]
