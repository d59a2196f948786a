"""Golden hashes: does a change of the code leave every config's results, figure tables and TensorBoard tags as they were?

    python benchmarks/golden.py write FILE [even2023/stepsizes ...]
    python benchmarks/golden.py compare FILE

`write` trains each config (all by default) for a few steps with two seeds and stores one hash for every results array,
figure table and TensorBoard tag. `compare` does the same with the present code and names each hash that differs. The
hashes belong to one machine and one set of library versions, because sums may be ordered differently elsewhere: write
them with the old code, then compare on the same machine. Wall times are left out.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr
import yaml
from gallery import configs as names
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

import dlnlab
from dlnlab.cli import main as dlnlab_main
from dlnlab.schedule import expand

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def reduced(name: str) -> list[str]:
    """The command line of a config with 30 steps, 2 seeds and the two ends of each long axis."""
    path = CONFIGS / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    words = ["fit", "--config", str(path), "--trainer.max_steps", "30"]
    if "ensemble" in content:
        words += ["--ensemble.seed", "2"]
    for axis, values in content.get("ensemble", {}).items():
        if axis != "seed" and len(found := expand(values, axis)) > 3:
            words += [f"--ensemble.{axis}", str([found[0], found[-1]])]
    return words


def hashes(run: Path) -> dict[str, str]:
    """One hash for every array, figure table and tag of a run directory and of its variants."""
    variants = sorted((run / "variants").glob("*"))
    return {key: value for folder in (run, *variants) for key, value in _of_folder(folder, run)}


def _of_folder(folder: Path, run: Path) -> Iterator[tuple[str, str]]:
    prefix = folder.relative_to(run).as_posix()
    dataset = dlnlab.load_results(folder)
    for name in (*dataset.coords, *dataset.data_vars):
        yield f"{prefix}: {name}", _of_array(dataset[name])
    for table in sorted((folder / "figures").glob("*.csv")):
        yield f"{prefix}: {table.name}", hashlib.sha256(table.read_bytes()).hexdigest()[:16]
    for events in sorted(folder.rglob("events.out.tfevents.*")):
        if folder == run and "variants" in events.relative_to(run).parts:
            continue
        reader = EventAccumulator(str(events), size_guidance={"scalars": 0, "tensors": 0})
        reader.Reload()
        where = events.parent.relative_to(folder).as_posix()
        for tag in reader.Tags()["scalars"]:
            if tag.endswith("/seconds"):
                continue
            content = [(event.step, event.value) for event in reader.Scalars(tag)]
            yield f"{prefix}: {where} {tag}", hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        for tag in reader.Tags()["tensors"]:
            steps = [(event.step, tensor_util.make_ndarray(event.tensor_proto).shape) for event in reader.Tensors(tag)]
            yield f"{prefix}: {where} {tag}", hashlib.sha256(repr(steps).encode()).hexdigest()[:16]


def _of_array(array: xr.DataArray) -> str:
    values = array.values
    content = repr(values.tolist()).encode() if values.dtype.kind in "OUT" else np.ascontiguousarray(values).tobytes()
    about = f"{array.dims} {array.shape} {values.dtype.kind}".encode()
    return hashlib.sha256(about + content).hexdigest()[:16]


def train(name: str) -> dict[str, str]:
    """Train a reduced config in a temporary folder and hash what it leaves behind.

    Raises:
        RuntimeError: If the fit fails.
    """
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()) as printed,
                contextlib.redirect_stderr(io.StringIO()) as said,
            ):
                code = dlnlab_main(reduced(name))
            if code:
                raise RuntimeError(f"{name}: exit code {code}: {said.getvalue()[-500:]}")
            return hashes(Path(folder) / printed.getvalue().splitlines()[-1].removeprefix("run: "))
        finally:
            os.chdir(before)


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The keys whose hash is new, missing or another."""
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def main() -> int:
    """Write or compare; 1 where a hash differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("configs", nargs="*")
    given = parser.parse_args()
    sys.path.insert(0, str(CONFIGS.parent))  # some configs train the plain modules of examples/
    if given.command == "write":
        found = {}
        for name in given.configs or names():
            found[name] = train(name)
            print(f"{name}: {len(found[name])} hashes", flush=True)
        given.file.write_text(json.dumps(found, indent=1))
        return 0
    golden, wrong = json.loads(given.file.read_text()), 0
    for name in given.configs or sorted({*golden, *names()}):
        if name not in golden or not (CONFIGS / f"{name}.yaml").exists():
            print(f"{name}: only {'now' if name not in golden else 'before'}")
            wrong += 1
            continue
        different = differences(golden[name], train(name))
        wrong += bool(different)
        print(f"{name}: {'equal' if not different else '; '.join(different)}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
