import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlnlab import callbacks
from dlnlab.cli import main

ROOT = Path(__file__).parent.parent
DROP = object()
INF, NAN, HUGE = float("inf"), float("nan"), 10**400
CONFIG = {
    "ensemble": {"lr": [0.05, 0.1], "seed": 2},
    "model": {"class_path": "DiagonalLinearNetwork", "init_args": {}},
    "data": {
        "class_path": "SparseRegression",
        "init_args": {"num_samples": 6, "dim": 5, "sparsity": 2, "num_test_samples": 4},
    },
    "trainer": {"max_steps": 3, "enable_progress_bar": False},
}
MINE = """
import torch
from lightning.pytorch import LightningModule
from dlnlab.callbacks import Measurement
from dlnlab.data import SyntheticData
from dlnlab.figures import Figure
from dlnlab.models import DiagonalLinearNetwork, LinearNetwork

class RaisesRuntimeError(DiagonalLinearNetwork):
    def __init__(self, **kwargs):
        raise RuntimeError("out of ideas\\nand of words")

class RaisesValueError(DiagonalLinearNetwork):
    def __init__(self, width: int = 3, **kwargs):
        super().__init__(**kwargs)
        raise ValueError(f"width = {width}: must be even")

class RaisesInBuild(LinearNetwork):
    def build(self, num_features, num_outputs):
        {}["missing"]

class Schedules(DiagonalLinearNetwork):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]

class WrongAxis(LinearNetwork):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.w = torch.nn.Parameter(torch.ones(5))

    def predictor(self):
        return self.w.expand(self.num_members, 5)

class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        1 / 0

class Steps(LightningModule):
    def training_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return None

class NotFinite(SyntheticData):
    def sample(self, stream, values):
        x = stream.normals("inputs", (6, 5))
        x[4, 2] = float("nan")
        return x, x[:, 0], None

class NoTeacher(SyntheticData):
    def sample(self, stream, values):
        x = stream.normals("inputs", (6, 5))
        return x, x[:, 0], None

class RaisesWhenMeasured(Measurement):
    def measure(self, model, batch):
        raise IndexError("no such place")

class RaisesLater(Measurement):
    calls = 0
    def measure(self, model, batch):
        RaisesLater.calls += 1
        if RaisesLater.calls > 3:
            raise ZeroDivisionError("three is enough")
        return {"three": torch.ones(model.num_members)}

class Text(str):
    pass

class Unwritable(Measurement):
    def __init__(self, made: str = Text("x")):
        super().__init__()

class Undrawn(Figure):
    def check(self, variables, axes):
        raise ValueError("needs a fourth wall")

class Alone(Figure):
    def draw(self, dataset):
        raise NotImplementedError

def make_nothing(params, lr: float = 0.1) -> torch.optim.Optimizer:
    return None
"""
FILES = {
    "mine.py": MINE,
    "broken.py": "def f(:\n",
    "imports.py": "import a_package_that_is_not_there\n",
    "divides.py": "1 / 0\n",
    "hole.csv": "a,b,y\n" + "".join(f"{i},{'' if i == 16 else i * i},{-i}\n" for i in range(30)),
    "infinite.csv": "a,b,y\n" + "".join(f"{i},{'inf' if i == 3 else i * i},{-i}\n" for i in range(30)),
    "words.csv": "a,y\none,two\nthree,four\n",
    "empty.csv": "",
    "note.txt": "no table",
}


@dataclass
class Case:
    """What is given, and words that the message must contain."""

    id: str
    words: list
    changes: dict = field(default_factory=dict)
    argv: list = field(default_factory=list)
    text: str | bytes | None = None
    files: dict = field(default_factory=dict)
    command: str = "fit"
    slow: bool = False


CASES: list[Case] = []


def case(id, words, changes=None, *argv, **more):
    assert id not in {other.id for other in CASES}
    words = [words] if isinstance(words, str) else words
    CASES.append(Case(id, words, changes or {}, list(argv), **more))


def values(key, words, *found):
    """One case for each value of a key, which the message must name; all but the first are slow tests."""
    for i, value in enumerate(found):
        words_of_huge = "digits" if value is HUGE or value == [HUGE] else words
        case(f"{key}-{i}", [key, words_of_huge], {key: value}, slow=i > 0)


# The ensemble ---------------------------------------------------------------------------------------------------------

values("ensemble.lr", "positive and finite", 0, -0.1, INF, NAN, True, "big", None, [0.1, None], [[0.1]], HUGE)
case("lr-repeated", ["ensemble.lr[1] = 0.1", "repeats"], {"ensemble.lr": [0.1, 0.1]})
case("lr-empty", "ensemble.lr is empty", {"ensemble.lr": []})
case("lr-empty-range", "ensemble.lr is empty", {"ensemble.lr": {"range": 0}})
case("lr-short", "ensemble.lr.log10 = [0, 1]: must be [lo, hi, n]", {"ensemble.lr": {"log10": [0, 1]}})
case("lr-beyond-floats", "within -307 and 307", {"ensemble.lr": {"log10": [-400, 0, 3]}})
case("lr-no-form", "linear: [lo, hi, n]", {"ensemble.lr": {"log11": [0, 1, 2]}})
case("lr-two-forms", "linear: [lo, hi, n]", {"ensemble.lr": {"log10": [0, 1, 2], "linear": [0, 1, 2]}})
case("lr-linear-from-zero", "ensemble.lr[0] = 0.0", {"ensemble.lr": {"linear": [0, 1, 3]}})
case("lr-many", ["ensemble.lr.linear[2]", "1000000"], {"ensemble.lr": {"linear": [0.1, 1, 10**8]}})
case("lr-range-many", ["ensemble.lr.range", "1,000,000,000 values"], {"ensemble.lr": {"range": [0, 10**9]}})
case("lr-nested-on-the-command-line", "ensemble.lr = {'x': ", {}, "--ensemble.lr.x", "1")
values("ensemble.seed", "must be", 10**8, 10**30, 0, -3, 1.5, "a", [-1], [2**63], True, None)
case("seed-range-many", "ensemble.seed.range", {"ensemble.seed": {"range": 10**8}})
case("seed-repeated", "ensemble.seed[1] = 1 repeats", {"ensemble.seed": [1, 1]})
case("seed-empty", "ensemble.seed is empty", {"ensemble.seed": []})
values("ensemble.batch_size", "must be", [0], [-1], [7], ["half"], [1.5], [True], None, 10**20)
case(
    "batch-size-beyond-samples", "must be at most the number of training samples, 6", {"model.init_args.batch_size": 7}
)
case("full-repeated", "repeats ensemble.batch_size[0]", {"ensemble.batch_size": ["full", "full"]})
values("ensemble.noise_std", "finite number", [-1], [INF], ["x"])
values("ensemble.correlation", "below 1", [1.0])
values("ensemble.init_scale", "finite", [0], ["x"], [NAN])
values("ensemble.weight_decay", "at least 0", [-1.0])
values("ensemble.label_noise", "at least 0", [-1])
values("ensemble.sampling", "one of replacement, subset, epochs", ["all"], [1])
case("decay-too-strong", "2 lr weight_decay must be below 1", {"ensemble.weight_decay": [100.0]})
case("sparsity-axis-beyond-dim", "ensemble.sparsity = 9: must be at most dim = 5",
     {"ensemble.sparsity": [9], "data.init_args.sparsity": DROP})  # fmt: skip
