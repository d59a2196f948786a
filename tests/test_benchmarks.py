import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAJECTORIES = Path(__file__).parents[1] / "benchmarks" / "trajectories.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "written"),
    [([], ["trajectories.md"]), (["--growth"], ["growth.md", "growth.png"]), (["--profile"], ["profile.md"])],
)
def test_trajectories_run(options, written, tmp_path):
    command = [sys.executable, TRAJECTORIES, "--quick", "--output", tmp_path, *options]
    environment = {**os.environ, "PYTHONPATH": str(TRAJECTORIES.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert "nan" not in (tmp_path / written[0]).read_text()


@pytest.mark.slow
def test_shallow_runs(tmp_path):
    script = TRAJECTORIES.with_name("shallow.py")
    environment = {**os.environ, "PYTHONPATH": str(TRAJECTORIES.parents[1])}
    command = [sys.executable, script, "--quick", "--output", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nan" not in (tmp_path / "shallow.md").read_text()
