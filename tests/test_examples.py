import itertools
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dlnlab
from dlnlab.cli import main
from dlnlab.data import SparseRegression

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
OWN_MODULES = [path.stem for path in EXAMPLES.glob("*.py")]


@pytest.fixture
def in_examples(tmp_path, monkeypatch):
    """The examples' folder as a person has it: classes are found in it, runs go elsewhere."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield ["--trainer.default_root_dir", str(tmp_path)]
    for name in OWN_MODULES:
        sys.modules.pop(name, None)


def results_of(capsys):
    return dlnlab.load_results(capsys.readouterr().out.splitlines()[-1].removeprefix("run: "))


def test_an_optimizer_of_ones_own_has_axes_of_its_own(in_examples):
    optimizer = {"class_path": "my_optimizer.HeavyBall"}
    config = {
        "model": {"class_path": "DiagonalLinearNetwork", "init_args": {"optimizer": optimizer}},
        "data": {"class_path": "SparseRegression", "init_args": {"num_samples": 6, "dim": 4, "sparsity": 2}},
        "record": {"variables": ["beta", "train_loss"]},
        "trainer": {"max_steps": 60},
    }
    results = dlnlab.run(config, lr=[0.02, 0.05], momentum=[0.0, 0.5, 0.9])
    problems = SparseRegression(6, 4, 2)
    problems.ensemble = dlnlab.Ensemble()
    problems.setup("fit")
    for lr, momentum in itertools.product([0.02, 0.05], [0.0, 0.5, 0.9]):
        w = [torch.nn.Parameter(torch.full((4,), 0.1, dtype=torch.float64)) for _ in range(2)]
        sgd = torch.optim.SGD(w, lr=lr, momentum=momentum)
        for _ in range(60):
            sgd.zero_grad()
            beta = (w[0] ** 2 - w[1] ** 2) / 2
            ((problems.problems.x[0] @ beta - problems.problems.y[0]).square().mean() / 2).backward()
            sgd.step()
        found = results.beta.sel(lr=lr, momentum=momentum).isel(step=-1)
        np.testing.assert_allclose(found, ((w[0] ** 2 - w[1] ** 2) / 2).detach(), rtol=1e-12)  # 60 roundings
    for wrong, message in (
        ({"momentun": [0.1]}, r"ensemble\.momentun: no such axis; the axes here are .*momentum"),
        ({"momentum": ["low", "high"]}, r"ensemble\.momentum = .*: must be numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            dlnlab.run(config, **wrong)
    optimizer["init_args"] = {"momentum": 0.5}
    config["ensemble"] = {"momentum": [0.1, 0.2]}
    with pytest.raises(ValueError, match=r"momentum = 0\.5: momentum is also an axis of the ensemble"):
        dlnlab.run(config)
    optimizer.update(class_path="torch.optim.SGD", init_args={"lr": 0.1})
    with pytest.raises(ValueError, match=r"ensemble\.momentum: .*takes one momentum for all members"):
        dlnlab.run(config)


def test_a_network_of_ones_own_trains_as_an_ensemble_through_the_generic_path(in_examples, capsys):
    assert main(["fit", "--config", "cubic.yaml", "--trainer.max_steps", "300", *in_examples]) == 0
    results = results_of(capsys)
    assert results.train_loss.dims == ("lr", "batch_size", "seed", "step")
    assert results.attrs["path"].startswith("generic")
    assert "gain" not in results
    small = results.train_loss.isel(lr=0)
    assert bool((small.isel(step=-1) < small.isel(step=0)).all())


def test_its_gain_is_refused_with_the_reason(in_examples, capsys, tmp_path):
    assert main(["fit", "--config", "cubic.yaml", "--record.variables", "[gain]", *in_examples]) == 2
    assert "gain is not defined here: CubicNetwork has no pairs of factors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_its_init_scale_is_an_axis_and_its_start_is_beta_zero(in_examples):
    sys.path.insert(0, str(EXAMPLES))
    from cubic_network import CubicNetwork

    x, y = np.eye(3), np.ones(3)
    options = {"record": ["beta", "train_loss"], "steps": 1, "lr": 0.25}
    results = dlnlab.simulate(x, y, model=CubicNetwork, init_scale=[0.1, 0.5], **options)
    np.testing.assert_array_equal(results.beta.isel(step=0), 0)
    # One step by hand: the gradient in beta is -1/3 per coordinate, in u it is -u^2, in v it is v^2.
    a = np.array([0.1, 0.5])
    beta = (a + 0.25 * a**2) ** 3 - (a - 0.25 * a**2) ** 3
    np.testing.assert_allclose(results.beta.isel(step=1), np.repeat(beta[:, None], 3, 1))


def test_a_network_of_ones_own_is_short():
    assert len((EXAMPLES / "cubic_network.py").read_text().splitlines()) < 40


def test_data_a_measurement_and_a_figure_of_ones_own_make_a_run(in_examples, capsys):
    assert main(["fit", "--config", "mine.yaml", "--trainer.max_steps", "400", *in_examples]) == 0
    results = results_of(capsys)
    assert results.participation.dims == ("lr", "seed", "step")
    final = results.participation.isel(step=-1)
    assert bool(((final >= 1) & (final <= 30)).all())
    figures = Path(results.encoding["source"]) / "figures"
    assert {path.name for path in figures.iterdir()} == {f"curves_figure.{kind}" for kind in ("png", "pdf", "csv")}


def test_a_figure_of_ones_own_refuses_before_the_fit_what_it_could_not_draw(in_examples, capsys):
    assert main(["fit", "--config", "mine.yaml", "--figures", '[{class_path: my_figure.CurvesFigure, init_args: '
                 '{variable: sharpness}}]', *in_examples]) == 2  # fmt: skip
    assert "'sharpness'" in capsys.readouterr().err


def test_gain_sgd_works_in_a_bare_torch_loop_and_prints_the_gain(capsys):
    runpy.run_path(str(EXAMPLES / "plain_torch.py"))
    shown = capsys.readouterr().out
    on, off = (float(re.search(rf"gain {side} the support +([\d.]+)", shown)[1]) for side in ("on", "off"))
    assert on > 0
    assert off > 0


def test_the_notebook_runs_from_top_to_bottom_and_its_outputs_are_stored(monkeypatch, tmp_path):
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    module = type(sys)("notebook")  # classes defined in a cell need a module to live in
    monkeypatch.setitem(sys.modules, "notebook", module)
    for cell in code:
        exec(compile("".join(cell["source"]), "notebook.ipynb", "exec"), module.__dict__)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code[1:])  # the first one only imports
    kinds = {kind for cell in code for output in cell["outputs"] for kind in output.get("data", {})}
    assert "image/png" in kinds
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert list(tmp_path.iterdir()) == []


def test_gradient_descent_from_where_sgd_has_ended_comes_closer_than_gradient_descent_alone(in_examples):
    found = {name: data.distance.isel(step=-1).median("seed") for name, data in dlnlab.run_all("phases.yaml").items()}
    assert bool((found["then_gd"] < found["main"]).all())
    assert bool((found["main"] < found["gd"]).all())
    assert bool((found["then_gd"].diff("lr") < 0).all())
