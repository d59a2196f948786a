import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
