"""An exception -> the one line a person needs: the key it is about, what must hold, what came instead."""

import contextlib
import inspect
import re
import traceback
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonargparse
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from dlnlab import callbacks, data, figures, models, optim
from dlnlab.callbacks import Measurement, MemberGuard, Recorder
from dlnlab.checkpoint import CheckpointError
from dlnlab.checks import shown
from dlnlab.figures import Figure
from dlnlab.results import ResultError

SECTIONS = (
    *("name", "seed", "ensemble", "model", "data", "record", "guard", "figures", "trainer", "variants", "init_from"),
    "ckpt_path",
)
_OPTIMIZER, _SCHEDULES = "model.init_args.optimizer", "model.init_args.schedules"
_HOMES: tuple[tuple[type, str], ...] = (
    (Recorder, "record"),
    (MemberGuard, "guard"),
    (LightningModule, "model"),
    (LightningDataModule, "data"),
    (Figure, "figures"),
    (Callback, "trainer.callbacks"),
    (Logger, "trainer.logger"),
    (Optimizer, _OPTIMIZER),
    (optim.StepSchedule, _SCHEDULES),
)
"""Where in a config a class is chosen."""
_SEVERAL = ("figures", "trainer.callbacks", "trainer.logger", "trainer.plugins", _SCHEDULES)
_ROSTERS: dict[str, tuple[ModuleType, type | tuple[type, ...]]] = {
    "model": (models, LightningModule),
    "data": (data, LightningDataModule),
    "figures": (figures, Figure),
    "trainer.callbacks": (callbacks, (Measurement, ModelCheckpoint)),
    _OPTIMIZER: (optim, Optimizer),
    _SCHEDULES: (optim, optim.StepSchedule),
}
_GIVEN = ("ensemble", "pairs", "params")
"""Arguments that no config gives: the ensemble has its own section, parameters are the model's."""
_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "bool": "true or false",
}
_LONGEST = 700
"""Characters of a message: the longest roster has 480."""
_MISTAKES = (jsonargparse.ArgumentError, ValueError, OSError, MisconfigurationException)
"""What says by itself what is wrong; of any other exception its kind and place are needed too."""


class Mistake(ValueError):
    """A message that names its key already."""


def explain(error: BaseException) -> str:
    """The innermost message of an error, in one line, with the key it is about.

    The parser wraps a mistake in every type it has tried; of that this keeps the key, what was wrong and what was given.
    """
    causes = chain(error)
    lacking = next((cause for cause in causes if _is_lack_of_memory(cause)), None)
    if lacking is not None:
        return _clip(_explain_lack_of_memory(lacking))
    named = next((cause for cause in causes if isinstance(cause, Mistake)), None)
    if named is not None:
        return _clip(str(named))
    if isinstance(error, jsonargparse.ArgumentError):
        return _clip(_explain_parser(str(error).strip()))
    return _clip(_brief(error))


def needs_no_traceback(error: BaseException) -> bool:
    """Whether the message of `explain` is all that a person can use: disks, files and memory, but no bug."""
    causes = chain(error)
    return isinstance(error, OSError | CheckpointError | ResultError) or any(map(_is_lack_of_memory, causes))


def chain(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from or while handling, the innermost last."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return causes


_LACKS = re.compile(r"can't allocate memory|out of memory|cannot allocate memory|bad_alloc", re.IGNORECASE)


def _is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) in (RuntimeError, OSError, torch.AcceleratorError) and bool(_LACKS.search(str(error)))


def _explain_lack_of_memory(error: BaseException) -> str:
    """How much was asked for, where, and what to change."""
    text = " ".join(str(error).split())
    if found := re.search(r"tried to allocate (\d+) bytes", text):  # torch on the CPU
        size = f"{int(found[1]):,} bytes could not be had"
    elif found := re.search(r"(?:Tried|Unable) to allocate ([\d.]+ \w+)", text):  # CUDA, NumPy
        size = f"{found[1]} could not be had"
    else:
        size = "more could not be had"
    frames = traceback.extract_tb(error.__traceback__)
    parts = [(frame, Path(frame.filename).parts) for frame in frames]
    ours = [frame for frame, names in parts if "dlnlab" in names or "site-packages" not in names] or frames
    where = f" ({Path(ours[-1].filename).name}, line {ours[-1].lineno})" if ours else ""
    return (
        f"out of memory: {size}{where}; use fewer members, smaller sizes or dtype: float32, record fewer variables or "
        "steps, or take a machine with more memory"
    )


