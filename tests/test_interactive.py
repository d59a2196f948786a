import functools
import logging
import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

import dlnlab
from dlnlab.callbacks import Measurement, PredictorNorm
from dlnlab.cli import main
from dlnlab.data import SparseRegression
from dlnlab.figures import StepSizeFigure
from dlnlab.models import DiagonalLinearNetwork, LinearNetwork

CONFIG = {
    "model": {"class_path": "DiagonalLinearNetwork", "init_args": {"init_scale": 0.2}},
    "data": {"class_path": "SparseRegression", "init_args": {"num_samples": 6, "dim": 5, "sparsity": 2}},
    "trainer": {"max_steps": 60},
}
X = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TEACHER = torch.tensor([1.0, 0, 0, -1, 0], dtype=torch.float64)


class Mine(SparseRegression):
    pass


def write(folder, config):
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    return folder / "mine.yaml"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loggers():
    found = {name: logger for name, logger in logging.root.manager.loggerDict.items() if hasattr(logger, "handlers")}
    return {name: (logger.level, list(logger.handlers), list(logger.filters)) for name, logger in found.items()}


def global_state():
    return {
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "arguments": list(sys.argv),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "random": random.getstate(),
        "loggers": loggers(),
        "interrupt": signal.getsignal(signal.SIGINT),
        "terminate": signal.getsignal(signal.SIGTERM),
    }


# run ------------------------------------------------------------------------------------------------------------------


def test_run_gives_what_the_command_line_records(empty_folder, capsys):
    assert main(["fit", "--config", str(write(empty_folder, CONFIG)), "--ensemble", "{lr: [0.05, 0.1], seed: 3}"]) == 0
    saved = dlnlab.load_results(capsys.readouterr().out.splitlines()[-1].removeprefix("run: "))
    results = dlnlab.run(CONFIG, lr=[0.05, 0.1], seed=3)
    assert results.equals(saved)
    assert results.attrs.keys() == saved.attrs.keys()
    assert all(results[name].attrs == saved[name].attrs for name in saved)


def test_run_takes_files_names_mappings_and_layers_of_them(empty_folder):
    path = write(empty_folder, CONFIG)
    axes = {"lr": [0.1], "seed": 2}
    by_mapping = dlnlab.run(CONFIG, **axes)
    assert dlnlab.run(path, **axes).identical(by_mapping)
    assert dlnlab.run(str(path), **axes).identical(by_mapping)
    layered = dlnlab.run([path, {"trainer": {"max_steps": 7}}], **axes)
    assert int(layered.step[-1]) == 7
    shipped = dlnlab.run("quickstart", {"trainer.max_steps": 7}, **axes)
    assert dict(shipped.sizes)["batch_size"] == 2


def test_keywords_are_axes_and_take_the_place_of_the_configs_scalars():
    lr = np.array([0.05, 0.1])
    results = dlnlab.run(CONFIG, init_scale=[0.1, 0.3], lr=lr, noise_std=(0.0, 1.0), seed=range(2))
    assert results.train_loss.dims == ("init_scale", "lr", "noise_std", "seed", "step")
    np.testing.assert_array_equal(results.lr, lr)
    assert "init_scale: 0.2" not in results.attrs["config"]


def test_changes_reach_every_key_and_classes_are_given_as_such():
    config = {**CONFIG, "data": {"class_path": Mine}}
    changes = {"model.init_args.dtype": "float32", "data.init_args.dim": 4, "trainer.max_steps": 5, "guard.tol": 1e-3}
    results = dlnlab.run(config, changes, lr=[0.1])
    assert results.sizes["coordinate"] == 4
    assert "tol: 0.001" in results.attrs["config"]
    assert "test_interactive.Mine" in results.attrs["config"]


def test_run_leaves_the_process_as_it_was_and_nothing_behind(empty_folder, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    dlnlab.run(CONFIG, lr=[0.1])  # the first call imports what a fit needs
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = global_state()
    first, second = dlnlab.run(CONFIG, lr=[0.1]), dlnlab.run(CONFIG, lr=[0.1])
    with pytest.raises(ValueError, match="step size"):
        dlnlab.run(CONFIG, lr=[-1])
    after = global_state()
    torch.set_num_threads(threads)
    for name, value in before.items():
        assert after[name] == value, name
    assert first.identical(second)
    assert capfd.readouterr() == ("", "")
    assert list(empty_folder.iterdir()) == []


def test_run_writes_nothing_where_the_config_would(empty_folder):
    write(empty_folder, CONFIG)
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}, {"class_path": "GainTracker"}]
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}
    config = {**CONFIG, "trainer": {"max_steps": 5, "logger": logger, "callbacks": callbacks},
              "figures": [{"class_path": "StepSizeFigure"}]}  # fmt: skip
    results = dlnlab.run(config, lr=[0.05, 0.1])
    assert "gain_l1" in results
    assert [path.name for path in empty_folder.iterdir()] == ["mine.yaml"]


