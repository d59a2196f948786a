"""Sharpness on plain LightningModules with any Trainer, and on ensembles, against dense Hessians and closed forms."""

import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from oracles import diagonal_hessian
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import dlnlab
from dlnlab.callbacks import Recorder, Sharpness
from dlnlab.data import SparseRegression
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.optim import GainSGD


class Kept(Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    name = version = "kept"

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def curve(self, tag):
        return {step: row[tag] for step, row in self.rows.items() if tag in row}


def data(rows=24, batch_size=8, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, generator=generator, dtype=dtype)
    return DataLoader(TensorDataset(x, torch.sin(x.sum(1, keepdim=True))), batch_size, **options)


def network(dtype=torch.float64):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


class Plain(LightningModule):
    """A regression as people write it."""

    def __init__(self, optimizer=lambda params: torch.optim.SGD(params, 0.1), net=None):
        super().__init__()
        self.net, self.optimizer = net or network(), optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def fit(module, *callbacks, steps=4, loader=None, **options):
    logger = Kept()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=steps, callbacks=list(callbacks), logger=logger, accelerator="cpu", devices=1,
                      log_every_n_steps=1, **{**quiet, **options})  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader or data())
    return logger


def dense(module, batch, loss=functional.mse_loss):
    parameters = list(module.parameters())
    x, y = batch
    gradients = torch.autograd.grad(loss(module(x), y), parameters, create_graph=True)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


# The value -----------------------------------------------------------------------------------------------------------


