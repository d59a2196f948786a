"""Hessians of losses against closed forms, dense Hessians column by column, and SciPy."""

import gc

import numpy as np
import pytest
import torch
from oracles import dense_hessian, diagonal_hessian
from torch import nn
from torch.nn import functional

from dlnlab.curvature import eigenpairs, gauss_newton, hessian


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def dense_of(model, loss):
    """The same from `torch.func`, which shares no line with the code under test."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    sizes = [value.numel() for value in parameters.values()]

    def of(flat):
        parts = flat.split(sizes)
        named = {name: part.reshape(value.shape) for part, (name, value) in zip(parts, parameters.items(), strict=True)}
        return loss(lambda *inputs: torch.func.functional_call(model, named, inputs))

    return torch.func.hessian(of)(torch.cat([value.reshape(-1) for value in parameters.values()]))


# Closed forms --------------------------------------------------------------------------------------------------------


def test_the_diagonal_network_has_its_four_blocks():
    x, y, u, v = torch.randn(7, 5), torch.randn(7), leaf(5), leaf(5)
    found = hessian(lambda: (x @ (u * v) - y).square().mean() / 2, [u, v]).dense()
    expected = diagonal_hessian(x.numpy(), y.numpy(), u.detach().numpy(), v.detach().numpy())
    np.testing.assert_allclose(found, expected, atol=1e-14)


def test_the_scalar_factorisation_has_its_formula_everywhere_and_its_squared_norm_at_a_minimum():
    for scale in (0.1, 1.0, 3.0):
        a, b = leaf(6), leaf(6)
        with torch.no_grad():
            a *= scale
            product, norm = float(a @ b), float(a @ a + b @ b)
        for target in (1.7, product):  # the second makes it a minimum
            residual = product - target
            top = (norm + (norm**2 + 8 * product * residual + 4 * residual**2) ** 0.5) / 2
            found = eigenpairs(hessian(lambda a=a, b=b, target=target: (a @ b - target) ** 2 / 2, [a, b]), tol=1e-10)
            assert float(found.values) == pytest.approx(top, rel=1e-9)
            assert bool(found.converged)


def test_two_layers_at_the_origin_have_the_data_correlations_singular_values_with_both_signs():
    x, y = torch.randn(20, 4), torch.randn(20, 3)
    first, second = torch.zeros(5, 4, requires_grad=True), torch.zeros(3, 5, requires_grad=True)
    found = eigenpairs(
        hessian(lambda: (x @ first.T @ second.T - y).square().sum() / 40, [first, second]), which="both", tol=1e-9
    )
    top = float(torch.linalg.matrix_norm(y.T @ x / 20, 2))
    assert found.values.tolist() == pytest.approx([top, -top])


def test_three_layers_at_the_origin_have_no_curvature():
    layers = [torch.zeros(4, 4, requires_grad=True) for _ in range(3)]
    x, y = torch.randn(9, 4), torch.randn(9, 4)
    found = eigenpairs(
        hessian(lambda: (x @ layers[0].T @ layers[1].T @ layers[2].T - y).square().mean(), layers), which="both"
    )
    assert found.values.tolist() == [0, 0]
    assert bool(found.converged)


@pytest.mark.parametrize("unbalance", [1.0, 3.0])
def test_matrix_factorisation_at_a_minimum(unbalance):
    left, singular, right = torch.linalg.svd(torch.randn(4, 4))
    u = (unbalance * left * singular.sqrt()).requires_grad_()
    v = (right.T * singular.sqrt() / unbalance).requires_grad_()
    target = left @ torch.diag(singular) @ right
    top = eigenpairs(hessian(lambda: (u @ v.T - target).square().sum() / 2, [u, v]), tol=1e-9)
    assert float(top.values) == pytest.approx(float((unbalance**2 + unbalance**-2) * singular[0]), rel=1e-8)


def test_a_deep_chain_of_numbers_has_its_dense_hessian():
    numbers = [torch.tensor(value, requires_grad=True) for value in (0.5, -1.2, 2.0, 0.8)]

    def loss(*w):
        return (w[0] * w[1] * w[2] * w[3] - 1) ** 2

    torch.testing.assert_close(hessian(lambda: loss(*numbers), numbers).dense(), dense_hessian(loss, *numbers))


def test_regression_has_the_covariance_plus_weight_decay_wherever_it_is():
    x, y, w = torch.randn(30, 6), torch.randn(30), leaf(6)
    found = hessian(lambda: (x @ w - y).square().mean() / 2 + 0.15 * w.square().sum(), [w]).dense()
    torch.testing.assert_close(found, x.T @ x / 30 + 0.3 * torch.eye(6))


def test_logistic_regression_at_zero_has_a_quarter_of_the_covariance():
    x, y, w = torch.randn(30, 6), torch.rand(30).round(), torch.zeros(6, requires_grad=True)
    found = hessian(lambda: functional.binary_cross_entropy_with_logits(x @ w, y), [w]).dense()
    torch.testing.assert_close(found, x.T @ x / 120)


# Modules -------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Embedding and read-out share their weights; one parameter is not used."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, tokens):
        return torch.tanh(self.mix(self.table(tokens))) @ self.table.weight.T


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x).mean(1)


MODULES = {
    "an mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), lambda: torch.randn(6, 4)),
    "a convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(8, 2)),
        lambda: torch.randn(3, 1, 4, 4),
    ),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()), lambda: torch.randn(6, 4)),
    "attention": (Attention, lambda: torch.randn(2, 3, 4)),
    "tied weights": (Tied, lambda: torch.randint(5, (7,))),
}


def dense_columns(model, loss):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    rows = [
        torch.cat(
            [
                part.reshape(-1)
                for part in torch.autograd.grad(
                    entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            ]
        )
        if entry.requires_grad
        else torch.zeros(len(flat))
        for entry in flat
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("method", ["graph", "recompute", "finite_differences"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_every_method_gives_the_dense_hessian_of_every_module(make, method):
    model, x = make[0](), make[1]()
    target = torch.randn_like(model(x))

    def loss():
        return (model(x) - target).square().mean()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = dense_columns(model, loss)
    operator = hessian(loss, model.parameters(), method=method)
    assert operator.method == ("finite_differences" if method == "finite_differences" else "exact")
    tolerance = 1e-7 if method == "finite_differences" else 1e-12  # the square root of the third derivative's rounding
    torch.testing.assert_close(operator.dense(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(operator.loss, loss().detach())


@pytest.mark.parametrize("name", ["an mlp", "a convolution"])
def test_the_dense_hessian_is_that_of_forward_over_reverse_too(name):
    make, data = MODULES[name]
    model, x = make(), data()
    found = hessian(lambda: model(x).square().mean(), model.parameters()).dense()
    torch.testing.assert_close(found, dense_of(model, lambda call: call(x).square().mean()), atol=1e-12, rtol=0)


def test_a_subset_of_the_parameters_has_its_block():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 4)

    def loss():
        return model(x).square().mean()

    whole = hessian(loss, model.parameters()).dense()
    torch.testing.assert_close(hessian(loss, model[2].parameters()).dense(), whole[25:, 25:])
    model[0].requires_grad_(False)
    torch.testing.assert_close(hessian(loss, model.parameters()).dense(), whole[25:, 25:])  # what is frozen is left out


def test_a_compiled_module_is_measured_eagerly():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 4)
    expected = hessian(lambda: model(x).square().mean(), model.parameters()).dense()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x).square().mean().backward()
    torch.testing.assert_close(hessian(lambda: compiled(x).square().mean(), model.parameters()).dense(), expected)


def test_under_autocast_the_hessian_is_not_that_of_half_precision():
    model, x = nn.Linear(4, 3, dtype=torch.float32), torch.randn(6, 4, dtype=torch.float32)
    expected = hessian(lambda: model(x).square().mean(), model.parameters()).dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hessian(lambda: model(x).square().mean(), model.parameters())
        assert torch.equal(found.dense(), expected)
        assert eigenpairs(found).values.dtype == torch.float32


def test_it_works_where_gradients_are_off():
    w = leaf(3)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert float(eigenpairs(hessian(lambda: (w**2).sum(), [w])).values) == pytest.approx(2)


def test_parameters_and_their_gradients_are_left_alone():
    model, x = MODULES["batch norm"][0](), torch.randn(6, 4)
    model(x).square().mean().backward()
    before = [(p.detach().clone(), p.grad.clone(), p.data_ptr()) for p in model.parameters()]
    for method in ("graph", "recompute", "finite_differences"):
        eigenpairs(hessian(lambda: model(x).square().mean(), model.parameters(), method=method))
    for parameter, (value, gradient, place) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)
        assert parameter.data_ptr() == place


# Randomness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["graph", "recompute", "finite_differences"])
def test_dropout_keeps_one_mask_and_the_generator_its_state(method):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)), torch.randn(6, 4)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    def loss():
        np.random.rand()  # noqa: NPY002 (as an augmentation may)
        return model(x).square().mean()

    dense = hessian(loss, model.parameters(), method=method).dense()
    torch.testing.assert_close(
        dense, dense.T, atol=1e-7, rtol=0
    )  # other masks would differ by 1e-2; differences by 1e-9
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def regression():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    x, y = torch.randn(130, 4), torch.randn(130, 2)
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 130, 64)]  # 64, 64 and 2 rows
    return model, x, y, batches


def mean_loss(model):
    return lambda batch: functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("options", [{}, {"memory": 20_000}, {"method": "recompute"}, {"method": "graph"}])
def test_batches_of_unequal_sizes_give_the_hessian_of_the_whole_set(regression, options):
    model, x, y, batches = regression
    whole = hessian(lambda: mean_loss(model)((x, y)), model.parameters())
    found = hessian(mean_loss(model), model.parameters(), batches, **options)
    torch.testing.assert_close(found.dense(), whole.dense(), atol=1e-14, rtol=0)
    torch.testing.assert_close(found.loss, whole.loss)


def test_batches_may_be_dictionaries_a_generator_or_a_shuffling_loader(regression):
    model, x, y, _ = regression
    whole = hessian(lambda: mean_loss(model)((x, y)), model.parameters()).dense()

    def of_dictionary(batch):
        return mean_loss(model)((batch["x"], batch["y"]))

    once = ({"x": part, "y": other} for part, other in zip(x.split(50), y.split(50), strict=True))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), 50, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    for loss, batches in ((of_dictionary, once), (mean_loss(model), loader)):
        found = hessian(loss, model.parameters(), batches, method="recompute")
        torch.testing.assert_close(found.dense(), whole, atol=1e-14, rtol=0)
    assert torch.equal(loader.generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_a_shuffling_loader_with_dropout_is_one_symmetric_matrix(regression):
    _, x, y, _ = regression
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 50, shuffle=True)
    dense = hessian(mean_loss(model), model.parameters(), loader, memory=10_000).dense()
    torch.testing.assert_close(dense, dense.T, atol=1e-14, rtol=0)


def test_weights_can_be_given_for_batches_of_another_kind(regression):
    model, x, y, batches = regression
    named = [("a name first", *batch) for batch in batches]
    whole = hessian(lambda: mean_loss(model)((x, y)), model.parameters()).dense()
    found = hessian(
        lambda batch: mean_loss(model)(batch[1:]), model.parameters(), named, rows=lambda batch: len(batch[1])
    )
    torch.testing.assert_close(found.dense(), whole, atol=1e-14, rtol=0)
    with pytest.raises(ValueError, match="no tensor in a list: give rows"):
        hessian(lambda batch: model(x).sum(), model.parameters(), [["nothing"]])


def peak_bytes(action):
    """The most that is allocated at one time, beyond what was before, from torch's own profiler."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum(changes).max())


