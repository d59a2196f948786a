"""YAML as configs are read: a mapping in which every key stands once. What is not so is refused in one line."""

from pathlib import Path
from typing import Any

import jsonargparse
import yaml

_MOST_VALUES = 10_000_000
"""Beyond this, aliases of aliases make a small file larger than memory."""
_load = jsonargparse.get_loader("yaml")


def load(text: str) -> Any:
    """Jsonargparse's loader of YAML, but a repeated key is an error instead of silently taking one of the two.

    Raises:
        yaml.YAMLError: If the text is no YAML, or a key is no word, or repeated.
    """
    try:
        _check(yaml.compose(text, Loader=yaml.SafeLoader), {})
        return _load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a date or a number that Python cannot hold
        raise yaml.YAMLError(str(error)) from None


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


def _say(source: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{source}: {' '.join(str(error).split())}"
    return f"{source}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _check(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Refuse repeated keys; returns how many values a node holds once its aliases are followed."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _error("an alias of what it is part of has no end", node)
        return sizes[id(node)]
    sizes[id(node)] = 0  # not yet known
    values = node.value
    if isinstance(node, yaml.MappingNode):
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be a word", key)
            if first.setdefault(key.value, key) is not key:
                raise _error(f"the key {key.value!r} is repeated: give it once", key)
        values = [value for _, value in node.value]
    sizes[id(node)] = size = 1 + sum(_check(value, sizes) for value in values)
    if size > _MOST_VALUES:
        raise _error(f"{size:,} values, once its aliases are followed", node)
    return size


def _error(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
