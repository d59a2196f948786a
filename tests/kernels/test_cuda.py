"""The CUDA kernel against `dlnlab.kernels.reference`, the CPU kernel, and itself in other company.

On a CUDA device as it is; under TRITON_INTERPRET=1 on CPU tensors, which `test_cuda_without_gpu.py` sees to. So sizes are
small: the interpreter takes about a millisecond for a row of a block.
"""

from dataclasses import fields, is_dataclass
from itertools import pairwise

import pytest
import torch
from test_cpu import (
    CONVERGED,
    DIVERGED,
    EVERY_KIND,
    SUM_ULPS,
    assert_close,
    assert_same_bits,
    dtypes,
    full_loss,
    guarded_reference,
    kinds,
    make,
    reference,
)

from dlnlab import streams
from dlnlab.kernels import cuda
from dlnlab.kernels.diagonal import Guard, Records
from dlnlab.kernels.guard import ABOVE_BOUND, NOT_FINITE

triton = pytest.importorskip("triton")
tl = triton.language
cuda_steps = pytest.importorskip("dlnlab.kernels.cuda_steps")

DEVICE = torch.device("cpu" if cuda.interpreted() else "cuda")
pytestmark = [] if cuda.interpreted() else [pytest.mark.cuda]


def moved(part, device):
    """A tensor, or a data class of tensors, on another device."""
    if isinstance(part, torch.Tensor):
        return part.to(device)
    if is_dataclass(part):
        return type(part)(**{field.name: moved(getattr(part, field.name), device) for field in fields(part)})
    return part


def write_back(target, source):
    if isinstance(target, torch.Tensor):
        target.copy_(source)
    elif is_dataclass(target):
        for field in fields(target):
            write_back(getattr(target, field.name), getattr(source, field.name))


def advance(setting, start, stop, **kwargs):
    """The kernel on the device, results back where they came from."""
    there, options = moved(setting, DEVICE), {name: moved(value, DEVICE) for name, value in kwargs.items()}
    taken = cuda.DiagonalKernel(there.x, there.y).advance(
        there.factors,
        there.lr,
        there.decay,
        there.problem,
        there.batches,
        start,
        stop,
        rates=moved(setting.rates(start, stop), DEVICE),
        **options,
    )
    write_back(setting.factors, there.factors)
    for name, value in kwargs.items():
        write_back(value, options[name])
    return taken


@pytest.fixture
def narrow(monkeypatch):
    """Blocks of eight members, so that a few dozen are several blocks."""
    monkeypatch.setattr(cuda, "VALUES", 1)


# Against the reference and the CPU kernel ----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("start, dtype", [(31, torch.float64), (2**33, torch.float32)], ids=str)
def test_one_step_agrees_with_the_reference_to_the_last_places(kind, start, dtype):
    # From the end of a period, and where a step has two words.
    ours = make(num_members=5, dtype=dtype, **kind)
    theirs = ours.clone()
    advance(ours, start, start + 1)
    reference(theirs, start, start + 1)
    assert_close(ours, theirs, SUM_ULPS * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "name, steps",
    [
        ("full batches", 200),
        ("single rows", 200),
        ("weight decay", 40),
        ("epochs", 10),
        ("all of it", 6),
        ("schedules", 40),
    ],
)
def test_a_stable_path_agrees_with_the_reference_and_the_cpu_kernel(name, steps):
    ours = make(num_members=6, **EVERY_KIND[name])
    theirs, cpu = ours.clone(), ours.clone()
    advance(ours, 30, 30 + steps)
    reference(theirs, 30, 30 + steps)
    cpu.advance(30, 30 + steps)
    # Rounding is a random walk of 200 steps, each of SUM_ULPS eps at most, that a stable path does not amplify.
    for other in (theirs, cpu):
        assert_close(ours, other, SUM_ULPS * 2.2e-16 * 200**0.5)


@pytest.mark.parametrize("n, d", [(1, 1), (9, 17), (20, 30), (6, 300)])  # the last: two warps for a member
def test_other_shapes_agree_with_the_reference(n, d):
    ours = make(num_members=3, n=n, d=d, num_problems=1, sizes=(0, 1, min(n, 7)), lr=0.001)
    theirs = ours.clone()
    advance(ours, 0, 33)
    reference(theirs, 0, 33)
    assert_close(ours, theirs, n * d * 2.2e-16 * 33)  # sums of n d terms, 33 times


