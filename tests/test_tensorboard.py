"""What a TensorBoard shows of a run, asked as its page asks."""

import contextlib
import io
import itertools
import json
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.demos.boring_classes import BoringModel
from tensorboard import program
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from dlnlab import event_files, load_results
from dlnlab.cli import main
from dlnlab.results import STATUSES

LR, SEEDS, LAST = [0.02, 0.05, 4.0], 3, 130
CONFIG = {
    "name": "page",
    "ensemble": {"lr": LR, "batch_size": [1, "full"], "seed": SEEDS},
    "model": {"class_path": "DiagonalLinearNetwork"},
    "data": {"class_path": "SparseRegression", "init_args": {"num_samples": 6, "dim": 5, "sparsity": 2}},
    "record": {"every_n_steps": 20, "variables": ["train_loss", "distance"]},
    "guard": {"every_n_steps": 10},
    "figures": [{"class_path": "StepSizeFigure", "init_args": {"quantities": ["distance"]}}],
    "trainer": {"max_steps": LAST, "callbacks": [{"class_path": "GainTracker"}], "enable_progress_bar": False},
}
CELLS = [f"cells/lr={lr:g},batch_size={size}" for lr, size in itertools.product(LR, (1, "full"))]


def fit(folder, *arguments, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "page.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}, sort_keys=False))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(
            ["fit", "--config", str(folder / "page.yaml"), "--trainer.default_root_dir", str(folder), *arguments]
        )
    assert code == 0
    return folder / output.getvalue().splitlines()[-1].removeprefix("run: ")


def events(folder):
    """[(step, tag, summary value)] of a run's event file, whose checksums the loader checks."""
    (path,) = folder.glob("events*")
    return [(e.step, value.tag, value) for e in EventFileLoader(str(path)).Load() for value in e.summary.value]


def steps_of(folder, tag):
    return [step for step, other, _ in events(folder) if other == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module", params=["true", "false"], ids=["compiled_reader", "python_reader"])
def ask(request, run):
    """Start a TensorBoard on the run; ask(path, body, **query) is what its page would be told."""
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(run), "--port", "0", "--load_fast", request.param])
    address = board.launch().rstrip("/")

    def ask(path, body=None, **query):
        url = f"{address}/data/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
            content = answer.read()
        return json.loads(content) if "json" in answer.headers["Content-Type"] else content

    until = time.monotonic() + 60
    while not (set(ask("runs")) == {".", *CELLS} and "figures/step_size_figure" in str(ask("plugin/images/tags"))):
        assert time.monotonic() < until
        threading.Event().wait(0.1)
    return ask


def test_the_scalars_are_medians_and_quantiles_over_seeds(ask, run):
    distance = load_results(run).distance.isel(lr=1, batch_size=0)
    for suffix, level in (("", 0.5), ("/p10", 0.1), ("/p90", 0.9)):
        shown = ask("plugin/scalars/scalars", run=CELLS[2], tag=f"recovery/distance{suffix}")
        assert [step for _, step, _ in shown] == [0, 20, 40, 60, 80, 100, 120, LAST]
        expected = distance.quantile(level, "seed").dropna("step")
        np.testing.assert_allclose([value for *_, value in shown], expected, rtol=1e-7)  # event files hold float32
        logarithms = ask("plugin/scalars/scalars", run=CELLS[2], tag=f"recovery/distance_log10{suffix}")
        np.testing.assert_allclose([value for *_, value in logarithms], np.log10(expected), rtol=1e-6)  # likewise


def test_a_ratio_that_is_not_defined_yet_has_no_point(ask):
    shown = ask("plugin/scalars/scalars", run=CELLS[0], tag="gain/support_ratio")
    assert [step for _, step, _ in shown] == [20, 40, 60, 80, 100, 120, LAST]


def test_every_chart_of_the_layout_finds_its_scalars(ask):
    layout = ask("plugin/custom_scalars/layout")
    categories = {category["title"]: category["chart"] for category in layout["category"]}
    assert list(categories) == ["loss", "recovery", "gain", "theory", "members"]
    found = ask("plugin/scalars/tags")
    wanted = set()
    for chart in itertools.chain(*categories.values()):
        if "margin" in chart:
            (series,) = chart["margin"]["series"]
            wanted |= {series["value"], series["lower"], series["upper"]}
        else:
            (regex,) = chart["multiline"]["tag"]
            answer = ask("plugin/custom_scalars/scalars", run=CELLS[0], tag=regex)
            assert list(answer["tag_to_events"]) == [chart["title"]]
            wanted |= set(answer["tag_to_events"])
    assert all(set(found[cell]) == wanted for cell in CELLS)


