"""What the command line's parser has against an argument, in one line and in words."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

WORDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "tuple": "two numbers, as [0.6,1.5]",
    "NoneType": "null",
}


def explain(message: str, flags: Collection[str] = ()) -> str:
    """Return a message of the parser without its own terms, and with the flag that was probably meant.

    Args:
        message: of the parser.
        flags: that the command has, without dashes.

    >>> explain('Parser key "lr": Expected a <class \\'float\\'>. Got value: fast')
    'lr: expected a number, got fast'
    >>> explain("unrecognized arguments: --batch_sz 32", ["batch_size", "lr"])
    'unrecognized arguments: --batch_sz 32; did you mean --batch-size?'
    """
    message = " ".join(message.split())
    if found := re.match(r'Parser key "([^"]+)": ', message):
        message = f"{found[1]}: {message[found.end() :]}"
        types = dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message))
        value = re.search(r"(?:Got|Given) value: (.*)$", message)
        if types and value:
            return f"{found[1]}: expected {' or '.join(WORDS.get(name, name) for name in types)}, got {value[1]}"
    if message.startswith("unrecognized arguments: "):
        given = [word.split("=")[0][2:] for word in message.split() if word.startswith("--")]
        meant = [match for name in given for match in get_close_matches(name, list(flags), n=1)]
        if meant:
            message += f"; did you mean {', '.join('--' + name.replace('_', '-') for name in meant)}?"
    return message


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        ValueError: not YAML, or anything but names with values.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines of 'name: value', got {type(content).__name__}")
    return content
