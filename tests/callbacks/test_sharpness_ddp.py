"""Sharpness on two processes: one answer, that of one process on all the data, and training left alone."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys, warnings
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from dlnlab.callbacks import Sharpness

warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
processes, measured, out = int(sys.argv[1]), sys.argv[2] == "measured", sys.argv[3]
x = torch.randn(30, 3, dtype=torch.float64)
y = torch.sin(x.sum(1, keepdim=True))


class Batches(torch.utils.data.IterableDataset):
    # Uneven shards: 11 and 4 rows of each 15.
    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
        for i in (0, 15):
            parts = {None: slice(i, i + 15), 0: slice(i, i + 11), 1: slice(i + 11, i + 15)}
            yield x[parts[rank]], y[parts[rank]]


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(Batches(), batch_size=None)


class Keeps(Sharpness):
    def measure(self, model, batch):
        values = super().measure(model, batch)
        rows.append((model.global_step, {name: float(value) for name, value in values.items()}))
        return values


rows = []
uneven = DataLoader(TensorDataset(x, y), 7)  # five batches for two processes, the last of two rows
callbacks = [Keeps(every_n_steps=1, tol=1e-8), Keeps(every_n_steps=1, tol=1e-8, data=uneven, k=2, memory=0),
             Keeps(every_n_steps=1, quantity="batch_sharpness"), Keeps(every_n_steps=1, quantity="critical"),
             Keeps(every_n_steps=1, quantity="trace")] if measured else []
many = {"strategy": "ddp", "devices": processes} if processes > 1 else {"devices": 1}
trainer = Trainer(max_steps=2 if processes > 1 else 1, accelerator="cpu", logger=False, callbacks=callbacks,
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **many)
net = Net()
trainer.fit(net)
torch.save({"rows": rows, "weights": [p.detach() for p in net.parameters()]}, f"{out}.{trainer.global_rank}")
"""


def run(folder, processes, measured):
    script, out = folder / "script.py", folder / f"{processes}-{measured}"
    script.write_text(textwrap.dedent(SCRIPT))
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, str(script), str(processes), measured, str(out)], cwd=folder, capture_output=True, text=True,
        timeout=200, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return [torch.load(f"{out}.{rank}") for rank in range(processes)]


@pytest.mark.slow  # 40 s: five Python processes that import torch
def test_two_processes_with_uneven_shards_have_one_answer_and_train_as_without_it(tmp_path):
    first, second = run(tmp_path, 2, "measured")
    assert repr(first["rows"]) == repr(second["rows"])  # NaN where one batch has no interval
    (alone,) = run(tmp_path, 1, "measured")
    for (step, found), (other_step, expected) in zip(first["rows"][:5], alone["rows"], strict=True):
        assert step == other_step
        for name, value in expected.items():
            if "products" not in name and "residual" not in name and value == value:
                assert found[name] == pytest.approx(value, rel=0.05 if "critical" in name else 1e-9), name
    bare, _ = run(tmp_path, 2, "bare")
    assert all(torch.equal(one, other) for one, other in zip(first["weights"], bare["weights"], strict=True))
