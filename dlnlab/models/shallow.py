"""The shallow linear network, a^T b against a number."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from dlnlab import checks, kernels, streams
from dlnlab.kernels import Course, Factors, Log, Multipliers, Rule, num_threads
from dlnlab.models.base import Guard, LinearNetwork
from dlnlab.optim.base import rotate
from dlnlab.theory import shallow

INITS = ("gaussian", "orthogonal", "equal", "region_A", "region_B", "region_C")
_RECORD_BYTES = 64 * 2**20
"""What the kernel's records may come to between two looks of the recorder."""


class ShallowLinearNetwork(LinearNetwork):
    r"""The shallow linear network x -> (a^T b) x, for the scalar factorisation a^T b = Phi of `ScalarTarget`.

    .. math:: L = \tfrac12 (a^\top b - \Phi)^2, \qquad a^\top b = (|p|^2 - |m|^2)/2, \qquad p, m = (a \pm b)/\sqrt2

    The parameters are `p`, `m` (E, D), D the width: a rotation of (a, b), so paths and Hessian spectrum are the same, but
    the imbalance a^2 - b^2 = 2 p m does not cancel. `GainSGD` is exact in two numbers a member, whatever the width, and
    its gain is how far the imbalance has shrunk: Q_i = Q_i(0) prod (1 - lr^2 eps^2).

    Initialisations, with alpha = `init_scale`; but for `gaussian`, |a|^2 + |b|^2 = 2 alpha^2, and where the width allows
    it |a| = |b| = alpha (of width 1, a and b are what a^T b and the sum of squares leave):

    - `gaussian`: entries N(0, alpha^2/D);
    - `orthogonal`: a^T b = 0;
    - `equal`: a = b, without any imbalance;
    - `region_A`, `region_B`, `region_C`: a^T b uniform in (Phi, alpha^2), (0, min(Phi, alpha^2)), (-alpha^2, 0).

    Directions, and the places in the regions, are drawn from the member's seed.

    Args:
        init: Its name. May be an axis.
        init_scale: alpha, positive. May be an axis.
        width: D.
        **kwargs: Those of `LinearNetwork`.

    Raises:
        ValueError: If an argument is out of range, or a region is empty.

    Reference:
        beneventano2025, section 2, and Figure 2 (regions); the rotated state and its two numbers: derived here.
    """

    axes: ClassVar[tuple[str, ...]] = (*LinearNetwork.axes, "init", "init_scale")
    lr_symbol: ClassVar[str] = r"\eta"
    dims: ClassVar = {"beta": ["feature"]}  # the coordinates are those of a and b

    def __init__(
        self,
        init: Literal["gaussian", "orthogonal", "equal", "region_A", "region_B", "region_C"] = "gaussian",
        init_scale: float = 1.0,
        width: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.init, self.init_scale = init, init_scale
        self.width = checks.integer("width", width, at_least=1)
        for value in self.per_member("init"):
            checks.one_of("init", value, INITS)
        for value in self.per_member("init_scale"):
            checks.positive("init_scale", value)

    # The network ------------------------------------------------------------------------------------------------------

    def build(self, num_features: int, num_outputs: int | None) -> None:
        """Draw p and m; see the class."""
        if num_features != 1 or num_outputs is not None:
            columns = "one column" if num_outputs is None else f"{num_outputs} columns"
            raise ValueError(
                f"ShallowLinearNetwork has one input and one output, the data have x of {num_features} columns and y of "
                f"{columns}; use ScalarTarget"
            )
        names = self.per_member("init")
        alpha = torch.tensor(self.per_member("init_scale"), dtype=torch.float64)
        draws = self.init_normals(2, self.width).double()
        p, m = rotate(*(draws * (alpha / self.width**0.5)[:, None, None]).unbind(1))
        named = torch.tensor([name != "gaussian" for name in names])
        if named.any():
            product = self._initial_product(names, alpha)
            along, across = _directions(draws)
            p = torch.where(named[:, None], (alpha**2 + product).sqrt()[:, None] * along, p)
            m = torch.where(named[:, None], (alpha**2 - product).sqrt()[:, None] * across, m)
        self.p, self.m = Parameter(p.to(self.number_type)), Parameter(m.to(self.number_type))

    def _initial_product(self, names: list[str], alpha: Tensor) -> Tensor:
        """a^T b at the start, (E,)."""
        key = streams.keys(self.ensemble.root, "init", self.ensemble.seed)
        place = 1 - streams.uniforms(key, torch.tensor([1]), 1)[:, 0, 0]  # in (0, 1]
        target, most = self.target.double().cpu(), alpha**2
        for i, name in enumerate(names):
            if name.startswith("region") and self.no_target is not None:
                raise ValueError(f"init = {name}: {self.no_target}")
            if name in ("region_A", "region_B") and target[i] <= 0:
                raise ValueError(f"init = {name}: the regions are those of a positive target, not {target[i]:g}")
            if name == "region_A" and most[i] <= target[i]:
                raise ValueError(
                    f"init = region_A: a^T b = {target[i]:g} needs init_scale above {float(target[i]) ** 0.5:.6g}, got "
                    f"{alpha[i]:g}"
                )
        of = {
            "gaussian": torch.zeros_like(alpha),
            "orthogonal": torch.zeros_like(alpha),
            "equal": most,
            "region_A": torch.minimum(target + (most - target) * place, most),
            "region_B": torch.minimum(target, most) * place * (1 - 2**-20),  # below Phi, which `place` may reach
            "region_C": -most * place,
        }
        return torch.stack([of[name][i] for i, name in enumerate(names)])

    def numbers_per_member(self, num_features: int, num_outputs: int | None) -> int:
        """Entries of p and m."""
        return 2 * self.width

    def predictor(self) -> Tensor:
        """a^T b, (E, 1)."""
        return (self.p.square().sum(-1, keepdim=True) - self.m.square().sum(-1, keepdim=True)) / 2

    @property
    def a(self) -> Tensor:
        """(p + m)/sqrt2, (E, D)."""
        return rotate(self.p, self.m)[0]

    @property
    def b(self) -> Tensor:
        """(p - m)/sqrt2, (E, D)."""
        return rotate(self.p, self.m)[1]

    @property
    def no_target(self) -> str | None:
        """Why the data have no Phi, or None if they have."""
        x = self.problems.x
        return None if x.shape[1] == 1 and bool((x == 1).all()) else "the data are not one row x = 1 (ScalarTarget)"

    @property
    def target(self) -> Tensor:
        """Phi, (E,), where there is one."""
        return self.problems.y[:, 0][self.problem_index]

    @property
    def eps(self) -> Tensor:
        """a^T b - Phi, (E,)."""
        return self.predictor()[:, 0] - self.target

    @property
    def norm_squared(self) -> Tensor:
        """|a|^2 + |b|^2, (E,)."""
        return self.p.square().sum(-1) + self.m.square().sum(-1)

    def variables(self) -> dict[str, Any]:
        """Those of every network, and `a`, `b` (E, D), `norm_squared` and `eps` (E,)."""
        own = {name: lambda name=name: getattr(self, name) for name in ("a", "b", "norm_squared", "eps")}
        return {**super().variables(), **own, "eps": self.no_target or own["eps"]}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One pair of factors."""
        return [{"params": [self.p, self.m], "form": "squares"}]

    def unit_of_lr(self) -> Tensor:
        """See `LinearNetwork.unit_of_lr`; `flow_edge` is 2/lambda where gradient flow from the member's start ends."""
        if self.lr_unit != "flow_edge":
            return super().unit_of_lr()
        if self.no_target is not None:
            raise ValueError(f"lr_unit = flow_edge: {self.no_target}")
        if (reason := self.squared_loss_refusal() or self.product_refusal()) is not None:
            raise ValueError(f"lr_unit = flow_edge: is of the squared loss of a^T b, but {reason}; use one or max_row")
        return 2 / shallow.norm_squared_at(self.target, shallow.spread(self.p.detach(), self.m.detach()))

    def product_refusal(self) -> str | None:
        """See `LinearNetwork.product_refusal`; beta is the product a^T b."""
        return self.changed_since(ShallowLinearNetwork, ("predictor", "parameter_groups"))

    # The closed form --------------------------------------------------------------------------------------------------

    def closed_form_refusal(self) -> str | None:
        """As `LinearNetwork.closed_form_refusal`; it is of one clean row x = 1 without weight decay."""
        if type(self).variables is not ShallowLinearNetwork.variables:
            return f"{type(self).__name__} has its own variables, which the kernel does not record"
        if self.no_target is not None:
            return self.no_target
        if self._has_noise:
            return "label_noise changes the target at every step"
        if bool((self.unscheduled("weight_decay") > 0).any()):
            return "weight_decay shrinks the factors beside the step"
        return super().closed_form_refusal()

    @property
    def path(self) -> str:
        """How this model is advanced, and why."""
        reason = kernels.shallow_kernel(self.device)[1]
        return super().path if self.closed_form_refusal() or reason is None else f"{super().path}, in torch: {reason}"

    def advance_closed_form(
        self, k: int, record_steps: list[int], variables: tuple[str, ...], guard: Guard | None
    ) -> tuple[int, dict[str, Tensor]]:
        """Steps in two numbers a member, guard and records included; see `LinearNetwork.advance_closed_form`."""
        optimizer = self._optimizer
        group, start = optimizer.pairs[0], optimizer.num_steps
        factors = optimizer.factors(group)
        lr = self.unscheduled("lr")
        state = Multipliers.of(factors)
        rule, kept = None, None
        if guard is not None:
            self.begin(start)
            names = {"parameter.p": "w_plus", "parameter.m": "w_minus"}
            kept = Factors(**{names.get(name, name.rpartition(".")[2]): value for name, value in self._kept.items()})
            rule = Rule(self.guard_tol, self.loss_bound, guard.every_n_steps, Multipliers.of(kept), self.diverged_by)
        row = 12 * 8 * self.p.numel()  # so that memory stays bounded
        if len(record_steps) > (most := max(1, _RECORD_BYTES // row)):
            record_steps = record_steps[:most]
            k = record_steps[-1] - start
        log = Log.allocate(record_steps, state)
        advance, _ = kernels.shallow_kernel(self.device)
        taken = advance(
            state, Course.of(factors, lr, self.target), start, start + k, self.status, self.stopped_at, rule, log,
            num_threads(), self.rates(start, start + k),
        )  # fmt: skip
        factors.copy_(state.factors(factors))
        if kept is not None:
            kept.copy_(rule.kept.factors(kept))
        optimizer.num_steps += taken
        reached = sum(step <= start + taken for step in record_steps)
        values = self._recorded(log, reached, variables, factors, lr)
        self._arrive(start + taken)
        return taken, values

    def _recorded(
        self, log: Log, reached: int, variables: tuple[str, ...], like: Factors, lr: Tensor
    ) -> dict[str, Tensor]:
        """The kernel's records of the steps it has reached -> variables (T, E, ...)."""
        factors = log.state.map(lambda tensor: tensor[:reached]).factors(like)
        plus, minus = (w.square().sum(-1) for w in (factors.w_plus, factors.w_minus))
        product = (plus - minus) / 2
        eps = product - self.target
        steps = torch.tensor(log.steps[:reached], dtype=torch.float64, device=self.device)
        values = {"status": log.status[:reached]}
        own = {
            "beta": lambda: product[..., None],
            "train_loss": lambda: eps.square() / 2,
            "distance": lambda: (product - self.problems.teacher[:, 0][self.problem_index]).square(),
            "time": lambda: steps[:, None] * lr.double(),
            "norm_squared": lambda: plus + minus,
            "eps": lambda: eps,
            "a": lambda: rotate(factors.w_plus, factors.w_minus)[0],
            "b": lambda: rotate(factors.w_plus, factors.w_minus)[1],
        }
        if self.programme:
            own |= {name: lambda value=value: value for name, value in self._at_steps(log.steps[:reached]).items()}
        return values | {name: own[name]() if name in own else getattr(factors, name)() for name in variables}


def _directions(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Two orthonormal vectors from two (E, 2, D); of width 1 both are 1."""
    along = draws[:, 0] / draws[:, 0].norm(dim=-1, keepdim=True)
    if draws.shape[-1] == 1:
        return torch.ones_like(along), torch.ones_like(along)
    across = draws[:, 1] - (draws[:, 1] * along).sum(-1, keepdim=True) * along
    return along, across / across.norm(dim=-1, keepdim=True)
