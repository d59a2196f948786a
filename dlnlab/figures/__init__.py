"""Recorded results -> figures."""

from dlnlab.figures.base import Figure
from dlnlab.figures.ends import EndsFigure
from dlnlab.figures.grid_map import GridMapFigure
from dlnlab.figures.rank import RankFigure
from dlnlab.figures.step_size import StepSizeFigure

__all__ = [
    "EndsFigure",
    "Figure",
    "GridMapFigure",
    "RankFigure",
    "StepSizeFigure",
]
