"""Arrays of other libraries -> plain float64, or an error that says which entry is no number."""

from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy import sparse
from torch import Tensor

_KINDS = {
    "c": "complex numbers (take .real)",
    "U": "texts",
    "S": "bytes",
    "M": "dates",
    "m": "durations",
    "V": "records",
}


def floats(name: str, value: Any) -> np.ndarray:
    """The numbers of an array, whatever library it is from.

    Args:
        name: What messages call it.
        value: Anything array-like: NumPy (masked, of any byte order, strides and precision), torch (sparse, on a device,
            with a gradient), pandas, xarray, SciPy's sparse matrices, nested lists. Boolean values count as 0 and 1.

    Returns:
        A copy in float64, C-contiguous and finite, of the shape of `value`.

    Raises:
        ValueError: If an entry is masked, missing, not finite or no real number.
    """
    array = _plain(name, value)
    masked = np.argwhere(np.ma.getmaskarray(array))
    if len(masked):
        raise ValueError(f"{name}{_at(masked[0])} is masked: every entry must be a number; fill it in or drop its row")
    array = np.ma.getdata(array)
    if array.dtype.kind == "O":
        array = np.array([_number(name, place, cell) for place, cell in np.ndenumerate(array)]).reshape(array.shape)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be an array of numbers, got {_KINDS.get(array.dtype.kind, array.dtype)}")
    with np.errstate(over="ignore"):  # what is too large for float64 becomes infinite, and is refused
        numbers = np.array(array, dtype=np.float64, order="C", subok=False)
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        raise ValueError(f"{name}{_at(bad[0])} = {numbers[tuple(bad[0])]}: must be finite")
    return numbers


def labels(value: Any, axis: int) -> tuple[str | None, pd.Index | None]:
    """The name of an axis and the labels along it, of a pandas or xarray object; None where it has none."""
    if isinstance(value, xr.DataArray) and -value.ndim <= axis < value.ndim:
        return str(value.dims[axis]), value.indexes.get(value.dims[axis])
    if isinstance(value, pd.DataFrame | pd.Series) and -value.ndim <= axis < value.ndim:
        return None, value.axes[axis]
    return None, None


def dense(name: str, tensor: Tensor) -> np.ndarray:
    """A tensor as a float64 array, wherever and however it is stored.

    Args:
        name: What messages call it.
        tensor: Sparse, quantized, on any device, with a gradient or none.

    Returns:
        An array of its shape.

    Raises:
        ValueError: If it is complex.
        NotImplementedError, RuntimeError: If it holds no numbers, as on the device `meta`.
    """
    if tensor.is_complex():
        raise ValueError(f"{name} must be an array of numbers, got {_KINDS['c']}")
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    return tensor.to("cpu", torch.float64).numpy()


def _plain(name: str, value: Any) -> np.ndarray:
    try:
        if isinstance(value, Tensor):
            return dense(name, value)
        if sparse.issparse(value):
            return value.toarray()
        if isinstance(value, pd.DataFrame | pd.Series | pd.Index | xr.DataArray):
            return value.to_numpy()
        if isinstance(value, list | tuple):
            # NumPy forgets masks, and knows no gradients, inside a list.
            if any(sparse.issparse(part) or (hasattr(part, "__array__") and not np.isscalar(part)) for part in value):
                return np.stack([floats(f"{name}[{i}]", part) for i, part in enumerate(value)])
            return np.asarray(value)
        return value if isinstance(value, np.ma.MaskedArray) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        if text.startswith(name):
            raise
        raise ValueError(f"{name} must be an array of numbers: {text}") from None


def _number(name: str, place: tuple[int, ...], cell: Any) -> float:
    try:
        if not isinstance(cell, str | bytes):
            return float(cell)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ValueError(f"{name}{_at(place)} = {cell!r:.60}: must be an array of numbers")


def _at(place: Any) -> str:
    found = [int(i) for i in place]
    return str(found) if found else ""
