"""The CUDA kernel of the shallow network against batched torch, the CPU kernel, and itself in other company.

On a CUDA device as it is; under TRITON_INTERPRET=1 on CPU tensors, which `test_cuda_without_gpu.py` sees to.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import dlnlab
from dlnlab.callbacks import MemberGuard
from dlnlab.data import ScalarTarget
from dlnlab.kernels import Course, Factors, Log, Multipliers, Rates, Rule, cuda, shallow
from dlnlab.models import ShallowLinearNetwork

pytest.importorskip("triton")
cuda_shallow = pytest.importorskip("dlnlab.kernels.cuda_shallow")

DEVICE = torch.device("cpu" if cuda.interpreted() else "cuda")
pytestmark = [] if cuda.interpreted() else [pytest.mark.cuda]
E, D, CONVERGED, DIVERGED = 40, 3, 1, 2  # two blocks
STEPS = [1, 32, 45, 70]


def run(advance, cuts=(0, 70), members=None, tol=0.0, every=10, lr=0.3, steps=STEPS, device=DEVICE, scheduled=False):
    """All that a run leaves, on the CPU: state, what the guard keeps, log, status, stopped_at and the steps taken."""
    generator = torch.Generator().manual_seed(0)
    p, m = torch.randn(2, E, D, generator=generator, dtype=torch.float64)
    lrs = lr * torch.rand(E, generator=generator, dtype=torch.float64)
    lrs[::9] = 50.0  # these diverge
    targets = torch.randn(E, generator=generator, dtype=torch.float64)
    chosen = torch.arange(E) if members is None else torch.tensor(members)
    factors = Factors.start(*(w[chosen].to(device) for w in (p, m)))
    state, course = Multipliers.of(factors), Course.of(factors, lrs[chosen].to(device), targets[chosen].to(device))
    status = torch.zeros(len(chosen), dtype=torch.int8, device=device)
    stopped_at, rule = torch.full_like(status, -1, dtype=torch.int64), Rule(tol, 1e6, every, Multipliers.of(factors))
    logs, taken = [], 0
    for start, stop in pairwise(cuts):
        log = Log.allocate([step for step in steps if start < step <= stop], state)
        rates = rates_of(lrs[chosen], chosen, start, stop, device) if scheduled else None
        taken += advance(state, course, start, stop, status, stopped_at, rule, log, rates=rates)
        logs.append([*vars(log.state).values(), log.status])
    log = [torch.cat(parts) for parts in zip(*logs, strict=True)]
    found = [*vars(state).values(), *vars(rule.kept).values(), rule.cause, *log, status, stopped_at]
    return [tensor.cpu() for tensor in found], taken


def rates_of(lrs, members, start, stop, device):
    """Two schedules of the step size, and none for every third member."""
    first = Rates.first_of(start)
    steps = torch.arange(first, stop, dtype=torch.float64)
    factors = torch.stack((0.6 + 0.4 * torch.cos(steps), 1 / (1 + 0.1 * steps)))
    parts = (lrs, torch.zeros_like(lrs), members % 3 - 1, factors, torch.ones_like(factors))
    return Rates(*(part.to(device) for part in parts), first)


def assert_same(ours, theirs, **tolerance):
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance or {"atol": 0, "rtol": 0})


@pytest.mark.parametrize("tol, scheduled", [(0.0, False), (1e-8, False), (0.0, True)])
@pytest.mark.parametrize("name", ["advance_torch", "advance_cpu"])
def test_steps_guard_and_records_agree_with_torch_and_the_cpu_kernel(tol, scheduled, name):
    # The last step of the diverging is at a check, so that what is beyond numbers is nowhere.
    steps, cuts = [10, 20, 32, 45], (0, 70)
    ours = run(cuda_shallow.advance_cuda, cuts, tol=tol, steps=steps, scheduled=scheduled)
    theirs = run(getattr(shallow, name), cuts, tol=tol, steps=steps, device="cpu", scheduled=scheduled)
    status = ours[0][-2]
    assert (status == DIVERGED).sum() >= 5
    assert (status == CONVERGED).any() == (tol > 0)
    assert_same(ours, theirs, rtol=1e-12, atol=1e-14)  # 70 steps of numbers of order 1, each rounded to 1e-16


def test_a_member_has_the_same_bits_in_any_company_order_chunks_and_launches(monkeypatch):
    everyone, taken = run(cuda_shallow.advance_cuda, tol=1e-3, scheduled=True)
    chosen = [37, 4, 11, 9, 30]
    monkeypatch.setattr(cuda, "LAUNCH_SECONDS", 1.7e-6)  # launches of 17 steps
    some, same = run(cuda_shallow.advance_cuda, (0, 1, 33, 70), members=chosen, tol=1e-3, scheduled=True)
    assert taken == same == 70
    for all_of_them, ours in zip(everyone, some, strict=True):
        assert torch.equal(all_of_them[..., chosen].nan_to_num(7.0), ours.nan_to_num(7.0))


def test_what_stopped_early_is_repeated_in_the_records_of_later_launches(monkeypatch):
    whole = run(cuda_shallow.advance_cuda, members=[0, 9], every=10)  # both diverge: the run is over
    assert whole[1] < 70
    monkeypatch.setattr(cuda, "LAUNCH_SECONDS", 5e-7)
    assert_same(run(cuda_shallow.advance_cuda, members=[0, 9], every=10), whole)
    assert (whole[0][-3] == torch.tensor([[0], [DIVERGED], [DIVERGED], [DIVERGED]], dtype=torch.int8)).all()


def test_exponents_below_all_others_agree_with_the_cpu_kernel():
    def from_afar(advance):
        def run_from(state, *arguments, **options):
            state.exponent_plus[::2] -= 700
            state.product_minus[1::4] = 2.0**-1060  # a denormal number
            return advance(state, *arguments, **options)

        return run_from

    ours = run(from_afar(cuda_shallow.advance_cuda), steps=[])
    theirs = run(from_afar(shallow.advance_cpu), steps=[], device="cpu")
    assert_same(ours, theirs, rtol=1e-12, atol=1e-14)  # as above


def test_without_a_rule_nobody_stops():
    def without(advance):
        return lambda state, course, start, stop, status, stopped_at, rule, log, rates: advance(
            state, replace(course, lr=course.lr.clamp(max=0.1)), start, stop, status, stopped_at, None, log
        )

    ours, taken = run(without(cuda_shallow.advance_cuda))
    assert taken == 70
    assert (ours[-2] == 0).all()
    assert_same((ours, taken), run(without(shallow.advance_cpu), device="cpu"), rtol=1e-12, atol=1e-14)  # as above


def test_a_whole_fit_agrees_with_one_on_the_cpu(fit, monkeypatch):
    def end(device):
        ensemble = dlnlab.Ensemble(lr=[0.01, 0.4, 30.0], init_scale=[0.5, 1.5], seed=2)
        model = ShallowLinearNetwork(ensemble=ensemble, width=4)
        fit(model, ScalarTarget(), 70, [MemberGuard(tol=1e-6, every_n_steps=10)], device=device)
        assert model.path == "closed form"
        return model.cpu()

    theirs = end("cpu")
    if cuda.interpreted():
        monkeypatch.setattr(dlnlab.kernels, "shallow_kernel", lambda device: (cuda_shallow.advance_cuda, None))
    ours = end(DEVICE)
    assert set(ours.status.tolist()) == {0, CONVERGED, DIVERGED}
    assert torch.equal(ours.status, theirs.status)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-12, atol=1e-14)  # as above
