"""docs/trust.md: what dlnlab reads, it never runs. (Tables: test_tables.py; the command line: test_bad_input.py.)"""

import ast
import base64
import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import dlnlab
from dlnlab import strict_yaml
from dlnlab.checkpoint import AtomicCheckpointIO, CheckpointError
from dlnlab.files import write_atomic
from dlnlab.results import ResultError, load_results, write_header
from dlnlab.tables import read_table

PACKAGE = Path(dlnlab.__file__).parent


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def mark(tmp_path):
    """A file that is there once a Malicious was unpickled."""
    path = tmp_path / "mark"
    pickle.loads(pickle.dumps(Malicious(path)))
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


CONTENTS = {
    "bare pickle": lambda evil, file: pickle.dump(evil, file),
    "object array": lambda evil, file: np.savez(file, dims=np.array("{}"), beta=np.array([evil], dtype=object)),
    "object array alone": lambda evil, file: np.save(file, np.array([evil], dtype=object)),
    "torch archive": lambda evil, file: torch.save({"state_dict": evil}, file),
    "old torch file": lambda evil, file: torch.save({"a": evil}, file, _use_new_zipfile_serialization=False),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("make", CONTENTS.values(), ids=CONTENTS)
def test_a_pickle_with_a_right_checksum_is_run_neither_as_results_nor_as_a_checkpoint(
    make, mark, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    buffer = io.BytesIO()
    make(Malicious(mark), buffer)
    results = tmp_path / "run" / "results"
    results.mkdir(parents=True)
    write_header(results, {"seed": [0]}, {}, {})
    segment, checkpoint = results / "part-000000.npz", tmp_path / "a.ckpt"
    for path in (segment, checkpoint):
        write_atomic(path, buffer.getvalue(), checksum=True)
    with pytest.raises(ResultError, match=r"never loaded|no segment") as of_results:
        load_results(tmp_path / "run")
    with pytest.raises(CheckpointError, match="never loaded") as of_checkpoint:
        AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=False)
    for path, caught in ((segment, of_results), (checkpoint, of_checkpoint)):
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickled_type_in_a_parquet_file_is_not_run(mark, tmp_path):
    pa = pytest.importorskip("pyarrow")

    class Type(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.int64(), "arrow.py_extension_type")

        def __arrow_ext_serialize__(self):
            return pickle.dumps(Malicious(mark))

    import pyarrow.parquet

    column = pa.ExtensionArray.from_storage(Type(), pa.array([1, 2]))
    path = tmp_path / "my.parquet"
    pyarrow.parquet.write_table(pa.table({"a": column, "b": [3.0, 4.0]}), path)
    schema = base64.b64decode(pyarrow.parquet.read_metadata(path).metadata[b"ARROW:schema"])
    assert pickle.dumps(Malicious(mark)) in schema
    assert read_table(path).numbers(["b"]).tolist() == [[3], [4]]


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{mark}]]",
        "!!python/object/new:os.mkdir [{mark}]",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!!python/tuple [1]",
        "!mine {{a: 1}}",
    ],
)
def test_a_tag_in_a_config_is_refused_and_makes_nothing(value, mark, tmp_path):
    value = value.format(mark=mark)
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        strict_yaml.load(f"a: {value}")
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {value}")
    with pytest.raises(ValueError, match=r"c\.yaml, line 1.*could not determine a constructor") as caught:
        dlnlab.run(config)
    assert "\n" not in str(caught.value)


ALLOWED = {
    "torch.load": lambda call, path: given(call, "weights_only") is True,
    "np.load": lambda call, path: given(call, "allow_pickle") is False,
    "pickle.loads": lambda call, path: path == PACKAGE / "kernels" / "caching.py",  # compiled kernels, which are code
    "import_module": lambda call, path: path.name in ("__init__.py", "cli.py", "config.py", "messages.py"),
}
DANGEROUS = re.compile(
    r"eval|exec|__import__|(\w+\.)*read_pickle|os\.(system|popen|exec\w*|spawn\w*)|subprocess\.\w+"
    r"|(np|numpy|torch|pickle|yaml|marshal|shelve|joblib|cloudpickle)\.(load|loads|load_all|unsafe_load|full_load|open)"
)
"""What runs something, or may run what it reads; safe forms are in ALLOWED."""


def given(call, keyword):
    return next((ast.literal_eval(each.value) for each in call.keywords if each.arg == keyword), None)


def test_no_line_of_the_package_reads_a_file_in_a_way_that_can_run_it():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name in ALLOWED:
                assert ALLOWED[name](call, path), f"{path}, line {call.lineno}: {name}"
            else:
                assert not DANGEROUS.fullmatch(name), f"{path}, line {call.lineno}: {name}"
