"""An exception -> the one line a person needs."""

import re

from dlnlab import callbacks, data, figures, models, optim

_ROSTERS = {"optimizer": optim, "callbacks": callbacks, "figures": figures, "model": models, "data": data}
_SECTIONS = {
    "LightningModule": "model",
    "LightningDataModule": "data",
    "Callback": "trainer.callbacks",
    "Figure": "figures",
}
_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "str": "a text",
    "list": "a list",
    "dict": "a mapping",
    "bool": "true or false",
}


def explain(error: BaseException) -> str:
    """The innermost message of an error, with the key it is about.

    The parser wraps a mistake in every type it has tried; of that this keeps the key, what was wrong and what was given.
    """
    text = str(error).strip()
    if text.startswith("Does not validate") and error.__cause__ is not None:
        # A constructor refused its arguments; the parser says which base class it was building.
        section = next((word for base, word in _SECTIONS.items() if f".{base}'" in text or f".{base}]" in text), None)
        return f"{section}: {explain(error.__cause__)}" if section else explain(error.__cause__)
    if found := re.match(r"unrecognized arguments: (.*)", text):
        return f"{found[1]}: there is no such argument"
    keys = re.findall(r'Parser key "([^"]+)"', text)
    if not keys:
        return text or type(error).__name__
    return _explain_key(text, keys)


def _explain_key(text: str, keys: list[str]) -> str:
    key = keys[0]
    for inner in keys[1:]:
        key += f".init_args.{inner}" if "class_path" in text else f".{inner}"
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        return f"{key}: no class {found[1]!r}; {_known(key)}"
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        name = re.search(r"Problem with given class_path '(?:\w+\.)*(\w+)'", text)
        return f"{key}: {name[1] if name else 'it'} has no argument {found[1]!r}"
    if found := re.search(r"Import path (\S+) does not correspond to a subclass", text):
        return f"{key}: {found[1]} is of another kind; {_known(key)}"
    innermost = text[text.rindex("Parser key") :]
    if found := re.search(r"(?:No module named|ModuleNotFoundError|ImportError|has no attribute)[^\n]*", innermost):
        return f"{key}: {found[0]}; {_known(key)}"
    innermost = re.split(r"\n\s*Given value: ", innermost, maxsplit=1)
    given = (
        re.sub(r"^NestedArg\(key='[^']*', val='?(.*?)'?\)$", r"\1", innermost[1].splitlines()[0])
        if innermost[1:]
        else ""
    )
    # What ends the message of the innermost key is the list of types it may have.
    expected = dict.fromkeys(re.findall(r"Expected an? <class '([^']+)'>", innermost[0]))
    choices = re.findall(r"Expected a typing\.Literal\[(.*?)\]", innermost[0])
    allowed = [_WORDS[name] for name in expected if name in _WORDS] + [f"one of {choice}" for choice in choices]
    if allowed:
        return f"{key} = {given}: must be {' or '.join(allowed)}"
    lines = [line.strip(" -") for line in text.splitlines()[0 if len(keys) == 1 else 1 :]]
    detail = re.sub(r'^(?:Parser key "[^"]+":\s*)+', "", " ".join(line for line in lines if line))
    return f"{key}: {detail[:300]}"


def _known(key: str) -> str:
    roster = next((room for word, room in _ROSTERS.items() if word in key), None)
    if roster is None:
        return "give a dotted class path"
    names = [name for name in roster.__all__ if name[0].isupper()]
    return f"there are {', '.join(names)}, or a dotted class path of your own"