@contextlib.contextmanager
def about(
    section: str, kind: type | None = None, axes: Collection[str] = (), file: tuple[str, str] | None = None
) -> Iterator[None]:
    """Name the key in any error raised inside.

    Args:
        section: The part of the config that is being set up.
        kind: The class that was chosen there; a message that begins with one of its arguments is about that key.
        axes: Those of the ensemble; a message that begins with one is about that axis.
        file: A key and the file it names; a message that begins with the file is about that key, whatever the file is
            called (`target.csv` is no argument `target`).

    Raises:
        Mistake: In the place of the error.
    """
    try:
        yield
    except Mistake:
        raise
    except Exception as error:
        raise Mistake(_located(error, section, kind, axes, file)) from error


def home(kind: type) -> str:
    """The part of a config in which a class is chosen."""
    return next((section for base, section in _HOMES if issubclass(kind, base)), "config")


def _located(
    error: Exception, section: str, kind: type | None, axes: Collection[str], file: tuple[str, str] | None
) -> str:
    text = _brief(error)
    if file is not None and file[1] and text.startswith(file[1]):
        return f"{section}.init_args.{file[0]}: {text}"
    if isinstance(error, NotImplementedError) and kind is not None:
        text = f"{kind.__name__} does not define `{traceback.extract_tb(error.__traceback__)[-1].name}`"
    if re.match(rf"({'|'.join(SECTIONS)})(\.|\[|: | = )", text):
        return text
    word = re.match(r"\w*(?=\.| = |: |\[)", text)
    word = word[0] if word and getattr(error, "filename", None) is None else ""
    if word and word in axes:
        return f"ensemble.{text}"
    if kind is None:
        return f"{section}: {text}"
    if word in arguments(kind):
        between = (
            f": {kind.__name__}." if section in _SEVERAL else "." if section in ("record", "guard") else ".init_args."
        )
        return f"{section}{between}{text}"
    ours = kind.__module__.split(".")[0] == "dlnlab"
    return f"{section}: {text}" if ours or kind.__name__ in text else f"{section}: {kind.__name__}: {text}"


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, _MISTAKES) and text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}".rstrip(": ") + where


def _clip(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 100]} ... {text[-90:]}"


