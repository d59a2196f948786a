"""Another run's parameters as the beginning of a new one: `fit --init_from RUN[@STEP]`, or a variant's `after`."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dlnlab import config as configs
from dlnlab.checkpoint import CheckpointError, read_checkpoint
from dlnlab.ensemble import Ensemble
from dlnlab.models import LinearNetwork


@dataclass(frozen=True)
class Origin:
    """What a run has started from: which run, wherever it lies and whatever it is called, and at which step.

    Attributes:
        identity: The source's `identity_of`; None for a run that has started from its own parameters.
        step: The source's optimizer step; None where it is not known yet.
        recorded: `RUN@STEP` of a checkpoint from before there were identities, which tells no more than that.
    """

    identity: str | None = None
    step: int | None = None
    recorded: str | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any]) -> "Origin":
        """The origin of a checkpoint's run."""
        found = checkpoint.get("dlnlab_origin")
        if not isinstance(found, dict):
            return cls(recorded=(checkpoint.get("dlnlab_config") or {}).get("init_from"))
        return cls(found.get("identity"), found.get("step"))

    def for_checkpoint(self) -> dict[str, Any] | None:
        """The origin as a checkpoint holds it."""
        return None if self.recorded is not None else {"identity": self.identity, "step": self.step}

    def may_be(self, identity: str, directory: Path) -> bool:
        """Whether a run is the source, at whichever step it stands now.

        Args:
            identity: The run's.
            directory: The run's, whose name is all that `recorded` tells of it.
        """
        if self.recorded is not None:
            return Path(self.recorded.rpartition("@")[0]).name == directory.resolve().name
        return self.identity == identity

    def is_at(self, start: "Start") -> bool:
        """Whether the source, which `may_be` has let pass, stands where this run has started from it."""
        if self.recorded is not None:
            return self.recorded.endswith(f"@{start.step}")
        return (self.identity, self.step) == (start.identity, start.step)


def identity_of(config: dict[str, Any] | None, origin: Origin) -> str:
    """Checksum of what tells a run from others: what of its resolved config a resume must not change, and its origin.

    A run that is resumed, extended, renamed, moved or copied keeps it.
    """
    parts = {} if config is None else configs.what_must_agree(config, fitting=True)
    return _sha256([{key: value for key, value in parts.items() if value is not None}, origin.identity])


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        run: The source's run directory, as it was named.
        step: The optimizer step of the source.
        state: The source's parameters and buffers by name.
        config_sha256: Checksum of the source's resolved config.
        identity: What tells the source from other runs (`identity_of`).
        axes: Its ensemble's axes, and those of the runs it has started from in turn, one value per member.
    """

    run: str
    step: int
    state: dict[str, Tensor]
    config_sha256: str
    identity: str
    axes: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, source: str) -> "Start":
        """Load a source; unlike a resume it never takes an earlier checkpoint for a damaged one.

        Args:
            source: A run directory, for its last checkpoint, or `RUN@STEP`.

        Raises:
            CheckpointError: If there is no such checkpoint, or it is damaged.
        """
        found = re.fullmatch(r"(.*)@([0-9]{1,18})", source, re.DOTALL)
        run, step = (found[1], int(found[2])) if found else (source, None)
        folder = Path(run) / "checkpoints"
        last = folder / "last.ckpt"
        wanted = last if step is None else folder / f"step={step}.ckpt"
        path = wanted if wanted.is_file() else last  # the end of a fit may lie there alone
        try:
            checkpoint = read_checkpoint(path) if path.is_file() else {}
        except CheckpointError as error:
            raise CheckpointError(f"init_from = {source}: {error}") from None
        if not path.is_file() or step not in (None, checkpoint.get("global_step")):
            names = [re.fullmatch(r"step=([0-9]{1,18})\.ckpt", file.name) for file in folder.glob("step=*.ckpt")]
            steps = sorted(int(name[1]) for name in names if name)
            known = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
            known += "; a step is a whole number, RUN@2000" if "@" in source and not found else ""
            raise CheckpointError(f"init_from = {source}: no checkpoint at {wanted}; {known}")
        config = checkpoint.get("dlnlab_config")
        if not {"global_step", "state_dict"} <= checkpoint.keys() or not isinstance(config, dict | None):
            raise CheckpointError(f"init_from = {source}: {path} is no checkpoint of a fit")
        identity = identity_of(config, Origin.of_checkpoint(checkpoint))
        ensemble = Ensemble(**((config or {}).get("ensemble") or {}))
        axes = (checkpoint.get("dlnlab_source_axes") or {}) | _axes_of(ensemble)
        return cls(run, checkpoint["global_step"], checkpoint["state_dict"], _sha256(config), identity, axes)

    @classmethod
    def at(
        cls,
        run: str,
        step: int,
        module: LightningModule,
        config: dict[str, Any] | None,
        identity: str,
        source_axes: dict[str, list[Any]],
    ) -> "Start":
        """Where a run in this process stands, as its checkpoint would say.

        Args:
            run: Its run directory, or its name if it has none.
            step: Its optimizer step.
            module: Its module.
            config: Its resolved config.
            identity: What tells it from other runs.
            source_axes: The axes of the run that it has started from itself.
        """
        axes = source_axes | (_axes_of(module.ensemble) if isinstance(module, LinearNetwork) else {})
        return cls(run, step, module.state_dict(), _sha256(config), identity, axes)

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


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
