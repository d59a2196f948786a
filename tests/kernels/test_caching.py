"""Compiled kernels on disk: reused as long as no kernel's source changes, done without where nothing can be written."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numba
import numpy as np
import pytest

import dlnlab
from dlnlab.kernels import caching

PACKAGE = Path(dlnlab.__file__).parent
VECTORS = """
from numba import njit

STEP = {step}

@njit
def change(x):
    return x {sign} STEP
"""
STEPS = """
from typing import NamedTuple

import numpy as np

from room.caching import cached_njit
from room.vectors import change

class State(NamedTuple):
    w: np.ndarray
    count: int

@cached_njit(nogil=True)
def advance(state):
    for i in range(state.count):
        state.w[i] = change(state.w[i])
    return state.w.sum()
"""


class Room:
    """A small copy of dlnlab/kernels: the cache, a cached function and a function of another file compiled into it."""

    def __init__(self, folder):
        self.folder = folder / "room"
        self.folder.mkdir()
        (self.folder / "caching.py").write_text(Path(caching.__file__).read_text())
        (self.folder / "steps.py").write_text(STEPS)
        self.write()

    def write(self, step=1, sign="+"):
        (self.folder / "vectors.py").write_text(VECTORS.format(step=step, sign=sign))

    def advance(self, dtype="float64"):
        """What a new process gets from three zeros; then whether it had to compile."""
        for name in [name for name in sys.modules if name.split(".")[0] == "room"]:
            del sys.modules[name]
        steps = import_module("room.steps")
        result = steps.advance(steps.State(np.zeros(3, dtype), 3))
        return result, steps.advance.stats.cache_hits == {}

    def files(self):
        return sorted(path.name for path in self.folder.rglob("*.nbc"))


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # .pyc files compare times, and these files change at once
    monkeypatch.syspath_prepend(tmp_path)
    return Room(tmp_path)


def test_the_next_process_compiles_nothing(room, tmp_path):
    code = "import numpy as np; from room.steps import State, advance; advance(State(np.zeros(3), 3))"
    path = f"{tmp_path}:{PACKAGE.parent}"
    subprocess.run([sys.executable, "-c", code], env={"PATH": "", "PYTHONPATH": path}, check=True)
    assert len(room.files()) == 1
    assert room.advance() == (3, False)
    assert room.advance("float32") == (3, True)
    assert room.advance("float32") == (3, False)
    assert room.advance() == (3, False), "the other signature is still there"


@pytest.mark.parametrize("change", [{"sign": "-"}, {"step": 2}], ids=["function", "constant"])
def test_a_change_of_an_imported_function_or_constant_recompiles_and_removes_the_old_code(room, change):
    assert room.advance() == (3, True)
    assert room.advance("float32") == (3, True)
    room.write(**change)
    expected = 3 * change.get("step", -1)
    assert room.advance() == (expected, True)
    assert len(room.files()) == 1
    assert room.advance() == (expected, False)


def test_a_damaged_file_is_compiled_anew(room):
    room.advance()
    (path,) = room.folder.rglob("*.nbc")
    for content in (b"", path.read_bytes()[:-100], path.read_bytes().replace(b"\0", b"\1", 1)):
        path.write_bytes(content)
        assert room.advance() == (3, True)
        assert room.advance() == (3, False)


def test_numbas_own_cache_folder_is_used_where_one_is_set(room, tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "elsewhere"))
    assert room.advance() == (3, True)
    assert room.advance() == (3, False)
    assert room.files() == [] and len([*(tmp_path / "elsewhere").rglob("*.nbc")]) == 1


def test_where_no_folder_can_be_written_kernels_run_uncached_and_one_line_says_so(room, tmp_path, monkeypatch, caplog):
    (room.folder / "__pycache__").write_text("a file, so that not even root can make the folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(room.folder / "__pycache__"))
    assert room.advance() == (3, True)
    assert len(caplog.records) == 1 and "NUMBA_CACHE_DIR" in caplog.text
    steps = import_module("room.steps")
    assert steps.advance(steps.State(np.zeros(3, "float32"), 3)) == 3
    assert len(caplog.records) == 1


def test_a_disk_that_is_full_stops_no_kernel(room, monkeypatch, caplog):
    def full(path, content, checksum):
        raise OSError(28, "No space left on device", str(path))

    room.advance()
    monkeypatch.setattr("dlnlab.files.write_atomic", full)
    assert room.advance("float32") == (3, True)
    assert len(caplog.records) == 1 and room.advance() == (3, False)


def test_every_cached_kernel_goes_through_the_one_cache():
    caching_by_numba = re.compile(r"cache\s*=\s*True|enable_caching")
    assert not [path for path in PACKAGE.rglob("*.py") if caching_by_numba.search(path.read_text())]
