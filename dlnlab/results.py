"""Result segments on disk -> one labelled data set.

A run's `results/` holds `ensemble.json` (axes and attributes, with a checksum inside) and immutable segments
`part-000000.npz`, ...; each is a zip archive of arrays with a checksum behind it. An array `name` holds one variable
over (T, E, ...), and `name/steps` the T optimizer steps it was recorded at; a variable without steps is as of the
segment's end.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dlnlab.files import DamagedFileError, read_verified, write_atomic

STATUSES = ("running", "converged", "diverged")
HEADER = "ensemble.json"
_PART = "part-{:06d}.npz"
_STEPS = "/steps"

UNITS = {
    "train_loss": "loss, 1/(2n) sum of squared errors",
    "test_loss": "loss, 1/(2n) sum of squared errors",
    "distance": "squared distance of the predictor to the teacher",
    "teacher": "the entries of beta*",
    "gain": "dimensionless",
    "gain_plus": "dimensionless",
    "gain_minus": "dimensionless",
    "effective_init": "scale of a factor, as init_scale",
    "imbalance": "square of a factor",
    "step_size": "lr times its unit",
    "time": "steps times step size; with a schedule the sum of the step sizes",
    "scheduled_lr": "step size of the next step",
    "scheduled_weight_decay": "weight decay of the next step",
    "scheduled_batch_size": "rows, or entries, of the next step",
    "stopped_at": "optimizer steps; -1 where the member still runs",
}


class ResultError(ValueError):
    """A run whose results cannot be read as they are."""


def write_header(folder: Path, axes: dict[str, list[Any]], coordinates: dict[str, Any], attributes: dict) -> None:
    """Start a results folder: the ensemble's axes, further coordinates {name: (axis, values)} and attributes."""
    header = {"axes": axes, "coordinates": coordinates, "attributes": attributes}
    write_atomic(folder / HEADER, json.dumps({**header, "sha256": _digest_of(header)}, indent=1).encode())


def _digest_of(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header).encode()).hexdigest()


def read_header(folder: Path) -> dict[str, Any]:
    """What `write_header` wrote.

    Raises:
        ResultError: If it is damaged.
    """
    try:
        header = json.loads((folder / HEADER).read_bytes())
        whole = header.pop("sha256") == _digest_of(header)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ResultError(f"{folder / HEADER} is damaged; a resume of the run writes it anew")
    return header


def write_segment(
    folder: Path,
    number: int,
    series: dict[str, tuple[list[int], np.ndarray]],
    constants: dict[str, np.ndarray],
    dims: dict[str, list[str]],
) -> str:
    """Write one immutable segment.

    Args:
        folder: The results folder.
        number: The segment's number.
        series: name -> (steps (T,), values (T, E, ...)).
        constants: name -> values (E, ...), as of now; the last segment's count.
        dims: Names of the trailing dimensions of variables that have any.

    Returns:
        The checksum of its contents.
    """
    arrays = dict(constants)
    for name, (steps, values) in series.items():
        arrays[name], arrays[name + _STEPS] = values, np.asarray(steps, dtype=np.int64)
    arrays["dims"] = np.array(json.dumps(dims))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(folder / _PART.format(number), buffer.getvalue(), checksum=True)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def chain(before: str, segment: str) -> str:
    """The checksum of a series of segments, from that of the series without its last and the last one's own."""
    return hashlib.sha256(f"{before} {segment}".encode()).hexdigest()


def verify_segments(folder: Path, count: int, expected: str) -> None:
    """Check that the first `count` segments are those that a checkpoint was written after.

    Args:
        folder: The results folder.
        count: How many there were.
        expected: Their `chain`; "" for none.

    Raises:
        ResultError: If one is missing, damaged or of another continuation of the run.
    """
    found = ""
    for number in range(count):
        path = folder / _PART.format(number)
        try:
            found = chain(found, hashlib.sha256(read_verified(path)).hexdigest())
        except FileNotFoundError:
            raise ResultError(f"{path} is missing: the checkpoint needs {count} segments") from None
        except DamagedFileError as error:
            raise ResultError(f"{error}; resume from a checkpoint that was written before it") from None
    if found != expected:
        raise ResultError(f"{folder}: the run was since resumed from an earlier checkpoint; use one written after that")


def segments(folder: Path) -> list[Path]:
    """The segments of a results folder, in order, without gaps."""
    found = []
    while (path := folder / _PART.format(len(found))).exists():
        found.append(path)
    return found


