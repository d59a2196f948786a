"""Problems to train on."""

from dlnlab.data.base import SyntheticData
from dlnlab.data.sparse_regression import SparseRegression

__all__ = ["SparseRegression", "SyntheticData"]
