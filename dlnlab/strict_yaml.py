"""YAML as configs are read: a mapping in which every key stands once. What is not so is refused in one line."""

import contextlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from dlnlab import checks

_MOST_VALUES = 10_000_000
"""Beyond this, aliases of aliases make a small file larger than memory."""
_MOST_DIGITS = 300
"""Of a whole number; floats end at 10^308."""
_load = jsonargparse.get_loader("yaml")


def load(text: str) -> Any:
    """Jsonargparse's loader of YAML, but a repeated key is an error instead of silently taking one of the two.

    Raises:
        yaml.YAMLError: If the text is no YAML, or a key is no word, or repeated, or a text holds a zero byte.
    """
    try:
        _check(yaml.compose(text, Loader=yaml.SafeLoader), "", {})
        return _load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a date or a number that Python cannot hold
        raise yaml.YAMLError(str(error)) from None


def check_arguments(arguments: list[str]) -> None:
    """Refuse, of a command line, what the parser would stumble over.

    Args:
        arguments: The words of the command line.

    Raises:
        ValueError: If a number is beyond all others, or a config file is no mapping.
        OSError: If a config file cannot be read.
    """
    for before, word in pairwise(["", *arguments]):
        if re.search(rf"\d{{{_MOST_DIGITS + 1}}}", word):
            raise ValueError(f"{before} {word[:40]}...: these are more digits than a number can have")
        if before in ("--config", "-c"):
            check_file(word)
        if word.startswith("--config="):
            check_file(word.partition("=")[2])
        key, equals, value = word.partition("=")
        key, value = (key, value) if equals else (before, word)
        if key.startswith("--") and value.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(yaml.YAMLError):  # the parser says it better, with the key
                _check_classes(load(value), key.removeprefix("--").rstrip("+"))


def check_file(given: str) -> None:
    """Refuse what `--config` cannot take.

    Args:
        given: The path of a file, or a config as text.

    Raises:
        ValueError: If it is no mapping, naming the file and the line.
        OSError: If it cannot be read.
    """
    path = Path(given)
    is_text = "\n" in given or given.lstrip().startswith("{")
    if not is_text and not path.exists():
        raise ValueError(f"--config {given}: there is no such file")
    if not is_text and path.is_dir():
        raise ValueError(f"--config {given}: is a folder; give a YAML file")
    source = "--config" if is_text else given
    try:
        content = load(given if is_text else path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{source}: must be a YAML file, text in UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(_say(source, error)) from None
    if not isinstance(content, dict):
        got = {type(None): "nothing", list: "a list"}.get(type(content), "a single value")
        raise ValueError(f"{source}: must be a mapping of sections, `model: ...`, `data: ...`; got {got}")
    _check_classes(content, "")


def _check_classes(content: Any, key: str, seen: set[int] | None = None) -> None:
    """Refuse a class whose path is no text, or whose arguments are no mapping, wherever a config names one.

    Raises:
        ValueError: That names the key.
    """
    seen = set() if seen is None else seen  # an alias is the same object again
    if not isinstance(content, dict | list) or id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, list):
        for i, value in enumerate(content):
            _check_classes(value, f"{key}[{i}]", seen)
        return
    path, arguments = content.get("class_path", "?"), content.get("init_args")
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"{key}.class_path = {checks.shown(path)}: must be the name of a class, as a text")
    if not isinstance(arguments, dict | None):
        raise ValueError(f"{key}.init_args = {checks.shown(arguments)}: must be a mapping, {{argument: value}}")
    for name in arguments or ():
        if not isinstance(name, str):
            raise ValueError(f"{key}.init_args.{name}: the name of an argument must be a text")
    for name, value in content.items():
        _check_classes(value, f"{key}.{name}" if key else str(name), seen)


def _say(source: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{source}: {' '.join(str(error).split())}"
    return f"{source}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _check(node: yaml.Node | None, key: str, sizes: dict[int, int]) -> int:
    """Refuse repeated keys and numbers beyond all others; returns how many values a node holds, aliases followed."""
    if node is None:
        return 1
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value:
            raise _error(f"{key} = {checks.shown(node.value)}: no text may hold a zero byte", node)
        if len(node.value) > _MOST_DIGITS and node.style is None and node.value.strip("+-_0123456789") == "":
            raise _error(
                f"{key} = {node.value[:20]}...: {len(node.value)} digits are more than a number can have", node
            )
        return 1
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _error(f"{key} is an alias of what it is part of, which has no end", node)
        return sizes[id(node)]
    sizes[id(node)] = 0  # not yet known
    parts = [(f"{key}[{i}]", value) for i, value in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        parts = []
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise _error("a key must be a word", name)
            inner = f"{key}.{name.value}" if key else name.value
            if inner in dict(parts):
                raise _error(f"the key {inner!r} is repeated: give it once", name)
            parts.append((inner, value))
    sizes[id(node)] = size = 1 + sum(_check(value, inner, sizes) for inner, value in parts)
    if size > _MOST_VALUES:
        raise _error(f"{key} has {size:,} values once its aliases are followed", node)
    return size


def _error(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
