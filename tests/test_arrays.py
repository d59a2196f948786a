"""Arrays of every library are used rightly or refused in words."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import sparse

import dlnlab
from dlnlab.arrays import floats
from dlnlab.data.arrays import ArrayRegression

X = np.array([[1.0, -2.0, 0.0], [0.5, 4.0, 3.0], [0.0, 0.0, -1.0], [2.0, 1.0, 0.0]])
Y = np.array([1.0, -1.0, 2.0, 0.5])

KINDS = {
    "negative strides": X[::-1, ::-1].copy()[::-1, ::-1],
    "Fortran order": np.asfortranarray(X),
    "a view of every second": np.repeat(np.repeat(X, 2, 0), 2, 1)[::2, ::2],
    "other byte order": X.astype(X.dtype.newbyteorder()),
    "half": X.astype(np.float16),
    "long double": X.astype(np.longdouble),
    "objects": X.astype(object),
    "an empty mask": np.ma.masked_greater(X, 100),
    "a matrix": np.asmatrix(X),
    "read only": np.broadcast_to(X, X.shape),
    "lists": X.tolist(),
    "a list of rows": list(X),
    "a list of tensors": [torch.tensor(row, requires_grad=True) for row in X],
    "a gradient": torch.tensor(X, requires_grad=True) * 1,
    "bfloat16": torch.tensor(X, dtype=torch.bfloat16),
    "a transposed tensor": torch.tensor(X.T.copy()).T,
    "sparse coordinates": torch.tensor(X).to_sparse(),
    "sparse rows": torch.tensor(X).to_sparse_csr(),
    "scipy's matrix": sparse.csr_matrix(X),
    "scipy's array": sparse.coo_array(X),
    "a frame": pd.DataFrame(X, columns=list("abc")),
    "nullable columns": pd.DataFrame(X).convert_dtypes(),
    "sparse columns": pd.DataFrame(X).astype(pd.SparseDtype("float", 0.0)),
    "xarray": xr.DataArray(X, dims=("sample", "feature")),
}


@pytest.mark.parametrize("value", KINDS.values(), ids=KINDS)
def test_numbers_of_every_library_are_the_same_numbers(value):
    found = floats("X", value)
    assert found.dtype == np.float64
    assert found.dtype.isnative
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert type(found) is np.ndarray
    assert np.array_equal(found, X)
    assert np.array_equal(ArrayRegression(value, Y)._x, X)


def test_whole_and_boolean_numbers_count_as_numbers_and_nothing_is_shared():
    for dtype in (bool, np.uint8, np.int64, ">i4"):
        assert np.array_equal(floats("y", np.array([0, 1, 1], dtype)), [0, 1, 1])
    assert np.array_equal(floats("y", pd.Series([True, False], dtype="boolean")), [1, 0])
    assert not np.shares_memory(floats("X", X), X)


def put(value, cell, kind=object):
    changed = np.array(X, kind)
    changed[1, 2] = cell
    return value(changed)


REFUSED = {
    "a masked entry": (np.ma.masked_equal(X, 3.0), r"X\[1, 2\] is masked"),
    "a masked row in a list": (list(np.ma.masked_equal(X, 3.0)), r"X\[1\]\[2\] is masked"),
    "nan": (put(np.asarray, np.nan, float), r"X\[1, 2\] = nan: must be finite"),
    "infinity": (put(torch.as_tensor, np.inf, float), r"X\[1, 2\] = inf"),
    "a sparse nan": (put(sparse.csr_array, np.nan, float), r"X\[1, 2\] = nan"),
    "too large for float64": (X.astype(np.longdouble) * np.longdouble("1e4000"), "= -?inf: must be finite"),
    "None": (put(np.asarray, None), r"X\[1, 2\] = None: must be an array of numbers"),
    "pandas' NA": (put(pd.DataFrame, pd.NA), r"X\[1, 2\] = <NA>"),
    "a missing number": (put(pd.DataFrame, np.nan, float), r"X\[1, 2\] = nan"),
    "a text": (put(np.asarray, "3"), r"X\[1, 2\] = '3'"),
    "texts": (X.astype(str), "array of numbers, got texts"),
    "a text in a list": ([[1, "2"], [3, 4]], "array of numbers, got texts"),
    "a text column": (pd.DataFrame({"a": [1.0, 2, 3, 4], "b": list("wxyz")}), r"X\[0, 1\] = 'w'"),
    "complex": (X + 0j, "got complex numbers"),
    "a complex tensor": (torch.tensor(X + 0j), "got complex numbers"),
    "complex in a list": ([[1, 2j], [3, 4]], "got complex numbers"),
    "a complex object": (put(np.asarray, 2j), r"X\[1, 2\] = 2j"),
    "dates": (np.full((4, 3), "2024-01-01", "M8[ns]"), "got dates"),
    "a date column": (pd.DataFrame({"a": pd.to_datetime(["2024-01-01"] * 4)}), "got dates"),
    "records": (np.zeros(4, [("a", float), ("b", float)]), "got records"),
    "ragged lists": ([[1, 2], [3]], "array of numbers"),
    "rows of different lengths": ([np.ones(2), np.ones(3)], "array of numbers"),
    "a mapping": ({"a": [1]}, "array of numbers"),
    "a generator": ((row for row in X), "array of numbers"),
    "a device without numbers": (torch.empty(4, 3, device="meta"), "array of numbers"),
    "a vector": (X[0], r"X must be \(N, D\)"),
    "no rows": (X[:0], r"X must be \(N, D\)"),
    "no columns": (X[:, :0], "must not be empty"),
}


@pytest.mark.filterwarnings("ignore:.*(masked element|longdouble|overflow)")
@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_number_is_refused_in_words(value, message):
    with pytest.raises(ValueError, match=message):
        ArrayRegression(value, Y)


def test_one_column_of_targets_is_a_vector_and_so_is_its_teacher():
    column = {"y": Y[:, None], "X_test": X[:2], "y_test": Y[:2, None], "teacher": np.ones((3, 1))}
    vector = {"y": Y, "X_test": X[:2], "y_test": Y[:2], "teacher": np.ones(3)}
    found, expected = (dlnlab.simulate(X, steps=3, lr=0.01, **given) for given in (column, vector))
    assert found.identical(expected)
    assert (
        dlnlab.simulate(pd.DataFrame(X), pd.DataFrame({"y": Y}), steps=3, lr=pd.Series([0.01, 0.02])).sizes["lr"] == 2
    )
    assert ArrayRegression(X, np.stack([Y, Y], 1))._y.shape == (4, 2)
    with pytest.raises(ValueError, match=r"X must be \(N, D\) and y"):
        ArrayRegression(X, Y[None])


FRAME, SERIES = pd.DataFrame(X, columns=list("abc")), pd.Series(Y)
GRID = xr.DataArray(X, dims=("sample", "feature"), coords={"feature": list("abc")})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": FRAME, "y": SERIES[::-1]}, "X and y must have the same rows"),
        ({"x": FRAME[:2], "y": SERIES[1:3]}, "X and y must have the same rows"),
        (
            {"x": FRAME, "y": Y, "x_test": FRAME[["b", "a", "c"]], "y_test": Y},
            "X and X_test must have the same columns",
        ),
        (
            {"x": FRAME, "y": Y, "teacher": pd.Series([1.0, 2, 3], list("bac"))},
            "X and teacher must have the same columns",
        ),
        ({"x": GRID, "y": xr.DataArray(Y[:3], dims="feature")}, "X must be|same rows"),
        ({"x": GRID[:3], "y": xr.DataArray(Y[:3], dims="feature")}, "X and y must have the same rows"),
    ],
)
def test_labels_that_contradict_the_order_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ArrayRegression(**given)
    plain = {name: value if name == "y" else np.asarray(value) for name, value in given.items()}
    if len(given["x"]) == len(given["y"]):
        ArrayRegression(**{**plain, "y": np.asarray(given["y"])})