class Truth(Plain):
    """Computes the dense Hessian's largest eigenvalue of the batch before every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.truth = {}

    def on_train_batch_start(self, batch, batch_idx):
        window = self.truth.setdefault(self.global_step, [])
        window.append((dense(self.net, batch), len(batch[0])))

    def top(self, step):
        whole = sum(size for _, size in self.truth[step])
        return float(torch.linalg.eigvalsh(sum(matrix * size / whole for matrix, size in self.truth[step]))[-1])


def assert_true(logger, module, tag="curvature/sharpness", rel=1e-9):
    curve = logger.curve(tag)
    assert curve
    for step, value in curve.items():
        assert value == pytest.approx(module.top(step), rel=rel)
    return curve


def test_the_sharpness_of_the_step_s_batch_is_that_of_its_dense_hessian_and_the_edge_is_at_two():
    module = Truth()
    logger = fit(module, Sharpness(every_n_steps=2, tol=1e-8), steps=6)
    curve = assert_true(logger, module)
    assert list(curve) == [0, 2, 4]
    for step, value in logger.curve("curvature/effective_sharpness").items():
        assert value == pytest.approx(0.1 * curve[step])
    assert all(value <= 1e-7 for value in logger.curve("curvature/sharpness_residual").values())
    assert all(value >= 1 for value in logger.curve("curvature/products").values())
    assert set(logger.curve("curvature/seconds")) == {0, 2, 4}


def test_with_gradient_accumulation_it_is_the_mean_loss_of_all_the_batches_of_a_step():
    module = Truth()
    logger = fit(module, Sharpness(every_n_steps=1, tol=1e-8), steps=4, loader=data(rows=40, batch_size=16),
                 accumulate_grad_batches=2)  # fmt: skip
    assert list(assert_true(logger, module)) == [0, 1, 2, 3]
    assert [len(window) for window in list(module.truth.values())[:2]] == [2, 1]  # 16 + 16, then the last 8 rows


def test_fixed_data_are_the_first_batch_and_a_loader_is_the_whole_set():
    whole = data(batch_size=100)
    for chosen, batches in (("fixed", data(batch_size=8)), (data(batch_size=7), whole)):
        module = Plain()
        reference = next(iter(batches))
        truths = {}

        class Looks(Sharpness):
            def on_before_optimizer_step(self, trainer, module, optimizer, truths=truths, reference=reference):
                truths[trainer.global_step] = float(torch.linalg.eigvalsh(dense(module.net, reference))[-1])
                super().on_before_optimizer_step(trainer, module, optimizer)

        logger = fit(module, Looks(every_n_steps=1, tol=1e-8, data=chosen, memory=0), steps=5)
        assert logger.curve("curvature/sharpness") == pytest.approx(truths, rel=1e-9)


def test_several_eigenvalues_of_both_ends():
    module = Truth()
    logger = fit(module, Sharpness(every_n_steps=1, k=2, which="both", tol=1e-8), steps=1)
    spectrum = torch.linalg.eigvalsh(module.truth[0][0][0])
    row = logger.rows[0]
    found = [row[f"curvature/{name}"] for name in ("sharpness", "sharpness_2", "smallest_eigenvalue")]
    expected = [float(spectrum[place]) for place in (-1, -2, 0)]
    assert found == pytest.approx(expected, rel=1e-8)
    assert row["measured/smallest_eigenvalue_2"] == pytest.approx(float(spectrum[1]), rel=1e-8)


def test_only_the_named_parameters():
    module = Truth()
    logger = fit(module, Sharpness(every_n_steps=1, tol=1e-8, params="net.2.*"), steps=1)
    block = module.truth[0][0][0][16:, 16:]
    assert logger.rows[0]["curvature/sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]))
    with pytest.raises(ValueError, match=r"Sharpness.params: no parameter that trains matches nothing.\*"):
        fit(Plain(), Sharpness(every_n_steps=1, params=["nothing.*"]), steps=1)


def test_float32_parameters_can_be_measured_in_float64():
    torch.manual_seed(0)
    loader = data(dtype=torch.float32)
    for dtype, rel in ((None, 1e-5), ("float64", 1e-9)):
        module = Plain(net=network(torch.float32))
        double = Plain(net=network(torch.float32)).double()
        expected = float(torch.linalg.eigvalsh(dense(double.net, [part.double() for part in next(iter(loader))]))[-1])
        logger = fit(module, Sharpness(every_n_steps=1, tol=1e-7, dtype=dtype), steps=1, loader=loader)
        assert logger.rows[0]["curvature/sharpness"] == pytest.approx(expected, rel=rel)
        assert {param.dtype for param in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_lower_precision_is_measured_in_float32_and_never_under_autocast(precision):
    loader, module, start = data(dtype=torch.float32), Plain(net=network(torch.float32)), network(torch.float32)
    batch = next(iter(loader))
    if precision == "bf16-true":  # so are the data
        start, batch = start.bfloat16(), [part.bfloat16() for part in batch]
    expected = float(torch.linalg.eigvalsh(dense(start.double(), [part.double() for part in batch]))[-1])
    logger = fit(module, Sharpness(every_n_steps=1, tol=1e-6), steps=2, loader=loader, precision=precision)
    assert logger.rows[0]["curvature/sharpness"] == pytest.approx(expected, rel=1e-5)
    if precision == "bf16-mixed":
        module = Plain(net=network(torch.float32))
        asked = fit(module, Sharpness(every_n_steps=1, tol=1e-6, autocast=True), steps=1, loader=loader,
                    precision=precision)  # fmt: skip
        relative = asked.rows[0]["curvature/sharpness"] / expected - 1
        assert 1e-5 < abs(relative) < 0.05  # half precision rounds at 4e-3


class Scaled(Plain):
    """Manual optimization under autocast, its loss scaled by 2^10 as a GradScaler does for half precision."""

    def __init__(self):
        super().__init__(net=network(torch.float32))
        self.automatic_optimization = False
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        with torch.autocast("cpu", torch.bfloat16):
            loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(self.scaler.scale(loss))
        self.scaler.step(optimizer)
        self.scaler.update()


def test_a_scaled_loss_is_measured_unscaled_in_float32():
    loader = data(dtype=torch.float32)
    start, batch = network(torch.float32).double(), [part.double() for part in next(iter(loader))]
    expected = float(torch.linalg.eigvalsh(dense(start, batch))[-1])
    module, plain = Scaled(), Scaled()
    measured = Sharpness(every_n_steps=1, tol=1e-6, loss_fn=lambda module, batch: Plain.training_step(module, batch, 0))
    logger = fit(module, measured, steps=3, loader=loader)
    assert logger.rows[0]["curvature/sharpness"] == pytest.approx(expected, rel=1e-5)
    assert set(logger.curve("curvature/sharpness")) == {0, 1, 2}
    fit(plain, steps=3, loader=data(dtype=torch.float32))
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), plain.parameters(), strict=True))
    assert module.scaler.state_dict() == plain.scaler.state_dict()


# Training is left alone ----------------------------------------------------------------------------------------------


class Everything(LightningModule):
    """Draws from every generator, logs, counts, keeps, changes its batch, and has states of many kinds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3))
        self.memory = nn.LSTM(8, 4, batch_first=True)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 1))
        self.error = torchmetrics.MeanSquaredError()
        self.kept = torchmetrics.CatMetric()
        self.calls, self.history, self.average = 0, [], torch.zeros(())

    def training_step(self, batch, batch_idx):
        x, y = batch
        x += 0.01 * torch.randn_like(x)
        noise = random.random() + np.random.rand()  # noqa: NPY002
        hidden, _ = self.memory(self.net(x)[:, None])
        found = self.head(hidden[:, 0])
        loss = functional.mse_loss(found, y) * (1 + 0.01 * noise)
        self.calls += 1
        self.history.append(float(loss))
        self.average.mul_(0.9).add_(0.1 * loss.detach())
        self.error(found.detach(), y)
        self.kept.update(loss.detach())
        self.log("loss", loss)
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.logger.log_metrics({"direct": float(loss)}, step=self.global_step)
        return {"loss": loss, "extra": found}

    def on_train_epoch_end(self):
        self.log("calls", float(self.calls))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def run_of_everything(*callbacks, **options):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    module = Everything()
    torch.manual_seed(7)
    loader = data(dtype=torch.float32, shuffle=True, generator=torch.Generator().manual_seed(3))
    logger = fit(module, *callbacks, steps=10, loader=loader, gradient_clip_val=0.5, **options)
    rows = {step: {tag: value for tag, value in row.items() if not tag.startswith(("curvature", "measured"))}
            for step, row in logger.rows.items()}  # fmt: skip
    optimizer = module.optimizers().optimizer.state_dict()["state"]
    tensors = [*module.state_dict().values(), *(value for state in optimizer.values() for value in state.values()),
               module.average, module.error.sum_squared_error, torch.get_rng_state(),
               loader.generator.get_state(), *(p.grad for p in module.parameters() if p.grad is not None)]  # fmt: skip
    rest = (module.calls, module.history, random.random(), np.random.rand(), module.training)  # noqa: NPY002
    return [tensor.clone() for tensor in tensors], {s: r for s, r in rows.items() if r}, rest


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"which": "both", "k": 2, "data": "fixed"},
        {"operator": "preconditioned", "mode": "eval"},
        {"quantity": "batch_sharpness", "data": "loader"},
        {"quantity": "trace", "dtype": "float64"},
        {"quantity": "critical"},
        {"differences": True, "data": "loader", "memory": 0},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()) or "default",
)
def test_training_with_the_callback_is_bitwise_training_without_it(options):
    bare, bare_rows, bare_rest = run_of_everything()
    if options.get("data") == "loader":
        options = {**options, "data": data(dtype=torch.float32, shuffle=True)}
    measured, rows, rest = run_of_everything(Sharpness(every_n_steps=1, **options))
    assert len(bare) == len(measured)
    assert all(torch.equal(one, other) for one, other in zip(bare, measured, strict=True))
    assert rows == bare_rows
    assert rest == bare_rest


