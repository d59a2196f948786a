"""What can be seen of the CUDA kernel without a device: that it runs in the interpreter, compiles, and refuses clearly."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cpu import make
from test_cpu_deep import MEAN, Setting

from dlnlab.kernels import cuda
from dlnlab.kernels.diagonal import Guard, Records

FILES = ["test_cuda", "test_cuda_shallow", "test_cuda_deep"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize(
    "names, chosen",
    [
        (
            FILES,
            "epochs and rows_are or guard_freezes or schedules-40 or deep and schedules and strong or shallow and guard",
        ),
        pytest.param(FILES[:1], "", marks=pytest.mark.slow),
        pytest.param(FILES[1:], "", marks=pytest.mark.slow),
    ],
    ids=["some", "all", "all of shallow and deep"],
)
def test_the_tests_of_the_kernels_pass_in_tritons_interpreter(names, chosen):
    # In a process of its own: triton reads the variable when it is imported.
    files = [str(Path(__file__).with_name(f"{name}.py")) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


class H200:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that calls of `advance` would launch on an H200, compiled by Triton and NVIDIA's assembler."""
    from triton.runtime import driver

    from dlnlab.kernels import cuda_deep_steps, cuda_shallow_steps, cuda_steps

    made, kernels = [], []

    class CompileOnly:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: made.append(self.kernel.warmup(*args, grid=grid, **options))

    for module in (cuda_steps, cuda_shallow_steps, cuda_deep_steps):
        kernels.append(module.advance)
        monkeypatch.setattr(module, "advance", CompileOnly(module.advance))
    monkeypatch.setattr(cuda, "refusal", lambda device, dim=1: None)
    for kernel in kernels:
        kernel.device_caches.clear()
    monkeypatch.setattr(driver, "_active", H200())
    yield made
    for kernel in kernels:
        kernel.device_caches.clear()  # nothing of this for the real device


def advance(setting, start, stop, **options):
    cuda.DiagonalKernel(setting.x, setting.y).advance(
        setting.factors, setting.lr, setting.decay, setting.problem, setting.batches, start, stop,
        rates=setting.rates(start, stop), **options,
    )  # fmt: skip


@needs_triton
def test_one_kernel_for_an_h200_serves_every_ensemble_chunk_guard_and_record(compiled):
    # Integers that are 1 or divisible by 16, and tensors of other types, would each have a kernel and bits of their own.
    for num_members, n, start, stop in ((1, 20, 0, 1), (16, 16, 2**33, 2**33 + 64)):
        setting = make(num_members=num_members, n=n, d=30)
        advance(setting, start, stop)
        guard = Guard(0.0, 1e10, 16, setting.factors.map(torch.clone))
        for everything in (False, True):
            advance(setting, start, stop, guard=guard, records=Records.allocate([stop], setting.factors, everything))
    assert len(compiled) == 6
    assert len({kernel.hash for kernel in compiled}) == 1
    # The one layout of tensors (coordinates, members), on which the cost of a sum over coordinates depends.
    layouts = [line for line in compiled[0].asm["ttgir"].splitlines() if line.startswith("#blocked")]
    assert "threadsPerWarp = [4, 8]" in layouts[0]
    assert not any("sizePerThread = [1, 2]" in line or "sizePerThread = [2" in line for line in layouts)
    assert len(compiled[0].asm["cubin"]) > 0


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dim", [3, 30, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_all_eight_kernels_compile_for_an_h200(dim, dtype, compiled):
    kinds = {"sizes": (0, 1), "noise": (0.0, 0.0, 0.1, 0.1), "schedules": (-1, -1, -1, -1, 0, 0, 0, 0)}
    advance(make(num_members=8, n=20, d=dim, dtype=dtype, **kinds), 0, 1)
    assert len({kernel.hash for kernel in compiled}) == 8


@needs_triton
def test_one_kernel_of_the_shallow_network_serves_every_ensemble_and_chunk(compiled):
    from test_cuda_shallow import run

    from dlnlab.kernels.cuda_shallow import advance_cuda

    for cuts, members in (((0, 64), None), ((2**33, 2**33 + 1), [3])):
        for scheduled in (False, True):
            run(advance_cuda, cuts, members=members, steps=[], device="cpu", scheduled=scheduled)
    assert len(compiled) == 4
    assert len({kernel.hash for kernel in compiled}) == 1
    assert len(compiled[0].asm["cubin"]) > 0


@needs_triton
@pytest.mark.parametrize(
    "widths, dtype",
    [((30, 30), torch.float64)]
    + [
        pytest.param(widths, dtype, marks=pytest.mark.slow)
        for widths, dtype in (((3,), torch.float64), ((100, 100, 60), torch.float64), ((100, 100, 60), torch.float32))
    ],
    ids=str,
)
def test_one_kernel_of_a_deep_network_serves_every_ensemble_chunk_and_batch(widths, dtype, compiled):
    from dlnlab.kernels import DeepGuard
    from dlnlab.kernels.cuda_deep import DeepKernel

    for start, stop, sizes in ((0, 1, (1,)), (2**33, 2**33 + 64, (3, 16)), (5, 21, (16,))):
        schedules = (-1,) if start == 0 else (0, 1, -1)
        setting = Setting(widths, sizes, (0, 1, 2), noise=(0.0, 0.1), dtype=dtype, schedules=schedules)
        DeepKernel(setting.places, setting.y, setting.sizes).advance(
            setting.weights, setting.lazy, setting.lr, setting.decay, setting.problem, setting.batches, MEAN, start, stop,
            guard=DeepGuard(0.0, 1e10, 16, [w.clone() for w in setting.weights]),
            rates=setting.rates(start, stop),
        )  # fmt: skip
    assert len(compiled) == 1 + 4 + 2  # a launch ends at every check
    assert len({kernel.hash for kernel in compiled}) == 1
    assert len(compiled[0].asm["cubin"]) > 0


def test_what_it_cannot_do_is_said_in_a_line(monkeypatch):
    assert cuda.refusal("cpu", 30) == "CUDA kernels do not run on cpu tensors"
    assert "4096 features" in cuda.refusal("cuda", 5000)
    with pytest.raises(ValueError, match="do not run on cpu tensors"):
        cuda.DiagonalKernel(torch.zeros(1, 2, 3), torch.zeros(1, 2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cuda._missing.cache_clear()
    assert cuda.refusal("cuda", 30) == "triton is not installed (pip install triton)"
    cuda._missing.cache_clear()


def test_the_interface_imports_without_triton():
    blocked = "import sys; sys.modules['triton'] = None; import dlnlab.kernels.cuda"
    subprocess.run([sys.executable, "-c", blocked], check=True, timeout=120)