values("ensemble.depth", "no such axis; the axes here are batch_size, correlation", [1])
for name in ("root", "self", "values", "shape", "_x", "a b", 1):
    case(f"axis-called-{name}", f"ensemble.{name}: no such axis", {"ensemble": {name: [1]}}, slow=name != "root")
case("axis-and-scalar", "data.init_args.sparsity = 2: sparsity is also an axis", {"ensemble.sparsity": [1, 2]})
case("axis-and-flag", "model.init_args.init_scale = 0.2: init_scale is also an axis",
     {"ensemble.init_scale": [0.1]}, "--model.init_args.init_scale", "0.2")  # fmt: skip
case("size-as-axis", "ensemble.dim: no such axis", {"ensemble.dim": [3], "data.init_args.dim": DROP})
values("ensemble", "must be a mapping", [1], "x", 3, None)
case("ensemble-bad-yaml", "ensemble = {lr: [1: must be a mapping", {}, "--ensemble", "{lr: [1")
case("seed-without-value", "ensemble", {}, "--ensemble.seed")

# Data -----------------------------------------------------------------------------------------------------------------

for name in ("num_samples", "dim", "sparsity", "num_test_samples"):
    values(f"data.init_args.{name}", "must be", None, NAN, INF, -1, HUGE, "x", [1], True, {})
for name in ("noise_std", "correlation"):
    values(f"data.init_args.{name}", "must be", None, NAN, INF, -1, "x", [1], True)
case("noise-huge", "data.init_args.noise_std", {"data.init_args.noise_std": HUGE})
case("huge-on-the-command-line", "guard.bound", {}, "--guard.bound", "1" + "0" * 400)
values("data.init_args.input_mean", "must be", None, NAN, INF, "x")
values("data.init_args.signal_scale", "must be", None, NAN, INF, 0, -1)
values("data.init_args.row_scale", "must be", NAN, -1, "x", [1], [1, 2, 3], [0, 1], [1, INF], {})
values("data.init_args.normalize_columns", "true or false", None, 3, "x")
values("data.init_args.signal", "one of", None, "minus", 3)
values("data.init_args.input_distribution", "one of", None, "cauchy")
case("sparsity-beyond-dim", "data.init_args.sparsity = 6: must be at most dim = 5", {"data.init_args.sparsity": 6})
case(
    "data-overflows",
    ["data", "not finite"],
    {"data.init_args.signal_scale": 1.7e308, "data.init_args.noise_std": 1e308},
)
case("data-not-finite", ["NotFinite: x", "row 4"], {"data": {"class_path": "mine.NotFinite"}})
case("data-missing", ["model", "trains on a dlnlab data set"], {"data": DROP})
TABLE = {"class_path": "TabularRegression", "init_args": {"path": "hole.csv"}}
for name, words in {
    "hole.csv": ["hole.csv", "row 17", '"b"', "empty"],
    "infinite.csv": ["infinite.csv", "row 4", "inf"],
    "words.csv": "words.csv",
    "empty.csv": "empty.csv",
    "note.txt": "note.txt",
    "missing.csv": "missing.csv",
    "target.csv": "data.init_args.path: target.csv: there is no such file",  # no argument `target`
    "lr.csv": "data.init_args.path: lr.csv: there is no such file",  # no axis `lr`
    ".": "data",
    "": "data",
}.items():
    case(f"table-{name}", words, {"data": {"class_path": "TabularRegression", "init_args": {"path": name}}})

# Classes --------------------------------------------------------------------------------------------------------------

MODEL = "there are DeepLinearNetwork, DiagonalLinearNetwork, ShallowLinearNetwork"
DATA = "there are LowRankCompletion, ObservedEntries, ScalarTarget, SparseRegression, TabularRegression"
OPTIMIZER = "model.init_args.optimizer"


def model(path, **arguments):
    return {"model": {"class_path": path, "init_args": arguments}}


def callback(path, **arguments):
    return {"trainer.callbacks": [{"class_path": path, "init_args": arguments}]}


case("model-typo", ["model: no class 'DiagonalNetwork'", MODEL], model("DiagonalNetwork"))
case("model-is-data", ["model", "'SparseRegression'", MODEL], model("SparseRegression"))
case("model-no-module", ["model", "No module named 'nowhere'", MODEL], model("nowhere.Net"))
case("model-not-in-module", ["model", "mine has no attribute 'Net'", MODEL], model("mine.Net"))
case("model-is-function", ["model: os.getcwd is of another kind", MODEL], model("os.getcwd"))
case("model-syntax-error", ["model: broken.Net cannot be imported", "broken.py, line 1"], model("broken.Net"))
case("model-import-error", ["imports.Net cannot be imported", "a_package_that_is_not_there"], model("imports.Net"))
case("model-module-raises", ["divides.Net cannot be imported", "division by zero"], model("divides.Net"))
case("model-number", ["model = 3: must be {class_path", MODEL], {"model": 3})
case("model-null", ["model: must be given", MODEL], {"model": None})
case("model-missing", ["model: must be given", MODEL], {"model": DROP})
case(
    "model-no-argument",
    ["model: DiagonalLinearNetwork has no argument 'foo'", "init_scale"],
    model("DiagonalLinearNetwork", foo=1),
)
case("model-argument-outside", ["model.foo: there is no such key", "init_args"], {"model.foo": 1})
case("model-abstract", "LinearNetwork does not define `predictor`", model("LinearNetwork"))
case(
    "model-raises",
    ["model: RaisesRuntimeError: RuntimeError: out of ideas", "mine.py, line"],
    model("mine.RaisesRuntimeError"),
)
case("model-refuses", "model.init_args.width = 3: must be even", model("mine.RaisesValueError"))
case(
    "model-raises-in-build", ["model: RaisesInBuild: KeyError: 'missing'", "mine.py, line"], model("mine.RaisesInBuild")
)
case("model-wrong-axis", "must be the 4 members", model("mine.WrongAxis"))
case("model-schedules", ["Schedules.configure_optimizers", "schedulers"], model("mine.Schedules"))
case("plain-module-raises", ["model: Plain: ZeroDivisionError"], {**model("mine.Plain"), "ensemble": DROP})
case("plain-module-with-ensemble", "ensemble: mine.Plain is no LinearNetwork", model("mine.Plain"))
case("plain-module-without-steps", "LightningModule does not define `training_step`",
     {**model("lightning.pytorch.LightningModule"), "ensemble": DROP})  # fmt: skip