def drop_segments(folder: Path, keep: int) -> None:
    """Remove the segments numbered `keep` and later, the last first, so that none is ever missing in between."""
    for path in sorted(folder.glob("part-*.npz"), reverse=True):
        if int(path.stem.split("-")[1]) >= keep:
            path.unlink()


def read_segment(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one segment, checked; no pickle is ever run.

    Raises:
        DamagedFileError: If the segment is not as it was written.
        ResultError: If it holds anything but plain arrays.
    """
    content = read_verified(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = dict(archive)
    except Exception:  # numpy, zipfile and zlib each raise their own
        arrays = {}
    if "dims" not in arrays or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ResultError(f"{path} is no segment of results: anything but plain arrays is never loaded")
    return arrays


def load_results(run: str | Path) -> xr.Dataset:
    """All that a run has recorded, finished or not, as one labelled data set.

    Args:
        run: The run directory.

    Returns:
        Variables over the ensemble's axes in the order written (an axis of length 1 is kept), then `step`, then
        `coordinate` (`index` for spectra, `row` and `column` for matrices), float64. `step` is the union of all
        schedules: NaN where a variable was not recorded. `status` is text; `stopped_at` and `step_size` have no step.
        `encoding["source"]` is the run directory.

    Raises:
        FileNotFoundError: If the folder is no run.
        ResultError: If a segment or the header is damaged.
    """
    run = Path(run)
    folder = run / "results"
    if not (folder / HEADER).exists():
        raise FileNotFoundError(f"{run} is no run directory: it has no results/{HEADER}")
    header = read_header(folder)
    parts = []
    for path in segments(folder):
        try:
            parts.append(read_segment(path))
        except DamagedFileError as error:
            raise ResultError(f"{error}; move it and the later segments away to read those before it") from None
    dataset = _assemble(header, parts)
    dataset.encoding["source"] = str(run)  # where xarray says what it has read
    return dataset


def _assemble(header: dict, parts: Iterable[dict[str, np.ndarray]]) -> xr.Dataset:
    axes: dict[str, list] = header["axes"]
    shape, names = tuple(len(values) for values in axes.values()), list(axes)
    series: dict[str, dict[int, np.ndarray]] = {}
    constants: dict[str, np.ndarray] = {}
    trailing: dict[str, list[str]] = {}
    for part in parts:
        trailing |= json.loads(str(part.pop("dims")))
        for name in [key for key in part if key + _STEPS in part]:
            # A step that was recorded twice (the end of a run that was then extended) counts as recorded last.
            series.setdefault(name, {}).update(zip(part.pop(name + _STEPS).tolist(), part.pop(name), strict=True))
        constants |= part
    steps = np.array(sorted({step for found in series.values() for step in found}), dtype=np.int64)
    place = {int(step): i for i, step in enumerate(steps)}
    variables: dict[str, Any] = {}
    for name, found in series.items():
        tail = next(iter(found.values())).shape[1:]
        dims = (*names, "step", *trailing.get(name, _default_dims(len(tail))))
        values = np.full((len(steps), int(np.prod(shape)), *tail), np.nan)
        values[[place[step] for step in found]] = np.stack(list(found.values()))
        values = np.moveaxis(values.reshape(len(steps), *shape, *tail), 0, len(shape))
        if name == "status":
            values = _status_text(values)
        variables[name] = (dims, values, {"units": UNITS[name]} if name in UNITS else {})
    for name, values in constants.items():
        units = {"units": UNITS[name]} if name in UNITS else {}
        variables[name] = (names, values.reshape(shape), units)
    coordinates = {name: _coordinate(values) for name, values in axes.items()}
    dataset = xr.Dataset(variables, {**coordinates, "step": steps}, header["attributes"])
    return dataset.assign_coords({name: (axis, values) for name, (axis, values) in header["coordinates"].items()})


def _default_dims(count: int) -> tuple[str, ...]:
    return {0: (), 1: ("coordinate",), 2: ("row", "column")}.get(count, tuple(f"dim_{i}" for i in range(count)))


def _status_text(codes: np.ndarray) -> np.ndarray:
    # "" where it was not recorded.
    table = np.array(["", *STATUSES])
    return table[np.where(np.isnan(codes), -1, codes).astype(int) + 1]


def _coordinate(values: list[Any]) -> np.ndarray:
    return np.array([str(value) for value in values] if any(isinstance(value, str) for value in values) else values)
