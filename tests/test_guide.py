import contextlib
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from dlnlab.cli import main

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / "guide.md").read_text(), re.MULTILINE | re.DOTALL)
SHARPNESS = (ROOT / "docs" / "sharpness.md").read_text()
OF_SHARPNESS = re.findall(r"^```(\w+)\n(.*?)^```$", SHARPNESS, re.MULTILINE | re.DOTALL)
FILES = [body.split("\n", 1) for _, body in BLOCKS + OF_SHARPNESS if body.startswith("# examples/")]


@pytest.mark.parametrize(("name", "shown"), FILES, ids=[name for name, _ in FILES])
def test_every_file_is_shown_as_it_is(name, shown):
    assert shown == (ROOT / name.removeprefix("# ")).read_text()


def test_every_example_is_shown():
    shown = {name.removeprefix("# examples/") for name, _ in FILES}
    assert shown == {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".yaml")}


FIRST = "lightning_logs/first/version_0"
"""The first run's directory as the guide has it, where there are no other runs of that name."""
RUNS = ("first", "second", "examples/cubic", "examples/table", "examples/mine", "examples/phases", "examples/annealed")


def logs(name):
    return (Path(name).parent / "lightning_logs" / Path(name).name).as_posix()


def test_every_block_runs_in_order_whatever_other_runs_there_are(tmp_path, monkeypatch, capsys):
    for name in ("quickstart", *RUNS):  # those of the README, and of somebody who stopped the guide's
        (tmp_path / logs(name) / "version_0" / "results").mkdir(parents=True)
    others = shutil.ignore_patterns("__pycache__", "lightning_logs")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=others, dirs_exist_ok=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace, first, printed = {}, FIRST, []
    for kind, body in BLOCKS:
        body = body.replace(FIRST, first)  # as the guide asks for
        if body.startswith("# examples/"):
            continue
        if kind == "python":
            exec(compile(body, "guide.md", "exec"), namespace)
            continue
        assert kind == "bash"
        for line in body.splitlines():
            command, *arguments = shlex.split(line)
            if command == "cd":
                os.chdir(arguments[0])  # monkeypatch goes back to where it came from
                sys.path.insert(0, os.getcwd())  # as for a person who starts python here
            elif arguments[0].endswith(".py"):
                exec(compile(Path(arguments[0]).read_text(), arguments[0], "exec"), {"__name__": "__main__"})
            else:
                assert (command, arguments[:2]) == ("python", ["-m", "dlnlab"])
                capsys.readouterr()
                code, shown = main(arguments[2:]), capsys.readouterr()
                assert code == 0, shown.err
                if arguments[2] == "fit":
                    printed.append(os.path.relpath(shown.out.splitlines()[-1].removeprefix("run: "), tmp_path))
                    first = printed[0]
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert printed == [f"{logs(name)}/version_1" for name in RUNS]
    assert not any((tmp_path / logs(name) / "version_2").exists() for name in RUNS)


@pytest.fixture(autouse=True)
def forget_the_examples():
    yield
    for path in (ROOT / "examples").glob("*.py"):
        with contextlib.suppress(KeyError):
            del sys.modules[path.stem]
