"""The CPU kernel against `dlnlab.kernels.reference`, laws that hold at every step, and itself in other layouts."""

import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlnlab import streams
from dlnlab.kernels import Factors, Rates, cpu, cpu_steps, diagonal_steps
from dlnlab.kernels.cpu import DiagonalKernel
from dlnlab.kernels.diagonal import Batches, Guard, Records
from dlnlab.kernels.guard import ABOVE_BOUND, NOT_FINITE

N, D = 5, 3
REPLACEMENT, SUBSET, EPOCHS = range(len(streams.SAMPLINGS))
CONVERGED, DIVERGED = 1, 2
SUM_ULPS = 40
"""Rounding of one step's sums of at most N D = 15 terms, in units of the last place; a factor of 2 to spare."""


@dataclass
class Setting:
    """Members on their problems, and all that the kernel needs to advance them."""

    x: torch.Tensor
    y: torch.Tensor
    problem: torch.Tensor
    factors: Factors
    lr: torch.Tensor
    decay: torch.Tensor
    weight_decay: torch.Tensor
    schedule: torch.Tensor
    batches: Batches

    def pick(self, members: torch.Tensor) -> "Setting":
        """Some of the members, in some order."""
        batches = Batches(**{field.name: getattr(self.batches, field.name)[members] for field in fields(Batches)})
        factors = self.factors.map(lambda tensor: tensor[members])
        own = {name: getattr(self, name)[members] for name in ("problem", "lr", "decay", "weight_decay", "schedule")}
        return replace(self, factors=factors, batches=batches, **own)

    def clone(self) -> "Setting":
        return replace(self, factors=self.factors.map(torch.clone))

    def advance(self, start, stop, **kwargs):
        rates = self.rates(start, stop)
        return DiagonalKernel(self.x, self.y).advance(
            self.factors, self.lr, self.decay, self.problem, self.batches, start, stop, rates=rates, **kwargs
        )

    def rates(self, start, stop):
        """Two schedules without any regularity, as a call between two steps needs them."""
        if (self.schedule < 0).all():
            return None
        first = Rates.first_of(start)
        table = [[factors_at(row, step) for step in range(first, stop)] for row in range(2)]
        tables = torch.tensor(table, dtype=torch.float64)
        return Rates(self.lr.double(), self.weight_decay.double(), self.schedule, *tables.unbind(-1), first)


def factors_at(schedule, step):
    """Of lr and weight decay: without any regularity, and 1 for no schedule."""
    return (
        (1.0, 1.0) if schedule < 0 else (1 + 0.5 * math.sin(step * (schedule + 1)), 1 + math.cos(3 * step - schedule))
    )