def test_memory_does_not_grow_with_the_number_of_batches():
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5))
    x, y = torch.randn(6400, 20), torch.randn(6400, 5)

    def peak(num_batches, **options):
        batches = [(x[200 * i : 200 * i + 200], y[200 * i : 200 * i + 200]) for i in range(num_batches)]
        vector = torch.randn(sum(p.numel() for p in model.parameters()))
        return peak_bytes(lambda: hessian(mean_loss(model), model.parameters(), batches, **options).matvec(vector))

    peak(2, memory=0)  # what is set up once
    few, many = peak(2, memory=0), peak(32, memory=0)
    assert many < 1.02 * few  # the weights of 30 further batches
    bounded, unbounded = peak(32, memory=2_000_000), peak(32, method="graph")
    assert few < bounded < few + 2.5 * 2_000_000  # the graph, and what its gradients hold besides saved tensors
    assert unbounded > 3 * bounded


# Members -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["graph", "recompute", "finite_differences"])
def test_every_member_of_an_ensemble_has_its_own_hessian(method):
    x, y, u, v = torch.randn(7, 5), torch.randn(7), leaf(3, 5), leaf(3, 5)
    with torch.no_grad():
        u *= torch.tensor([[0.01], [1.0], [30.0]])

    def losses():
        return ((u * v) @ x.T - y).square().mean(-1) / 2

    operator = hessian(losses, [u, v], method=method)
    assert operator.shape == (3, 10, 10)
    torch.testing.assert_close(operator.loss, losses().detach())
    for member, found in enumerate(operator.dense()):
        expected = diagonal_hessian(*(part.detach().numpy() for part in (x, y, u[member], v[member])))
        np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())
    top = eigenpairs(operator, tol=1e-8).values[:, 0]
    torch.testing.assert_close(top, torch.linalg.eigvalsh(operator.dense())[:, -1], rtol=1e-7, atol=0)