def test_the_grid_is_a_table_of_hyperparameters_and_final_numbers(ask, run):
    experiment = ask("plugin/hparams/experiment", {"experimentName": ""})
    parameters = {info["name"]: info for info in experiment["hparamInfos"]}
    assert parameters["batch_size"]["domainDiscrete"] == ["1", "full"]
    assert parameters["lr"]["domainInterval"] == {"minValue": min(LR), "maxValue": max(LR)}
    assert set(parameters) == {"lr", "batch_size"}
    states = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    question = {"experimentName": "", "allowedStatuses": states, "colParams": [], "startIndex": 0, "sliceSize": 100}
    groups = ask("plugin/hparams/session_groups", question)["sessionGroups"]
    assert {group["name"] for group in groups} == set(CELLS)
    last = load_results(run).isel(step=-1)
    assert (last.status == "diverged").any()
    for group in groups:
        cell = last.sel(group["hparams"])
        metrics = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        assert metrics.keys() == {"loss/train_log10", "recovery/distance_log10", "gain/l1", "gain/support_ratio",
                                  *(f"members/{status}" for status in STATUSES)}  # fmt: skip
        for status in STATUSES:
            assert metrics[f"members/{status}"] == (cell.status == status).sum()
        for tag, value in (
            ("loss/train_log10", np.log10(cell.train_loss.median())),
            ("recovery/distance_log10", np.log10(cell.distance.median())),
            ("gain/l1", cell.gain_l1.median()),
        ):
            np.testing.assert_allclose(metrics[tag], value, rtol=1e-6)  # event files hold float32


def test_the_figures_are_images_of_the_run(ask, run):
    (shown,) = ask("plugin/images/images", run=".", tag="figures/step_size_figure", sample=0)
    assert shown["step"] == LAST
    query = dict(urllib.parse.parse_qsl(shown["query"]))
    assert ask("plugin/images/individualImage", **query) == (run / "figures" / "step_size_figure.png").read_bytes()


def test_config_and_versions_are_texts_of_the_run(ask, run):
    (shown,) = ask("plugin/text/text", run=".", tag="config", markdown="false")
    assert (run / "config.yaml").read_text() in shown["text"]
    (shown,) = ask("plugin/text/text", run=".", tag="versions", markdown="false")
    assert json.loads((run / "versions.json").read_text())["torch"] in shown["text"]


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_run_directory_holds_nothing_that_nobody_asked_for(run):
    names = {"config.yaml", "versions.json", "results", "checkpoints", "figures", "cells"}
    assert {path.name for path in run.iterdir()} == {*names, "events.out.tfevents.0.dlnlab"}


