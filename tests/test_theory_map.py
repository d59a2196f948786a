"""docs/theory.md names things that exist."""

import inspect
import re
from pathlib import Path

import pytest

from dlnlab import callbacks, models, optim, theory
from dlnlab.callbacks import Measurement
from dlnlab.fitting import quiet
from dlnlab.study import Study

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "theory.md").read_text()
ROOMS = {"theory": theory, "optim": optim, "callbacks": callbacks, "models": models}
ROWS = [line for line in TEXT.splitlines() if line.startswith("|")]
TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:theory|optim|callbacks|models)(?:\.\w+)+)`", TEXT))))
def test_every_function_it_names_exists_and_is_public(name):
    room, function, *inside = name.split(".")
    assert function in ROOMS[room].__all__
    for part in inside:  # of a subject that is a module of its own
        assert not part.startswith("_")
        assert hasattr(getattr(ROOMS[room], function), part)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", TEXT))))
def test_every_test_it_names_exists(name):
    assert name in TESTS


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z]+\d{4}/\w+)`", TEXT))))
def test_every_config_it_names_exists(name):
    assert (ROOT / "configs" / f"{name}.yaml").exists()


def test_every_formula_of_the_theory_is_in_it():
    named = set(re.findall(r"`theory\.([\w.]+)`", TEXT))
    public = {name: getattr(theory, name) for name in theory.__all__ if name[0].islower()}
    subjects = {name: room for name, room in public.items() if inspect.ismodule(room)}
    formulas = public.keys() - subjects.keys()
    for subject, room in subjects.items():
        formulas |= {
            f"{subject}.{name}" for name, function in inspect.getmembers(room, inspect.isfunction) if name[0] != "_"
        }
    # The increments' halves, the entropy itself and what a proof of uniqueness needs serve the functions that are named.
    helpers = {
        "gain_increment_plus", "gain_increment_minus", "hypentropy", "hypentropy_gradient", "hypentropy_conjugate",
        "hypentropy_bregman", "min_l1_is_unique", "flow_edge",
    }  # fmt: skip
    assert formulas - helpers <= named


def test_every_statement_has_a_label_and_a_test():
    for row in ROWS[2:]:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        if set(cells[0]) <= {"-"} or cells[0] == "statement":
            continue
        assert len(cells) == 6, row
        assert re.search(r"stated|derived|recollected", cells[1]), row
        assert cells[5].startswith("`test_"), row


def cells_of(row):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


RECORDED = {}
"""Config -> the variables that the rows with this config name."""
for _cells in map(cells_of, ROWS):
    for _config in re.findall(r"`([a-z]+\d{4}/\w+)`", _cells[4]) if len(_cells) == 6 else ():
        RECORDED.setdefault(_config, set()).update(re.findall(r"`([a-z]\w*)`", _cells[3]))


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_config_records_what_the_rows_that_name_it_say(name):
    with quiet():
        words = [
            "fit",
            "--config",
            str(ROOT / "configs" / f"{name}.yaml"),
            "--trainer.accelerator=cpu",
            "--ensemble.seed=1",
        ]
        study = Study(words, write=False)
        study.check()
    found = set()
    for run in study.runs.values():
        found |= set(run.recorder._variable_names())
        for callback in run.trainer.callbacks:
            if isinstance(callback, Measurement):
                found |= set(callback.names(run.model))
    assert RECORDED[name] <= found


def test_the_papers_it_names_are_in_the_bibliography():
    keys = set(re.findall(r"@\w+\{(\w+),", (ROOT / "docs" / "references.bib").read_text()))
    assert set(re.findall(r"\b([a-z]+20\d\d)\b", TEXT)) <= keys