case("plain-module-without-data", "data: neither they nor Steps define `train_dataloader`",
     {**model("mine.Steps"), "ensemble": DROP, "data": DROP})  # fmt: skip
case("sizes-disagree", ["model", "4 features", "5"], model("DiagonalLinearNetwork", dim=4))
for name in ("init_scale", "init_on_support", "label_noise"):
    values(f"model.init_args.{name}", "must be", None, NAN, INF, -1, "x", True, {})
case("init-scale-list", "init_scale has 2 entries", {"model.init_args.init_scale": [1.0, 2.0]})
values("model.init_args.batch_size", "must be", None, 0, -1, 1.5, "half", True, NAN, [1])
values("model.init_args.max_chunk", "must be", 0, -1, 1.5, "x", HUGE)
values("model.init_args.sampling", "one of", None, "all")
values("model.init_args.lr_unit", "one of", None, "two")
values("model.init_args.dtype", "one of", None, "float16")
case("data-typo", ["data: no class 'SparseRegresion'", DATA], {"data.class_path": "SparseRegresion"})
case("data-is-model", ["data", DATA], {"data.class_path": "DiagonalLinearNetwork"})
case("data-no-argument", "SparseRegression has no argument 'rows'", {"data.init_args.rows": 3})
case("data-abstract", "SyntheticData does not define `sample`", {"data": {"class_path": "SyntheticData"}})
case("optimizer-typo", [OPTIMIZER, "no class 'GainSDG'", "GainSGD"], {OPTIMIZER: {"class_path": "GainSDG"}})
case("optimizer-is-a-layer", [OPTIMIZER, "torch.nn.Linear", "GainSGD"], {OPTIMIZER: {"class_path": "torch.nn.Linear"}})
case("optimizer-number", [OPTIMIZER, "= 3"], {OPTIMIZER: 3})
SCHEDULES = "model.init_args.schedules"
for name, of, said in (
    ("typo", {"lr": {"class_path": "Piecewize"}}, ["no class 'Piecewize'", "Cosine, Piecewise"]),
    ("late", {"lr": {"class_path": "Piecewise", "init_args": {"steps": [1]}}}, ["Piecewise.steps[0] = 1", "must be 0"]),
    ("argument", {"lr": {"class_path": "Cosine", "init_args": {"steps": 3}}}, ["Cosine has no argument 'steps'"]),
    ("number", {"lr": 3}, ["= 3", "class_path"]),
    ("quantity", {"speed": {"class_path": "Cosine"}}, ["own.speed: there is no such key; there are lr, weight_decay"]),
    ("ends", {"lr": {"class_path": "Cosine", "init_args": {"num_steps": 1}}}, ["own.lr = 0 at step 1", "positive"]),
    ("rows", {"batch_size": {"class_path": "Piecewise", "init_args": {"values": [1.5]}}}, ["own.batch_size = 1.5"]),
):
    case(f"schedule-{name}", [SCHEDULES, *said], {SCHEDULES: {"own": of}, "model.init_args.schedule": "own"})
for name in ("../../escaped", "a/b", "/tmp/x", "..", ".", "", "a\\b", "x" * 300, "a\nb", 3):
    case(f"schedule-called-{str(name)[:20]}", f"{SCHEDULES}: name = ",
         {SCHEDULES: {name: {"lr": {"class_path": "Piecewise"}}}}, slow=name != "../../escaped")  # fmt: skip
case("schedule-unknown", ["ensemble.schedule", "'cosine'", "constant"], {"ensemble.schedule": ["constant", "cosine"]})
case("schedule-twice", ["model.init_args.schedule", "also an axis"],
     {"ensemble.schedule": ["constant"], "model.init_args.schedule": "constant"})  # fmt: skip
case("optimizer-makes-nothing", ["optimizer: must make a torch optimizer", "None"], {OPTIMIZER: "mine.make_nothing"})
case("optimizer-with-closure", "LBFGS", {OPTIMIZER: {"class_path": "torch.optim.LBFGS"}, "ensemble.lr": DROP})
case("optimizer-no-argument", "GainSGD has no argument 'momentum'; it has lr, weight_decay",
     {OPTIMIZER: {"class_path": "GainSGD", "init_args": {"momentum": 0.9}}})  # fmt: skip
for value in (-1.0, 0, INF, NAN, "x", None, [1]):
    case(f"optimizer-lr-{value}", "optimizer.init_args.lr = ",
         {OPTIMIZER: {"class_path": "GainSGD", "init_args": {"lr": value}}, "ensemble.lr": DROP},
         slow=value != -1.0)  # fmt: skip
case("optimizer-of-one-lr", ["ensemble.lr", "GainSGD"], {OPTIMIZER: {"class_path": "torch.optim.SGD"}})
case("optimizer-refuses", [OPTIMIZER, "Adam", "beta"],
     {OPTIMIZER: {"class_path": "torch.optim.Adam", "init_args": {"betas": [2, 3]}}, "ensemble.lr": DROP})  # fmt: skip

# A class's path and arguments of the wrong kind: the parser would speak of what it could not hash, or iterate over.
for section, of in {
    "model": {"class_path": "DiagonalLinearNetwork"},
    "data": {"class_path": "SparseRegression"},
    OPTIMIZER: {"class_path": "GainSGD"},
    "trainer.callbacks": {"class_path": "GainTracker"},
    "figures": {"class_path": "StepSizeFigure"},
    "variants.a.model": {"class_path": "DiagonalLinearNetwork"},
}.items():
    several = section in ("trainer.callbacks", "figures")
    at = f"{section}[0]" if several else section
    for i, value in enumerate((3, {"a": 1}, [None], None, True, 1.5, "", {})):
        chosen = {"class_path": value}
        case(f"{section}-class-path-{i}", f"{at}.class_path = {value!r}: must be the name of a class",
             {section: [chosen] if several else chosen}, slow=i > 0)  # fmt: skip
    for i, value in enumerate((3, [1], "a/b", {1: 2}, {None: 1})):
        chosen = {**of, "init_args": value}
        case(f"{section}-arguments-{i}", f"{at}.init_args", {section: [chosen] if several else chosen}, slow=i > 0)
