"""Problems to train on."""

from dlnlab.data.base import SyntheticData
from dlnlab.data.sparse_regression import SparseRegression
from dlnlab.data.tabular import TabularRegression

__all__ = ["SparseRegression", "SyntheticData", "TabularRegression"]
