"""What does one step of one member cost in the CUDA kernels, beside the CPU kernels on one core, and what bounds it?

    python benchmarks/cuda_kernel.py                          # (N, D) = (20, 30), E = 10,000, full batches and single rows
    python benchmarks/cuda_kernel.py --values 2 4 8 --registers 128 168 255 --members 1000 10000
    python benchmarks/cuda_kernel.py --networks               # the shallow network, and the deep one on single entries

Times are wall times of whole `advance` calls after a warm-up, medians of rounds; each round does the same steps with both
kernels' guards checking, every 100 (the deep network: 1000). Before it is timed, the diagonal kernel's result is compared
with the reference's; `pytest -m cuda` does that for all.

**The kernels have been checked in Triton's interpreter only, so no table of this script exists yet.** Predicted for an
H200 and the diagonal network (`dlnlab/kernels/cuda_steps.py` counts): 0.2 ns for full batches, bound by reads of x from the
first-level cache, and 0.03 ns for single rows, bound by the issue of float64 and integer instructions.
"""

import argparse
import statistics
import sys
import time

import completion
import contest
import shallow
import torch

from dlnlab import streams
from dlnlab.kernels import Batches, Factors, Guard, cpu, cuda, shallow_kernel
from dlnlab.kernels.shallow import advance_torch

N, D, ALPHA = 20, 30, 0.1
L1_BYTES_PER_CYCLE = 128
"""A multiprocessor reads so much per cycle from its first-level cache."""
PEAK = {9: 64, 8: 32}
"""Float64 multiply-adds of a multiprocessor per cycle, by compute capability (9.0, 8.0: data sheets)."""