def test_with_accumulation_and_autocast_too():
    options = {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    bare, bare_rows, bare_rest = run_of_everything(**options)
    measured, rows, rest = run_of_everything(Sharpness(every_n_steps=1), **options)
    assert all(torch.equal(one, other) for one, other in zip(bare, measured, strict=True))
    assert (rows, rest) == (bare_rows, bare_rest)


def test_dropout_has_one_mask_in_a_measurement_and_none_in_eval_mode():
    values = {}
    for mode in ("as_is", "eval"):
        torch.manual_seed(3)
        module = Plain(net=nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)).double())
        expected = float(torch.linalg.eigvalsh(dense(module.net.eval(), next(iter(data()))))[-1])
        module.net.train()
        logger = fit(module, Sharpness(every_n_steps=1, tol=1e-8, mode=mode), steps=1)
        assert logger.rows[0]["curvature/sharpness_residual"] < 1e-7  # a fresh mask each time would leave 0.1
        values[mode] = logger.rows[0]["curvature/sharpness"]
    assert values["eval"] == pytest.approx(expected)
    assert values["as_is"] != pytest.approx(expected, rel=0.01)


# Other ways to train -------------------------------------------------------------------------------------------------


class Manual(Truth):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_needs_the_loss_and_has_it_measured():
    module = Manual()

    def loss(module, batch):
        return functional.mse_loss(module.net(batch[0]), batch[1])

    assert_true(fit(module, Sharpness(every_n_steps=1, tol=1e-8, loss_fn=loss)), module)
    with pytest.raises(ValueError, match=r"Sharpness.loss_fn: with manual optimization training_step takes the steps"):
        fit(Manual(), Sharpness(every_n_steps=1))


