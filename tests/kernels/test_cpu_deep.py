"""The compiled steps of the deep network against batched torch, and that against autograd."""

import pytest
import torch
from test_cpu import factors_at

from dlnlab import streams
from dlnlab.kernels import Batches, DeepGuard, EntryLoss, Rates, deep_step
from dlnlab.kernels.cpu_deep import DeepKernel

E, D, K, N, P = 3, 7, 5, 20, 2
MEAN, HALF_SUM = EntryLoss(1.0, True), EntryLoss(0.5, False)


class Setting:
    """Random members on random entries; they take the given batch sizes, samplings and noises in turn."""

    def __init__(
        self, widths=(6, 4), sizes=(1,), samplings=(0,), noise=(0.0,), dtype=torch.float64, kappa=0.01, lr=0.03,
        schedules=(-1,),
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        self.sizes = [D, *widths, K]
        self.weights = [
            (1.2 * torch.randn(E, b, a, generator=generator, dtype=torch.float64) / a**0.5).to(dtype)
            for a, b in zip(self.sizes, self.sizes[1:], strict=False)
        ]
        flat = torch.stack([torch.randperm(D * K, generator=generator)[:N] for _ in range(P)])
        self.places = torch.stack((flat // D, flat % D), dim=-1)
        self.y = torch.randn(P, N, generator=generator, dtype=torch.float64).to(dtype)
        members = torch.arange(E)
        self.problem = members % P
        turns = [[values[m % len(values)] for m in range(E)] for values in (sizes, samplings, noise)]
        self.batches = Batches(
            torch.tensor(turns[0]), torch.tensor(turns[1]), streams.keys(0, "sampling", members),
            streams.keys(0, "label_noise", members), torch.tensor(turns[2], dtype=torch.float64),
        )  # fmt: skip
        self.lr = torch.full((E,), lr, dtype=torch.float64) * (1 + 0.1 * members)
        self.decay, self.weight_decay = 1 - 2 * self.lr * kappa, torch.full((E,), kappa, dtype=torch.float64)
        self.schedule = torch.tensor([schedules[m % len(schedules)] for m in range(E)])
        self.lazy = torch.zeros_like(self.weights[0].mT.contiguous()), torch.zeros_like(self.weights[-1])

    def advance(self, start, stop, loss=MEAN, **kwargs):
        return DeepKernel(self.places, self.y, self.sizes).advance(
            self.weights, self.lazy, self.lr, self.decay, self.problem, self.batches, loss, start, stop,
            rates=self.rates(start, stop), **kwargs
        )  # fmt: skip

    def rates(self, start, stop):
        first = Rates.first_of(start)
        table = [[factors_at(row, step) for step in range(first, stop)] for row in range(2)]
        tables = torch.tensor(table, dtype=torch.float64).unbind(-1)
        return Rates(self.lr, self.weight_decay, self.schedule, *tables, first) if (self.schedule >= 0).any() else None

    def reference(self, start, stop, loss=MEAN):
        """The same steps with `deep_step`, member by member; returns the weights."""
        found = [w.clone() for w in self.weights]
        for m in range(E):
            size, key = int(self.batches.size[m]), self.batches.sampling_key[m]
            p, alone = self.problem[m], [w[m : m + 1] for w in found]
            for step in range(start, stop):
                rows = torch.arange(N)
                if size:
                    kind = streams.SAMPLINGS[int(self.batches.sampling[m])]
                    rows = streams.sample(kind, key, step, step + 1, size, N)[0]
                noise = streams.normals(self.batches.noise_key[m], torch.tensor([step]), len(rows))[0]
                y = self.y[p, rows] + (self.batches.noise_std[m] * noise).to(self.y.dtype)
                f, g = factors_at(int(self.schedule[m]), step)
                keep = 1 - f * g * (1 - self.decay)
                lr, decay = (value[m : m + 1].to(self.y.dtype) for value in (f * self.lr, keep))
                alone = deep_step(alone, self.places[p, rows][None], y[None], lr, decay, loss, size == 0)
            for w, one in zip(found, alone, strict=True):
                w[m] = one[0]
        return found


def assert_close(ours, theirs, atol):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


KINDS = {
    "everything": {"sizes": (0,)},
    "single entries": {},
    "mini-batches": {"sizes": (2, 3, 20)},
    "without replacement": {"sizes": (1, 2, 7), "samplings": (1, 2)},
    "label noise": {"sizes": (0, 1, 3), "noise": (0.1,)},
    "strong decay": {
        "sizes": (1, 2, 1),
        "kappa": 12.0,
        "lr": 0.01,
    },  # 1 - 2 lr kappa = 0.76: the lazy scale shrinks fast
    "schedules": {"sizes": (1, 0, 3), "schedules": (0, 1), "kappa": 0.5},
    "schedules and strong decay": {"sizes": (1, 2), "schedules": (0, -1, 1), "kappa": 6.0, "lr": 0.01},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("widths", [(6,), (6, 4), (9, 17, 4)], ids=str)
def test_compiled_steps_agree_with_torch(kind, widths):
    setting = Setting(widths, **kind)
    theirs = setting.reference(3, 70, HALF_SUM if kind is KINDS["mini-batches"] else MEAN)
    start = [w.clone() for w in setting.weights]
    setting.advance(3, 32, HALF_SUM if kind is KINDS["mini-batches"] else MEAN)
    setting.advance(32, 70, HALF_SUM if kind is KINDS["mini-batches"] else MEAN)
    assert (setting.weights[0] - start[0]).abs().max() > 0.05
    assert_close(setting.weights, theirs, 2e-13)  # 67 steps of sums of up to 20 x 17 terms, each rounded to 1e-16


def test_float32_agrees_to_its_own_rounding():
    setting = Setting(sizes=(0, 1, 3), dtype=torch.float32)
    theirs = setting.reference(0, 50)
    setting.advance(0, 50)
    assert_close(setting.weights, theirs, 1e-5)  # 50 steps of sums rounded to 6e-8


@pytest.mark.parametrize("through_product", [True, False])
@pytest.mark.parametrize("loss", [MEAN, HALF_SUM])
def test_a_step_is_the_gradient_of_the_dense_product(through_product, loss):
    setting = Setting((6, 4))
    places, y = setting.places[setting.problem], setting.y[setting.problem]
    weights = [w.clone().requires_grad_() for w in setting.weights]
    product = weights[2] @ weights[1] @ weights[0]
    found = product[torch.arange(E)[:, None], places[..., 0], places[..., 1]]
    scale = loss.scale / (N if loss.mean else 1)
    (scale * (found - y).square().sum()).backward()
    moved = deep_step(setting.weights, places, y, setting.lr, setting.decay, loss, through_product)
    for w, new in zip(weights, moved, strict=True):
        expected = setting.decay[:, None, None] * w - setting.lr[:, None, None] * w.grad
        torch.testing.assert_close(new, expected.detach())


def test_an_entry_drawn_twice_counts_twice():
    setting = Setting((6, 4))
    places = setting.places[setting.problem][:, [4, 4, 9]]
    y = setting.y[setting.problem][:, [4, 4, 9]]
    both = [deep_step(setting.weights, places, y, setting.lr, setting.decay, MEAN, way) for way in (True, False)]
    assert_close(*both, 1e-14)  # the same sums in another order


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_paths_do_not_depend_on_where_calls_end(kind):
    whole, parts = Setting(**kind), Setting(**kind)
    whole.advance(0, 75)
    for start, stop in ((0, 5), (5, 6), (6, 32), (32, 49), (49, 75)):
        parts.advance(start, stop)
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, parts.weights, strict=True))


def test_weights_that_someone_changes_between_two_calls_are_taken_as_they_are():
    setting = Setting(kappa=1.0)
    setting.advance(0, 13)
    for w in setting.weights:
        w.mul_(1.1)
    theirs = setting.reference(13, 20)
    setting.advance(13, 20)
    assert_close(setting.weights, theirs, 1e-13)  # 7 steps of sums of a few terms of order 1


def test_a_member_has_the_same_bits_alone_and_with_threads():
    together, threads = Setting(sizes=(0, 1, 3)), Setting(sizes=(0, 1, 3))
    together.advance(0, 40)
    threads.advance(0, 40, num_threads=3)
    assert all(torch.equal(a, b) for a, b in zip(together.weights, threads.weights, strict=True))
    for m in range(E):
        alone = Setting(sizes=(0, 1, 3))
        alone.advance(0, 40, status=torch.tensor([0 if i == m else 1 for i in range(E)], dtype=torch.int8))
        assert all(torch.equal(a[m], b[m]) for a, b in zip(together.weights, alone.weights, strict=True))


def test_the_guard_takes_the_diverged_back_and_stops_the_converged():
    setting = Setting(sizes=(1, 0, 1), kappa=0.0)
    start = [w.clone() for w in setting.weights]
    setting.lr[0] = 1e3
    kept = [w.clone() for w in setting.weights]
    status, stopped_at = torch.zeros(E, dtype=torch.int8), torch.full((E,), -1)
    rule = DeepGuard(1e-4, 1e10, 10, kept)
    setting.advance(0, 3000, status=status, stopped_at=stopped_at, guard=rule)
    assert status[:2].tolist() == [2, 1]
    assert stopped_at[0] % 10 == 0
    assert all(w[0].isfinite().all() for w in setting.weights)
    if stopped_at[0] == 0:
        assert all(torch.equal(w[0], old[0]) for w, old in zip(setting.weights, start, strict=True))
    product = setting.weights[2] @ setting.weights[1] @ setting.weights[0]
    places, y = setting.places[1], setting.y[1]
    loss = (product[1][places[:, 0], places[:, 1]] - y).square().mean()
    assert loss < 1e-4
    assert stopped_at[1] % 10 == 0
    assert stopped_at[1] < 3000


def test_entries_of_some_columns_alone_let_the_other_columns_decay_exactly():
    setting, columns = Setting(kappa=0.05), [0, 3]
    places, y = setting.places[setting.problem], setting.y[setting.problem]
    weights, steps = setting.weights, 400
    start = weights[0].clone()
    chosen = torch.isin(places[..., 1], torch.tensor(columns))
    for step in range(steps):
        entry = torch.stack([torch.nonzero(each)[step % int(each.sum())] for each in chosen])  # (E, 1)
        here = entry[..., None].expand(-1, -1, 2)
        weights = deep_step(weights, places.gather(1, here), y.gather(1, entry), setting.lr, setting.decay, MEAN, False)
    others = [j for j in range(D) if j not in columns]
    expected = start[:, :, others] * (setting.decay**steps)[:, None, None]
    torch.testing.assert_close(weights[0][:, :, others], expected, rtol=1e-12, atol=0)  # 400 roundings
    # Rank two at most is left, whatever it was: wang2024's way into the set of that rank.
    values = torch.linalg.svdvals(weights[2] @ weights[1] @ weights[0])
    assert (values[:, 2] < float((setting.decay**steps).max()) * 10).all()
