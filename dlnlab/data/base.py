"""SyntheticData: what every data set of dlnlab promises.

A subclass writes `sample(stream, values)`, which draws one problem from the streams of one seed; `values` are the data
axes of that problem. It inherits the rest: members of one seed and equal data axes share one problem (`data_index`),
the last `num_test_samples` rows of a problem are its test set, everything is drawn on the trainer's device and lies
stacked over problems:

    class Line(SyntheticData):
        axes = ("slope",)

        def __init__(self, slope: float = 1.0, **kwargs):
            super().__init__(**kwargs)
            self.slope = slope

        def sample(self, stream, values):
            x = stream.normals("inputs", (10 + self.num_test_samples, 2))
            return x, values["slope"] * x[:, 0], None
"""

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dlnlab import checks
from dlnlab.ensemble import Ensemble
from dlnlab.streams import Stream


class Problems(NamedTuple):
    """P problems, stacked.

    What is observed of a predictor is either its value at inputs, x (P, N, D) and y (P, N) or (P, N, K), or single
    entries of it: then x (P, N, 2) holds their places (row, column) in a matrix (K, D), int64, and y (P, N) their values.

    Attributes:
        x: Inputs, or places.
        y: Targets.
        teacher: The truth, (P, D) or (P, K, D), or None.
        x_test: Those of the test set, or None.
        y_test: Likewise.
        matrix_shape: (K, D) where x holds places.
    """

    x: Tensor
    y: Tensor
    teacher: Tensor | None
    x_test: Tensor | None
    y_test: Tensor | None
    matrix_shape: tuple[int, int] | None = None

    @property
    def predictor_shape(self) -> tuple[int, ...]:
        """What a predictor for these problems looks like, (D,) or (K, D)."""
        return self.matrix_shape or (*self.y.shape[2:], self.x.shape[-1])

    def to(self, dtype: torch.dtype) -> "Problems":
        """The same problems in another precision; places stay whole numbers."""
        numbers = {
            name: value.to(dtype)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return self._replace(**numbers)


class Ticks:
    """A loader without an end or a length: every item is the same batch, for the training loop decides when to stop."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return repeat(self.batch)


class Once:
    """A loader of one batch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        yield self.batch

    def __len__(self) -> int:
        return 1


class SyntheticData(LightningDataModule):
    """Problems drawn per data seed and shared by the members of that seed.

    Args:
        num_test_samples: Rows of each problem that are kept for the test loss.

    Raises:
        ValueError: If an argument is out of range.
    """

    axes: ClassVar[tuple[str, ...]] = ()
    """The arguments that may be axes of the ensemble; sizes cannot."""

    depends_on_seed: ClassVar[bool] = True
    """False where the members of all seeds share one problem."""

    matrix_shape: tuple[int, int] | None = None
    """(K, D) where `sample` returns places in a matrix instead of inputs; see `Problems`."""

    source: str = ""
    """The file whose numbers `checksum` is of, where `sample` draws from one."""

    checksum: str | None = None

    ensemble: Ensemble | None = None
    """Set where the model brings none (a plain LightningModule); otherwise the model's is used."""

    def __init__(self, num_test_samples: int = 0) -> None:
        super().__init__()
        self.num_test_samples = checks.integer("num_test_samples", num_test_samples)
        self.problems: Problems | None = None
        self.data_index: Tensor | None = None

    def sample(self, stream: Stream, values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw one problem.

        Args:
            stream: The random streams of this problem's seed.
            values: The problem's value of every name in `axes`. They never enter the stream's key, so problems that
                differ in them share all draws that they do not change.

        Returns:
            x (N + num_test_samples, D), y (N + num_test_samples,) or (..., K), and the teacher (D,) or (K, D), or None;
            where there is a `matrix_shape`, x (N + num_test_samples, 2) of places, int64.
        """
        raise NotImplementedError

    def check(self, values: dict[str, Any]) -> None:
        """Raise ValueError if a problem with these values cannot be drawn; called for all before the first is drawn."""

    def bytes_per_problem(self) -> int | None:
        """Memory one problem needs, if it is known before it is drawn."""
        return None

    def bytes_to_draw(self) -> int:
        """Memory that drawing one problem needs beside it; random words and Box-Muller's parts of x, unless known."""
        return 12 * (self.bytes_per_problem() or 0)

    def setup(self, stage: str | None = None) -> None:
        """Draw all problems of the ensemble, once."""
        del stage
        if self.problems is not None:
            return
        ensemble = self._ensemble()
        ensemble.data_axes = tuple(name for name in self.axes if name in ensemble.axes)
        seed = ("seed",) if self.depends_on_seed else ()
        self.data_index, combinations = ensemble.group((*seed, *ensemble.data_axes))
        values = [{name: combo.get(name, getattr(self, name)) for name in self.axes} for combo in combinations]
        for one in values:
            self.check(one)
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        self._check_memory(len(combinations), device)
        rows = [
            self._draw(Stream(ensemble.root, combo.get("seed", 0), device), one)
            for combo, one in zip(combinations, values, strict=True)
        ]
        shapes = {tuple(None if tensor is None else tuple(tensor.shape) for tensor in row) for row in rows}
        if len(shapes) > 1:
            raise ValueError(
                f"{type(self).__name__}.sample gave problems of different shapes: {sorted(map(str, shapes))}"
            )
        x, y, teacher = (
            None if column[0] is None else torch.stack(column)
            for column in (list(part) for part in zip(*rows, strict=True))
        )
        train = x.shape[1] - self.num_test_samples
        has_test = self.num_test_samples > 0
        self.problems = Problems(
            x[:, :train].contiguous(),
            y[:, :train].contiguous(),
            teacher,
            x[:, train:].contiguous() if has_test else None,
            y[:, train:].contiguous() if has_test else None,
            self.matrix_shape,
        )

    def state_dict(self) -> dict[str, Any]:
        """A checksum of the numbers that were read, for a resume."""
        return {} if self.checksum is None else {"checksum": self.checksum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on training on other numbers: a path says where a table lies, not what is in it."""
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and state_dict.get("checksum") != self.checksum:
            raise ValueError(f"{self.source} has changed since the checkpoint: start a new run")

    def _ensemble(self) -> Ensemble:
        module = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, "ensemble", None) or self.ensemble or Ensemble()

    def _check_memory(self, count: int, device: torch.device) -> None:
        each = self.bytes_per_problem()
        if each is None:
            return
        needed = 3 * count * each + self.bytes_to_draw()  # drawn, stacked, divided into training and test rows
        refuse_beyond_memory(
            needed, device, "the data", f"{count:,} problems of {each:,}", "use fewer seeds or smaller sizes"
        )

    def _draw(self, stream: Stream, values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        name = type(self).__name__
        x, y, teacher = self.sample(stream, values)
        if x.ndim != 2 or y.ndim not in (1, 2) or len(x) != len(y):
            raise ValueError(
                f"{name}.sample must return x of shape (N, D) and y of shape (N,) or (N, K), got {tuple(x.shape)} and "
                f"{tuple(y.shape)}"
            )
        if len(x) <= self.num_test_samples:
            raise ValueError(
                f"{name}.sample returned {len(x)} rows, of which num_test_samples = {self.num_test_samples} are the test "
                "set: none is left to train on"
            )
        for part, tensor in (("x", x), ("y", y)):
            bad = ~torch.isfinite(tensor)
            if bad.any():
                row = int(bad.reshape(len(tensor), -1).any(1).nonzero()[0])
                raise ValueError(f"{name}: {part} has a value that is not finite in row {row}")
        return x, y, teacher

    def train_dataloader(self) -> Any:
        """The first problem (x, y), without end; a `LinearNetwork` draws its own batches from all problems."""
        return Ticks((self.problems.x[0], self.problems.y[0]))

    def val_dataloader(self) -> Any:
        """The training problems, one batch of one item: all rows, every problem."""
        return Once((self.problems.x, self.problems.y))

    def test_dataloader(self) -> Any:
        """The test rows of every problem; the training rows where there are none."""
        if self.problems.x_test is None:
            return self.val_dataloader()
        return Once((self.problems.x_test, self.problems.y_test))

    def predict_dataloader(self) -> Any:
        """As `test_dataloader`."""
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing moves: the data are drawn where they are used."""
        del device, dataloader_idx
        return batch


def refuse_beyond_memory(needed: int, device: torch.device, what: str, detail: str, advice: str) -> None:
    """Raise ValueError where a device has less than `needed` bytes free.

    Args:
        needed: An estimate, known before anything is allocated.
        device: Where they would be.
        what: Needs them.
        detail: Where the number comes from.
        advice: What to do.

    Raises:
        ValueError: With all of these.
    """
    available = free_memory(device)
    if needed > available:
        raise ValueError(f"{what} need {needed:,} bytes ({detail}) and {device} has {available:,} free: {advice}")


def free_memory(device: torch.device) -> int:
    """Bytes a device can still hand out (for the CPU, what the system says is available)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