def test_a_compiled_module_is_measured_and_trains_on():
    module = Truth()
    module.net = torch.compile(module.net, backend="aot_eager")
    module.on_train_batch_start = lambda *_: None
    expected = float(torch.linalg.eigvalsh(dense(module.net._orig_mod, next(iter(data()))))[-1])
    logger = fit(module, Sharpness(every_n_steps=2, tol=1e-8), steps=4)
    assert logger.rows[0]["curvature/sharpness"] == pytest.approx(expected)
    assert logger.curve("curvature/sharpness").keys() == {0, 2}


def test_a_line_search_that_calls_the_loss_often_is_measured_once_a_step():
    module = Truth(optimizer=lambda params: torch.optim.LBFGS(params, 0.5, max_iter=4))
    logger = fit(module, Sharpness(every_n_steps=1, tol=1e-8), steps=3)
    assert list(assert_true(logger, module)) == [0, 1, 2]
    assert not logger.curve("curvature/effective_sharpness")  # no edge is known


def test_a_resumed_run_measures_what_an_unbroken_one_does(tmp_path):
    callback = Sharpness(every_n_steps=1, data="fixed")
    loader = data(batch_size=24)
    whole = fit(Plain(), callback, steps=6, loader=loader)
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    first = Trainer(max_steps=3, callbacks=[Sharpness(every_n_steps=1, data="fixed")], logger=Kept(), accelerator="cpu",
                    **options)  # fmt: skip
    first.fit(Plain(), loader)
    first.save_checkpoint(tmp_path / "three.ckpt")
    logger = Kept()
    second = Trainer(max_steps=6, callbacks=[Sharpness(every_n_steps=1, data="fixed")], logger=logger, accelerator="cpu",
                     **options)  # fmt: skip
    second.fit(Plain(), loader, ckpt_path=tmp_path / "three.ckpt", weights_only=True)
    tail = {step: value for step, value in whole.curve("curvature/sharpness").items() if step >= 3}
    assert logger.curve("curvature/sharpness") == tail
    products = {step: value for step, value in whole.curve("curvature/products").items() if step >= 3}
    assert logger.curve("curvature/products") == products


def test_a_warm_measurement_takes_fewer_products():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(3, 100), nn.Tanh(), nn.Linear(100, 1)).double()
    module = Plain(lambda params: torch.optim.SGD(params, 1e-4), wide)
    logger = fit(module, Sharpness(every_n_steps=1, data="fixed", k=4, tol=1e-6))
    products = list(logger.curve("curvature/products").values())
    assert max(products[1:]) < products[0]


# Optimizers ----------------------------------------------------------------------------------------------------------