def arguments(kind: type) -> list[str]:
    """The names of a class's arguments, with those its bases take."""
    names: dict[str, None] = {}
    for cls in kind.__mro__:
        if "__init__" not in vars(cls):
            continue
        try:
            parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        except ValueError:  # a class written in C
            break
        names |= {p.name: None for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


# The parser's errors --------------------------------------------------------------------------------------------------


def _explain_parser(text: str) -> str:
    if found := re.match(r"unrecognized arguments: (.*)", text):
        return f"{found[1]}: there is no such argument"
    if found := re.match(r"Subcommand '\w+' does not accept option '([^']+)'", text):
        sections = "" if "." in found[1] else f"; the sections are {', '.join(SECTIONS)}"
        return f"{found[1]}: there is no such key{sections}"
    if found := re.match(r"the following arguments are required: \w+\.(\S+)", text):
        return f"{found[1]}: must be given; {_known(found[1])}"
    if 'Parser key "' not in text:
        return " ".join(text.split())
    key, kind, inner = _innermost(text)
    return _explain_key(key, kind, inner)


def _innermost(text: str) -> tuple[str, str | None, str]:
    """Follow the parser's first attempt to the key at fault: its full name, the class it belongs to, what is said of it.

    The parser writes an outline, indented by what was tried inside what.
    """
    key, kind, depth, rest, between = "", None, -1, [], ""
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() and key and indent <= depth:
            break  # the next thing that was tried
        if found := re.search(r'Parser key "([^"]+)":', line):
            of_class = "class_path" in between or "callable class" in between + line
            if not key:
                key = found[1]
            elif key in _SEVERAL and kind:
                key = f"{key}: {kind.rpartition('.')[2]}.{found[1]}"
            else:
                key += f".init_args.{found[1]}" if of_class else f".{found[1]}"
            depth, rest, between = indent, [line[found.end() :]], ""
            continue
        if found := re.search(r"Problem with given class_path '([^']+)'", line):
            kind = found[1]
        between += line
        rest.append(line)
    if found := re.search(r"Got value: Namespace\(class_path='([^']+)'", "".join(rest)):
        kind = found[1]
    return key, kind, "\n".join(rest)


def _explain_key(key: str, kind: str | None, inner: str) -> str:
    if found := re.search(r"Option '([^']+)' is not accepted", inner):
        return f"{key}: {_no_argument(kind, found[1])}"
    if found := re.search(r"the following arguments are required: ([\w, ]+)", inner):
        return f"{key}: {kind.rpartition('.')[2] if kind else 'it'} needs {found[1]}"
    if found := re.search(r"Expected a dot import path string: (\S*?)\.?(?:\s|$)", inner):
        return f"{key}: no class {found[1]!r}; {_known(key)}"
    if found := re.search(r"(?:Import path (\S+) does not correspond|Expected '(\S+)' to be )", inner):
        return f"{key}: {found[1] or found[2]} is of another kind; {_known(key)}"
    given = re.search(r"(?:Got|Given) value: (.*)", inner)
    given = re.sub(r"^NestedArg\(key='[^']*', val=(.*?)\)$", r"\1", given[1]) if given else ""
    given = given.split(". Got value: ")[0]  # of a value, then of what holds it
    if found := re.search(r"(No module named|has no attribute) '([^']+)'", inner):
        return f"{key}: {_not_found(key, kind or _class_path(given), found[0], found[2])}"
    if "Unable to load config" in inner:  # the parser takes a text for the name of a file
        return f"{key} = {shown(re.search('Unable to load config (.*)', inner)[1][1:-1])}: must be a mapping"
    if found := re.search(r"but (\S+) is abstract", inner):
        return f"{key}: {found[1].rpartition('.')[2]} is abstract, a base of others; {_known(key)}"
    if "Not a valid subclass" in inner or "Expected an import path or a subclass" in inner:
        beside = re.match(r"\{'class_path': '[^']*'(?:, 'init_args': \{.*?\})?, '(?!init_args)(\w+)': ", given)
        if beside:
            return f"{key}.{beside[1]}: there is no such key; arguments of a class go under init_args"
        return f"{key} = {_short(given)}: must be {{class_path: ..., init_args: {{...}}}}; {_known(key)}"
    allowed = dict.fromkeys(
        _WORDS[name] for name in re.findall(r"Expected an? <class '(\w+)'>", inner) if name in _WORDS
    )
    choices = [f"one of {choice}" for choice in re.findall(r"Expected a typing\.Literal\[(.*?)\]", inner)]
    if allowed or choices:
        return f"{key} = {_short(given)}: must be {' or '.join([*allowed, *choices])}"
    said = re.search(r"Errors:\s*- (.*)", inner) or re.search(r"(\S.*)", inner)
    said = said[1].split(". Got value: ")[0] if said else ""
    chosen = _class_path(given)
    return f"{key}: {chosen} cannot be imported: {said}" if chosen else f"{key} = {_short(given)}: {said}"


def _class_path(given: str) -> str | None:
    found = re.search(r"class_path'?(?:=|: )'([^']+)'", given)
    return found[1] if found else None


def _short(given: str) -> str:
    return given if len(given) <= 80 else f"{given[:60]} ... {given[-10:]}"


def _no_argument(kind: str | None, name: str) -> str:
    if kind is None:
        return f"there is no argument {name!r}"
    module, _, cls = kind.rpartition(".")
    known = [known for known in arguments(getattr(import_module(module), cls)) if known not in _GIVEN]
    return f"{cls} has no argument {name!r}; it has {', '.join(known) or 'none'}"


def _not_found(key: str, kind: str | None, said: str, name: str) -> str:
    module, _, cls = (kind or "").rpartition(".")
    if said.startswith("No module") and kind and name != module and not module.startswith(f"{name}."):
        return f"{kind} cannot be imported: {said}"  # the file is there, and what it imports is not
    what = f"{module} {said}" if cls == name and not said.startswith("No module") else said
    return f"no class {kind!r}: {what}; {_known(key)}"


def _known(key: str) -> str:
    room = next((room for room in (_OPTIMIZER, _SCHEDULES, *_ROSTERS) if key.startswith(room)), None)
    if room is None:
        return "give a dotted class path"
    roster, base = _ROSTERS[room]
    found = [name for name in roster.__all__ if _can_be_chosen(getattr(roster, name), base)]
    return f"there are {', '.join(found)}, or a dotted class path of your own"


def _can_be_chosen(thing: Any, base: type | tuple[type, ...]) -> bool:
    # A room's base.py holds what its classes inherit.
    if not isinstance(thing, type) or inspect.isabstract(thing) or thing.__module__.endswith(".base"):
        return False
    return issubclass(thing, base)


def trainer_mistake(error: Exception, given: dict[str, Any]) -> Mistake:
    """What Lightning's trainer says of its arguments, with the key it means.

    Args:
        error: What its constructor raised.
        given: The arguments that were given.
    """
    # Lightning raises a TypeError for a value that it does not take, in words of its own.
    text = " ".join(str(error).split()) if type(error) is TypeError else _brief(error)
    named = [key for key in given if f"{key}=" in text]
    named += [key for key in given if re.search(rf"\b{key}\b", text)]
    named += [key for key, value in given.items() if isinstance(value, str) and value and value.lower() in text.lower()]
    if named:
        return Mistake(f"trainer.{named[0]} = {shown(given[named[0]])}: {text}")
    return Mistake(f"trainer: {text} (given: {', '.join(f'{key} = {shown(value)}' for key, value in given.items())})")