@dtypes
def test_factors_near_the_floor_are_held_as_the_reference_holds_them(dtype):
    small = 1e-130 if dtype == torch.float64 else 1e-11
    ours = make(num_members=3, num_problems=1, dtype=dtype)
    factors = ours.factors
    factors.w_minus[:, 0], factors.initial_minus[:, 0] = small, small
    factors.w_plus[:, 1], factors.initial_plus[:, 1] = -small, -small
    factors.w_minus[:, 2], factors.initial_minus[:, 2] = 0, 0  # stays zero
    factors.exponent_minus[:, 0] = -100  # already far below
    factors.exponent_plus[:, 1] = 10
    factors.product_minus[:2, 1] = 2.0**-1060  # a denormal number
    factors.product_plus[2, 2], factors.w_plus[2, 2] = 0, 0
    theirs = ours.clone()
    advance(ours, 0, 64)
    reference(theirs, 0, 64)
    assert (ours.factors.w_minus[:, 2] == 0).all()
    assert ours.factors.w_minus[:, 0].abs().min() > 0
    # exp of a logarithm near 300 has 300 times the rounding of the logarithm; 64 steps of float32 otherwise.
    assert_close(ours, theirs, 1e-12 if dtype == torch.float64 else 64 * SUM_ULPS * 1.2e-7)


# Independence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, stop, dtype",
    [("full batches", 66, torch.float64), ("full batches", 40, torch.float32), ("single rows", 66, torch.float64),
     ("single rows", 40, torch.float32), ("all of it", 33, torch.float64), ("schedules", 40, torch.float64)],
    ids=str,
)  # fmt: skip
def test_a_member_has_the_same_bits_in_any_company_order_chunks_and_launches(name, stop, dtype, narrow, monkeypatch):
    everyone = make(num_members=12, num_problems=2, dtype=dtype, **EVERY_KIND[name])
    chosen = torch.tensor([11, 2, 9, 7])
    some, alone = everyone.pick(chosen).clone(), everyone.pick(torch.tensor([2])).clone()
    advance(everyone, 30, stop)
    advance(alone, 30, stop)
    advance(some, 30, 31)
    advance(some, 31, 33)
    monkeypatch.setattr(cuda, "LAUNCH_SECONDS", 0)  # launches of one period
    advance(some, 33, stop)
    assert_same_bits(some, everyone.pick(chosen))
    assert_same_bits(alone, everyone.pick(torch.tensor([2])))


def test_checks_and_records_change_no_bit():
    plain = make(num_members=6, sizes=(0, 1, 2))
    watched = plain.clone()
    advance(plain, 20, 60)
    records = Records.allocate([21, 33, 60], watched.factors, everything=True)
    advance(watched, 20, 60, guard=Guard(0.0, 1e10, 7, watched.factors.map(torch.clone)), records=records)
    assert_same_bits(plain, watched)


def test_members_that_have_stopped_do_not_move():
    setting = make(num_members=6, sizes=(0, 1))
    before, status = setting.clone(), torch.tensor([0, 0, 0, CONVERGED, DIVERGED, 0], dtype=torch.int8)
    assert advance(setting, 0, 40, status=status) == 40
    stopped = torch.tensor([3, 4])
    assert_same_bits(setting.pick(stopped), before.pick(stopped))
    assert not torch.equal(setting.factors.w_plus[5], before.factors.w_plus[5])


# Streams -------------------------------------------------------------------------------------------------------------