class Quadratic(LightningModule):
    """1/2 x^T A x from a given start."""

    def __init__(self, spectrum, optimizer):
        super().__init__()
        self.matrix = torch.diag(torch.tensor(spectrum, dtype=torch.float64))
        self.x = nn.Parameter(torch.full((len(spectrum),), 1e-3, dtype=torch.float64))
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return self.x @ self.matrix @ self.x / 2

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def test_adam_has_no_preconditioned_sharpness_before_its_first_step_and_no_edge_for_the_plain_one():
    module = Truth(lambda params: torch.optim.Adam(params, 0.01))
    callbacks = Sharpness(every_n_steps=1, operator="preconditioned", tol=1e-8), Sharpness(every_n_steps=1, tol=1e-8)
    logger = fit(module, *callbacks, steps=3)
    assert list(logger.curve("curvature/preconditioned_sharpness")) == [1, 2]
    assert list(logger.curve("curvature/effective_sharpness")) == [1, 2]
    assert_true(logger, module)


def test_groups_with_different_step_sizes_have_no_common_edge_but_each_has_its_own():
    def groups(params):
        first, second, *rest = list(params)
        return torch.optim.SGD([{"params": [first, second], "lr": 0.1}, {"params": rest, "lr": 0.3}])

    logger = fit(Plain(groups), Sharpness(every_n_steps=1), Sharpness(every_n_steps=1, params="net.2.*", k=2), steps=1)
    assert logger.rows[0]["curvature/effective_sharpness"] > 0
    logger = fit(Plain(groups), Sharpness(every_n_steps=1), steps=1)
    assert "curvature/effective_sharpness" not in logger.rows[0]


# Other quantities ----------------------------------------------------------------------------------------------------


def test_batch_sharpness_over_a_loader_has_the_mean_and_interval_of_its_batches():
    module, loader = Plain(), data(batch_size=4)
    expected = []
    for x, y in loader:
        parameters = list(module.net.parameters())
        parts = torch.autograd.grad(functional.mse_loss(module.net(x), y), parameters)
        gradient = torch.cat([part.reshape(-1) for part in parts])
        expected.append(float(gradient @ dense(module.net, (x, y)) @ gradient / (gradient @ gradient)))
    row = fit(module, Sharpness(every_n_steps=1, quantity="batch_sharpness", data=loader), steps=1).rows[0]
    assert row["curvature/batch_sharpness"] == pytest.approx(np.mean(expected))
    half = 2.570582 * np.std(expected, ddof=1) / 6**0.5  # Student's 97.5 % quantile, 5 degrees of freedom
    assert row["curvature/batch_sharpness_error"] == pytest.approx(half, rel=1e-5)
    assert row["curvature/effective_batch_sharpness"] == pytest.approx(0.1 * np.mean(expected))


def test_the_trace_is_the_dense_hessians():
    module = Truth()
    row = fit(module, Sharpness(every_n_steps=1, quantity="trace"), steps=1).rows[0]
    assert row["curvature/trace"] == pytest.approx(float(module.truth[0][0][0].trace()))


def test_gauss_newton_needs_outputs_and_loss_apart():
    def split(module, batch):
        return module.net(batch[0]), lambda outputs: functional.mse_loss(outputs, batch[1])

    module, (x, y) = Plain(), next(iter(data()))
    parameters = list(module.net.parameters())
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in module.net(x)[:, 0]]
    jacobian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    expected = float(torch.linalg.matrix_norm(jacobian, 2) ** 2 * 2 / len(y))
    row = fit(module, Sharpness(every_n_steps=1, operator="gauss_newton", loss_fn=split, tol=1e-8), steps=1).rows[0]
    assert row["curvature/gauss_newton_sharpness"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="gauss_newton needs a function"):
        fit(Plain(), Sharpness(every_n_steps=1, operator="gauss_newton"), steps=1)