# Gauss-Newton --------------------------------------------------------------------------------------------------------


def test_gauss_newton_is_the_jacobian_around_the_losss_own_hessian(regression):
    model, x, _, _ = regression
    labels = torch.randint(2, (130,))
    parameters = list(model.parameters())
    operator = gauss_newton(lambda: model(x), lambda outputs: functional.cross_entropy(outputs, labels), parameters)
    jacobian = torch.stack(
        [
            torch.cat([part.reshape(-1) for part in torch.autograd.grad(entry, parameters, retain_graph=True)])
            for entry in model(x).reshape(-1)
        ]
    )
    inner = torch.func.hessian(lambda outputs: functional.cross_entropy(outputs.reshape(130, 2), labels))(
        model(x).detach().reshape(-1)
    )
    torch.testing.assert_close(operator.dense(), jacobian.T @ inner @ jacobian, atol=1e-13, rtol=0)


def test_gauss_newton_of_a_linear_model_is_its_hessian_over_batches_too(regression):
    _, x, y, batches = regression
    model = nn.Linear(4, 2)
    options = {"batches": batches, "memory": 0}
    found = gauss_newton(lambda batch: model(batch[0]), lambda outputs, batch: functional.mse_loss(outputs, batch[1]),
                         model.parameters(), **options)  # fmt: skip
    whole = hessian(lambda: mean_loss(model)((x, y)), model.parameters()).dense()
    torch.testing.assert_close(found.dense(), whole, atol=1e-14, rtol=0)