@triton.jit
def draw_steps(keys, rows, order, plan, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    key0, key1 = tl.load(keys + 2 * lane).to(tl.uint32), tl.load(keys + 2 * lane + 1).to(tl.uint32)
    start, stop, count, size, sampling = (
        tl.load(plan), tl.load(plan + 1), tl.load(plan + 2), tl.load(plan + 3), tl.load(plan + 4)
    )  # fmt: skip
    cuda_steps.draw(rows, order, start * 0 - 1, key0, key1, sampling, start, stop, count, size, LANES)


@pytest.mark.parametrize("sampling", range(3), ids=streams.SAMPLINGS)
@pytest.mark.parametrize(
    "start, length, count, size", [(0, 40, 1, 5), (3, 5, 3, 7), (2**33 - 2, 3, 5, 11), (31, 2, 7, 7)]
)
def test_rows_are_those_of_the_streams(sampling, start, length, count, size):
    key = streams.keys(7, "sampling", torch.tensor([0, 1, 2**35, 5]))
    rows = torch.zeros(length, count, 4, dtype=torch.int32, device=DEVICE)
    order = torch.zeros(size, 4, dtype=torch.int32, device=DEVICE)
    plan = torch.tensor([start, start + length, count, size, sampling], device=DEVICE)
    draw_steps[(1,)](key.to(DEVICE), rows, order, plan, LANES=4, num_warps=1)
    expected = streams.sample(streams.SAMPLINGS[sampling], key, start, start + length, count, size)
    assert torch.equal(rows.cpu().permute(2, 0, 1).long(), expected)


# The guard and records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0,), (1, 0)])
def test_the_guard_freezes_and_takes_back_as_the_reference_does(sizes, narrow):
    setting = make(num_members=9, sizes=sizes, num_problems=1, lr=0.06, scale=0.8)
    setting.lr[1::5] = 50.0  # these diverge at once
    bound = torch.full((9,), 1e10, dtype=torch.float64)
    bound[2] = 1e-3 * full_loss(setting)[2]
    theirs = setting.clone()
    status, stopped_at = torch.zeros(9, dtype=torch.int8), torch.full((9,), -1)
    guard = Guard(1e-2, bound, 20, setting.factors.map(torch.clone))
    taken = advance(setting, 0, 400, status=status, stopped_at=stopped_at, guard=guard)
    expected = guarded_reference(theirs, 400, 1e-2, bound, 20)
    assert set(expected[0]) == {CONVERGED, DIVERGED}
    assert set(expected[2]) == {0, ABOVE_BOUND, NOT_FINITE}
    assert (status.tolist(), stopped_at.tolist(), guard.cause.tolist(), taken) == expected
    assert_close(setting, theirs, 1e-12)  # rounding along a path that converges


def test_the_guard_is_the_same_however_a_run_is_cut(monkeypatch):
    whole = make(num_members=6, sizes=(0, 1), num_problems=1, lr=0.05, scale=0.8)
    whole.lr[::3] = 40.0
    results = []
    for cuts, seconds in (([0, 120], 0.2), ([0, 3, 50, 64, 120], 0.2), ([0, 120], 0)):
        monkeypatch.setattr(cuda, "LAUNCH_SECONDS", seconds)
        setting, kept = whole.clone(), whole.factors.map(torch.clone)
        status, stopped_at = torch.zeros(6, dtype=torch.int8), torch.full((6,), -1)
        guard, taken = Guard(1e-2, 1e10, 25, kept), 0
        for start, stop in pairwise(cuts):
            taken += advance(setting, start, stop, status=status, stopped_at=stopped_at, guard=guard)
        results.append((setting, status, stopped_at, taken))
    assert set(results[0][1].tolist()) >= {DIVERGED}
    for other in results[1:]:
        assert_same_bits(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1]) and torch.equal(results[0][2], other[2])
        assert results[0][3] == other[3]


@pytest.mark.parametrize("everything", [False, True])
def test_records_are_the_states_that_shorter_runs_end_with(everything, narrow, monkeypatch):
    setting = make(num_members=9, sizes=(0, 0, 1), num_problems=1)
    first, steps = setting.clone(), [1, 32, 40]
    records = Records.allocate(steps, setting.factors, everything)
    monkeypatch.setattr(cuda, "LAUNCH_SECONDS", 0)
    advance(setting, 0, 40, records=records)
    for t, step in enumerate(steps):
        shorter = first.clone()
        advance(shorter, 0, step)
        assert torch.equal(records.w_plus[t], shorter.factors.w_plus)
        assert torch.equal(records.w_minus[t], shorter.factors.w_minus)
        torch.testing.assert_close(records.train_loss[t], full_loss(shorter), rtol=1e-10, atol=1e-28)  # r cancels
        if everything:
            for name in ("product_plus", "exponent_minus", "step_sum", "log_decay"):
                assert torch.equal(getattr(records.factors, name)[t], getattr(shorter.factors, name))
            assert torch.equal(records.factors.square_sum[t], shorter.factors.square_sum)
            assert torch.equal(records.factors.largest_step[t], shorter.factors.largest_step)
    assert (records.status == 0).all()


@pytest.mark.parametrize("num_members", [1, 2])  # alone it ends the run early
def test_records_of_a_stopped_member_repeat_what_it_stopped_with(num_members):
    setting = make(num_members=num_members, num_problems=1)
    setting.lr[0] = 50.0
    kept = setting.factors.map(torch.clone)
    records = Records.allocate([5, 40, 41, 80], setting.factors)
    taken = advance(setting, 0, 80, guard=Guard(0.0, 1e3, 20, kept), records=records)
    assert taken == (20 if num_members == 1 else 80)
    assert records.status[:, 0].tolist() == [0, DIVERGED, DIVERGED, DIVERGED]
    assert not records.train_loss[0, 0] <= 1e3  # between the check that kept it and the one that found it
    for t in (1, 2, 3):
        assert torch.equal(records.w_plus[t, 0], setting.factors.initial_plus[0])
    assert (records.status[:, 1:] == 0).all()