def make(
    num_members=4, n=N, d=D, dtype=torch.float64, num_problems=2, sizes=(0,), samplings=(REPLACEMENT,), noise=(0.0,),
    weight_decay=(0.0,), schedules=(-1,), lr=0.02, scale=0.4, seed=0,
):  # fmt: skip
    """Random problems with interpolators; members take the given values in turn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_problems, n, d, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(num_problems, d, 1, generator=generator, dtype=torch.float64))[..., 0]
    members = torch.arange(num_members)

    def turns(values, kind):
        return torch.tensor([values[int(m) % len(values)] for m in members], dtype=kind)

    rates, kappa = lr * (1 + 0.1 * members).to(dtype), turns(weight_decay, dtype)
    w = scale * (1 + 0.1 * torch.rand(2, num_members, d, generator=generator, dtype=torch.float64)).to(dtype)
    batches = Batches(
        turns(sizes, torch.int64), turns(samplings, torch.int64), streams.keys(0, "sampling", members),
        streams.keys(0, "label_noise", members), turns(noise, torch.float64),
    )  # fmt: skip
    return Setting(x.to(dtype), y.to(dtype), members % num_problems, Factors.start(w[0].clone(), w[1].clone()),
                   rates, 1 - 2 * rates * kappa, kappa, turns(schedules, torch.int64), batches)  # fmt: skip


def reference(setting, start, stop):
    """The same steps by the reference kernel, member by member, in place."""
    x, y = setting.x, setting.y
    n = x.shape[1]
    for m in range(len(setting.lr)):
        p, size, std = int(setting.problem[m]), int(setting.batches.size[m]), float(setting.batches.noise_std[m])
        lr, decay = setting.lr[m], setting.decay[m]
        steps, rows = torch.arange(start, stop), torch.arange(n).expand(stop - start, n)
        if size:
            kind = streams.SAMPLINGS[int(setting.batches.sampling[m])]
            rows = streams.sample(kind, setting.batches.sampling_key[m], start, stop, size, n)
        noise = std * streams.normals(setting.batches.noise_key[m], steps, rows.shape[1]).to(x.dtype)
        xs, targets = x[p, rows], y[p, rows] + noise

        def gradient(beta, step, xs=xs, targets=targets):
            rows = xs[step - start]
            return (rows @ beta - targets[step - start]) @ rows / len(rows)

        row = setting.factors.map(lambda tensor, m=m: tensor[m])
        if setting.schedule[m] < 0:
            diagonal_steps(row, lr, decay, gradient, start, stop)
            continue
        for step in range(start, stop):
            f, g = factors_at(int(setting.schedule[m]), step)
            here = (lr.double() * f).to(lr.dtype)
            keep = (1 - 2 * lr.double() * f * setting.weight_decay[m].double() * g).to(lr.dtype)
            diagonal_steps(row, here, keep, gradient, step, step + 1)


def tensors(setting):
    """Everything a step changes, by name."""
    return vars(setting.factors)


def assert_same_bits(a, b):
    for name, value in tensors(a).items():
        assert torch.equal(value, tensors(b)[name]), name


def assert_close(a, b, atol):
    assert torch.equal(a.factors.exponent_plus, b.factors.exponent_plus)
    assert torch.equal(a.factors.exponent_minus, b.factors.exponent_minus)
    for name, value in tensors(a).items():
        torch.testing.assert_close(value.double(), tensors(b)[name].double(), atol=atol, rtol=atol, msg=name)


EVERY_KIND = {
    "full batches": {},
    "single rows": {"sizes": (1,)},
    "mini-batches with replacement": {"sizes": (2, 3)},
    "subsets": {"sizes": (1, 2, 4), "samplings": (SUBSET,)},
    "epochs": {"sizes": (1, 2), "samplings": (EPOCHS,)},
    "label noise": {"sizes": (0, 1, 3), "noise": (0.1,)},
    "weight decay": {"sizes": (0, 1, 2), "weight_decay": (0.05,)},
    "all of it": {"sizes": (0, 1, 3, 0, 2), "samplings": (REPLACEMENT, SUBSET, EPOCHS), "noise": (0.1, 0.0, 0.2),
                  "weight_decay": (0.0, 0.03)},
    "schedules": {"sizes": (0, 1, 3, 0), "weight_decay": (0.05, 0.0, 0.2), "schedules": (0, 1, -1, 1, 0)},
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", EVERY_KIND.values(), ids=EVERY_KIND.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


# Against the reference -----------------------------------------------------------------------------------------------


@kinds
@dtypes
@pytest.mark.parametrize("num_members", [4, 37])  # one after another, and side by side
@pytest.mark.parametrize("start", [0, 31, 2**33])  # within a period, across its end, and where a step has two words
def test_one_step_agrees_with_the_reference_to_the_last_places(kind, dtype, num_members, start):
    ours = make(num_members=num_members, dtype=dtype, **kind)
    theirs = ours.clone()
    ours.advance(start, start + 1)
    reference(theirs, start, start + 1)
    assert_close(ours, theirs, SUM_ULPS * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["full batches", "single rows", "all of it"])
def test_ten_thousand_stable_steps_agree_with_the_reference(kind):
    ours = make(num_members=5 if kind == "all of it" else 1, **EVERY_KIND[kind])
    theirs = ours.clone()
    ours.advance(0, 10_000)
    reference(theirs, 0, 10_000)
    # Rounding is a random walk of 1e4 steps, each of SUM_ULPS eps at most, that a stable path does not amplify.
    assert_close(ours, theirs, SUM_ULPS * 2.2e-16 * 100)


@pytest.mark.parametrize("n, d", [(1, 1), (8, 16), (9, 17), (20, 30), (33, 70), (6, 150)])
@pytest.mark.parametrize("num_members", [1, 16])
def test_shapes_beside_and_beyond_the_padding_agree_with_the_reference(n, d, num_members):
    ours = make(num_members=num_members, n=n, d=d, num_problems=1, sizes=(0, 1, min(n, 7)), lr=0.001)
    theirs = ours.clone()
    ours.advance(0, 70)
    reference(theirs, 0, 70)
    assert_close(ours, theirs, n * d * 2.2e-16 * 70)  # sums of n d terms, 70 times


# Laws ----------------------------------------------------------------------------------------------------------------


def edge(lr):
    """Gradient descent that has no stable minimum to go to: it oscillates for ever, and its gain grows."""
    return make(num_members=1, n=20, d=30, num_problems=1, lr=lr, scale=0.1, seed=3)


def test_products_sum_and_decay_carry_w_exactly_at_the_edge_of_stability():
    setting, steps = edge(0.35), 4000
    setting.advance(0, steps)
    factors = setting.factors
    assert factors.gain().max() > 100
    assert setting.factors.largest_step.max() > 0.8
    for w, initial, log in (
        (factors.w_plus, factors.initial_plus, factors.log_plus()),
        (factors.w_minus, factors.initial_minus, factors.log_minus()),
    ):
        # A rounding of each of w and its product a step: a random walk of 2 steps.
        torch.testing.assert_close(w.abs().log(), initial.abs().log() + log, atol=1e-15 * math.sqrt(2 * steps), rtol=0)


def test_path_sums_bound_the_gain():
    setting = make(sizes=(0, 1, 2), num_members=9)
    setting.advance(0, 2000)
    gain, squares = setting.factors.gain().abs().sum(1), setting.factors.square_sum
    assert (setting.factors.largest_step < 0.8926).all()  # mathematics.md, section 1: gain bounds
    assert (squares <= gain * (1 + 1e-12)).all()
    assert (gain <= 2 * squares * (1 + 1e-12)).all()


def test_factors_stay_within_floating_point_while_the_gain_passes_thousands():
    setting = edge(0.4)
    factors = setting.factors
    for start, gain in ((0, 700), (6000, 1400)):
        setting.advance(start, start + 6000 if start == 0 else 20_000)
        assert factors.gain().isfinite().all()
        assert factors.gain().max() > gain
        for w, initial, log in (
            (factors.w_plus, factors.initial_plus, factors.log_plus()),
            (factors.w_minus, factors.initial_minus, factors.log_minus()),
        ):
            true = initial.abs().log() + log
            assert (w.abs() > 1e-145).all()  # above the floor 1e-138 but for what one period takes away
            kept = true > -250  # those above the floor are what they would be without it
            torch.testing.assert_close(w.abs().log()[kept], true[kept], atol=1e-11, rtol=0)  # 1e-15 sqrt(T) log(w)


@pytest.mark.parametrize("num_members", [2, 16])
@dtypes
def test_factors_near_the_floor_are_held_as_the_reference_holds_them(num_members, dtype):
    small = 1e-130 if dtype == torch.float64 else 1e-11
    ours = make(num_members=num_members, num_problems=1, dtype=dtype)
    factors = ours.factors
    factors.w_minus[:, 0], factors.initial_minus[:, 0] = small, small
    factors.w_plus[:, 1], factors.initial_plus[:, 1] = -small, -small
    factors.w_minus[:, 2], factors.initial_minus[:, 2] = 0, 0  # stays zero
    factors.exponent_minus[:, 0] = -100  # already far below
    factors.exponent_plus[:, 1] = 10
    theirs = ours.clone()
    ours.advance(0, 64)
    reference(theirs, 0, 64)
    assert (ours.factors.w_minus[:, 2] == 0).all()
    assert ours.factors.w_minus[:, 0].abs().min() > 0
    # exp of a logarithm near 300 has 300 times the rounding of the logarithm; 64 steps of float32 otherwise.
    assert_close(ours, theirs, 1e-12 if dtype == torch.float64 else 64 * SUM_ULPS * 1.2e-7)


# Independence --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(list(EVERY_KIND.values())),
    num_members=st.integers(1, 40),
    seed=st.randoms(use_true_random=False),
    cuts=st.lists(st.integers(1, 149), max_size=4, unique=True),
    num_threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    d=st.sampled_from([D, 20, 40]),  # each has its own steps on single rows
)
def test_a_member_has_the_same_bits_in_any_company_order_chunking_and_thread(
    kind, num_members, seed, cuts, num_threads, dtype, d
):
    everyone = make(num_members=40, d=d, num_problems=2, dtype=dtype, lr=0.06 / d, **kind)
    order = list(range(40))
    seed.shuffle(order)
    chosen = torch.tensor(order[:num_members])
    some = everyone.pick(chosen).clone()
    everyone.advance(0, 150)
    for start, stop in pairwise([0, *sorted(cuts), 150]):
        some.advance(start, stop, num_threads=num_threads)
    assert_same_bits(some, everyone.pick(chosen))


def test_single_members_and_lanes_have_the_same_bits_in_many_shapes():
    for n, d in [(1, 1), (2, 9), (7, 16), (13, 33), (20, 30), (40, 100), (5, 300)]:
        together = make(num_members=16, n=n, d=d, num_problems=1, lr=0.001, noise=(0.0, 0.1), weight_decay=(0, 0.1))
        alone = together.clone()
        together.advance(0, 100)
        for m in range(16):
            single = alone.pick(torch.tensor([m])).clone()
            single.advance(0, 100)
            assert_same_bits(single, together.pick(torch.tensor([m])))


@kinds
def test_checks_and_records_change_no_bit(kind):
    plain = make(num_members=20, **kind)
    watched = plain.clone()
    plain.advance(0, 200)
    records = Records.allocate([1, 33, 64, 130, 200], watched.factors, everything=True)
    watched.advance(0, 200, guard=Guard(0.0, 1e10, 7, watched.factors.map(torch.clone)), records=records)
    assert_same_bits(plain, watched)


# Streams -------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    sampling=st.sampled_from(range(3)),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 2**34),
    length=st.integers(1, 32),
    size=st.integers(1, 23),
    data=st.data(),
)
def test_rows_are_those_of_the_streams(sampling, seed, start, length, size, data):
    count = data.draw(st.integers(1, size))
    key = streams.keys(7, "sampling", torch.tensor(seed))
    expected = streams.sample(streams.SAMPLINGS[sampling], key, start, start + length, count, size)
    rows, order = torch.zeros(length * count, dtype=torch.int64), torch.full((size + 1,), -1)
    arguments = (tensor.numpy() for tensor in (key, rows, order))
    cpu_steps.draw_rows(sampling, next(arguments), start, start + length, count, size, *arguments)
    assert torch.equal(rows.reshape(length, count), expected)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_noise_is_that_of_the_streams_to_the_last_places(count):
    key = streams.keys(3, "label_noise", torch.tensor(11))
    out = torch.zeros(count, dtype=torch.float64)
    cpu_steps.draw_normals(key.numpy(), 2**33 + 5, count, 2.0, out.numpy(), 0, 1)
    expected = 2.0 * streams.normals(key, torch.tensor([2**33 + 5]), count)[0]
    torch.testing.assert_close(out, expected, atol=1e-14, rtol=1e-14)  # cos near a zero: a few places of its argument


# The guard -----------------------------------------------------------------------------------------------------------


def full_loss(setting):
    factors = setting.factors
    beta = (factors.w_plus**2 - factors.w_minus**2) / 2
    x, y = setting.x[setting.problem], setting.y[setting.problem]
    return ((x @ beta[..., None])[..., 0] - y).square().mean(1) / 2


def guarded_reference(setting, stop, tol, bound, every_n_steps):
    """The guard by the book: check, keep, freeze, take back; returns status, stopped_at, cause and steps taken."""
    members = range(len(setting.lr))
    status, stopped_at, cause = [0] * len(members), [-1] * len(members), [0] * len(members)
    taken = 0
    for m in members:
        alone = setting.pick(torch.tensor([m])).clone()
        kept, now = alone.clone(), 0
        while now < stop and status[m] == 0:
            end = min(stop, now - now % every_n_steps + every_n_steps)
            reference(alone, now, end)
            now = end
            if now % every_n_steps == 0:
                loss, factors = float(full_loss(alone)), alone.factors
                finite = bool(torch.cat((factors.w_plus, factors.w_minus)).isfinite().all()) and math.isfinite(loss)
                if not (finite and loss <= bound[m]):
                    cause[m] = ABOVE_BOUND if finite else NOT_FINITE
                    status[m], stopped_at[m], alone = DIVERGED, max(now - every_n_steps, 0), kept
                else:
                    kept = alone.clone()
                    if loss < tol:
                        status[m], stopped_at[m] = CONVERGED, now
        taken = max(taken, now)
        for name, value in tensors(setting).items():
            value[m] = tensors(alone)[name][0]
    return status, stopped_at, cause, taken


@pytest.mark.parametrize("sizes", [(0,), (1,), (2, 0)])
@pytest.mark.parametrize("num_members", [5, 12])
def test_the_guard_freezes_and_takes_back_as_the_reference_does(sizes, num_members):
    setting = make(num_members=num_members, sizes=sizes, num_problems=1, lr=0.03, scale=0.5)
    setting.lr[1::4] = 50.0  # these diverge at once
    bound = torch.full((num_members,), 1e10, dtype=torch.float64)
    bound[2] = 1e-3 * full_loss(setting)[2]
    theirs = setting.clone()
    status, stopped_at = torch.zeros(num_members, dtype=torch.int8), torch.full((num_members,), -1)
    guard = Guard(1e-8, bound, 20, setting.factors.map(torch.clone))
    taken = setting.advance(0, 5000, status=status, stopped_at=stopped_at, guard=guard)
    expected = guarded_reference(theirs, 5000, 1e-8, bound, 20)
    assert set(expected[0]) == {CONVERGED, DIVERGED}
    assert set(expected[2]) == {0, ABOVE_BOUND, NOT_FINITE}
    assert (status.tolist(), stopped_at.tolist(), guard.cause.tolist(), taken) == expected
    assert_close(setting, theirs, 1e-11)  # rounding along a path that converges


def test_the_guard_is_the_same_however_a_run_is_cut():
    whole = make(num_members=20, sizes=(0, 1), num_problems=1, lr=0.05)
    whole.lr[::6] = 40.0
    results = []
    for cuts in ([0, 3000], [0, 3, 50, 64, 65, 1000, 3000]):
        setting, kept = whole.clone(), whole.factors.map(torch.clone)
        status, stopped_at = torch.zeros(20, dtype=torch.int8), torch.full((20,), -1)
        for start, stop in pairwise(cuts):
            setting.advance(start, stop, status=status, stopped_at=stopped_at, guard=Guard(1e-6, 1e10, 50, kept))
        results.append((setting, status, stopped_at))
    assert_same_bits(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][2], results[1][2])


def test_members_that_have_stopped_do_not_move():
    setting = make(num_members=20, sizes=(0, 1))
    before, status = setting.clone(), torch.zeros(20, dtype=torch.int8)
    status[3], status[4] = CONVERGED, DIVERGED
    assert setting.advance(0, 50, status=status) == 50
    stopped = torch.tensor([3, 4])
    assert_same_bits(setting.pick(stopped), before.pick(stopped))
    assert not torch.equal(setting.factors.w_plus[5], before.factors.w_plus[5])


# Records -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("num_members", [3, 20])
def test_records_are_the_states_that_shorter_runs_end_with(everything, num_members):
    setting = make(num_members=num_members, sizes=(0, 0, 2), num_problems=1)
    first, steps = setting.clone(), [1, 30, 32, 100, 160]
    records = Records.allocate(steps, setting.factors, everything)
    setting.advance(0, 160, records=records)
    for t, step in enumerate(steps):
        shorter = first.clone()
        shorter.advance(0, step)
        assert torch.equal(records.w_plus[t], shorter.factors.w_plus)
        assert torch.equal(records.w_minus[t], shorter.factors.w_minus)
        torch.testing.assert_close(records.train_loss[t], full_loss(shorter), rtol=1e-10, atol=1e-28)  # r cancels
        if everything:
            for name in ("product_plus", "exponent_minus", "step_sum", "log_decay"):
                assert torch.equal(getattr(records.factors, name)[t], getattr(shorter.factors, name))
            assert torch.equal(records.factors.square_sum[t], shorter.factors.square_sum)
    assert (records.status == 0).all()


@pytest.mark.parametrize("num_members", [2, 20])
def test_records_of_a_stopped_member_repeat_what_it_stopped_with(num_members):
    setting = make(num_members=num_members, num_problems=1)
    setting.lr[0] = 50.0
    kept = setting.factors.map(torch.clone)
    records = Records.allocate([5, 40, 41, 80], setting.factors)
    setting.advance(0, 80, guard=Guard(0.0, 1e3, 20, kept), records=records)
    assert records.status[:, 0].tolist() == [0, DIVERGED, DIVERGED, DIVERGED]
    assert not records.train_loss[0, 0] <= 1e3  # between the check that kept it and the one that found it
    for t in (1, 2, 3):
        assert torch.equal(records.w_plus[t, 0], setting.factors.initial_plus[0])
    assert (records.status[:, 1] == 0).all()


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(cpu.cpu_steps, "advance", fail)
    with pytest.raises(RuntimeError, match="broken"):
        make(num_members=9, sizes=(1,)).advance(0, 1, num_threads=2)
