"""Another run's parameters as the beginning of a new one: `fit --init_from RUN[@STEP]`."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dlnlab.checkpoint import CheckpointError, read_checkpoint
from dlnlab.models import LinearNetwork


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        run: The source's run directory, as it was named.
        step: The optimizer step of the source.
        state: The source's parameters and buffers by name.
        config_sha256: Checksum of the source's resolved config.
    """

    run: str
    step: int
    state: dict[str, Tensor]
    config_sha256: str

    @classmethod
    def read(cls, source: str) -> "Start":
        """Load a source; unlike a resume it never takes an earlier checkpoint for a damaged one.

        Args:
            source: A run directory, for its last checkpoint, or `RUN@STEP`.

        Raises:
            CheckpointError: If there is no such checkpoint, or it is damaged.
        """
        run, at, step = source.rpartition("@")
        if not at or not step.isdigit():
            run, step = source, ""
        folder = Path(run) / "checkpoints"
        path = folder / (f"step={int(step)}.ckpt" if step else "last.ckpt")
        if not path.is_file():
            steps = sorted(int(name) for file in folder.glob("step=*.ckpt") if (name := file.stem[5:]).isdigit())
            known = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
            raise CheckpointError(f"init_from = {source}: no checkpoint at {path}; {known}")
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(f"init_from = {source}: {error}") from None
        config = json.dumps(checkpoint.get("dlnlab_config"), sort_keys=True)
        sha256 = hashlib.sha256(config.encode()).hexdigest()
        return cls(run, checkpoint["global_step"], checkpoint["state_dict"], sha256)

    @property
    def source(self) -> str:
        """`RUN@STEP`, for the new run's config."""
        return f"{self.run}@{self.step}"

    @property
    def provenance(self) -> str:
        """Run, step and config checksum as JSON, for the results' attributes."""
        return json.dumps({"run": self.run, "step": self.step, "config_sha256": self.config_sha256})

    @torch.no_grad()
    def apply(self, module: LightningModule) -> None:
        """Give a module that has been set up the source's parameters; all else begins anew.

        Raises:
            ValueError: If number of members, names or shapes differ.
        """
        where, own = f"init_from = {self.source}", dict(module.named_parameters())
        linear = isinstance(module, LinearNetwork)
        if linear and "status" in self.state and len(self.state["status"]) != module.num_members:
            raise ValueError(
                f"{where}: its ensemble has {len(self.state['status'])} members and this one {module.num_members}; "
                "they must have equally many"
            )
        theirs = self.state.keys() - dict(module.named_buffers()).keys()
        if theirs != own.keys():
            raise ValueError(
                f"{where}: its parameters are {', '.join(sorted(theirs))} and this model's {', '.join(sorted(own))}"
            )
        for name, parameter in own.items():
            if self.state[name].shape != parameter.shape:
                raise ValueError(
                    f"{where}: its parameter {name} has shape {tuple(self.state[name].shape)} and this model's "
                    f"{tuple(parameter.shape)}"
                )
        if linear:
            module.start_from({name: self.state[name] for name in own})
        else:
            for name, parameter in own.items():
                parameter.copy_(self.state[name])
