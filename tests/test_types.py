"""The public names and the documents' Python, as a type checker and an editor see them."""

import re
from pathlib import Path

import pytest

import dlnlab

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CONFIG = f"""
[mypy]
mypy_path = {ROOT}:{ROOT / "examples"}
follow_imports = silent
[mypy-torch.*,lightning.*,torchmetrics.*,pandas.*,scipy.*,sklearn.*,matplotlib.*,tensorboard.*,numba.*,jsonargparse.*,yaml]
follow_imports = skip
ignore_missing_imports = True
"""
"""Our names, NumPy's and xarray's are followed; torch and lightning would take a minute."""


def code(document):
    """The Python of a document, at the same line numbers; shown files aside, which are checked as they are."""
    text = document.read_text()
    lines = [""] * len(text.splitlines())
    for block in re.finditer(r"^```python\n(?!# examples/)(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        first = text[: block.start(1)].count("\n")
        body = block[1].splitlines()
        lines[first : first + len(body)] = body
    return "\n".join(lines) + "\n"


def test_the_documents_type_check_and_no_public_name_is_any(tmp_path, pytestconfig):
    api = pytest.importorskip("mypy.api")
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "readme.py").write_text(code(ROOT / "README.md"))
    (tmp_path / "guide.py").write_text(code(ROOT / "docs" / "guide.md"))
    names = [name for name in dlnlab.__all__ if callable(getattr(dlnlab, name))]
    revealed = [f"reveal_type(dlnlab.{name})" for name in names]
    results = ["run('quickstart')", "run_all('quickstart')['main']", "simulate([[1]], [1])", "load_results('run')"]
    revealed += [f"reveal_type(dlnlab.{call})" for call in results]
    wrong = ["dlnlab.nothing", "dlnlab.load_results(1)", "dlnlab.simulate([[1]], [1], steps='ten')"]
    (tmp_path / "names.py").write_text("\n".join(["import dlnlab", *revealed, *wrong]))

    cache = pytestconfig.cache.mkdir("mypy")  # the next run takes a second
    files = [str(path) for path in (*EXAMPLES, *(tmp_path / f"{name}.py" for name in ("readme", "guide", "names")))]
    out, err, _ = api.run([f"--config-file={tmp_path / 'mypy.ini'}", f"--cache-dir={cache}", *files])
    assert err == ""
    notes = re.findall(r'names\.py:\d+: note: Revealed type is "(.*)"', out)
    assert len(notes) == len(revealed)
    for call, note in zip(revealed, notes, strict=True):
        assert "dlnlab.ensemble.Ensemble" in note or "xarray.core.dataset.Dataset" in note, call
    errors = [line for line in out.splitlines() if ": error: " in line]
    assert [line for line in errors if "names.py" not in line] == []
    assert len(errors) == len(wrong)
