"""An exception -> the one line a person needs."""

import re

from dlnlab import callbacks, data, figures, models, optim

_ROSTERS = (
    ("optimizer", optim),
    ("callbacks", callbacks),
    ("figures", figures),
    ("model", models),
    ("data", data),
)


def explain(error: BaseException) -> str:
    """The innermost message of an error, with the key it is about.

    The parser reports a mistake with every type it has tried around it; of that this keeps the key, what was wrong and
    what was given.
    """
    text = str(error).strip()
    keys = re.findall(r'Parser key "([^"]+)"', text)
    if not keys:
        return text or type(error).__name__
    key = _join(keys, text)
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        return f"{key}: no class {found[1]!r}; {_known(key)}"
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        return f"{key}.{found[1]}: there is no such argument"
    if found := re.search(r"(?:Unexpected|No action for) .*?key[s]? \"([^\"]+)\"", text):
        return f"{found[1]}: there is no such argument"
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\S+)", text):
        return f"{key}: {found[1]} is no {found[2].rsplit('.', 1)[-1].strip(':.')}; {_known(key)}"
    expected = dict.fromkeys(re.findall(r"Expected (?:an?|one of)? ?(?:<class ')?([^'>\n]+)", _innermost(text)))
    given = re.findall(r"Given value: (.*)", text)
    if expected:
        return f"{key} = {given[0] if given else '?'}: must be {' or '.join(expected)}"
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    return f"{key}: {lines[-1] if lines[-1] != text else text}"


def _join(keys: list[str], text: str) -> str:
    path = keys[0]
    for key in keys[1:]:
        path += f".init_args.{key}" if "class_path" in text else f".{key}"
    return path


def _innermost(text: str) -> str:
    """What follows the last key: the parts before it are the types tried around it."""
    return text[text.rindex("Parser key") :]


def _known(key: str) -> str:
    roster = next((room for word, room in _ROSTERS if word in key), None)
    if roster is None:
        return "give its dotted class path"
    names = ", ".join(name for name in roster.__all__ if name[0].isupper())
    return f"there are {names}, or a dotted class path of your own"
