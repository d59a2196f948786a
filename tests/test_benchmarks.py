import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("script", ["shallow", "completion"])
def test_every_contender_of_a_comparison_takes_its_steps(script, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    contest, contenders = importlib.import_module("contest"), importlib.import_module(script).CONTENDERS
    monkeypatch.setattr(contest, "NO_JAX", ["none here"])  # compiling it takes seconds
    lines = contest.comparison(contenders, {"tiny": (4, 3)}, rounds=1, seconds=1e-3, longer=2, note="")
    ours = [name for name in contenders if not name.startswith("JAX")]
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and line.endswith("|")]
    assert [row[0].removeprefix("| ") for row in rows[2:]] == ours + [f"a fit, beside {name}" for name in ours[:-2]]
    for row in rows[2:]:
        assert float(row[1].split("x")[0].split(" ns")[0].replace(",", "")) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "written"),
    [
        ("trajectories", [], ["trajectories.md"]),
        ("trajectories", ["--growth"], ["growth.md", "growth.png"]),
        ("trajectories", ["--profile"], ["profile.md"]),
        ("shallow", [], ["shallow.md"]),
        ("completion", [], ["completion.md"]),
    ],
)
def test_benchmarks_of_steps_run(script, options, written, tmp_path):
    command = [sys.executable, BENCHMARKS / f"{script}.py", "--quick", "--output", tmp_path, *options]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert "nan" not in (tmp_path / written[0]).read_text()