case("class-path-on-the-command-line", "figures[0].class_path = 3", {}, "--figures", "[{class_path: 3}]")
case("class-path-after-equals", "data.init_args = 3", {}, "--data={class_path: SparseRegression, init_args: 3}")
case("optimizer-null", [OPTIMIZER, "None", "GainSGD"], {OPTIMIZER: None})
case("optimizer-list", [OPTIMIZER, "[1]", "GainSGD"], {OPTIMIZER: [1]})
case(
    "schedule-base",
    [SCHEDULES, "StepSchedule is abstract", "Cosine, Piecewise"],
    {SCHEDULES: {"own": {"lr": {"a": 1}}}},
)
case("init-from-superscript", ["init_from = run@²", "a step is a whole number"], {}, "--init_from", "run@²")
case("checkpoint-file-outside", "trainer.callbacks: ModelCheckpoint.filename = '../x': must be a name in the folder",
     callback("lightning.pytorch.callbacks.ModelCheckpoint", filename="../x", every_n_train_steps=5))  # fmt: skip

# Records, the guard, measurements, figures ----------------------------------------------------------------------------

values("record", "must be a mapping", 3)
values("record.every_n_steps", "must be", 0, -1, 1.5, "x", HUGE, NAN)
values("record.at", "must be", -1, [-1], [NAN], [INF], "x", [None], {"x": 1}, [HUGE], [1e300], True, [[1, 2], [3]],
       [{}], {}, {"range": {}}, {"log10": "abc"}, {"log10": [0, 1e400, 3]}, {"linear": [0, None, 2]}, {1: 2})  # fmt: skip
values("record.max_runs", "must be", 0, None, "x")
values("record.pairs", "true or false", None, "x")
case("record-empty", "record.at is empty", {"record.at": []})
case("record-both", "record: needs either every_n_steps or at", {"record.at": [1], "record.every_n_steps": 2})
case("record-unknown", ["record.variables: no variable 'loss'", "train_loss"], {"record.variables": ["loss"]})
case("record-not-a-list", "record.variables = train_loss", {"record.variables": "train_loss"})
case("record-undefined", ["record.variables: distance is not defined", "no teacher"],
     {"record.variables": ["distance"], "data": {"class_path": "mine.NoTeacher"}})  # fmt: skip
case("record-no-test-set", ["test_loss is not defined", "num_test_samples"],
     {"record.variables": ["test_loss"], "data.init_args.num_test_samples": 0})  # fmt: skip
values("guard", "must be a mapping", 3)
values("guard.tol", "must be", -1, NAN, INF, "x")
values("guard.bound", "must be", 0, None, NAN, INF, "x", HUGE)
values("guard.every_n_steps", "must be", 0, None, 1.5, HUGE)
CALLBACKS = "there are " + ", ".join(
    name
    for name in callbacks.__all__
    if name == "RunCheckpoint"
    or (issubclass(getattr(callbacks, name), callbacks.Measurement) and name != "Measurement")
)
case("callback-typo", ["trainer.callbacks: no class 'GainTrakcer'", CALLBACKS], callback("GainTrakcer"))
case("callback-no-argument", "GainTracker has no argument 'x'", callback("GainTracker", x=1))
case("callback-number", ["trainer.callbacks = 3", CALLBACKS], {"trainer.callbacks": [3]})
case("callback-period", "GainTracker.every_n_steps = x: must be", callback("GainTracker", every_n_steps="x"))
case("callback-period-zero", "GainTracker.every_n_steps = 0", callback("GainTracker", every_n_steps=0))
case("callback-both", "GainTracker: needs either", callback("GainTracker", every_n_steps=1, at=[1]))
case("callback-threshold", "SupportRecovery.threshold = -1.0", callback("SupportRecovery", threshold=-1.0))
case("callback-no-teacher", ["SupportRecovery", "no teacher"],
     callback("SupportRecovery") | {"data": {"class_path": "mine.NoTeacher"}})  # fmt: skip
case(
    "callback-raises", ["RaisesWhenMeasured: IndexError: no such place", "mine.py"], callback("mine.RaisesWhenMeasured")
)
case("callback-abstract", "Measurement does not define `measure`", callback("Measurement"))
case("callback-guard", "MemberGuard is always on; set it in `guard:`", callback("MemberGuard"))
case("callback-recorder", "Recorder is always on; set it in `record:`", callback("Recorder"))
for name, arguments in {
    "EarlyStopping": {"monitor": "x"},
    "LearningRateFinder": {},
    "BatchSizeFinder": {},
    "LearningRateMonitor": {},
    "StochasticWeightAveraging": {"swa_lrs": 0.1},
    "ModelCheckpoint": {},
}.items():
    case(
        f"callback-{name}",
        f"trainer.callbacks: {name}",
        callback(f"lightning.pytorch.callbacks.{name}", **arguments),
        slow=name != "EarlyStopping",
    )
case("callback-not-writable", "config.yaml of the run could not hold", callback("mine.Unwritable"))
FIGURE = {"class_path": "StepSizeFigure"}
case(
    "figure-typo",
    ["figures: no class 'StepSizeFigur'", "StepSizeFigure"],
    {"figures": [{"class_path": "StepSizeFigur"}]},
)
case("figure-twice", "figures: two are called 'step_size_figure'", {"figures": [FIGURE, FIGURE]})
case("figure-no-axis", ["StepSizeFigure", "ensemble.lr"], {"figures": [FIGURE], "ensemble.lr": DROP})
case("figure-not-recorded", ["StepSizeFigure", "distance"], {"figures": [FIGURE], "record.variables": ["train_loss"]})
case("figure-unknown", ["StepSizeFigure.quantities", "'x' is not recorded"],
     {"figures": [FIGURE | {"init_args": {"quantities": ["x"]}}]})  # fmt: skip
case("figure-settled", "StepSizeFigure.settled = x", {"figures": [FIGURE | {"init_args": {"settled": "x"}}]})
case("figure-name", "figures: name = '../x'", {"figures": [FIGURE | {"init_args": {"name": "../x"}}]})
case("figure-refuses", "figures: Undrawn: needs a fourth wall", {"figures": [{"class_path": "mine.Undrawn"}]})
case("figures-number", "figures = 3", {"figures": 3})
case("figures-null", "figures = None: must be a list", {"figures": None})
case("figure-base", "figures: Figure does not define `draw`", {"figures": [{"class_path": "Figure"}]})
case("figure-without-table", "figures: Alone does not define `table`", {"figures": [{"class_path": "mine.Alone"}]})
case("figure-constant", "dlnlab.figures.base.GREY is of another kind",
     {"figures": [{"class_path": "dlnlab.figures.base.GREY"}]})  # fmt: skip
