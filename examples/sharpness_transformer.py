"""The sharpness of a small attention model, and its critical sharpness, which takes forward passes only."""

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dlnlab.callbacks import Sharpness


class DigitsTransformer(LightningModule):
    """Full-batch gradient descent of a pre-norm transformer that reads the eight lines of a digit as tokens."""

    def __init__(self, lr: float = 0.1, width: int = 32, rows: int = 200):
        super().__init__()
        self.lr, self.rows = lr, rows
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.read = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 10)

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        x, y = batch
        return nn.functional.cross_entropy(self.read(self.blocks(self.embed(x) + self.place).mean(1)), y)

    def configure_optimizers(self):
        """Gradient descent."""
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self):
        """One batch of all rows."""
        x, y = load_digits(return_X_y=True)
        x = torch.tensor(x[: self.rows] / 8 - 1).float().reshape(-1, 8, 8)
        return DataLoader(TensorDataset(x, torch.tensor(y[: self.rows])), self.rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    callbacks = [Sharpness(every_n_steps=25), Sharpness(every_n_steps=25, quantity="critical")]
    Trainer(max_steps=300, accelerator="cpu", callbacks=callbacks).fit(DigitsTransformer())
