import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlnlab.figures.base import colours, panels

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


def test_a_picture_of_the_gallery_has_every_pixel_as_it_was_drawn(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    gallery = importlib.import_module("gallery")
    figure, (panel,) = panels(1)
    for colour in colours(300):  # more than a palette of a picture has
        panel.plot([0, 1], np.random.default_rng(0).random(2), color=colour, alpha=0.5)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=gallery.DPI)
    gallery.shrink(drawn, tmp_path / "made" / "picture.png")
    pixels, kept = (np.asarray(Image.open(file).convert("RGBA")) for file in (drawn, tmp_path / "made" / "picture.png"))
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 256
    np.testing.assert_array_equal(kept, pixels)


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