def test_critical_sharpness_of_gradient_descent_on_a_quadratic_is_the_curvature_along_its_step():
    for make, lr in ((torch.optim.SGD, 0.1), (torch.optim.SGD, 0.9)):
        module = Quadratic([3.0, 1.0, 0.2], lambda params, make=make, lr=lr: make(params, lr))
        gradient = module.matrix @ module.x.detach()
        expected = float(gradient @ module.matrix @ gradient / (gradient @ gradient))
        logger = fit(module, Sharpness(every_n_steps=1, quantity="critical"), steps=1, loader=[torch.zeros(1)] * 9)
        assert logger.rows[0]["curvature/critical_sharpness"] == pytest.approx(expected, rel=0.02)  # its bracket
        assert logger.rows[0]["curvature/effective_critical_sharpness"] == pytest.approx(lr * expected, rel=0.02)


class Final(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)


class FinalNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        return self.layers[2](Final.apply(self.layers[0](x)))


def test_what_cannot_be_differentiated_twice_is_named_and_can_be_measured_by_differences():
    with pytest.raises(RuntimeError, match=r"Final cannot be differentiated twice: .*differences"):
        fit(Plain(net=FinalNet()), Sharpness(every_n_steps=1), steps=1)
    expected = float(torch.linalg.eigvalsh(dense(network(), next(iter(data()))))[-1])
    logger = fit(Plain(net=FinalNet()), Sharpness(every_n_steps=1, differences=True), steps=1)
    assert logger.rows[0]["curvature/sharpness"] == pytest.approx(expected, rel=1e-4)


# Ensembles -----------------------------------------------------------------------------------------------------------


def ensemble_run(*callbacks, steps=60, **options):
    recorder = Recorder(at=[0, 20, 60], variables=["train_loss"])
    ensemble = dlnlab.Ensemble(lr=[0.02, 0.1], batch_size=["full", 2], seed=2)
    model = DiagonalLinearNetwork(ensemble=ensemble, init_scale=0.3, **options)
    trainer = Trainer(max_steps=steps, callbacks=[recorder, *callbacks], logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, SparseRegression(6, 4, 2))
    return model, recorder.dataset()


def final_hessians(model):
    for member in range(model.num_members):
        x, y = (part[model.problem_index[member]].numpy() for part in (model.problems.x, model.problems.y))
        yield diagonal_hessian(x, y, model.u[member].detach().numpy(), model.v[member].detach().numpy())


def test_every_member_of_an_ensemble_has_its_sharpness_in_the_results():
    model, results = ensemble_run(Sharpness(tol=1e-8))
    assert results.sharpness.dims == ("lr", "batch_size", "seed", "step")
    assert results.step.values.tolist() == [0, 20, 60]
    expected = [np.linalg.eigvalsh(matrix)[-1] for matrix in final_hessians(model)]
    np.testing.assert_allclose(results.sharpness.isel(step=-1).values.ravel(), expected, rtol=1e-8)
    np.testing.assert_allclose(results.effective_sharpness, results.sharpness * results.lr, rtol=1e-12)
    assert float(results.sharpness_residual.max()) < 1e-6


def test_weight_decay_counts_in_the_effective_sharpness_of_an_ensemble():
    _, results = ensemble_run(Sharpness(), optimizer=partial(GainSGD, weight_decay=0.05))
    np.testing.assert_allclose(results.effective_sharpness, (results.sharpness + 0.1) * results.lr, rtol=1e-12)


