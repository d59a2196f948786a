"""Problems to train on."""

from dlnlab.data.base import SyntheticData
from dlnlab.data.low_rank_completion import LowRankCompletion
from dlnlab.data.observed_entries import ObservedEntries
from dlnlab.data.scalar_target import ScalarTarget
from dlnlab.data.sparse_regression import SparseRegression
from dlnlab.data.tabular import TabularRegression

__all__ = [
    "LowRankCompletion",
    "ObservedEntries",
    "ScalarTarget",
    "SparseRegression",
    "SyntheticData",
    "TabularRegression",
]