def test_run_writes_a_whole_run_where_it_is_asked_to(empty_folder, capfd):
    config = {**CONFIG, "name": "kept", "figures": [{"class_path": "StepSizeFigure"}]}
    results = dlnlab.run(config, directory=empty_folder / "here", lr=[0.05, 0.1])
    run = empty_folder / "here" / "lightning_logs" / "kept" / "version_0"
    assert results.encoding["source"] == str(run)
    assert results.identical(dlnlab.load_results(run))
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert (run / "figures" / "step_size_figure.png").exists()
    assert results.equals(dlnlab.run(config, lr=[0.05, 0.1]))
    assert capfd.readouterr() == ("", "")


MISTAKES = {
    "lr": ({}, {"lr": [0.1, -0.1]}),
    "axis": ({}, {"speed": [1]}),
    "argument": ({"model.init_args.depth": 3}, {"lr": [0.1]}),
    "key": ({"trainer.max_stps": 3}, {"lr": [0.1]}),
    "class": ({"model": "DiagnalNetwork"}, {"lr": [0.1]}),
    "type": ({"trainer.max_steps": "many"}, {"lr": [0.1]}),
    "variable": ({"record.variables": ["beat"]}, {"lr": [0.1]}),
    "steps": ({"trainer.max_steps": None}, {"lr": [0.1]}),
}


