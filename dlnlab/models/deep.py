"""The deep linear network, x -> W_L ... W_1 x."""

from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import Parameter, ParameterList

from dlnlab import checks, kernels
from dlnlab.kernels import DeepGuard, EntryLoss, deep_step
from dlnlab.models.base import Guard, LinearNetwork, stack_records
from dlnlab.models.batch import Batch

INITS = ("gaussian", "orthogonal", "balanced", "spectral", "rank_minimum")
REDUCTIONS = ("mean", "sum")


class DeepLinearNetwork(LinearNetwork):
    r"""The deep linear network A = W_L ... W_1, on observed entries of a matrix or on inputs.

    .. math:: \frac1N \sum_{(i, j)} (A_{ij} - Y_{ij})^2 \; + \; \kappa \sum_l |W_l|_F^2

    The parameters are `weights.0` = W_1 (E, H_1, D) to `weights.<L-1>` = W_L (E, K, H_{L-1}); `weight_decay` of the
    optimizer is kappa, `train_loss` the data term alone. SGD on entries costs O(L H^2) for each entry of the batch.

    Args:
        depth: L, the number of layers, at least 2.
        width: H, or one number for each of the L - 1 hidden layers; None is the larger of D and K.
        shape: (K, D); None takes the data's.
        init: `gaussian`: entries N(0, init_scale^2/fan-in). `orthogonal`: init_scale times (semi-)orthogonal factors.
            `balanced`: W_{l+1}^T W_{l+1} = W_l W_l^T, for the product init_scale^L times a Gaussian matrix of variance
            1/D. `spectral`: balanced factors of the observed entries over their share of the matrix, zero elsewhere, cut
            to `init_rank`. `rank_minimum`: a local minimum of the loss and its penalty among products of rank
            `init_rank` or less, from the spectral start; its further hidden units are zero.
        init_scale: Positive; of the first three. May be an axis.
        init_rank: Of the last two; None is the full rank.
        init_matrix: (K, D), a list of rows, instead of the observed entries.
        reduction: Of the data loss over the entries of a batch: `mean` or `sum`.
        half: Multiply it by 1/2.
        **kwargs: Those of `LinearNetwork`.

    Raises:
        ValueError: If an argument is out of range, or does not fit the data.

    Reference:
        wang2024 (the network, its penalty, single entries). Which normalisation of the loss the paper uses could not be
        confirmed; with half of the loss lr and kappa are twice and half as large.
    """

    axes: ClassVar[tuple[str, ...]] = (*LinearNetwork.axes, "init_scale")
    lr_symbol: ClassVar[str] = r"\eta"

    def __init__(
        self,
        depth: int = 3,
        width: int | list[int] | None = None,
        shape: tuple[int, int] | None = None,
        init: Literal["gaussian", "orthogonal", "balanced", "spectral", "rank_minimum"] = "gaussian",
        init_scale: float = 1.0,
        init_rank: int | None = None,
        init_matrix: list[list[float]] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        half: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.depth = checks.integer("depth", depth, at_least=2)
        widths = list(width) if isinstance(width, list | tuple) else [width] * (depth - 1)
        if len(widths) != depth - 1:
            raise ValueError(f"width = {width}: must be one number or {depth - 1}, one for each hidden layer")
        self.widths = [None if each is None else checks.integer("width", each, at_least=1) for each in widths]
        self.init = checks.one_of("init", init, INITS)
        self.init_scale = init_scale
        for value in self.per_member("init_scale"):
            checks.positive("init_scale", value)
        self.init_rank = None if init_rank is None else checks.integer("init_rank", init_rank, at_least=1)
        self.init_matrix = None if init_matrix is None else _matrix(init_matrix)
        self.reduction = checks.one_of("reduction", reduction, REDUCTIONS)
        self.halved = checks.flag("half", half)  # `half` is a method of every torch module
        self.weights = ParameterList()
        self._kernel: Any = None
        self._minimised = False
        if shape is not None:
            if len(shape) != 2:
                raise ValueError(f"shape = {shape}: must be two numbers, the rows and the columns of the matrix")
            height, dim = (checks.integer("shape", size, at_least=1) for size in shape)
            if init in ("spectral", "rank_minimum") and init_matrix is None:
                raise ValueError(f"init = {init}: starts from the data; leave `shape` to them, or give init_matrix")
            self.build(dim, height)

    def build(self, num_features: int, num_outputs: int | None) -> None:
        """W_1, ..., W_L as `init` says; the vector predictor of data without K is W_L ... W_1 of one row."""
        self._is_vector = num_outputs is None
        sizes = self._sizes(num_features, num_outputs or 1)
        self.weights.extend(Parameter(w.to(self.number_type).contiguous()) for w in self._initial(sizes))
        # What one call of the compiled kernel hands to the next (`dlnlab.kernels.cpu_deep_steps`).
        for name, layer in (("lazy_first", self.weights[0].mT), ("lazy_last", self.weights[-1])):
            self.register_buffer(name, torch.zeros_like(layer, memory_format=torch.contiguous_format))

    def _sizes(self, dim: int, height: int) -> list[int]:
        """D, H_1, ..., H_{L-1}, K."""
        return [dim, *(max(dim, height) if width is None else width for width in self.widths), height]

    def numbers_per_member(self, num_features: int, num_outputs: int | None) -> int:
        """All layers."""
        sizes = self._sizes(num_features, num_outputs or 1)
        return sum(a * b for a, b in pairwise(sizes))

    # Initialisations --------------------------------------------------------------------------------------------------

    def _initial(self, sizes: list[int]) -> list[Tensor]:
        shapes = [(b, a) for a, b in pairwise(sizes)]
        scale = torch.tensor(self.per_member("init_scale"), dtype=torch.float64)[:, None, None]
        counts = [a * b for a, b in shapes]
        if self.init in ("gaussian", "orthogonal"):
            draws = self.init_normals(sum(counts)).double().split(counts, dim=1)
            draws = [part.unflatten(1, shape) for part, shape in zip(draws, shapes, strict=True)]
            if self.init == "gaussian":
                return [scale * part / part.shape[-1] ** 0.5 for part in draws]
            return [scale * _orthogonal(part) for part in draws]
        # Hidden bases of their own, so that no coordinate is special.
        inner = [size * size for size in sizes[1:-1]]
        draws = self.init_normals(sizes[0] * sizes[-1] + sum(inner)).double().split([sizes[0] * sizes[-1], *inner], 1)
        bases = [
            _orthogonal(part.unflatten(1, (size, size))) for part, size in zip(draws[1:], sizes[1:-1], strict=True)
        ]
        if self.init == "balanced":
            matrix = scale**self.depth * draws[0].unflatten(1, (sizes[-1], sizes[0])) / sizes[0] ** 0.5
            return _balanced(matrix, sizes, bases)
        matrix = self._start_matrix(sizes)
        if self.init == "rank_minimum":
            bases = None  # the zero hidden units are whole coordinates
        return _balanced(matrix, sizes, bases, self.init_rank)

    def _start_matrix(self, sizes: list[int]) -> Tensor:
        """What `spectral` factors, (E, K, D)."""
        shape = sizes[-1], sizes[0]
        if self.init_matrix is not None:
            if tuple(self.init_matrix.shape) != shape:
                raise ValueError(f"init_matrix has shape {tuple(self.init_matrix.shape)}: must be {shape}")
            return self.init_matrix.expand(self.num_members, *shape)
        if self.problems.matrix_shape is None:
            raise ValueError(f"init = {self.init}: the data have no observed entries to start from; give init_matrix")
        places, y = self.problems.x.cpu(), self.problems.y.double().cpu()
        filled = torch.zeros(len(y), shape[0] * shape[1], dtype=torch.float64)
        filled.scatter_(1, places[..., 0] * shape[1] + places[..., 1], y * (shape[0] * shape[1] / y.shape[1]))
        return filled.unflatten(1, shape)[self.problem_index.cpu()]

    def setup(self, stage: str) -> None:
        """See `LinearNetwork.setup`; `rank_minimum` needs the optimizer's weight decay, so it comes last."""
        super().setup(stage)
        if stage == "fit" and self.init == "rank_minimum" and not self._minimised:
            self._minimised = True
            self._minimise()

    @torch.no_grad()
    def _minimise(self) -> None:
        """Go to the nearest local minimum of loss and penalty, with `init_rank` hidden units in each layer."""
        kappa = torch.as_tensor(self._optimizer.param_groups[0].get("weight_decay", 0.0), dtype=torch.float64)
        kappa = kappa.expand(self.num_members)
        rank = self.init_rank if self.init_rank is not None else min(self._sizes(*reversed(self._matrix_shape())))
        shapes = [
            (min(a, rank) if i < self.depth - 1 else a, min(b, rank) if i else b)
            for i, (a, b) in enumerate(tuple(w.shape[1:]) for w in self.weights)
        ]
        counts = [a * b for a, b in shapes]
        solved: dict[Any, list[Tensor]] = {}
        for m in range(self.num_members):
            key = int(self.problem_index[m]), float(kappa[m])
            if key not in solved:
                data = self.full_batch(torch.tensor([m], device=self.device))
                data = Batch(_doubled(data.x).cpu(), _doubled(data.y).cpu(), data.members.cpu(), data.problem.cpu())

                def objective(
                    numbers: np.ndarray, data: Batch = data, kappa: float = key[1]
                ) -> tuple[float, np.ndarray]:
                    theta = torch.from_numpy(numbers.copy()).requires_grad_()
                    with torch.enable_grad():
                        layers = [part.view(1, *shape) for part, shape in zip(theta.split(counts), shapes, strict=True)]
                        value = (
                            self._scaled(data, data.losses(self._as_predictor(layers))) + kappa * theta.square().sum()
                        )
                        value.backward()
                    return float(value.detach()), theta.grad.numpy()

                parts = [
                    w[m, : s[0], : s[1]].double().cpu().flatten() for w, s in zip(self.weights, shapes, strict=True)
                ]
                options = {"maxiter": 20_000, "maxfun": 10**6, "gtol": 1e-12, "ftol": 0.0, "maxcor": 50}
                found = minimize(objective, torch.cat(parts).numpy(), jac=True, method="L-BFGS-B", options=options).x
                solved[key] = list(torch.from_numpy(found).split(counts))
            for w, part, shape in zip(self.weights, solved[key], shapes, strict=True):
                w[m] = 0
                w[m, : shape[0], : shape[1]] = part.view(shape).to(w)

    def _matrix_shape(self) -> tuple[int, int]:
        return self.weights[-1].shape[1], self.weights[0].shape[2]

    # The network ------------------------------------------------------------------------------------------------------

    def predictor(self) -> Tensor:
        """W_L ... W_1, (E, K, D), or (E, D) where the data have no K."""
        return self._as_predictor(list(self.weights))

    def _as_predictor(self, weights: list[Tensor]) -> Tensor:
        product = weights[0]
        for w in weights[1:]:
            product = w @ product
        return product[:, 0] if self._is_vector else product

    def losses(self, batch: Batch) -> Tensor:
        """The data loss of each member of the batch, as `reduction` and `half` say; the penalty is the optimizer's."""
        product = self.weights[0][batch.members]
        for w in list(self.weights)[1:]:
            product = w[batch.members] @ product
        return self._scaled(batch, batch.losses(product[:, 0] if self._is_vector else product))

    def _scaled(self, batch: Batch, half_means: Tensor) -> Tensor:
        count = batch.y.shape[1] if self.reduction == "sum" else 1
        return half_means * (count if self.halved else 2 * count)

    def squared_loss_refusal(self) -> str | None:
        """See `LinearNetwork.squared_loss_refusal`; with `half`, the mean is that loss."""
        changed = self.changed_since(DeepLinearNetwork)
        if changed is not None or (self.halved and self.reduction == "mean"):
            return changed
        return f"half = {self.halved}, reduction = {self.reduction} is another multiple of it (half: true, reduction: mean)"

    # The closed form --------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """See `LinearNetwork.restart`; the data may be others."""
        super().restart()
        self._kernel = None

    def closed_form_refusal(self) -> str | None:
        """As `LinearNetwork.closed_form_refusal`; on inputs there is none."""
        if self.problems.matrix_shape is None:
            return "the data are inputs and not entries of the matrix"
        return super().closed_form_refusal()

    @property
    def kernel(self) -> Any:
        """The compiled kernel of the model's device, or a line saying why it has none."""
        if self._kernel is None:
            sizes = [self.weights[0].shape[2], *(w.shape[1] for w in self.weights)]
            self._kernel = kernels.deep_kernel(self.problems.x, self.problems.y, sizes)
        return self._kernel

    @property
    def _kernel_refusal(self) -> str | None:
        """Why the next steps are not the kernel's, in a line, or None if they are."""
        return self.kernel if isinstance(self.kernel, str) else self.kernel.refusal(self._batches.size)

    @property
    def path(self) -> str:
        """How this model is advanced, and why."""
        reason = None if self.closed_form_refusal() else self._kernel_refusal
        return super().path if reason is None else f"{super().path}, in torch: {reason}"

    def advance_closed_form(
        self, k: int, record_steps: list[int], variables: tuple[str, ...], guard: Guard | None
    ) -> tuple[int, dict[str, Tensor]]:
        """Steps without autograd; see `LinearNetwork.advance_closed_form`. A record costs a call of the kernel."""
        start = step = self._optimizer.num_steps
        end, records, due = start + k, [], set(record_steps)
        advance = self._advance_compiled if self._kernel_refusal is None else self._advance_in_torch
        while step < end:
            stop = min([end, *(s for s in record_steps if s > step)])
            step += advance(step, stop, guard) if len(self.running) else stop - step
            self._optimizer.num_steps = step
            self._arrive(step)
            if step in due:
                records.append(self.measure(variables))
            if len(self.running) == 0:
                break
        return step - start, stack_records(records)

    def _hyperparameters(self) -> tuple[Tensor, Tensor]:
        """Lr and 1 - 2 lr weight_decay, (E,), without what schedules multiply them by."""
        lr, kappa = self.unscheduled("lr"), self.unscheduled("weight_decay")
        return lr, 1 - 2 * lr * kappa

    @property
    def _entry_loss(self) -> EntryLoss:
        return EntryLoss(0.5 if self.halved else 1.0, self.reduction == "mean")

    def _advance_compiled(self, start: int, stop: int, guard: Guard | None) -> int:
        """In one call of the device's kernel, guard included; returns the steps taken."""
        lr, decay = self._hyperparameters()
        rule = None
        if guard is not None:
            self.begin(start)
            kept = [self._kept[f"parameter.weights.{layer}"] for layer in range(self.depth)]
            rule = DeepGuard(self.guard_tol, self.loss_bound, guard.every_n_steps, kept, self.diverged_by)
        return self._kernel.advance(
            [w.data for w in self.weights], (self.lazy_first, self.lazy_last), lr, decay, self.problem_index, self._batches,
            self._entry_loss, start, stop, self.status, self.stopped_at, rule, kernels.num_threads(),
            self.rates(start, stop),
        )  # fmt: skip

    def _advance_in_torch(self, start: int, stop: int, guard: Guard | None) -> int:
        """The same on any device, all members at once; returns the steps taken."""
        (lr, decay), rates = self._hyperparameters(), self.rates(start, stop)
        for step in range(start, stop):
            if rates is not None:
                lr, decay = rates.at(step, self.number_type)
            for batch in self.batches(step, self.running):
                members, places = batch.members, batch.x
                if batch.problem is not None:
                    places = places[batch.problem]
                layers = [w[members] for w in self.weights]
                moved = deep_step(layers, places, batch.targets, lr[members], decay[members], self._entry_loss,
                                  batch.problem is not None)  # fmt: skip
                for w, new in zip(self.weights, moved, strict=True):
                    w[members] = new
            if guard is not None and (step + 1) % guard.every_n_steps == 0:
                self.check_members(step + 1)
                if len(self.running) == 0:
                    return step + 1 - start
        return stop - start


def _matrix(rows: Any) -> Tensor:
    try:
        matrix = torch.as_tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"init_matrix: must be rows of numbers: {error}") from None
    if matrix.ndim != 2 or not torch.isfinite(matrix).all():
        raise ValueError("init_matrix: must be rows of equally many finite numbers")
    return matrix


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _orthogonal(draws: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, (E, a, b)."""
    u, _, vh = torch.linalg.svd(draws, full_matrices=False)
    return u @ vh


def _balanced(matrix: Tensor, sizes: list[int], bases: list[Tensor] | None, rank: int | None = None) -> list[Tensor]:
    """Factors of matrices (E, K, D) with W_{l+1}^T W_{l+1} = W_l W_l^T, cut to the narrowest layer and to a rank.

    Args:
        matrix: What they multiply to, as far as their widths allow.
        sizes: D, H_1, ..., H_{L-1}, K.
        bases: An orthogonal matrix (E, H_l, H_l) for each hidden layer, in whose first columns its units lie; None is
            the identity.
        rank: At most so many singular values.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    count = min(s.shape[-1], *sizes[1:-1], *([] if rank is None else [rank]))
    depth, members = len(sizes) - 1, len(matrix)
    if bases is None:
        bases = [torch.eye(size, dtype=torch.float64).expand(members, -1, -1) for size in sizes[1:-1]]
    frames = [vh[:, :count].mT, *(basis[..., :count] for basis in bases), u[..., :count]]
    root = s[:, :count] ** (1 / depth)
    return [(frames[layer + 1] * root[:, None]) @ frames[layer].mT for layer in range(depth)]
