"""What a config and a command line say: their axes, what must agree with a checkpoint, what reaches a variant."""

import json
import re
from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any

import jsonargparse
import yaml

from dlnlab import checks, strict_yaml
from dlnlab.ensemble import Ensemble

_FIXED = ("ensemble", "model", "data", "seed", "guard", "record")
"""Sections that a resumed run must share with its checkpoint (the model but for max_chunk)."""
_OF_MAIN = {"variants": {}, "figures": [], "init_from": None, "ckpt_path": None}
"""What a variant does not take over from the config it is a variant of."""


def class_of(class_path: str) -> type:
    """The class a dotted path names."""
    module, name = class_path.rsplit(".", 1)
    return getattr(import_module(module), name)


def ensemble_of(config: jsonargparse.Namespace) -> Ensemble:
    """The members a config names.

    Raises:
        ValueError: If it names no such ensemble.
    """
    axes = config.ensemble
    if not isinstance(axes, dict):
        raise ValueError(f"ensemble = {checks.shown(axes)}: must be a mapping of axes, {{lr: [0.1, 0.2], seed: 10}}")
    for name in axes:
        if not isinstance(name, str) or name in ("self", "root"):
            raise ValueError(f"ensemble.{name}: no such axis")
    return Ensemble(root=config.seed, **axes)


def init_args(config: Any) -> Iterator[tuple[str, Any]]:
    """(key, mapping) of every set of arguments whose scalars could be axes."""
    for key in ("model.init_args", "model.init_args.optimizer.init_args", "data.init_args"):
        found = config
        for part in key.split("."):
            found = found.get(part) if hasattr(found, "get") else None
        if found is not None:
            yield key, found


def refuse_scalars_of_axes(axes: Collection[str], given: jsonargparse.Namespace | dict[str, Any]) -> None:
    """Refuse what is given both as an axis and as a scalar.

    Raises:
        ValueError: That names the scalar.
    """
    for key, arguments in init_args(given):
        for name in axes:
            if name in arguments:
                raise ValueError(
                    f"{key}.{name} = {arguments[name]!r}: {name} is also an axis of the ensemble; give it in one place"
                )


def resolve(parser: Any, config: Any, subcommand: str, ensemble: Ensemble) -> dict[str, Any]:
    """The config as a plain dictionary that can be run again: without arguments that are axes.

    Raises:
        ValueError: If an argument is nothing a file could hold.
    """
    try:
        resolved = yaml.safe_load(parser.dump(config, skip_none=False))[subcommand]
    except Exception as error:
        found = re.search(r"cannot represent an object', (.*?)\)", str(error))
        raise ValueError(
            f"config.yaml of the run could not hold {found[1] if found else error}: give that argument a plain value"
        ) from None
    resolved.pop("ckpt_path", None)
    for _, arguments in init_args(resolved):
        for name in ensemble.axes:
            arguments.pop(name, None)
    return resolved


def what_must_agree(resolved: dict[str, Any], fitting: bool) -> dict[str, Any]:
    """The parts of a config that a checkpoint's run must share, flat: {"model.init_args.init_scale": 0.1, ...}.

    What is evaluated on other data or by other measurements is still the same ensemble.
    """
    parts = {section: resolved.get(section) for section in (_FIXED if fitting else ("ensemble", "model", "seed"))}
    if fitting:
        measurements = (resolved.get("trainer") or {}).get("callbacks") or []
        parts["trainer.callbacks"] = measurements if isinstance(measurements, list) else [measurements]
    flat: dict[str, Any] = {}

    def flatten(key: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                flatten(f"{key}.{name}", inner)
        else:
            flat[key] = value

    for section, value in parts.items():
        flatten(section, value)
    flat.pop("model.init_args.max_chunk", None)
    return flat


def changes(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What a config must hold to make one resolved config of another when it is merged over it.

    Args:
        base: A resolved config.
        other: The one to make of it, without what a variant does not take over.
    """
    found = {}
    for section, value in other.items():
        before = base.get(section)
        if section == "name" or section in _OF_MAIN or value == before:
            continue
        if section in ("trainer", "record", "guard"):  # merged key by key
            found[section] = {key: inner for key, inner in value.items() if inner != before[key]}
        else:
            found[section] = _changed_class(before, value)
    return found | {key: other[key] for key in ("figures", "init_from") if other[key]}


def _changed_class(before: Any, after: Any) -> Any:
    """Of a class that stays the same its changed arguments; of one that changes all of them."""
    known = [value.get("class_path") if isinstance(value, dict) else None for value in (before, after)]
    if known[0] != known[1] or known[1] is None:
        return after
    old, new = (value.get("init_args") or {} for value in (before, after))
    changed = {key: _changed_class(old.get(key), value) for key, value in new.items() if old.get(key, ...) != value}
    return {"class_path": known[1], "init_args": changed}


# Command lines --------------------------------------------------------------------------------------------------------


def configs_and_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that give config files, and the others: the parser lets whatever comes later win."""
    configs, flags, rest = [], [], iter(words)
    for word in rest:
        if word in ("--config", "-c"):
            configs += [word, *([following] if (following := next(rest, None)) is not None else [])]
        elif word.startswith("--config="):
            configs.append(word)
        else:
            flags.append(word)
    return configs, flags


def variant_command_line(argv: list[str], name: str, partial: dict[str, Any]) -> list[str]:
    """The command line of one variant: the configs of a study, the partial config over them, then the flags.

    Args:
        argv: The study's command line.
        name: The variant's name.
        partial: What the config has under `variants.<name>`.
    """
    configs, flags = configs_and_flags(argv[1:])
    layers = [f"--config={json.dumps(layer, default=str)}" for layer in ({"name": name, **_OF_MAIN}, partial)]
    return [argv[0], *configs, *layers, *_flags_for(flags, own_axes(partial))]


def refuse_parts_of_variants(words: list[str]) -> None:
    """Refuse a flag for a part of a variant, which the parser would take for the whole of it.

    Raises:
        ValueError: That says how to give one.
    """
    for word in words:
        if found := re.match(r"(--variants\.[^.=]+)\.[^=]*", word):
            raise ValueError(f"{found[0]}: a variant is given whole, {found[1]} '{{after: ..., trainer: ...}}'")


def own_axes(partial: dict[str, Any]) -> Collection[str] | None:
    """The axes of a variant that has an ensemble of its own, None where it has the study's."""
    if "ensemble" not in partial:
        return None
    return partial["ensemble"].keys() if isinstance(partial["ensemble"], dict) else ()


def _flags_for(flags: list[str], axes: Collection[str] | None) -> Iterator[str]:
    """Leave out the flags that are the main run's alone, and those for axes that a variant's own ensemble lacks."""
    words = iter(flags)
    for word in words:
        key, equals, value = word.partition("=")
        section, _, axis = key.removeprefix("--").rstrip("+").partition(".")
        of_ensemble = section == "ensemble" and axes is not None
        if not word.startswith("--") or not (section in ("name", *_OF_MAIN) or of_ensemble):
            yield word
            continue
        value = value if equals else next(words, "")
        if of_ensemble:
            given = {axis: value} if axis else strict_yaml.load(value)
            for name, values in given.items() if isinstance(given, dict) else ():
                if str(name).partition(".")[0] in axes:
                    yield f"--ensemble.{name}={values if isinstance(values, str) else json.dumps(values)}"