def test_a_resume_leaves_no_duplicates_and_says_with_which_config(tmp_path):
    run = fit(tmp_path)
    before = [[(step, tag) for step, tag, _ in events(run / cell)] for cell in CELLS]
    fit(tmp_path, "--ckpt_path", str(run / "checkpoints" / "step=70.ckpt"))
    assert [[(step, tag) for step, tag, _ in events(run / cell)] for cell in CELLS] == before
    page = Counter((step, tag) for step, tag, _ in events(run))
    assert set(page.values()) == {1}
    assert steps_of(run, "config") == [0, 70]
    assert steps_of(run, "figures/step_size_figure") == [LAST]
    fit(tmp_path, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    assert [[(step, tag) for step, tag, _ in events(run / cell)] for cell in CELLS] == before
    assert steps_of(run, "figures/step_size_figure") == [LAST]


def test_what_a_module_logs_has_a_file_of_its_own(tmp_path, monkeypatch):
    def training_step(module, batch, batch_idx):
        loss = module.step(batch)
        module.log("own", loss)
        return loss

    monkeypatch.setattr(BoringModel, "training_step", training_step)
    plain = ["--model", "BoringModel", "--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"]
    root = ["--name", "plain", "--trainer.default_root_dir", str(tmp_path), "--trainer.limit_val_batches", "0"]
    assert main(["fit", *plain, *root]) == 0
    run = tmp_path / "lightning_logs" / "plain" / "version_0"
    (own,) = set(run.glob("events*")) - {run / "events.out.tfevents.0.dlnlab"}
    assert [e.step for e in EventFileLoader(str(own)).Load() for value in e.summary.value if value.tag == "own"] == [
        0, 1, 2]  # fmt: skip
    assert not (run / "hparams.yaml").exists()
    assert steps_of(run / "cells" / "members", "loss/train") == [0, 1, 2]


# Thinning -------------------------------------------------------------------------------------------------------------

DENSE = {
    "ensemble": {"lr": [0.05], "seed": 2},
    "record": {"every_n_steps": 1, "variables": ["train_loss"]},
    "figures": [],
    "guard": {"every_n_steps": 10, "tol": 0.0},
    "trainer": {"max_steps": 1304, "callbacks": [], "enable_progress_bar": False},
}


def test_cells_of_any_values_have_a_folder_each_inside_the_run(tmp_path, monkeypatch):
    (tmp_path / "flavoured_net.py").write_text(
        "from dlnlab.models import DiagonalLinearNetwork\n\n\nclass Flavoured(DiagonalLinearNetwork):\n"
        "    axes = (*DiagonalLinearNetwork.axes, 'flavour')\n\n    def __init__(self, flavour: str = 'plain', **given):\n"
        "        super().__init__(**given)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flavours = ["plain", "../../../../escaped", "/tmp/escaped", "a/b", "..", "", "s", "S", "long" * 100, "long" * 101]
    lrs = [0.1, 0.1 + 1e-9]  # the same to six digits
    run = fit(tmp_path / "run", name="cells", ensemble={"flavour": flavours, "lr": lrs, "seed": 2}, figures=[],
              model={"class_path": "flavoured_net.Flavoured"}, trainer={"max_steps": 2})  # fmt: skip
    cells = [path.name for path in (run / "cells").iterdir()]
    assert len({name.casefold() for name in cells}) == len(cells) == len(flavours) * len(lrs)
    assert max(len(name.encode()) for name in cells) <= 223
    for name in cells:
        assert steps_of(run / "cells" / name, "loss/train") == [0, 2]
    files = {path.name for path in (tmp_path / "run").rglob("events*")}
    assert len(files) == 1  # the parents hold none but the run's
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"flavoured_net.py", "run"}


def test_tensorboard_shows_evenly_chosen_points_of_a_dense_curve_whatever_the_chunks_or_resumes(tmp_path):
    run = fit(tmp_path, **DENSE)
    assert load_results(run).train_loss.dropna("step").sizes["step"] == 1305
    shown = steps_of(run / "cells/lr=0.05", "loss/train")
    assert shown == [*range(0, 1305, 3), 1304]
    chunks = fit(tmp_path, "--model.init_args.max_chunk", "37", **DENSE)
    assert events(chunks / "cells/lr=0.05")[1:] == events(run / "cells/lr=0.05")[1:]  # the first says when it began
    before = events(run / "cells/lr=0.05")
    for checkpoint in ("step=700", "last"):
        fit(tmp_path, "--ckpt_path", str(run / "checkpoints" / f"{checkpoint}.ckpt"), **DENSE)
        assert events(run / "cells/lr=0.05") == before


def test_a_fit_that_ends_early_shows_where_it_ended(tmp_path):
    early = DENSE | {"guard": {"every_n_steps": 10, "tol": 0.01}}
    run = fit(tmp_path, **early)
    end = int(load_results(run).step[-1])
    assert end < 1304
    assert end % 3 != 0
    shown = steps_of(run / "cells/lr=0.05", "loss/train")
    assert shown == [*range(0, end, 3), end]
    assert steps_of(run / "cells/lr=0.05", "members/converged") == shown
    fit(tmp_path, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), **early)
    assert steps_of(run / "cells/lr=0.05", "loss/train") == shown


@given(st.binary(max_size=300))
def test_records_are_framed_as_tensorboard_frames_them(content):
    record = event_files._record(content)
    length = len(content).to_bytes(8, "little")
    sums = [masked_crc32c(part).to_bytes(4, "little") for part in (length, content)]
    assert record == length + sums[0] + content + sums[1]
