"""Recorded results -> figures."""

from dlnlab.figures.axis import AxisFigure
from dlnlab.figures.base import Figure
from dlnlab.figures.coordinate import CoordinateFigure
from dlnlab.figures.coordinate_paths import CoordinatePathsFigure
from dlnlab.figures.coordinates import CoordinatesFigure
from dlnlab.figures.curve import CurveFigure
from dlnlab.figures.edge import EdgeFigure
from dlnlab.figures.ends import EndsFigure
from dlnlab.figures.final_value import FinalValueFigure
from dlnlab.figures.grid_map import GridMapFigure
from dlnlab.figures.map import MapFigure
from dlnlab.figures.oscillation import OscillationFigure
from dlnlab.figures.plane import PlaneFigure
from dlnlab.figures.rank import RankFigure
from dlnlab.figures.scatter import ScatterFigure
from dlnlab.figures.step_size import StepSizeFigure
from dlnlab.figures.variant_distance import VariantDistanceFigure
from dlnlab.figures.waiting import WaitingFigure

__all__ = [
    "AxisFigure",
    "CoordinateFigure",
    "CoordinatePathsFigure",
    "CoordinatesFigure",
    "CurveFigure",
    "EdgeFigure",
    "EndsFigure",
    "Figure",
    "FinalValueFigure",
    "GridMapFigure",
    "MapFigure",
    "OscillationFigure",
    "PlaneFigure",
    "RankFigure",
    "ScatterFigure",
    "StepSizeFigure",
    "VariantDistanceFigure",
    "WaitingFigure",
]