case("figure-long-name", ["figures: name = 'fff", "File name too long, 240 bytes; at most 223"],
     {"figures": [FIGURE | {"init_args": {"name": "f" * 240}}]})  # fmt: skip
case("figure-names-of-one-file", ["figures: 'F' and 'f'", "upper and lower case"],
     {"figures": [FIGURE | {"init_args": {"name": name}} for name in "Ff"]})  # fmt: skip

# Variants -------------------------------------------------------------------------------------------------------------

values("variants", "must be a mapping", 3, "x", None, [1])
values("variants.slow", "must be a mapping of what differs", 3, "x", None, [])
for name in ("main", "dataset", "a/b", "..", "", "a b", 3):
    case(f"variant-called-{name}", [f"variants.{name}: must be a file name", "none of main"], {"variants": {name: {}}},
         slow=name != "main")  # fmt: skip
case("variant-long-name", ["variants: name = 'ééé", "File name too long, 240 bytes"], {"variants": {"é" * 120: {}}})
case("variant-names-of-one-folder", ["variants: 'Slow' and 'slow'", "upper and lower case"],
     {"variants": {"Slow": {}, "slow": {}}})  # fmt: skip
case("variant-of-variant", "variants.a.variants: a variant has no variants", {"variants.a": {"variants": {"b": {}}}})
case("variant-resumed", "variants.a.ckpt_path: a variant goes on", {"variants.a": {"ckpt_path": "last.ckpt"}})
case("variant-name", "variants.a.name: a variant's name is its key", {"variants.a": {"name": "b"}})
case("variant-unknown-section", "variants.a.modle: there is no such key", {"variants.a": {"modle": 3}})
case("variant-unknown-key", "variants.a.trainer.max_stps: there is no such key", {"variants.a.trainer.max_stps": 3})
case("variant-axis", "variants.a.ensemble.depth: no such axis", {"variants.a.ensemble": {"depth": [1]}})
case("variant-lr", "variants.a.ensemble.lr[0] = -1: a step size", {"variants.a.ensemble": {"lr": [-1]}})
case("variant-ensemble", "variants.a.ensemble = 3: must be a mapping", {"variants.a.ensemble": 3})
case("variant-axis-and-scalar", "variants.a.model.init_args.init_scale = 0.2: init_scale is also an axis",
     {"variants.a": {"ensemble": {"init_scale": [0.1]}, "model": {"init_args": {"init_scale": 0.2}}}})  # fmt: skip
case("variant-class", ["variants.a.model: no class 'DiagonalNetwork'", MODEL], {"variants.a": model("DiagonalNetwork")})
case("variant-argument", "variants.a.data: SparseRegression has no argument 'rows'",
     {"variants.a.data.init_args.rows": 3})  # fmt: skip
case("variant-flag", "variants.a.data: TabularRegression has no argument 'correlation'",
     {"variants.a.data": {"class_path": "TabularRegression", "init_args": {"path": "hole.csv"}}},
     "--data.init_args.correlation", "0.1")  # fmt: skip
case("variant-checked-first", "variants.a.record.variables: no variable 'loss'",
     {"variants.a.record.variables": ["loss"]})  # fmt: skip
case("variant-after-nothing", ["variants.a.after = 'b': there is no such run", "there are main, a"],
     {"variants.a.after": "b"})  # fmt: skip
case("variant-after-number", "variants.a.after = 3: there is no such run", {"variants.a.after": 3})
case("variant-after-itself", "variants.a.after = a: a wait for each other", {"variants.a.after": "a"})
case("variant-cycle", "variants.a.after = b: a, b wait for each other",
     {"variants": {"c": {}, "a": {"after": "b"}, "b": {"after": "a"}}})  # fmt: skip
case("variant-after-other-members", "variants.a.after = main: its ensemble has 4 members and this one 6",
     {"variants.a": {"after": "main", "ensemble": {"lr": [0.1, 0.2], "seed": 3}}})  # fmt: skip
case("variant-after-other-shapes", "variants.a.after = b: its parameter w_plus has shape (4, 4) and this model's (4, 5)",
     {"variants": {"a": {"after": "b"}, "b": {"data": {"init_args": {"dim": 4}}}}})  # fmt: skip
case("variant-after-and-init-from", "variants.a.init_from: give it or `after`, not both",
     {"variants.a": {"after": "main", "init_from": "run"}})  # fmt: skip
case("variant-init-from", "variants.a.init_from = run: no checkpoint", {"variants.a.init_from": "run"})
case("variant-figure", ["variants.a.figures: Undrawn: needs"], {"variants.a.figures": [{"class_path": "mine.Undrawn"}]})
case("figure-without-variants", ["figures: Alone.draw does not take the variants a, b", "**variants"],
     {"figures": [{"class_path": "mine.Alone"}], "variants": {"a": {}, "b": {}}})  # fmt: skip
case("variant-in-parts", "--variants.a.trainer.max_steps: a variant is given whole", {},
     "--variants.a.trainer.max_steps", "3")  # fmt: skip

# The trainer ----------------------------------------------------------------------------------------------------------

