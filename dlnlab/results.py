"""Result segments on disk -> one labelled data set.

A run's `results/` holds `ensemble.json` (format number, axes and attributes, with a checksum inside) and immutable
segments `part-000000.npz`, ...; each is a zip archive of arrays with a checksum behind it. An array `name` holds one
variable over (T, E, ...), and `name/steps` the T optimizer steps it was recorded at; a variable without steps is as of
the segment's end. `dims` names trailing dimensions, and `follows` is the checksum of the axes and of the segments before.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dlnlab.files import DamagedFileError, newer, read_verified, write_atomic

FORMAT = 1
"""The number of the layout described above, which headers carry as `format`. It grows when files can no longer be read
by older versions of dlnlab. Headers without it, from before there was one, count as 0: their segments lack `follows`."""
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
    "stopped_at": "optimizer steps of the run in which the member stopped; -1 where it still runs",
    "diverged_by": "loss, not finite or source: why the member has diverged",
}
UNOBSERVED = "mean squared error over the unobserved entries"
"""The units of `distance` where the predictor is a matrix; the attribute `distance_units` says so."""


class ResultError(ValueError):
    """A run whose results cannot be read as they are."""


def write_header(folder: Path, axes: dict[str, list[Any]], coordinates: dict[str, Any], attributes: dict) -> None:
    """Start a results folder: the ensemble's axes, further coordinates {name: (axis or axes, values)} and attributes."""
    header = {"format": FORMAT, "axes": axes, "coordinates": coordinates, "attributes": attributes}
    write_atomic(folder / HEADER, json.dumps({**header, "sha256": _digest_of(header)}, indent=1).encode())


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_header(folder: Path) -> dict[str, Any]:
    """Read what `write_header` wrote.

    Raises:
        ResultError: If it is missing, damaged, of a newer format, or no header of results.
    """
    path = folder / HEADER
    try:
        header = json.loads(path.read_bytes())
        digest = header.pop("sha256", None) if isinstance(header, dict) else None
        whole = digest is not None and digest == _digest_of(header)
    except FileNotFoundError:
        raise ResultError(f"{path} is missing; a resume of the run writes it anew") from None
    except (ValueError, RecursionError):
        header, whole = None, False
    number = header.get("format", 0) if isinstance(header, dict) else 0
    if type(number) is int and number > FORMAT:
        raise ResultError(f"{path}: {newer('results', number, FORMAT)}")
    if not whole:
        raise ResultError(f"{path} is damaged; a resume of the run writes it anew")
    if reason := _no_header(header):
        raise ResultError(f"{path} is no header of results that dlnlab wrote: {reason}")
    return header


def _no_header(header: dict[str, Any]) -> str | None:
    """Why a mapping is no header, or None if it is one."""
    if type(header.get("format", 0)) is not int or header.get("format", 0) < 0:
        return "its format is no whole number"
    for key in ("axes", "coordinates", "attributes"):
        if not isinstance(header.get(key), dict):
            return f"{key} must be a mapping"
    axes = header["axes"]
    for name, values in axes.items():
        if name == "step" or not _are_labels(values):
            return f"axes.{name} must be a list of numbers or texts, and not be called step"
    for name, given in header["coordinates"].items():
        of, values = given if isinstance(given, list) and len(given) == 2 else (None, None)
        of = [of] if isinstance(of, str) else of
        if (
            name in (*axes, "step")
            or not isinstance(of, list)
            or not set(map(type, of)) <= {str}
            or not _are_labels(values if of else [values])  # a number of the whole run lies along no axis
        ):
            return f"coordinates.{name} must be its axes and as many numbers or texts"
    return None


def _are_labels(values: Any) -> bool:
    """Whether values from a file can label axes: texts and numbers that arrays of NumPy hold as such."""
    try:
        return isinstance(values, list) and bool(values) and _coordinate(values).dtype.kind in "Uiuf"
    except (ValueError, OverflowError):  # ragged lists
        return False


def write_segment(
    folder: Path,
    number: int,
    series: dict[str, tuple[list[int], np.ndarray]],
    constants: dict[str, np.ndarray],
    dims: dict[str, list[str]],
    follows: str,
) -> str:
    """Write one immutable segment.

    Args:
        folder: The results folder.
        number: The segment's number.
        series: name -> (steps (T,), values (T, E, ...)).
        constants: name -> values (E, ...), as of now; the last segment's count.
        dims: Names of the trailing dimensions of variables that have any.
        follows: What the segment belongs behind (`follows`).

    Returns:
        The checksum of its contents.
    """
    arrays = dict(constants)
    for name, (steps, values) in series.items():
        arrays[name], arrays[name + _STEPS] = values, np.asarray(steps, dtype=np.int64)
    arrays["dims"], arrays["follows"] = np.array(json.dumps(dims)), np.array(follows)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(folder / _PART.format(number), buffer.getvalue(), checksum=True)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def chain(before: str, segment: str) -> str:
    """The checksum of a series of segments, from that of the series without its last and the last one's own."""
    return hashlib.sha256(f"{before} {segment}".encode()).hexdigest()


def follows(axes: dict[str, list[Any]], before: str) -> str:
    """What a segment says of its place, so that a part of another run is not taken for one of this.

    Args:
        axes: The ensemble's axes, as the header has them.
        before: The `chain` of the segments before it.
    """
    return chain(before, _digest_of(axes))


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
    """The segments of a results folder, in order.

    Raises:
        ResultError: If there are none, or one of those before the last is missing.
    """
    found = {path.name for path in folder.glob("part-*.npz")}
    last = max((int(name[5:-4]) for name in found if re.fullmatch(r"part-[0-9]{6,}\.npz", name)), default=None)
    if last is None:
        raise ResultError(
            f"{folder} has no segments ({_PART.format(0)}, ...): the run has recorded nothing yet, or they were removed"
        )
    paths = []
    while len(paths) <= last:
        path = folder / _PART.format(len(paths))
        if path.name not in found:
            raise ResultError(
                f"{path} is missing, and segments up to {_PART.format(last)} are there: put it back, or resume from a "
                "checkpoint that was written before it"
            )
        paths.append(path)
    return paths