def test_the_other_quantities_of_an_ensemble():
    model, results = ensemble_run(
        Sharpness(quantity="trace"),
        Sharpness(quantity="batch_sharpness", num_batches=200),
        Sharpness(quantity="critical"),
        Sharpness(operator="gauss_newton", tol=1e-8),
    )
    hessians = list(final_hessians(model))
    np.testing.assert_allclose(results.trace.isel(step=-1).values.ravel(), [np.trace(h) for h in hessians], rtol=1e-10)
    for member, matrix in enumerate(hessians):
        x, y = (part[model.problem_index[member]].numpy() for part in (model.problems.x, model.problems.y))
        u, v = (part[member].detach().numpy() for part in (model.u, model.v))
        label = {name: value for name, value in model.ensemble.labels[member].items()}
        label["batch_size"] = str(label["batch_size"])
        here = results.sel(label).isel(step=-1)
        jacobian = x @ np.concatenate([np.diag(v), np.diag(u)], 1)
        assert float(here.gauss_newton_sharpness) == pytest.approx(np.linalg.norm(jacobian, 2) ** 2 / 6, rel=1e-6)

        def along(rows, x=x, y=y, u=u, v=v):
            part = x[rows]
            g = part.T @ (part @ (u * v) - y[rows]) / len(rows)
            gradient = np.concatenate([g * v, g * u])
            return gradient @ diagonal_hessian(part, y[rows], u, v) @ gradient / (gradient @ gradient)

        everything = along(range(6))
        assert np.isfinite(matrix).all()
        if label["batch_size"] == "full":
            assert float(here.batch_sharpness) == pytest.approx(everything, rel=1e-8)
        else:  # with replacement: all pairs of rows are equally likely
            pairs = np.mean([along([i, j]) for i in range(6) for j in range(6)])
            assert abs(float(here.batch_sharpness) - pairs) < 2 * float(here.batch_sharpness_error)  # 3.9 sigma
    small = results.isel(step=1)
    assert bool((small.critical_sharpness > 0).all())


def test_the_critical_sharpness_of_an_ensemble_near_its_start_is_the_curvature_along_the_gradient():
    model, results = ensemble_run(Sharpness(quantity="critical"), Sharpness(), steps=1)
    assert bool((results.critical_sharpness <= 1.2 * results.sharpness).all())  # far steps leave the quadratic
    assert model.num_members == 8


def test_an_ensemble_trains_as_without_the_callback_and_resumes_as_unbroken(tmp_path):
    bare, _ = ensemble_run()
    measured, _ = ensemble_run(Sharpness(), Sharpness(quantity="batch_sharpness"), Sharpness(quantity="critical"))
    assert torch.equal(bare.w_plus, measured.w_plus)
    assert torch.equal(bare.w_minus, measured.w_minus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantity": "norm"}, "Sharpness.quantity = 'norm': must be one of sharpness"),
        ({"operator": "fisher"}, "Sharpness.operator = 'fisher': must be one of hessian"),
        ({"operator": "gauss_newton", "quantity": "critical"}, "critical has no choice of operator"),
        ({"data": "train"}, "Sharpness.data = 'train': must be one of batch, fixed"),
        ({"data": iter([])}, "must be batch, fixed or a loader"),
        ({"loss_fn": 3}, "Sharpness.loss_fn = 3: must be a function"),
        ({"k": 0}, "Sharpness.k = 0: must be at least 1"),
        ({"tol": -1.0}, "Sharpness.tol = -1.0: must be positive"),
        ({"differences": True, "quantity": "critical"}, "only Hessians are measured by differences"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sharpness(**options)


def test_what_an_ensemble_has_no_use_for_is_refused():
    with pytest.raises(
        ValueError, match=r"Sharpness.dtype: a DiagonalLinearNetwork is measured on its full training loss"
    ):
        ensemble_run(Sharpness(dtype="float32"))


def test_it_says_once_when_it_takes_more_than_its_share(monkeypatch):
    monkeypatch.setattr("dlnlab.callbacks.sharpness._PATIENCE", 0.0)
    with pytest.warns(UserWarning, match=r"measurements have taken .* seconds: measure less often") as caught:
        logger = Kept()
        trainer = Trainer(max_steps=20, callbacks=[Sharpness(every_n_steps=1, max_share=0.01)], logger=logger,
                          enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        trainer.fit(Plain(), data())
    assert len([warning for warning in caught if "measurements have taken" in str(warning.message)]) == 1


def test_a_loss_that_is_none_is_refused_with_what_came():
    class Later(Sharpness):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            module.training_step = lambda batch, batch_idx: None
            super().on_before_optimizer_step(trainer, module, optimizer)

    with pytest.raises(ValueError, match="training_step gave NoneType where its loss was asked for"):
        fit(Plain(), Later(every_n_steps=1), steps=1)