@pytest.mark.parametrize(("changes", "axes"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_a_value_error_with_the_command_lines_message(changes, axes, empty_folder, capsys):
    with pytest.raises(ValueError) as caught:
        dlnlab.run(CONFIG, changes, **axes)
    path = write(empty_folder, CONFIG)
    flags = [f"--{key}={'null' if value is None else value}" for key, value in changes.items()]
    flags += [f"--ensemble.{name}={values}" for name, values in axes.items()]
    assert main(["fit", "--config", str(path), *flags]) == 2
    assert capsys.readouterr().err.startswith(f"dlnlab fit: {str(caught.value).splitlines()[0]}")
    assert [path.name for path in empty_folder.iterdir()] == ["mine.yaml"]


def test_a_missing_config_is_an_ordinary_exception():
    with pytest.raises(ValueError, match=r"nothing\.yaml"):
        dlnlab.run("nothing.yaml")


class Interrupt(Callback):
    def on_train_batch_end(self, *_):
        raise KeyboardInterrupt


def test_an_interrupt_is_a_keyboard_interrupt_and_no_exit():
    before = signal.getsignal(signal.SIGINT)
    config = {**CONFIG, "trainer": {"max_steps": 50, "callbacks": [{"class_path": Interrupt}]}}
    with pytest.raises(KeyboardInterrupt):
        dlnlab.run(config)
    assert signal.getsignal(signal.SIGINT) is before


# simulate -------------------------------------------------------------------------------------------------------------


def test_simulate_follows_gradient_descent_on_the_given_arrays():
    results = dlnlab.simulate(X, X @ TEACHER, lr=0.1, init_scale=0.3, steps=40, record=["beta", "train_loss"])
    u, v = torch.full((5,), 0.3 * 2**0.5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(40):
        g = X.T @ (X @ (u * v) - X @ TEACHER) / 8
        u, v = u - 0.1 * g * v, v - 0.1 * g * u
    np.testing.assert_allclose(results.beta.isel(step=-1), u * v, rtol=1e-10)  # 40 steps of rounding
    loss = (X @ (u * v - TEACHER)).square().mean() / 2
    np.testing.assert_allclose(results.train_loss.isel(step=-1), loss, rtol=1e-9)  # likewise


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, lambda a: a.tolist(), lambda a: a.float()])
def test_simulate_takes_arrays_of_any_kind(convert):
    results = dlnlab.simulate(convert(X), convert(X @ TEACHER), steps=5, lr=0.1)
    assert float(results.train_loss[-1]) < float(results.train_loss[0])


def test_several_values_are_an_axis_in_the_order_written_and_one_is_a_coordinate():
    results = dlnlab.simulate(
        X, X @ TEACHER, init_scale=[0.1, 0.2], lr={"log10": [-2, -1, 3]}, batch_size=np.array([1, 4]), seed=2,
        sampling="epochs", weight_decay=0.001, label_noise=0.1, steps=3,
    )  # fmt: skip
    assert results.train_loss.dims == ("init_scale", "lr", "batch_size", "seed", "step")
    assert (results.sampling.item(), results.weight_decay.item(), results.label_noise.item()) == ("epochs", 0.001, 0.1)
    np.testing.assert_allclose(results.lr, [0.01, 10**-1.5, 0.1])


def test_every_seed_has_the_same_data_and_its_own_mini_batches():
    results = dlnlab.simulate(X, X @ TEACHER, lr=0.1, batch_size=[1, "full"], seed=3, steps=20, record=["beta"])
    final = results.beta.isel(step=-1)
    full = final.sel(batch_size="full")
    np.testing.assert_array_equal(full, full.isel(seed=[0, 0, 0]))
    assert len(np.unique(final.sel(batch_size="1").isel(coordinate=0))) == 3


def test_teacher_and_test_rows_define_distance_and_test_loss():
    known = {"teacher": TEACHER, "X_test": X[:3], "y_test": X[:3] @ TEACHER}
    results = dlnlab.simulate(X, X @ TEACHER, lr=0.1, steps=5, **known)
    np.testing.assert_allclose(results.distance.isel(step=0), 2)
    np.testing.assert_allclose(results.test_loss.isel(step=0), (X[:3] @ TEACHER).square().mean() / 2)
    bare = dlnlab.simulate(X, X @ TEACHER, lr=0.1, steps=5)
    assert "distance" not in bare
    assert "test_loss" not in bare
    np.testing.assert_array_equal(bare.train_loss, results.train_loss)


def test_a_model_of_ones_own_and_measurements_are_taken():
    class Square(LinearNetwork):
        def build(self, num_features, num_outputs):
            self.w = torch.nn.Parameter(torch.full((self.num_members, num_features), 0.5))

        def predictor(self):
            return self.w**2

    class Largest(Measurement):
        def measure(self, model, batch):
            return {"largest": model.predictor().abs().amax(-1)}

    results = dlnlab.simulate(
        X, X @ TEACHER.abs(), model=Square, lr=[0.05, 0.1], steps=9, callbacks=[Largest(), PredictorNorm(at=[3])],
        record={"every_n_steps": 4, "variables": ["beta"]}, guard={"tol": 0},
    )  # fmt: skip
    assert results.step.values.tolist() == [0, 3, 4, 8, 9]
    np.testing.assert_allclose(results.largest.sel(step=8), results.beta.sel(step=8).max("coordinate"))
    single = functools.partial(DiagonalLinearNetwork, dtype="float32")
    wide, narrow = (dlnlab.simulate(X, X @ TEACHER, model=m, lr=0.1, steps=9) for m in (DiagonalLinearNetwork, single))
    assert 0 < abs(float(wide.train_loss[-1] / narrow.train_loss[-1]) - 1) < 1e-4


def test_simulate_leaves_the_process_as_it_was_and_nothing_behind(empty_folder, capfd):
    before = global_state()
    first = dlnlab.simulate(X, X @ TEACHER, lr=[0.1, 0.2], batch_size=2, seed=2, steps=20)
    second = dlnlab.simulate(X, X @ TEACHER, lr=[0.1, 0.2], batch_size=2, seed=2, steps=20)
    after = global_state()
    for name, value in before.items():
        assert after[name] == value, name
    assert first.identical(second)
    assert capfd.readouterr() == ("", "")
    assert list(empty_folder.iterdir()) == []


WRONG = {
    "rows": ({"y": torch.ones(7)}, r"X must be \(N, D\) and y"),
    "vector": ({"X": torch.ones(8)}, r"X must be \(N, D\)"),
    "no numbers": ({"X": [["a", "b"]]}, "X must be an array of numbers"),
    "not finite": ({"X": torch.full((8, 5), float("nan"))}, r"X\[0, 0\] = nan: must be finite"),
    "half a test": ({"X_test": X}, "X_test must be .* and y_test"),
    "other features": ({"X_test": X[:, :4], "y_test": torch.ones(8)}, "test rows must be like the training rows"),
    "teacher": ({"teacher": torch.ones(4)}, r"teacher must have shape \(5,\)"),
    "outputs": ({"y": torch.ones(8, 2)}, "predicts one number"),
    "axis": ({"speed": 3}, "no such axis"),
    "lr": ({"lr": 0}, "step size must be positive"),
    "batch": ({"batch_size": 9}, "at most the number of training samples, 8"),
    "variable": ({"record": ["beat"]}, "no variable 'beat'"),
    "steps": ({"steps": 0}, "steps = 0"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_a_value_error_that_names_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        dlnlab.simulate(**{"X": X, "y": X @ TEACHER, "steps": 5, **arguments})


def test_a_figure_draws_the_data_set_and_shows_itself_in_a_notebook():
    results = dlnlab.simulate(X, X @ TEACHER, teacher=TEACHER, lr=[0.05, 0.1], batch_size=[1, "full"], seed=2, steps=30)
    figure = StepSizeFigure().draw(results)
    assert len(figure.axes) == 1
    assert figure._repr_png_()[:4] == b"\x89PNG"