values("trainer", "must be a mapping", 3, "x", "", [1], None)
values("trainer.max_steps", "must", None, 0, -1, -2, 1.5, INF, NAN, "x", True, [5], HUGE, DROP)
values("trainer.devices", "", 2, 0, -1, "x", 1.5, None, [0, 1], {}, "a", 2**63, [], [None], True)
values("trainer.accelerator", "", "gpu", "abacus", None) if not torch.cuda.is_available() else None
values("trainer.strategy", "", "ddp", "ddp_spawn", "abacus", None)
values("trainer.num_nodes", "", 2, 0, None)
values("trainer.precision", "", "16-mixed", "bf16-true", "64-true", "abacus")
values("trainer.gradient_clip_val", "", 1.0, "x")
values("trainer.accumulate_grad_batches", "", 2, 0, "x", None)
values("trainer.val_check_interval", "", 10, 0.5, "x")
values("trainer.check_val_every_n_epoch", "", 2, None)
values("trainer.limit_train_batches", "", 0, 3, 0.5, "x", -1)
values("trainer.overfit_batches", "", 1, 0.5, -1)
values("trainer.max_time", "", "x", 3)
values("trainer.max_epochs", "", 3, 0, "x")
values("trainer.min_epochs", "", 2)
values("trainer.min_steps", "", 2)
values("trainer.detect_anomaly", "", True, "x")
values("trainer.barebones", "", "x")
case("barebones", ["trainer", "barebones"], {"trainer.barebones": True})
values("trainer.fast_dev_run", "", True, 3)
values("trainer.reload_dataloaders_every_n_epochs", "", 1, -1)
values("trainer.log_every_n_steps", "", -1, "x")
values("trainer.logger", "", "x", 3, {"class_path": "CSVLogger"})
values("trainer.plugins", "", "x", ["x"])
values("trainer.profiler", "", "x")
values("trainer.deterministic", "", "x")
case("trainer-unknown", "trainer.steps: there is no such key", {"trainer.steps": 3})
case(
    "root-is-a-file",
    ["trainer.default_root_dir", "note.txt", "Not a directory"],
    {"trainer.default_root_dir": "note.txt"},
)
case("root-cannot-be-written", ["trainer.default_root_dir", "/proc"], {"trainer.default_root_dir": "/proc/dlnlab"})
case("root-null-byte", "trainer.default_root_dir", {"trainer.default_root_dir": "a\0b"})
case("root-number", "trainer.default_root_dir = 3", {"trainer.default_root_dir": 3})
case("logs-is-a-file", ["lightning_logs", "Not a directory"], files={"lightning_logs": ""})

# The whole config -----------------------------------------------------------------------------------------------------

for i, value in enumerate(("a/b", "..", ".", "", "a\0b", "a\nb", "x" * 300, 3)):
    case(f"name-{i}", "name" if i != 6 else "File name too long", {"name": value}, slow=i not in (0, 6))
values("seed", "must be", -1, 2**32, None, 1.5, "x", True, INF)
case("unknown-section", ["modle: there is no such key", "the sections are name, seed, ensemble"], {"modle": 3})
case("unknown-flag", "--trainer.steps", {}, "--trainer.steps", "3")
case("unknown-flag-of-model", "has no argument 'depth'", {}, "--model.depth", "3")
for name, (text, *words) in {
    "flow": ("model: [1", "config.yaml, line 1"),
    "indent": ("model: 1\n data: 2", "config.yaml, line 2", "mapping values"),
    "tab": ("model:\n\t- 1", "config.yaml, line 2"),
    "list": ("- 1\n- 2", "config.yaml: must be a mapping", "a list"),
    "word": ("hello", "config.yaml: must be a mapping"),
    "empty": ("", "config.yaml: must be a mapping", "nothing"),
    "comment": ("# nothing here\n", "config.yaml: must be a mapping", "nothing"),
    "binary": (bytes(range(256)), "config.yaml: must be a YAML file, text in UTF-8"),
    "zeros": (b"\0\0\0", "config.yaml"),
    "utf-16": ("model: 1".encode("utf-16"), "UTF-8"),
    "alias": ("model: *nothing", "config.yaml, line 1", "nothing"),
    "endless": ("model: &a [*a]", "config.yaml, line 1"),
    "laughs": ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)), "values"),
    "deep": ("[" * 5000, "config.yaml", "nested"),
    "code": ("model: !!python/object/apply:os.mkdir [pwned]", "config.yaml, line 1", "os.mkdir"),
    "tag": ("model: !net 3", "config.yaml, line 1", "!net"),
    "repeated": ("trainer: {max_steps: 1}\nseed: 1\ntrainer: {}\n", "config.yaml, line 3", "'trainer' is repeated"),
    "repeated-inside": ("trainer: {max_steps: 1, max_steps: 2}", "'trainer.max_steps' is repeated"),
    "key": ("? [a, b]\n: 1\n", "a key must be a word"),
    "documents": ("seed: 1\n---\nseed: 2\n", "config.yaml", "another document"),
    "number": ("seed: " + "9" * 5000, "config.yaml"),
    "date": ("seed: !!timestamp 2020-02-31", "config.yaml"),
    "digits": ("guard: {bound: 1" + "0" * 400 + "}", "config.yaml, line 1", "guard.bound = 1000"),
}.items():
    case(f"yaml-{name}", words, text=text)
case("config-missing", ["--config absent.yaml", "no such file"], {}, "--config", "absent.yaml")
case("config-missing-equals", ["--config absent.yaml", "no such file"], {}, "--config=absent.yaml")
case("config-folder", ["--config .", "folder"], {}, "--config", ".")
case("config-without-value", "--config", {}, "--config")

# Memory ---------------------------------------------------------------------------------------------------------------

case("memory-of-data", ["data", "need", "bytes", "free"],
     {"data.init_args.num_samples": 10**7, "data.init_args.dim": 10**6})  # fmt: skip
case("memory-of-data-beyond-counting", ["data", "need", "bytes"], {"data.init_args.dim": 2**53})
case("memory-of-covariance", ["data", "need", "bytes"],
     {"data.init_args.dim": 10**6, "data.init_args.input_distribution": "correlated"})  # fmt: skip
case("memory-of-members", ["ensemble", "100,000 members need", "bytes", "free"],
     {"ensemble": {"lr": {"linear": [0.1, 0.2, 100_000]}}, "data.init_args.dim": 10**4})  # fmt: skip
case("memory-of-errors", ["ensemble", "100,000 members need", "bytes"],
     {"ensemble": {"lr": {"linear": [0.1, 0.2, 100_000]}}, "data.init_args.num_samples": 10**5})  # fmt: skip
case("memory-of-batches", ["ensemble", "need", "bytes"],
     {"ensemble": {"lr": {"linear": [0.1, 0.2, 100_000]}, "batch_size": 1000},
      "data.init_args.dim": 1000, "data.init_args.num_samples": 1000})  # fmt: skip
case("members-beyond-counting", ["ensemble", "10,000,000,000 members", "bytes"],
     {"ensemble.lr": {"linear": [0.1, 0.2, 10**5]}, "ensemble.seed": 10**5})  # fmt: skip


# Checkpoints ----------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def sealed(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue() + b"\nsha256 " + hashlib.sha256(buffer.getvalue()).hexdigest().encode()


