import csv
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pandas
import pytest
import xarray as xr

import dlnlab
from dlnlab.cli import main
from dlnlab.export import FORMATS, export

CONFIG = {
    "ensemble": {"lr": [0.05, 0.9], "batch_size": [2, "full"], "seed": 2},
    "model": {"class_path": "DiagonalLinearNetwork", "init_args": {"init_scale": 0.2}},
    "data": {"class_path": "SparseRegression", "init_args": {"num_samples": 6, "dim": 5, "sparsity": 2}},
    "record": {"every_n_steps": 25, "variables": ["train_loss", "beta"]},
    "guard": {"every_n_steps": 10},
    "trainer": {"max_steps": 100, "callbacks": [{"class_path": "PredictorNorm", "init_args": {"every_n_steps": 40}}]},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return dlnlab.run(CONFIG, directory=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(results):
    return results.encoding["source"]


def test_netcdf_holds_the_data_set_as_it_is(run, results, tmp_path):
    netcdf = pytest.importorskip("netCDF4")
    (path,) = export(run, "netcdf", tmp_path / "out.nc")
    xr.testing.assert_identical(xr.open_dataset(path, engine="netcdf4").load(), results)
    with netcdf.Dataset(path) as file:
        assert file.variables["beta"].dimensions == ("lr", "batch_size", "seed", "step", "coordinate")
        np.testing.assert_array_equal(file.variables["beta"][:].filled(np.nan), results.beta)
        assert file.variables["batch_size"][:].tolist() == ["2", "full"]
        assert set(file.variables["status"][:].ravel()) == {"", "running", "diverged"}
        assert json.loads(file.versions)["dlnlab"] == dlnlab.__version__


def test_zarr_holds_the_data_set_as_it_is(run, results, tmp_path):
    zarr = pytest.importorskip("zarr")
    (path,) = export(run, "zarr", tmp_path / "out.zarr")
    xr.testing.assert_identical(xr.open_zarr(path).load(), results)
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(group["beta"][:], results.beta)
    assert group["batch_size"][:].tolist() == ["2", "full"]
    assert group.attrs["path"] == "closed form"


def expected_rows(results):
    """The main table's (lr, batch_size, seed, step), from the data set."""
    steps = [0, 25, 40, 50, 75, 80, 100]
    assert results.step.values.tolist() == steps
    return [(lr, b, s, t) for lr in (0.05, 0.9) for b in ("2", "full") for s in (0, 1) for t in steps]


def test_parquet_has_a_row_for_each_member_and_step(run, results, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = export(run, "parquet", tmp_path / "out.parquet")
    assert [path.name for path in paths] == ["out.coordinate.parquet", "out.parquet"]
    rows = parquet.read_table(paths[1]).to_pylist()
    assert [(row["lr"], row["batch_size"], row["seed"], row["step"]) for row in rows] == expected_rows(results)
    for row in rows:
        cell = results.sel({name: row[name] for name in ("lr", "batch_size", "seed", "step")})
        for name in ("train_loss", "l1_norm", "stopped_at", "step_size", "batch_size_number"):
            np.testing.assert_equal(np.nan if row[name] is None else row[name], cell[name].item())
        assert (row["status"] or "") == cell.status.item()
    long = parquet.read_table(paths[0]).to_pandas()
    values = long.set_index(["lr", "batch_size", "seed", "step", "coordinate"]).beta.to_xarray()
    np.testing.assert_array_equal(values, results.beta.dropna("step", how="all"))


def test_csv_gives_every_number_back_exactly(run, results, tmp_path):
    paths = export(run, "csv", tmp_path / "out.csv")
    assert [path.name for path in paths] == ["out.coordinate.csv", "out.csv"]
    with open(paths[1], newline="") as file:
        rows = list(csv.DictReader(file))
    keys = [(float(row["lr"]), row["batch_size"], int(row["seed"]), int(row["step"])) for row in rows]
    assert keys == expected_rows(results)
    for row, (lr, size, seed, step) in zip(rows, keys, strict=True):
        expected = results.train_loss.sel(lr=lr, batch_size=size, seed=seed, step=step).item()
        np.testing.assert_equal(float(row["train_loss"] or "nan"), expected)
    long = pandas.read_csv(paths[0], float_precision="round_trip")
    assert len(long) == 8 * 5 * 5  # members, steps at which beta was recorded, coordinates
    np.testing.assert_array_equal(long.beta, results.beta.dropna("step", how="all").values.ravel())


def test_the_default_output_lies_in_the_run_and_an_existing_one_is_refused_unless_overwritten(run, capsys, tmp_path):
    for format, suffix in FORMATS.items():
        library = {"netcdf": "netCDF4", "zarr": "zarr", "parquet": "pyarrow"}.get(format, "csv")
        pytest.importorskip(library)
        assert main(["export", run, "--format", format]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"exported: {run}/results{suffix}"
        assert main(["export", run, "--format", format]) == 2
        shown = capsys.readouterr()
        assert f"results{suffix} exists already" in shown.err
        assert len(shown.err.splitlines()) == 1
        assert main(["export", run, "--format", format, "--overwrite"]) == 0
        capsys.readouterr()
    assert dlnlab.load_results(run).sizes["step"] == 7


def test_a_failed_export_leaves_what_was_there_and_nothing_else(run, tmp_path, monkeypatch):
    (path, main_path) = export(run, "csv", tmp_path / "out.csv")
    before = {each: each.read_bytes() for each in (path, main_path)}
    write = pandas.DataFrame.to_csv

    def fails_at_the_second(frame, target, **options):
        write(frame, target, **options)
        if "coordinate" not in frame:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pandas.DataFrame, "to_csv", fails_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        export(run, "csv", tmp_path / "out.csv", overwrite=True)
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("format", "library"), [("netcdf", "netCDF4"), ("zarr", "zarr"), ("parquet", "pyarrow")])
def test_a_missing_library_is_named_with_the_way_to_install_it(run, format, library, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    assert main(["export", run, "--format", format, "--output", str(tmp_path / "out")]) == 2
    assert f"needs {library}, which is not installed: pip install 'dlnlab[export]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_said_in_one_line(run, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    for arguments, message in (
        ([tmp_path, "--format", "csv"], "is no run directory"),
        ([run, "--format", "csv", "--output", tmp_path / "no" / "out.csv"], "there is no folder"),
    ):
        assert main(["export", *map(str, arguments)]) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert len(shown.err.splitlines()) == 1
    with pytest.raises(ValueError, match="must be one of netcdf, zarr, parquet, csv"):
        export(run, "excel")
    with pytest.raises(SystemExit, match="2"):
        main(["export", run, "--format", "excel"])


def test_a_run_without_axes_or_further_dimensions_is_one_table(tmp_path):
    config = {**CONFIG, "ensemble": {}, "record": {"variables": ["train_loss"]}, "trainer": {"max_steps": 5}}
    run = dlnlab.run(config, directory=tmp_path).encoding["source"]
    (path,) = export(run, "csv", tmp_path / "out.csv")
    assert pandas.read_csv(path).step.tolist() == [0, 1, 2, 3, 4, 5]


def test_an_export_waits_for_no_torch():
    code = "import sys, dlnlab.export; assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
