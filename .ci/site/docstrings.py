"""Extension of griffe: docstrings of this house, in the form that griffe's Google parser reads.

Under ``Raises:`` one paragraph may name several exceptions, under ``Args:`` and ``Attributes:`` one item several names;
each gets an item of its own. Doctests outside a section become blocks of code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXCEPTION = re.compile(r"(?:^|(?<=[.;] ))([A-Z]\w+(?: or [A-Z]\w+)*): ")
SECTION = re.compile(r"^(Raises|Args|Attributes):\n((?:    .*\n|\n(?=    ))+)", re.MULTILINE)
NAMES = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n     .*)*)", re.MULTILINE)
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def for_google(text: str) -> str:
    text = SECTION.sub(_section, text + "\n")
    return DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text).rstrip()


def _section(match: re.Match[str]) -> str:
    title, body = match[1], match[2]
    if title == "Raises":
        _, *parts = EXCEPTION.split(" ".join(body.split()))
        items = [f"    {name}: {what.strip()}\n" for name, what in zip(parts[::2], parts[1::2], strict=True)]
        return f"{title}:\n{''.join(items)}\n"
    alone = NAMES.sub(lambda item: "\n".join(f"    {name}: {item[2]}" for name in item[1].split(", ")), body)
    return f"{title}:\n{alone}"


class HouseDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = for_google(obj.docstring.value)
