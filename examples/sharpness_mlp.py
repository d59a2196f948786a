"""The sharpness of any LightningModule: a tanh network on scikit-learn's digits, beside the edge of stability."""

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dlnlab.callbacks import Sharpness


class DigitsMLP(LightningModule):
    """Full-batch training of a tanh network, squared loss; optimizer is sgd or adam."""

    def __init__(self, lr: float = 0.1, optimizer: str = "sgd", width: int = 100, rows: int = 500):
        super().__init__()
        self.lr, self.kind, self.rows = lr, optimizer, rows
        layers = [nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
        self.net = nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        """Half the mean over rows of the squared error of all ten outputs."""
        x, y = batch
        return (self.net(x) - y).square().sum(1).mean() / 2

    def configure_optimizers(self):
        """One optimizer."""
        return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.kind](self.parameters(), self.lr)

    def train_dataloader(self):
        """One batch of all rows."""
        x, y = load_digits(return_X_y=True)
        x, y = torch.tensor(x[: self.rows] / 16).float(), nn.functional.one_hot(torch.tensor(y[: self.rows])).float()
        return DataLoader(TensorDataset(x - x.mean(0), y), self.rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    Trainer(max_steps=500, accelerator="cpu", callbacks=[Sharpness(every_n_steps=25)]).fit(DigitsMLP())