# Refusals ------------------------------------------------------------------------------------------------------------


class Final(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def test_a_function_that_cannot_be_differentiated_twice_is_named_and_finite_differences_take_it():
    w = leaf(3)
    for loss in (lambda: Final.apply(w).sum(), lambda: Final.apply(w).sum() ** 2):
        with pytest.raises(RuntimeError, match=r"Final cannot be differentiated twice: .*finite_differences"):
            hessian(loss, [w])
    found = hessian(lambda: Final.apply(w).sum(), [w], method="finite_differences")
    torch.testing.assert_close(found.dense(), 2 * torch.eye(3), atol=1e-8, rtol=0)  # of the differences
    assert eigenpairs(found).method == "finite_differences"


def test_such_a_function_that_does_not_lead_to_the_parameters_is_none_of_their_business():
    w, other = leaf(3), leaf(3)
    found = hessian(lambda: (Final.apply(other) * w).square().sum(), [w]).dense()
    torch.testing.assert_close(found, torch.diag(2 * other.detach() ** 4))


def test_an_operation_of_torch_without_second_derivative_is_named():
    lengths = torch.full((1,), 4)
    w = leaf(4, 1, 3)

    def loss():
        return functional.ctc_loss(w.log_softmax(-1), torch.tensor([[1, 2]]), lengths, torch.tensor([2]))

    with pytest.raises(RuntimeError, match=r"ctc_loss_backward.* cannot be differentiated twice"):
        hessian(loss, [w])


def test_weight_norm_whose_second_derivative_torch_gets_wrong_is_refused():
    layer, x = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), torch.randn(6, 4)

    def loss():
        return layer(x).square().mean()

    with pytest.raises(RuntimeError, match=r"WeightNormInterface cannot be differentiated twice"):
        hessian(loss, layer.parameters())
    dense = hessian(loss, layer.parameters(), method="finite_differences").dense()
    torch.testing.assert_close(dense, dense.T, atol=1e-8, rtol=0)  # of the differences
    wrong = dense_columns(layer, loss)
    assert float((wrong - wrong.T).abs().max()) > 0.01  # once torch is right, it need not be refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: hessian(lambda: w.sum(), []), "params: must be tensors that require gradients"),
        (lambda w: hessian(lambda: w.sum(), [w.detach()]), "params: must be tensors that require gradients"),
        (lambda w: hessian(lambda: w.outer(w), [w]), r"loss: must return one number, or one per member, got shape"),
        (lambda w: hessian(lambda: 3.0, [w]), "loss: must return one number, or one per member, got float"),
        (lambda w: hessian(lambda: w[:2], [w]), "every parameter's first axis must be theirs"),
        (lambda w: hessian(lambda batch: w.sum(), [w], []), "batches: there is none"),
        (lambda w: hessian(lambda: w.sum(), [w], method="fd"), "method = 'fd': must be one of auto"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(leaf(3))


def test_a_loss_that_is_linear_in_its_parameters_has_no_curvature():
    w = leaf(3)
    assert torch.equal(hessian(lambda: w.sum(), [w]).dense(), torch.zeros(3, 3))
    assert torch.equal(gauss_newton(lambda: w * 2, lambda f: f.sum(), [w]).dense(), torch.zeros(3, 3))