class Run:
    """One kernel on one problem."""

    def __init__(self, kernels, device, members, batch_size, dtype):
        generator = torch.Generator().manual_seed(0)
        x, teacher = torch.randn(1, N, D, generator=generator, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
        teacher[:3] = 1.0
        self.device, self.dtype, self.now = device, dtype, 0
        self.kernel = kernels.DiagonalKernel(x.to(device, dtype), (x @ teacher).to(device, dtype))
        w = torch.full((members, D), ALPHA, dtype=dtype)
        self.factors = self._there(Factors.start(w, w.clone()))
        lr = 0.05 if batch_size == 0 else 0.2 / D
        self.lr = torch.full((members,), lr, dtype=dtype, device=device)
        size = torch.full((members,), batch_size, device=device)
        key = streams.keys(0, "sampling", torch.arange(members)).to(device)
        self.problem = torch.zeros_like(size)
        self.batches = Batches(size, torch.zeros_like(size), key, key, torch.zeros(members, device=device))
        self.guard = Guard(0.0, 1e10, 100, self.factors.map(torch.clone))

    def _there(self, factors):
        return factors.map(lambda tensor: tensor.to(self.device))

    def steps(self, count):
        """That many more steps; seconds."""
        began = time.perf_counter()
        taken = self.kernel.advance(
            self.factors, self.lr, None, self.problem, self.batches, self.now, self.now + count, guard=self.guard
        )  # its answer waits for the device
        assert taken == count, "a member stopped: the rates would be wrong"
        self.now += count
        return time.perf_counter() - began

    def calibrate(self, seconds):
        """How many steps take about that long."""
        self.steps(32)  # compiles
        count = 32
        while (took := self.steps(count)) < 0.2 * seconds:
            count *= 4
        return max(32, round(count * seconds / took))


def operations(rows):
    """Multiply-adds counted as two, per member-step: two products with each row, and 15 a coordinate for the rest."""
    return 4 * rows * D + 15 * D


def networks(rounds, seconds):
    """The other two networks: the kernel of this device beside that of a CPU core and torch's batched steps."""

    def waiting(run):
        def all_of_it(steps):
            taken = run(steps)
            torch.cuda.synchronize()
            return taken

        return all_of_it

    advance, refused = shallow_kernel(torch.device("cuda"))
    assert refused is None, refused
    print(f"{'network':>14} {'E':>7} {'CPU core ns':>11} {'torch ns':>10} {'GPU ns':>10} {'ratio':>7} {'us/step':>8}")
    cases = [("shallow", 10, members) for members in (1000, 40_000, 1_000_000)]
    cases += [("deep", n, members) for n in (30, 100) for members in (100, 1000, 10_000)]
    for name, size, members in cases:
        if name == "shallow":
            host, plain = shallow.kernel(size, 1000), shallow.kernel(size, members, advance_torch, "cuda")
            run, alone = shallow.kernel(size, members, advance, "cuda"), 1000
        else:
            host, plain = completion.kernel(size, 10), completion.torch_batched(size, members, "cuda")
            run, alone = completion.kernel(size, members, "cuda"), 10
        ns = []
        for contender, count in ((host, alone), (waiting(plain), members), (waiting(run), members)):
            steps = contest.steps_in(contender, seconds)
            times = [contest.seconds_per_step(contender, steps, time.perf_counter) for _ in range(rounds)]
            ns.append(1e9 * statistics.median(times) / count)
        print(f"{name + f' {size}':>14} {members:>7} {ns[0]:11.2f} {ns[1]:10.3f} {ns[2]:10.4f} {ns[0] / ns[2]:7.0f} "
              f"{ns[2] * members / 1000:8.2f}", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=[10_000])
    parser.add_argument("--values", type=int, nargs="+", default=[cuda.VALUES], help="coordinates a thread holds")
    parser.add_argument("--registers", type=int, nargs="+", default=[cuda.REGISTERS], help="of a thread, at most")
    parser.add_argument("--clock", type=float, default=1.98, help="GHz, for the shares of peaks (an H200's highest)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="per round and kernel")
    parser.add_argument("--networks", action="store_true", help="the shallow and the deep network instead")
    parser.add_argument("--float32", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/cuda_kernel.py needs a CUDA device, and torch finds none here")
    reason = cuda.refusal("cuda", D)
    if reason is not None:
        sys.exit(f"benchmarks/cuda_kernel.py: {reason}")
    if arguments.networks:
        networks(arguments.rounds, arguments.seconds)
        return
    dtype = torch.float32 if arguments.float32 else torch.float64
    device = torch.cuda.get_device_properties(0)
    clock = 1e9 * arguments.clock
    peak = 2 * PEAK.get(device.major, 64) * device.multi_processor_count * clock
    print(f"{device.name}, {device.multi_processor_count} multiprocessors at {clock / 1e9:.2f} GHz, "
          f"float64 peak {peak / 1e12:.0f} TFLOP/s; {dtype}")  # fmt: skip
    print(f"{'batch':>5} {'E':>7} {'values':>6} {'regs':>4} {'CPU core ns':>11} {'GPU ns':>8} {'ratio':>7} {'us/step':>8} "
          f"{'of fp64 peak':>12} {'of L1 reads':>11}")  # fmt: skip
    for batch_size in (0, 1):
        rows = batch_size or N
        one = Run(cpu, "cpu", 300, batch_size, dtype)
        count = one.calibrate(arguments.seconds)
        host = statistics.median(one.steps(count) for _ in range(arguments.rounds)) / count / 300
        for members in arguments.members:
            for values in arguments.values:
                for registers in arguments.registers:
                    cuda.VALUES, cuda.REGISTERS = values, registers
                    run, same = Run(cuda, "cuda", members, batch_size, dtype), Run(cpu, "cpu", 8, batch_size, dtype)
                    run.steps(200), same.steps(200)
                    torch.testing.assert_close(run.factors.w_plus[:8].cpu(), same.factors.w_plus,
                                               rtol=1e-10 if dtype == torch.float64 else 1e-3, atol=0)  # fmt: skip
                    count = run.calibrate(arguments.seconds)
                    took = statistics.median(run.steps(count) for _ in range(arguments.rounds)) / count
                    each = took / members
                    columns = cuda.layout(D)[0]
                    reads = rows * columns * dtype.itemsize / L1_BYTES_PER_CYCLE / clock / device.multi_processor_count
                    print(f"{'full' if batch_size == 0 else batch_size:>5} {members:>7} {values:>6} {registers:>4} "
                          f"{1e9 * host:11.1f} {1e9 * each:8.3f} {host / each:7.0f} {1e6 * took:8.2f} "
                          f"{operations(rows) / each / peak:12.1%} {reads / each:11.1%}", flush=True)  # fmt: skip
    print(
        "What bounds it: the column near 100 %; where neither is, latency (try more members, other values and registers)."
    )


if __name__ == "__main__":
    main()