def pickled(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def archived(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


CHECKPOINT = "run/checkpoints/last.ckpt"


def checkpoint(id, words, change, changes=None, **more):
    """A case of a resume whose checkpoint is what `change` makes of a good one."""
    case(f"checkpoint-{id}", words, changes, "--ckpt_path", CHECKPOINT, files={CHECKPOINT: change}, **more)


def flipped(content):
    return content[:300] + bytes([content[300] ^ 1]) + content[301:]


for command in ("fit", "validate", "test", "predict"):
    case(f"checkpoint-missing-{command}", "ckpt_path = absent.ckpt: there is no such file", {},
         "--ckpt_path", "absent.ckpt", command=command)  # fmt: skip
case("checkpoint-folder", "ckpt_path = .", {}, "--ckpt_path", ".")
checkpoint("empty", [CHECKPOINT, "damaged"], lambda good: b"")
checkpoint("text", [CHECKPOINT, "damaged"], lambda good: b"hello")
checkpoint("cut", [CHECKPOINT, "damaged"], lambda good: good[:-100])
checkpoint("flipped", [CHECKPOINT, "damaged"], flipped)
checkpoint("pickle", [CHECKPOINT, "never loaded"], lambda good: sealed({"state_dict": Evil()}))
checkpoint("raw-pickle", CHECKPOINT, lambda good: pickled({"state_dict": Evil()}))
checkpoint("tensor", [CHECKPOINT, "no checkpoint"], lambda good: sealed(torch.ones(3)))
checkpoint("stranger", [CHECKPOINT, "no checkpoint"], lambda good: sealed({"state_dict": {}}))
checkpoint(
    "of-another-model", "model.init_args.init_scale = 0.2: ", lambda good: good, {"model.init_args.init_scale": 0.2}
)
checkpoint("of-another-ensemble", "ensemble.seed = 3: ", lambda good: good, {"ensemble.seed": 3})
checkpoint("of-other-data", "data.init_args.dim = 6: ", lambda good: good, {"data.init_args.dim": 6})
checkpoint("of-other-records", "record.every_n_steps = 3: ", lambda good: good, {"record.every_n_steps": 3})
checkpoint("of-another-guard", "guard.tol = 0.1: ", lambda good: good, {"guard.tol": 0.1})
checkpoint("of-other-measurements", "trainer.callbacks", lambda good: good, callback("GainTracker"))
checkpoint("of-another-seed", "seed = 1: ", lambda good: good, {"seed": 1})
checkpoint(
    "to-validate-another-model", "dtype", lambda good: good, {"model.init_args.dtype": "float32"}, command="validate"
)
checkpoint("to-test-other-sizes", ["ckpt_path", "does not fit", "size mismatch"], lambda good: good,
           {"data.init_args.dim": 6}, command="test")  # fmt: skip
NPZ, PT = archived(X=np.array([Evil()]), y=np.ones(1)), pickled({"X": Evil(), "y": torch.ones(3)})
case("pickle-in-npz", ["evil.npz", "never loaded"],
     {"data": {"class_path": "TabularRegression", "init_args": {"path": "evil.npz"}}}, files={"evil.npz": NPZ})  # fmt: skip
case("pickle-in-pt", ["evil.pt", "never loaded"],
     {"data": {"class_path": "TabularRegression", "init_args": {"path": "evil.pt"}}}, files={"evil.pt": PT})  # fmt: skip


# Running them ---------------------------------------------------------------------------------------------------------


def changed(changes):
    config = deepcopy(CONFIG)
    for key, value in changes.items():
        *path, last = key.split(".")
        part = config
        for name in path:
            part = part.setdefault(name, {})
        if value is DROP:
            part.pop(last)
        else:
            part[last] = deepcopy(value)
    return config


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tree(folder):
    """Everything in a folder, but for what Python compiles."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def assert_one_short_message(code, out, err):
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert out == ""
    assert 1 <= len(lines) <= 3
    assert all(len(line) < 640 for line in lines)  # 480 for the roster of callbacks
    assert lines[0].startswith("dlnlab ")
    assert "Traceback" not in err
    return err


class HangError(BaseException):
    """No Exception, so that nobody takes it for a mistake."""


@contextmanager
def at_most(seconds):
    """Of the processor's time, for other work may slow a test down; and of waiting twelve times that."""

    def ring(*_):
        raise HangError(f"more than {seconds} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 12 * seconds))
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working folder; what is imported from it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    """The files of a run of the unchanged config."""
    folder, here = tmp_path_factory.mktemp("good"), os.getcwd()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    os.chdir(folder)
    try:
        assert main(["fit", "--config", "config.yaml"]) == 0
    finally:
        os.chdir(here)
    run = folder / "lightning_logs" / "config" / "version_0"
    return {f"run/{name}": content for name, content in tree(run).items() if content is not None}


def prepare(folder, case, good_run):
    """Write a case's files; returns its command line."""
    files = {**FILES, **case.files}
    if CHECKPOINT in files:
        files = {**FILES, **good_run, CHECKPOINT: files[CHECKPOINT](good_run[CHECKPOINT])}
        files.pop(f"{CHECKPOINT}.previous", None)
    text = yaml.safe_dump(changed(case.changes), sort_keys=False) if case.text is None else case.text
    write(folder, {**files, "config.yaml": text})
    return [case.command, "--config", "config.yaml", *case.argv]


def marked(case):
    return pytest.param(case, id=case.id, marks=pytest.mark.slow if case.slow else ())


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_mistake_is_one_short_message_that_names_it_and_nothing_is_made(case, workplace, capsys, good_run):
    arguments = prepare(workplace, case, good_run)
    before = tree(workplace)
    capsys.readouterr()
    with at_most(20):
        code = main(arguments)
    message = assert_one_short_message(code, *capsys.readouterr())
    for word in case.words:
        assert word in message
    assert tree(workplace) == before


def test_the_unchanged_config_runs(workplace):
    assert main(prepare(workplace, Case("good", []), {})) == 0
    assert (workplace / "lightning_logs" / "config" / "version_0" / "results").is_dir()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_time": "00:00:01:00", "devices": "auto", "accelerator": "cpu", "gradient_clip_val": 0, "max_epochs": -1},
        {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 2, "num_sanity_val_steps": 1},
    ],
)
def test_trainer_options_that_can_be_honoured_are(changes, workplace):
    changes = {f"trainer.{key}": value for key, value in changes.items()}
    assert main(prepare(workplace, Case("good", [], changes), {})) == 0


SUBPROCESSES = ("table-hole.csv", "checkpoint-pickle", "yaml-repeated", "root-cannot-be-written")


@pytest.mark.parametrize(
    "case", [marked(replace(case, slow=case.id != SUBPROCESSES[0])) for case in CASES if case.id in SUBPROCESSES]
)
def test_the_program_itself_ends_with_code_2_and_the_message(case, tmp_path, good_run):
    arguments = prepare(tmp_path, case, good_run)
    before = tree(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "dlnlab", *arguments], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    message = assert_one_short_message(done.returncode, done.stdout, done.stderr)
    for word in case.words:
        assert word in message
    assert tree(tmp_path) == before


def test_a_failure_during_the_fit_is_code_1_names_the_run_and_keeps_what_was_recorded(workplace, capsys):
    from dlnlab import load_results

    changes = {
        "trainer.callbacks": [{"class_path": "mine.RaisesLater"}],
        "record.every_n_steps": 1,
        "trainer.max_steps": 9,
    }
    assert main(prepare(workplace, Case("fails", [], changes), {})) == 1
    out, err = capsys.readouterr()
    assert out == ""
    message = err.splitlines()[-1]
    assert message.startswith(
        "dlnlab fit: run lightning_logs/config/version_0 failed after step 2: ZeroDivisionError: "
    )
    assert "three is enough (mine.py, line " in message
    assert load_results("lightning_logs/config/version_0").train_loss.sizes["step"] >= 2


def test_a_traceback_is_shown_where_one_is_asked_for(workplace, capsys, monkeypatch):
    monkeypatch.setenv("DLNLAB_TRACEBACK", "1")
    assert main(prepare(workplace, Case("raises", [], model("mine.RaisesInBuild")), {})) == 2
    assert "in build" in capsys.readouterr().err


def test_without_a_run_to_claim_the_folders_made_for_it_are_removed(workplace, capsys):
    (workplace / "lightning_logs" / "config").mkdir(parents=True)
    (workplace / "lightning_logs" / "config" / "note").write_text("keep me")
    before = tree(workplace)
    assert main(prepare(workplace, Case("long", [], {"name": "x" * 300}), {})) == 2
    assert set(before) <= set(tree(workplace))
    assert sorted(path.name for path in (workplace / "lightning_logs").iterdir()) == ["config"]


# A fuzz ---------------------------------------------------------------------------------------------------------------

KEYS = [
    *(f"model.init_args.schedules{rest}" for rest in ("", ".x", ".x.lr", ".x.lr.class_path", ".x.lr.init_args")),
    *(f"model.init_args.optimizer{rest}" for rest in (".class_path", ".init_args", ".init_args.lr")),
    *("variants", "variants.a", "variants.a.after", "variants.a.ensemble", "variants.a.trainer.max_steps"),
    *("name", "seed", "ensemble", "model", "data", "record", "guard", "figures", "trainer", "ckpt_path", "unknown"),
    *("model.class_path", "model.init_args", "data.class_path", "data.init_args"),
    *(f"ensemble.{name}" for name in ("lr", "seed", "batch_size", "sampling", "init_scale", "label_noise", "weight_decay",
                                      "sparsity", "noise_std", "correlation", "momentum")),
    *(f"model.init_args.{name}" for name in ("init_scale", "init_on_support", "dim", "batch_size", "sampling",
                                             "label_noise", "lr_unit",
                                             "dtype", "max_chunk", "optimizer", "ensemble", "depth")),
    *(f"data.init_args.{name}" for name in ("num_samples", "dim", "sparsity", "noise_std", "input_distribution",
                                            "correlation", "input_mean", "row_scale", "signal", "signal_scale",
                                            "normalize_columns", "num_test_samples", "path")),
    *(f"record.{name}" for name in ("every_n_steps", "at", "variables", "pairs", "max_runs", "x")),
    *(f"guard.{name}" for name in ("tol", "bound", "every_n_steps")),
    *(f"trainer.{name}" for name in ("max_steps", "callbacks", "devices", "precision", "max_epochs", "logger", "strategy",
                                     "log_every_n_steps", "limit_train_batches", "max_time", "default_root_dir",
                                     "accumulate_grad_batches", "enable_checkpointing", "num_sanity_val_steps")),
]  # fmt: skip
NUMBERS = st.sampled_from([-2, -1, 0, 1, 2, 3, 7, 30, 10**12, 2**53, 2**63, 10**30, HUGE, True, False, None, 0.5, -0.5,
                           1e-300, 1e300, -0.0, INF, -INF, NAN])  # fmt: skip
WORDS = st.sampled_from(["", "x", "full", "1e3", "null", "ones", "SGD", "torch.optim.SGD", "GainSGD", "mine.Plain",
                         "float32", "SparseRegression", "DiagonalLinearNetwork", "train_loss", "beta", ".", "a/b",
                         "\0", "ü", "epochs",
                         "note.txt", "{", "[1", "!!python/name:os.system", "=", "@", "%"])  # fmt: skip
FORMS = st.sampled_from(
    ["log10", "linear", "range", "class_path", "init_args", "lr", "seed", "every_n_steps", "x", 3, None]
)
CLASSES = st.sampled_from(["GainTracker", "SupportRecovery", "Measurement", "StepSizeFigure", "GainSGD", "x"])
ODD = st.recursive(
    NUMBERS | WORDS | st.builds(lambda name: {"class_path": name}, CLASSES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FORMS, inner, max_size=2),
    max_leaves=6,
)
CHANGES = st.lists(st.tuples(st.sampled_from(KEYS), ODD | st.just(DROP)), min_size=1, max_size=3)


def mutated(changes):
    """The config with some keys replaced, whatever they lie in, but without more steps than there is time for."""
    config = deepcopy(CONFIG)
    for key, value in changes:
        *path, last = key.split(".")
        part = config
        for name in path:
            if not isinstance(part.get(name), dict):
                part[name] = {}
            part = part[name]
        part[last] = deepcopy(value)
        if value is DROP:
            del part[last]
    trainer = config.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("max_steps"), int) and 30 < trainer["max_steps"] <= 2**53:
        trainer["max_steps"] = 30
    return config


def assert_runs_or_is_refused(changes):
    here, path = os.getcwd(), list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            write(Path(folder), {**FILES, "config.yaml": yaml.safe_dump(mutated(changes), sort_keys=False)})
            before, out, err = tree(Path(folder)), io.StringIO(), io.StringIO()
            with at_most(10), redirect_stdout(out), redirect_stderr(err):
                code = main(["fit", "--config", "config.yaml"])
            if code != 0:
                message = assert_one_short_message(code, out.getvalue(), err.getvalue())
                assert not re.search(r"TypeError|AttributeError|iterable|unhashable|NoneType|index-sized", message), (
                    message
                )
                assert tree(Path(folder)) == before
        finally:
            os.chdir(here)
            sys.path[:] = path
            sys.modules.pop("mine", None)


@settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CHANGES)
def test_any_config_runs_or_is_refused(changes):
    assert_runs_or_is_refused(changes)


@pytest.mark.slow
@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(CHANGES)
def test_any_of_many_configs_runs_or_is_refused(changes):
    assert_runs_or_is_refused(changes)
