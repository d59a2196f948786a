"""Another run's parameters as the beginning of a new one: `fit --init_from RUN[@STEP]`, or a variant's `after`."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dlnlab.checkpoint import CheckpointError, read_checkpoint
from dlnlab.ensemble import Ensemble
from dlnlab.models import LinearNetwork


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        run: The source's run directory, as it was named.
        step: The optimizer step of the source.
        state: The source's parameters and buffers by name.
        config_sha256: Checksum of the source's resolved config.
        axes: Its ensemble's axes, and those of the runs it has started from in turn, one value per member.
    """

    run: str
    step: int
    state: dict[str, Tensor]
    config_sha256: str
    axes: dict[str, list[Any]] = field(default_factory=dict)

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
        config = checkpoint.get("dlnlab_config")
        ensemble = Ensemble(**((config or {}).get("ensemble") or {}))
        axes = (checkpoint.get("dlnlab_source_axes") or {}) | _axes_of(ensemble)
        return cls(run, checkpoint["global_step"], checkpoint["state_dict"], _sha256(config), axes)

    @classmethod
    def at(
        cls,
        run: str,
        step: int,
        module: LightningModule,
        config: dict[str, Any] | None,
        source_axes: dict[str, list[Any]],
    ) -> "Start":
        """Where a run in this process stands, as its checkpoint would say.

        Args:
            run: Its run directory, or its name if it has none.
            step: Its optimizer step.
            module: Its module.
            config: Its resolved config.
            source_axes: The axes of the run that it has started from itself.
        """
        axes = source_axes | (_axes_of(module.ensemble) if isinstance(module, LinearNetwork) else {})
        return cls(run, step, module.state_dict(), _sha256(config), axes)

    @property
    def source(self) -> str:
        """`RUN@STEP`, for the new run's config."""
        return f"{self.run}@{self.step}"

    @property
    def provenance(self) -> str:
        """Run, step and config checksum as JSON, for the results' attributes."""
        return json.dumps({"run": self.run, "step": self.step, "config_sha256": self.config_sha256})

    def check(self, module: LightningModule, key: str) -> None:
        """Refuse a module, set up, that cannot start from here.

        Args:
            module: It.
            key: What was given for that, for the message.

        Raises:
            ValueError: If number of members, names or shapes differ.
        """
        own = dict(module.named_parameters())
        linear = isinstance(module, LinearNetwork)
        if linear and "status" in self.state and len(self.state["status"]) != module.num_members:
            raise ValueError(
                f"{key}: its ensemble has {len(self.state['status'])} members and this one {module.num_members}; "
                "they must have equally many"
            )
        theirs = self.state.keys() - dict(module.named_buffers()).keys()
        if theirs != own.keys():
            raise ValueError(
                f"{key}: its parameters are {', '.join(sorted(theirs))} and this model's {', '.join(sorted(own))}"
            )
        for name, parameter in own.items():
            if self.state[name].shape != parameter.shape:
                raise ValueError(
                    f"{key}: its parameter {name} has shape {tuple(self.state[name].shape)} and this model's "
                    f"{tuple(parameter.shape)}"
                )

    @torch.no_grad()
    def apply(self, module: LightningModule) -> None:
        """Give a module that `check` has let pass the source's parameters; all but what had diverged begins anew."""
        parameters = {name: self.state[name] for name, _ in module.named_parameters()}
        if isinstance(module, LinearNetwork):
            module.start_from(parameters)
            module.restart()
            if "status" in self.state:
                module.inherit(self.state["status"], self.state["stopped_at"])
        else:
            for name, parameter in module.named_parameters():
                parameter.copy_(parameters[name])


def _axes_of(ensemble: Ensemble) -> dict[str, list[Any]]:
    return {name: ensemble.values(name) for name in ensemble.axes}


def _sha256(config: dict[str, Any] | None) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
