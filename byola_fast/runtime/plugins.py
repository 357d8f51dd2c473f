"""Classes by name: built-in names, and ``package.module:Class`` for classes of users."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any


def find_class(kind: str, name: str | type[Any], known: Mapping[str, type[Any]]) -> type[Any]:
    """Return the class of a name: a known class, or ``"package.module:Class"``, which is imported.

    Modules are searched on ``sys.path`` and in the current folder. A class is returned unchanged.

    Args:
        kind: kind of class, such as "encoder", for messages.
        name: name of the class, or the class.
        known: known classes by name.

    Raises:
        ValueError: an unknown name, a module that cannot be imported, or no such class in it.

    >>> find_class("encoder", "collections:OrderedDict", {})
    <class 'collections.OrderedDict'>
    """
    if inspect.isclass(name):
        return name
    if name in known:
        return known[str(name)]
    module_name, colon, class_name = str(name).partition(":")
    if not colon:
        names = ", ".join(map(repr, known))
        raise ValueError(f"{kind}: expected one of {names}, or 'package.module:Class', got {name!r}")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in class_name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind}: {name!r} cannot be imported: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not inspect.isclass(found):
        raise ValueError(f"{kind}: expected a class, got {name!r}, a {type(found).__name__}")
    return found


def class_name(value: object, known: Mapping[str, type[Any]]) -> str:
    """Return the name of the class of a value, as ``find_class`` takes it."""
    cls = type(value)
    return cls.__name__ if known.get(cls.__name__) is cls else f"{cls.__module__}:{cls.__qualname__}"