def drop_segments(folder: Path, keep: int) -> None:
    """Remove the segments numbered `keep` and later, the last first, so that none is ever missing in between."""
    for path in sorted(folder.glob("part-*.npz"), reverse=True):
        if int(path.stem.split("-")[1]) >= keep:
            path.unlink()


def read_segment(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one segment, checked; no pickle is ever run.

    Raises:
        DamagedFileError: If the segment is not as it was written, or holds anything but plain arrays.
    """
    return _arrays(path, read_verified(path))


def _arrays(path: Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return dict(archive)
    except Exception:  # what NumPy and zipfile raise for a foreign archive differs from version to version
        raise DamagedFileError(
            f"{path} is damaged: it is no archive of plain arrays, and is never loaded as anything else"
        ) from None


def load_results(run: str | Path) -> xr.Dataset:
    """All that a run has recorded, finished or not, as one labelled data set.

    Args:
        run: The run directory.

    Returns:
        Variables over the ensemble's axes in the order written (an axis of length 1 is kept), then `step`, then
        `coordinate` (`index` for spectra, `row` and `column` for matrices), float64. `step` is the union of all
        schedules: NaN where a variable was not recorded. `status` and `diverged_by` are text; `stopped_at`,
        `diverged_by` and `step_size` have no step.
        A run that started from another one has that one's axes as coordinates, `source_lr`, where they differ.
        `encoding["source"]` is the run directory.

    Raises:
        FileNotFoundError: If the folder is no run.
        ResultError: If nothing was recorded yet, if the header or a segment is missing, damaged, foreign or part of
            another run, or if a newer version of dlnlab wrote them in a format that this one does not know.
    """
    run = Path(run)
    folder = run / "results"
    if not folder.is_dir():
        raise FileNotFoundError(f"{run} is no run directory: it has no results/{HEADER}")
    if not (folder / HEADER).exists() and not any(folder.glob("part-*.npz")):
        raise FileNotFoundError(f"{run} is no run directory: it has no results/{HEADER}")
    header = read_header(folder)
    parts, before, members = [], "", math.prod(len(values) for values in header["axes"].values())
    for path in segments(folder):
        try:
            content = read_verified(path)
            part = _arrays(path, content)
        except DamagedFileError as error:
            raise ResultError(f"{error}; move it and the later segments away to read those before it") from None
        if reason := _no_segment(part, members):
            raise ResultError(f"{path} is no segment of these results: {reason}")
        place = part.pop("follows", None)
        if place is not None and str(place) != follows(header["axes"], before):
            raise ResultError(f"{path} belongs to another run, or to another continuation of this one")
        before = chain(before, hashlib.sha256(content).hexdigest())
        parts.append(part)
    try:
        dataset = _assemble(header, parts)
    except ValueError as error:
        raise ResultError(f"the segments in {folder} do not belong together: {error}") from None
    dataset.encoding["source"] = str(run)  # where xarray says what it has read
    return dataset


def _no_segment(part: Mapping[str, np.ndarray], members: int) -> str | None:
    """Why arrays are no segment of an ensemble's results, or None if they are one."""
    try:
        dims = json.loads(str(part["dims"]))
    except (KeyError, ValueError, RecursionError):
        dims = None
    if not isinstance(dims, dict) or not all(
        isinstance(of, list) and set(map(type, of)) <= {str} for of in dims.values()
    ):
        return "its dims are no mapping of variables to names"
    for name, values in part.items():
        if name in ("dims", "follows"):
            continue
        if name.endswith(_STEPS):
            if values.dtype.kind != "i" or values.ndim != 1 or name.removesuffix(_STEPS) not in part:
                return f"{name} must be a list of whole numbers that belongs to a variable"
            continue
        if values.dtype.kind not in ("biuf" if name + _STEPS in part else "biufU"):  # why a member diverged is text
            return f"{name} must hold numbers, and has {values.dtype}"
        steps = part.get(name + _STEPS)
        expected = (members,) if steps is None else (len(steps), members)
        found = values.shape if steps is None else values.shape[:2]
        if found != expected:
            return f"{name} has shape {values.shape}, and these results have {members} members"
        if name == "status" and not (np.isnan(values) | np.isin(values, range(len(STATUSES)))).all():
            return "status must be a number of " + ", ".join(STATUSES)
        if name in dims and len(dims[name]) != values.ndim - len(expected):
            return f"{name} has shape {values.shape}, and dims {dims[name]}"
    return None


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
    units = {**UNITS, "distance": header["attributes"].get("distance_units", UNITS["distance"])}
    variables: dict[str, Any] = {}
    for name, found in series.items():
        if len({values.shape[1:] for values in found.values()}) > 1:
            raise ValueError(f"{name} has not one shape")
        tail = next(iter(found.values())).shape[1:]
        dims = (*names, "step", *trailing.get(name, _default_dims(len(tail))))
        values = np.full((len(steps), int(np.prod(shape)), *tail), np.nan)
        values[[place[step] for step in found]] = np.stack(list(found.values()))
        values = np.moveaxis(values.reshape(len(steps), *shape, *tail), 0, len(shape))
        if name == "status":
            values = _status_text(values)
        variables[name] = (dims, values, {"units": units[name]} if name in units else {})
    for name, values in constants.items():
        variables[name] = (names, values.reshape(shape), {"units": units[name]} if name in units else {})
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
