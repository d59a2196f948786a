"""The CUDA kernel of the deep network against batched torch, the CPU kernel, and itself in other company.

On a CUDA device as it is; under TRITON_INTERPRET=1 on CPU tensors, which `test_cuda_without_gpu.py` sees to. So runs are
short: the interpreter takes some milliseconds for a step.
"""

import pytest
import torch
from test_cpu_deep import HALF_SUM, KINDS, MEAN, E, Setting, assert_close

import dlnlab
from dlnlab.callbacks import MemberGuard
from dlnlab.data import LowRankCompletion
from dlnlab.kernels import DeepGuard, Rates, cuda
from dlnlab.models import DeepLinearNetwork

pytest.importorskip("triton")
cuda_deep = pytest.importorskip("dlnlab.kernels.cuda_deep")

DEVICE = torch.device("cpu" if cuda.interpreted() else "cuda")
pytestmark = [] if cuda.interpreted() else [pytest.mark.cuda]
KINDS = {  # full batches stay in torch
    name: {**kind, "sizes": tuple(size for size in kind.get("sizes", (1,)) if size)}
    for name, kind in KINDS.items()
    if name != "everything"
}
TYPES = [
    (torch.float64, 2e-13),
    (torch.float32, 1e-5),
]  # dozens of steps of sums of 20 x 17 terms, rounded to 1e-16, 6e-8


def advance(setting, start, stop, loss=MEAN, status=None, stopped_at=None, guard=None):
    """The kernel on the device, results back where they came from."""

    def there(part):
        if isinstance(part, torch.Tensor):
            return part.to(DEVICE)
        if isinstance(part, list | tuple):
            return [there(each) for each in part]
        return part

    rates = setting.rates(start, stop)
    batches = type(setting.batches)(**{name: there(value) for name, value in vars(setting.batches).items()})
    rule = None if guard is None else DeepGuard(guard.tol, guard.bound, guard.every_n_steps, there(guard.kept))
    changed = [*setting.weights, *setting.lazy, *([] if guard is None else guard.kept)]
    changed += [tensor for tensor in (status, stopped_at) if tensor is not None]
    moved = there(changed)
    count = len(setting.weights)
    if guard is not None:
        rule.kept = moved[count + 2 : 2 * count + 2]
    taken = cuda_deep.DeepKernel(there(setting.places), there(setting.y), setting.sizes).advance(
        moved[:count], moved[count : count + 2], there(setting.lr), there(setting.decay), there(setting.problem), batches,
        loss, start, stop, None if status is None else moved[-2], None if status is None else moved[-1], rule,
        rates=None if rates is None else Rates(*map(there, vars(rates).values())),
    )  # fmt: skip
    for ours, theirs in zip(changed, moved, strict=True):
        ours.copy_(theirs)
    return taken


def assert_same_bits(ours, theirs, members=slice(None)):
    for a, b in zip((*ours.weights, *ours.lazy), (*theirs.weights, *theirs.lazy), strict=True):
        assert torch.equal(a[members], b[members])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "widths", [(6, 4), *(pytest.param(w, marks=pytest.mark.slow) for w in ((6,), (9, 17, 4)))], ids=str
)
def test_steps_agree_with_torch(name, widths):
    setting = Setting(widths, **KINDS[name])
    loss = HALF_SUM if name == "mini-batches" else MEAN
    theirs = setting.reference(30, 34, loss)
    before = [w.clone() for w in setting.weights]
    advance(setting, 30, 34, loss)  # across the step at which c goes into V
    assert (setting.weights[0] - before[0]).abs().max() > 0.01
    assert_close(setting.weights, theirs, 2e-13)  # 4 steps of sums of up to 20 x 17 terms, each rounded to 1e-16


@pytest.mark.parametrize("dtype, tolerance", TYPES, ids=["float64", "float32"])
def test_steps_agree_with_the_cpu_kernel_where_a_step_has_two_words(dtype, tolerance):
    ours, theirs = (Setting((6, 4), sizes=(1, 3), dtype=dtype) for _ in range(2))
    advance(ours, 2**33 - 3, 2**33 + 5)
    theirs.advance(2**33 - 3, 2**33 + 5)
    assert_close(ours.weights, theirs.weights, tolerance)


