"""Recorded results -> files that other programs read: `dlnlab export RUN --format netcdf`. Imports no torch."""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas
import xarray as xr

from dlnlab.results import load_results

FORMATS = {"netcdf": ".nc", "zarr": ".zarr", "parquet": ".parquet", "csv": ".csv"}
"""Format -> suffix of its default output."""
_NEEDS = {"netcdf": "netCDF4", "zarr": "zarr", "parquet": "pyarrow"}


def export(
    run: str | Path,
    format: Literal["netcdf", "zarr", "parquet", "csv"],
    output: str | Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write what a run has recorded in another format; each file is whole or absent.

    `netcdf` and `zarr` hold the labelled data set as it is, with text attributes. `parquet` and `csv` are tables in long
    form. The main one has a row for each member and step: the axes, `step`, and every variable with one number per
    member (those without steps, `stopped_at` and `step_size`, are repeated). Variables with further dimensions have
    tables of their own beside it, named by these, `results.coordinate.csv`: a row for each member, step and coordinate.
    Rows at which nothing of a table was recorded are left out.

    Args:
        run: The run directory.
        format: `netcdf`, `zarr`, `parquet` or `csv`.
        output: Where to; None is `results.nc`, `.zarr`, `.parquet` or `.csv` in the run directory.
        overwrite: Replace what is there already.

    Returns:
        The paths written, the main one last.

    Raises:
        ValueError: If the format is unknown, its library is missing or the results cannot be read.
        OSError: If the run is none, the output exists or its folder cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}: must be one of {', '.join(FORMATS)}")
    library = _NEEDS.get(format)
    if library is not None and importlib.util.find_spec(library) is None:
        raise ValueError(f"the format {format} needs {library}, which is not installed: pip install 'dlnlab[export]'")
    output = Path(run) / f"results{FORMATS[format]}" if output is None else Path(output)
    dataset = load_results(run)
    if not dataset.data_vars:
        raise ValueError(f"{run} has recorded nothing yet")
    writers = _tables(dataset, format, output) if format in ("parquet", "csv") else _whole(dataset, format, output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output = {output}: there is no folder {output.parent}")
    if not overwrite and (existing := [str(path) for path in writers if path.exists()]):
        raise FileExistsError(f"output: {', '.join(existing)} exists already; give --overwrite or another --output")
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        for number, (path, write) in enumerate(writers.items()):
            fresh = Path(scratch) / f"{number}{path.suffix}"
            write(fresh)
            if fresh.is_file():
                _sync(fresh)
        for number, path in enumerate(writers):
            if path.is_dir() and not path.is_symlink():  # a folder is only ever renamed to a free name
                path.rename(Path(scratch) / f"{number}.replaced")
            os.replace(Path(scratch) / f"{number}{path.suffix}", path)
    return list(writers)


def _whole(dataset: xr.Dataset, format: str, output: Path) -> dict[Path, Callable[[Path], object]]:
    dataset = dataset.copy()
    dataset.attrs = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in dataset.attrs.items()
    }
    if format == "netcdf":
        return {output: lambda path: dataset.to_netcdf(path, engine="netcdf4", format="NETCDF4")}
    # Version 2 of the format has a specification of text arrays, and every reader knows it.
    return {output: lambda path: dataset.to_zarr(path, zarr_format=2, consolidated=True)}


def _tables(dataset: xr.Dataset, format: str, output: Path) -> dict[Path, Callable[[Path], object]]:
    """One table for each set of trailing dimensions, the main one (without any) last."""
    axes = [str(dim) for dim in dataset.dims if dim in dataset.coords and dim != "step"]  # trailing ones have no labels
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, variable in dataset.data_vars.items():
        trailing = tuple(dim for dim in variable.dims if dim not in (*axes, "step"))
        kinds.setdefault(trailing, []).append(str(name))
    writers = {}
    for trailing in sorted(kinds, key=len, reverse=True):
        frame = _long(dataset[kinds[trailing]], [*axes, "step", *trailing])
        writers[output.with_name(".".join([output.stem, *trailing]) + output.suffix)] = _writer(frame, format)
    return writers


def _writer(frame: pandas.DataFrame, format: str) -> Callable[[Path], object]:
    if format == "csv":
        return lambda path: frame.to_csv(path, index=False)
    return lambda path: frame.to_parquet(path, engine="pyarrow", index=False)


def _long(dataset: xr.Dataset, order: list[str]) -> pandas.DataFrame:
    """A row for each point of the dimensions in `order` at which something was recorded."""
    stepwise = [name for name, variable in dataset.data_vars.items() if "step" in variable.dims]
    frame = dataset.to_dataframe(dim_order=[name for name in order if name in dataset.dims]).reset_index()
    recorded = frame[stepwise].replace("", np.nan).notna().any(axis=1)
    return frame[recorded]


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def main(argv: list[str]) -> int:
    """The command line: `export RUN --format FORMAT [--output PATH] [--overwrite]`.

    Args:
        argv: The command and its arguments.

    Returns:
        0, or 2 for a mistake, of which one line says what it is.
    """
    parser = argparse.ArgumentParser(
        "dlnlab export",
        usage="dlnlab export RUN --format FORMAT [--output PATH] [--overwrite]",
        description="Write what a run has recorded in another format.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run directory")
    parser.add_argument("--format", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--output", metavar="PATH", help="where to; results.nc, ... in the run directory unless given")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")
    arguments = parser.parse_args(argv[1:])
    try:
        for path in export(**vars(arguments)):
            print(f"exported: {path}")
    except (ValueError, OSError) as error:
        print(f"dlnlab export: {error}", file=sys.stderr)
        return 2
    return 0
