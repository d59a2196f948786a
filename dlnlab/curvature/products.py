"""Products with the Hessian or the Gauss-Newton matrix of a loss, over one batch or many."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlnlab.curvature.operators import Operator

Product = Callable[[Sequence[Tensor]], list[Tensor]]
"""A direction, one tensor for each parameter -> the matrix times it, likewise."""
Evaluation = tuple[Tensor, list[Tensor], Product]
"""Of one batch: the loss, its gradient, one tensor for each parameter, and the product."""
Methods = Literal["auto", "graph", "recompute", "finite_differences"]

_BYTES = 2**30
# Its fused backward pass takes the norm for a constant (torch 2.13; seen as a Hessian that is not symmetric).
_WRONG = ("WeightNormInterfaceBackward0",)
# Operations that have been differentiated twice without an error.
_PASSED: set[str] = set()
_TWICE = (
    "{} cannot be differentiated twice: write it with other operations, or ask for finite differences "
    "(method='finite_differences', of the Sharpness callback differences=True)"
)


def hessian(
    loss: Callable[..., Tensor],
    params: Iterable[Tensor],
    batches: Iterable[Any] | None = None,
    method: Methods = "auto",
    memory: float | None = None,
    rows: Callable[[Any], float] | None = None,
) -> "LossOperator":
    r"""The Hessian of a loss in some of its parameters, as an operator.

    The loss may be a number, or one number per member of an ensemble, (E,), whose parameters all have the members as their
    first axis: then every member has a Hessian of its own, and one product serves all.

    Parameters the loss does not use have zero rows, tied ones count once. The loss is evaluated once and the graph of its
    gradient kept (1.4 to 2.1 times faster than without), in eager mode, without autocast, with attention in its math
    kernel: the others have no second derivative. Random numbers the loss draws (dropout) are the same at every evaluation,
    and the generators are left as they were. Buffers that the loss changes, it changes here too.

    Args:
        loss: A function of no arguments, or of one batch where there are batches.
        params: Tensors that require gradients.
        batches: Batches, iterated again for every product whose graphs do not fit `memory`: the matrix is the mean of
            theirs, weighted by their numbers of rows. A one-time iterator is kept as a list.
        method: `graph` keeps the graph of every batch, `recompute` none, `auto` of as many batches as fit into `memory`.
            `finite_differences` takes central differences of gradients, for losses that cannot be differentiated twice:
            relative error about 1e-4 in float32, 1e-8 in float64; the operator's `method` says so.
        memory: Bytes of graphs that may be kept; None is 1 GiB of batches, or the whole graph of a single loss.
        rows: A batch's weight; None is the length of the first tensor in it.

    Returns:
        The operator, of shape (n, n) or (E, n, n), n the number of entries of all parameters (of one member).

    Raises:
        ValueError: If nothing requires a gradient or an argument is out of range.
        RuntimeError: If some operation cannot be differentiated twice; it is named.

    Example:
        >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> hessian(lambda: (w[0] * w[1] - 2) ** 2 / 2, [w]).dense()
        tensor([[4., 2.],
                [2., 1.]], dtype=torch.float64)

    Reference:
        Pearlmutter 1994 (Hessian-vector products).
    """

    def build(*batch: Any) -> Evaluation:
        value = loss(*batch)
        total = _total(value)
        _refuse_final_functions(total, params)
        gradients = _grad(total, params, create_graph=True)
        used = [(gradient, i) for i, gradient in enumerate(gradients) if gradient.requires_grad]
        outputs = [gradient for gradient, _ in used]

        def product(direction: Sequence[Tensor]) -> list[Tensor]:
            if not used:  # a loss linear in its parameters
                return [torch.zeros_like(param) for param in params]
            return _grad(outputs, params, [direction[i] for _, i in used], retain_graph=True)

        _refuse_final_operations(outputs, product, params)
        return value, gradients, product

    def differences(*batch: Any) -> Evaluation:
        states = _random_states(params)

        def evaluate() -> tuple[Tensor, list[Tensor]]:
            _set_random_states(states)
            value = loss(*batch)
            return value.detach(), _grad(_total(value), params)

        def product(direction: Sequence[Tensor]) -> list[Tensor]:
            return _central_difference(lambda: evaluate()[1], params, direction, members=value.ndim)

        value, gradients = evaluate()
        return value, gradients, product

    params = _trainable(params)
    return LossOperator(differences if method == "finite_differences" else build, params, batches, method, memory, rows)


def gauss_newton(
    outputs: Callable[..., Tensor],
    loss: Callable[..., Tensor],
    params: Iterable[Tensor],
    batches: Iterable[Any] | None = None,
    method: Literal["auto", "graph", "recompute"] = "auto",
    memory: float | None = None,
    rows: Callable[[Any], float] | None = None,
) -> "LossOperator":
    r"""The Gauss-Newton matrix J^T (d^2 loss/d outputs^2) J of a loss of a model's outputs.

    It is the Hessian without the outputs' own curvature, and has no negative eigenvalue where the loss is convex in them.

    Args:
        outputs: The model's outputs: a function of no arguments, or of one batch.
        loss: Of the outputs (and the batch): a number, or one per member (E,).
        params: As for `hessian`, and so are the others.
        batches: Batches.
        method: Whether graphs are kept.
        memory: Bytes of graphs that may be kept.
        rows: A batch's weight.

    Returns:
        The operator.

    Raises:
        ValueError: As `hessian`.
        RuntimeError: If some operation cannot be differentiated twice; it is named.

    Reference:
        Schraudolph 2002.
    """

    def build(*batch: Any) -> Evaluation:
        found = outputs(*batch)
        value = loss(found, *batch)
        total = _total(value)
        _refuse_final_functions(total, params)
        cotangent = torch.zeros_like(found, requires_grad=True)
        # Linear in the cotangent, so that its derivative there is the directional derivative J v.
        transposed = _grad(found, params, cotangent, create_graph=True)
        (slope,) = _grad(total, [found], create_graph=True)
        used = [(gradient, i) for i, gradient in enumerate(transposed) if gradient.requires_grad]
        pulled = [gradient for gradient, _ in used]

        def product(direction: Sequence[Tensor]) -> list[Tensor]:
            if not used or not slope.requires_grad:
                return [torch.zeros_like(param) for param in params]
            (change,) = _grad(pulled, [cotangent], [direction[i] for _, i in used], retain_graph=True)
            (curved,) = _grad(slope, [found], change, retain_graph=True)
            return _grad(found, params, curved, retain_graph=True)

        _refuse_final_operations([*pulled, slope], product, params)
        return value, _grad(found, params, slope.detach(), retain_graph=True), product

    params = _trainable(params)
    return LossOperator(build, params, batches, method, memory, rows)


def mean_loss(
    loss: Callable[..., Tensor],
    params: Iterable[Tensor],
    batches: Iterable[Any] | None = None,
    rows: Callable[[Any], float] | None = None,
) -> Callable[[], tuple[Tensor, float]]:
    """A loss without its gradient, evaluated as often as wanted, each time with the same random numbers.

    Args:
        loss: As for `hessian`, and so are the others.
        params: Where random numbers may be drawn.
        batches: Batches.
        rows: A batch's weight.

    Returns:
        A function: nothing -> the mean loss, and the weight of all batches.
    """
    passes = Passes(_trainable(params), batches, rows)

    def evaluate() -> tuple[Tensor, float]:
        total, whole = 0.0, 0.0
        with passes.walk() as each, torch.no_grad():
            for _, weight, arguments in each:
                total, whole = total + weight * loss(*arguments), whole + weight
        return total / whole, whole

    return evaluate


class LossOperator(Operator):
    """The weighted mean over batches of a matrix that belongs to a loss; made by `hessian` and `gauss_newton`.

    Args:
        build: A batch (or nothing) -> its loss, the loss's gradient, and the product with its matrix.
        params: The parameters, in the order of a vector's entries.
        batches: See `hessian`.
        method: See `hessian`.
        memory: See `hessian`.
        rows: See `hessian`.
    """

    def __init__(
        self,
        build: Callable[..., Evaluation],
        params: list[Tensor],
        batches: Iterable[Any] | None = None,
        method: Methods = "auto",
        memory: float | None = None,
        rows: Callable[[Any], float] | None = None,
    ) -> None:
        if method not in ("auto", "graph", "recompute", "finite_differences"):
            raise ValueError(f"method = {method!r}: must be one of auto, graph, recompute, finite_differences")
        self.params, self._build = params, build
        self._passes = Passes(params, batches, rows)
        self._kept: list[Product] = []
        """Products of the first batches, whose graphs are kept."""
        self.weights: list[float] = []
        self.loss: Tensor | None = None
        """The mean loss, () or (E,)."""
        self._reduce: Callable[[Tensor], Tensor] | None = None
        if method == "finite_differences":
            self.method = method
        unlimited = method == "graph" or (memory is None and batches is None)
        limit = float("inf") if unlimited else _BYTES if memory is None else memory
        self._first_pass(limit if method in ("auto", "graph") else 0.0)
        members = self.loss.shape[0] if self.loss.ndim == 1 else None
        if members is not None and any(param.shape[:1] != (members,) for param in params):
            raise ValueError(f"the loss has {members} members: every parameter's first axis must be theirs")
        size = sum(param.numel() for param in params) // (members or 1)
        kind = torch.float32  # products of half precision are summed in single
        for param in params:
            kind = torch.promote_types(kind, param.dtype)
        super().__init__(size, members, kind, params[0].device)
        self._total_weight = sum(self.weights)
        self.loss = self.loss / self._total_weight
        self.gradient = self.flatten(self._gradients) / self._total_weight
        """The mean gradient, (n,) or (E, n)."""
        del self._gradients

    def share(self, reduce: Callable[[Tensor], Tensor], agree: Callable[[bool], bool]) -> "LossOperator":
        """Make this the mean over the batches of several processes; all must call its `matvec` alike.

        Args:
            reduce: Sums a tensor over the processes.
            agree: Lets one process decide for all.

        Returns:
            This operator.
        """
        weight = torch.tensor([self._total_weight], dtype=torch.float64, device=self.device)
        total = float(reduce(weight))
        self.loss = reduce(self.loss * (self._total_weight / total))
        self.gradient = reduce(self.gradient * (self._total_weight / total))
        self._total_weight, self._reduce, self.agree = total, reduce, agree
        return self

    def matvec(self, vectors: Tensor) -> Tensor:
        """See `Operator.matvec`."""
        dims = len(self.shape) - 1
        flat = vectors.reshape(-1, *vectors.shape[vectors.ndim - dims :])
        result = torch.stack(self._products([self.split(row) for row in flat]))
        if self._reduce is not None:
            result = self._reduce(result)
        return result.reshape(vectors.shape)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector (n,) or (E, n) as tensors of the parameters' shapes."""
        lead = len(self.shape) - 2
        sizes = [param.numel() // (self.shape[0] if lead else 1) for param in self.params]
        parts = vector.split(sizes, -1)
        return [part.reshape(param.shape).to(param) for part, param in zip(parts, self.params, strict=True)]

    def flatten(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes as a vector, (n,) or (E, n)."""
        lead = self.shape[:1] if len(self.shape) == 3 else ()
        return torch.cat([part.reshape(*lead, -1).to(self.dtype) for part in parts], -1)

    def _first_pass(self, limit: float) -> None:
        """Evaluate every batch once: weights, the loss, and the graphs that may be kept."""
        held = 0.0
        with self._passes.walk() as batches:
            self._gradients = [torch.zeros_like(param) for param in self.params]
            for number, weight, arguments in batches:
                keep = number == len(self._kept) and held < limit
                if keep and limit < float("inf"):
                    states = _random_states(self.params)
                    held += self._bytes(arguments)
                    keep = held <= limit
                    _set_random_states(states)
                value, gradients, product = self._build(*arguments)
                weighted = weight * value.detach()
                self.loss = weighted if self.loss is None else self.loss + weighted
                self.weights.append(weight)
                for total, gradient in zip(self._gradients, gradients, strict=True):
                    total.add_(gradient.detach(), alpha=weight)
                if keep:
                    self._kept.append(product)
                del value, gradients, product  # or the graph would live until the next is there
        if not self.weights:
            raise ValueError("batches: there is none")

    def _bytes(self, arguments: tuple) -> int:
        """What a batch's graph holds, beyond the parameters."""
        seen: dict[int, int] = {}

        def add(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        # The graph that is kept is another one, without hooks that would be called at every product.
        with saved_tensors_hooks(add, lambda tensor: tensor):
            self._build(*arguments)
        for param in self.params:
            seen.pop(param.untyped_storage().data_ptr(), None)
        return sum(seen.values())

    def _products(self, directions: list[list[Tensor]]) -> list[Tensor]:
        """The mean over batches of the products with several directions."""
        means: list[Tensor] = []

        def add(product: Product, weight: float) -> None:
            found = [self.flatten(product(direction)) for direction in directions]
            share = weight / self._total_weight
            if means:
                for mean, part in zip(means, found, strict=True):
                    mean.add_(part, alpha=share)
            else:
                means.extend(part.mul_(share) for part in found)

        kept = len(self._kept)
        with torch.inference_mode(False), torch.autocast(self.params[0].device.type, enabled=False):
            for product, weight in zip(self._kept, self.weights, strict=False):
                add(product, weight)
        if kept < len(self.weights):
            with self._passes.walk() as batches:
                for number, weight, arguments in batches:
                    if number >= kept:
                        add(self._build(*arguments)[2], weight)
        return means


class Passes:
    """Passes over batches that all see the same batches and the same random numbers, and leave the generators alone.

    Args:
        params: Where random numbers may be drawn.
        batches: Batches, or None for a loss of no arguments.
        rows: A batch's weight.
    """

    def __init__(
        self, params: list[Tensor], batches: Iterable[Any] | None, rows: Callable[[Any], float] | None
    ) -> None:
        self.params = params
        self.batches = list(batches) if isinstance(batches, Iterator) else batches
        self.rows = rows or num_rows
        self._generator = getattr(batches, "generator", None)  # a shuffling loader's own
        self._before = _random_states(params)

    @contextmanager
    def walk(self) -> Iterator[Iterator[tuple[int, float, tuple]]]:
        """One pass: the batches' numbers, their weights, and the loss's arguments."""
        order = None if self._generator is None else self._generator.get_state()

        def each() -> Iterator[tuple[int, float, tuple]]:
            _set_random_states(self._before)
            if self.batches is None:
                yield 0, 1.0, ()
                return
            seed, batches = torch.initial_seed(), iter(self.batches)
            for number in count():
                if number:  # whether the last batch was evaluated or not
                    _seed(self.params, seed + number)
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                yield number, float(self.rows(batch)), (batch,)

        states = _random_states(self.params)
        try:
            with twice_differentiable(self.params[0].device.type):
                yield each()
        finally:
            _set_random_states(states)
            if order is not None:
                self._generator.set_state(order)


def num_rows(batch: Any) -> int:
    """The rows of a batch: the length of the first tensor found in it.

    Raises:
        ValueError: If it holds no tensor.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    for item in items:
        try:
            return num_rows(item)
        except ValueError:
            continue
    raise ValueError(f"batches: no tensor in a {type(batch).__name__}: give rows, a function batch -> its weight")


# Differentiation -----------------------------------------------------------------------------------------------------


def _total(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim > 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: must return one number, or one per member, got {what}")
    return value.sum()


def _trainable(params: Iterable[Tensor]) -> list[Tensor]:
    params = [params] if isinstance(params, Tensor) else list(params)
    # Tied parameters are one, and what is frozen is no parameter.
    found = list({id(param): param for param in params if param.requires_grad}.values())
    if not found:
        raise ValueError("params: must be tensors that require gradients, there is none")
    return found


def _grad(outputs: Any, inputs: list[Tensor], along: Any = None, **options: Any) -> list[Tensor]:
    try:
        return list(torch.autograd.grad(outputs, inputs, along, allow_unused=True, materialize_grads=True, **options))
    except RuntimeError as error:
        text = str(error)
        if "derivative for" in text and "not implemented" in text:
            operation = text.split("derivative for")[1].split("is not")[0].strip(" '")
        elif "double backward" in text or "double-backward" in text:
            operation = text.split(".")[0]
        else:
            raise
    # Outside of the handler, whose traceback would hold the graph.
    raise RuntimeError(_TWICE.format(operation))


def _refuse_final_functions(loss: Tensor, params: list[Tensor]) -> None:
    """Refuse functions on the way to the parameters whose second derivative torch leaves out without a word.

    They are custom functions whose backward pass is marked by `once_differentiable`, and those of `_WRONG`.
    """
    parents = _graph([loss])
    final = [node for node in parents if _is_final(node)]
    if not final:
        return
    ends = {param.view_as(param).grad_fn.next_functions[0][0] for param in params}

    def reaches(node: Any) -> bool:
        waiting, seen = [node], set()
        while waiting:
            node = waiting.pop()
            if node in ends:
                return True
            if node is not None and node not in seen:
                seen.add(node)
                waiting += parents[node]
        return False

    names = dict.fromkeys(
        type(node).__name__.removesuffix("0").removesuffix("Backward") for node in final if reaches(node)
    )
    if names:
        raise RuntimeError(_TWICE.format(", ".join(names)))


def _refuse_final_operations(gradients: list[Tensor], product: Product, params: list[Tensor]) -> None:
    """Refuse at once what cannot be differentiated twice: try a product, unless all its operations have passed before."""
    operations = {node.name() for node in _graph(gradients)}
    if not operations <= _PASSED:
        product([torch.zeros_like(param) for param in params])
        _PASSED.update(operations)


def _graph(tensors: Iterable[Tensor]) -> dict[Any, list[Any]]:
    """The nodes that tensors come from, each with its parents."""
    parents: dict[Any, list[Any]] = {}
    waiting = [tensor.grad_fn for tensor in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in parents:
            parents[node] = [parent for parent, _ in node.next_functions]
            waiting += parents[node]
    return parents


def _is_final(node: Any) -> bool:
    """Whether a node's second derivative is missing without an error."""
    if node.name() in _WRONG:
        return True
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    while hasattr(backward, "__wrapped__"):
        if backward.__code__.co_filename == torch.autograd.function.__file__:
            return True
        backward = backward.__wrapped__
    return False


def _central_difference(
    gradient: Callable[[], list[Tensor]], params: list[Tensor], direction: Sequence[Tensor], members: int
) -> list[Tensor]:
    """(g(theta + h v) - g(theta - h v))/(2 h), at the h that balances rounding and curvature; each member has its own."""

    def norm(tensors: Sequence[Tensor]) -> Tensor:
        return torch.sqrt(sum(part.detach().double().flatten(members).square().sum(-1) for part in tensors))

    length = norm(direction)
    epsilon = max(torch.finfo(param.dtype).eps for param in params)
    h = epsilon ** (1 / 3) * norm(params).clamp_min(1) / torch.where(length == 0, 1, length)
    steps = [h.reshape(h.shape + (1,) * (param.ndim - members)).to(param) for param in params]
    saved, found = [param.data for param in params], []
    try:
        for sign in (1, -1):
            # Other tensors take the parameters' place: nothing that refers to their own notices.
            for param, at, step, part in zip(params, saved, steps, direction, strict=True):
                param.data = at + sign * step * part
            found.append(gradient())
    finally:
        for param, at in zip(params, saved, strict=True):
            param.data = at
    return [(plus - minus) / (2 * step) for plus, minus, step in zip(*found, steps, strict=True)]


@contextmanager
def twice_differentiable(device_type: str) -> Iterator[None]:
    """Evaluate with gradients, eagerly, in the parameters' own precision, attention in its math kernel."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


# Random numbers ------------------------------------------------------------------------------------------------------


def _random_states(params: list[Tensor]) -> list[Any]:
    devices = {param.device for param in params if param.device.type == "cuda"}
    return [
        torch.get_rng_state(),
        {device: torch.cuda.get_rng_state(device) for device in devices},
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002 (the global generator is the point)
    ]


def _set_random_states(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    for device, state in states[1].items():
        torch.cuda.set_rng_state(state, device)
    random.setstate(states[2])
    np.random.set_state(states[3])  # noqa: NPY002


def _seed(params: list[Tensor], seed: int) -> None:
    torch.random.default_generator.manual_seed(seed)
    for device in {param.device for param in params if param.device.type == "cuda"}:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