def test_a_layer_of_several_tiles_agrees_with_torch(monkeypatch):
    monkeypatch.setattr(cuda_deep, "TILE", 64)  # four rows
    setting = Setting((9, 13))
    theirs = setting.reference(0, 5)
    advance(setting, 0, 5)
    assert_close(setting.weights, theirs, 2e-13)  # as above


@pytest.mark.parametrize(
    "kind",
    [pytest.param("without replacement", marks=pytest.mark.slow), "strong decay", "schedules and strong decay"],
)
def test_a_member_has_the_same_bits_in_any_company_chunks_and_launches(kind, monkeypatch):
    whole, parts, alone = (Setting((6, 4), **KINDS[kind]) for _ in range(3))
    advance(whole, 27, 35)
    monkeypatch.setattr(cuda, "LAUNCH_SECONDS", 0)  # launches of one step
    for start, stop in ((27, 28), (28, 33), (33, 35)):
        advance(parts, start, stop)
    assert_same_bits(whole, parts)
    advance(alone, 27, 35, status=torch.tensor([1, 0, 1], dtype=torch.int8), stopped_at=torch.zeros(3).long())
    assert all(torch.equal(a[1], b[1]) for a, b in zip(alone.weights, whole.weights, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone.weights, Setting((6, 4)).weights, strict=True))


def test_weights_that_someone_changes_between_two_calls_are_taken_as_they_are():
    setting = Setting(kappa=1.0)
    advance(setting, 0, 5)
    for w in setting.weights:
        w.mul_(1.1)
    theirs = setting.reference(5, 9)
    advance(setting, 5, 9)
    assert_close(setting.weights, theirs, 1e-13)  # 4 steps of sums of a few terms of order 1


def test_the_guard_takes_back_and_stops_the_members_that_the_cpu_kernel_does():
    results = []
    for take in (advance, lambda setting, *arguments, **options: setting.advance(*arguments, **options)):
        setting = Setting((6, 4), kappa=0.0)
        setting.lr[0] = 1e3
        status, stopped_at = torch.zeros(E, dtype=torch.int8), torch.full((E,), -1)
        # The second member's loss is below 1.6 at the start, the third's is above.
        rule = DeepGuard(1.0, 1e10, 10, [w.clone() for w in setting.weights])
        taken = take(setting, 3, 45, status=status, stopped_at=stopped_at, guard=rule)
        results.append((setting, status.tolist(), stopped_at.tolist(), taken, rule.kept))
    ours, theirs = results
    assert ours[1:4] == theirs[1:4]
    assert ours[1][0] == 2
    assert_close(ours[0].weights, theirs[0].weights, 1e-12)  # 40 steps of order 1, as above
    assert_close(ours[4], theirs[4], 1e-12)


def test_a_whole_fit_agrees_with_one_on_the_cpu(fit, monkeypatch):
    def end(device, **axes):
        ensemble = dlnlab.Ensemble(lr=[0.02, 50.0], weight_decay=[1e-3], **axes)
        model = DeepLinearNetwork(ensemble=ensemble, width=6)
        fit(model, LowRankCompletion(shape=(5, 7)), 12, [MemberGuard(every_n_steps=6)], device=device)
        return model.cpu()

    theirs = end("cpu", batch_size=[1, 2])
    if cuda.interpreted():
        monkeypatch.setattr(dlnlab.kernels, "deep_kernel", cuda_deep.DeepKernel)
    ours = end(DEVICE, batch_size=[1, 2])
    assert ours.path == "closed form"
    assert set(ours.status.tolist()) == {0, 2}
    assert torch.equal(ours.status, theirs.status)
    assert_close(ours.weights, theirs.weights, 1e-12)  # as above


def test_what_it_cannot_do_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr(cuda, "refusal", lambda device: None)
    assert cuda_deep.refusal("cuda", [5, 2048, 5]) is None
    assert "width of 2048" in cuda_deep.refusal("cuda", [5, 4, 2049, 5])
    setting = Setting()
    kernel = cuda_deep.DeepKernel(setting.places, setting.y, setting.sizes)
    assert kernel.refusal(torch.tensor([1, 32])) is None
    for sizes in (torch.tensor([1, 0]), torch.tensor([1, 33])):
        assert "more than 32 entries" in kernel.refusal(sizes)
