"""Problems to train on."""

from dlnlab.data.base import SyntheticData
from dlnlab.data.scalar_target import ScalarTarget
from dlnlab.data.sparse_regression import SparseRegression
from dlnlab.data.tabular import TabularRegression

__all__ = ["ScalarTarget", "SparseRegression", "SyntheticData", "TabularRegression"]
