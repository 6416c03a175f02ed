"""Types of settings in words: what a value may be, and which classes may be named."""

import collections.abc
import inspect
import os
import types
import typing
from typing import Any

WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    type(None): ("null", "null"),
    dict: ("a mapping", "mappings"),
    os.PathLike: ("a path", "paths"),
}
"""What one and several values of a type are called."""

MOST_CLASSES = 6
"""So many classes are listed by name."""


def any_of(words: list[str], conjunction: str = "or") -> str:
    """`a, b or c`"""
    return f" {conjunction} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def literals(expected: Any) -> list[str]:
    """The words that may stand where a value of a type is expected."""
    kinds = [kind for kind in _alternatives(expected) if typing.get_origin(kind) is typing.Literal]
    return list(dict.fromkeys(str(value) for kind in kinds for value in typing.get_args(kind)))


def classes(expected: Any) -> list[str]:
    """Names of the classes that may stand where a value of a type is expected, or in a list of such values."""
    return sorted({name for kind in _alternatives(expected) for base in _bases(kind) for name in _subclasses(base)})


def in_words(expected: Any) -> str:
    """What may stand where a value of a type is expected; nothing if there are no words for it."""
    words = [f"'{value}'" for value in literals(expected)]
    bases = list(dict.fromkeys(base for kind in _alternatives(expected) for base in _bases(kind)))
    named = [f"`{name}`" for name in classes(expected)]
    words += named if len(named) <= MOST_CLASSES else [f"a subclass of `{base.__name__}`" for base in bases]
    words += ["true", "false"] if bool in _alternatives(expected) else []
    words += [phrase for kind in _alternatives(expected) if (phrase := _phrase(kind))]
    return any_of(list(dict.fromkeys(words)))


def _alternatives(expected: Any) -> list[Any]:
    """The types of which a value has one."""
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(expected) for kind in _alternatives(part)]
    return [expected]


def _bases(kind: Any) -> list[type]:
    """The classes of this or another project whose subclasses a value may name, one or in a list."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is collections.abc.Callable:
        return _bases(arguments[-1])
    if _is(origin, collections.abc.Iterable):
        return [base for argument in arguments for part in _alternatives(argument) for base in _bases(part)]
    plain = _is(kind, int, float, str, dict, os.PathLike, type(None), object) and kind.__module__ == "builtins"
    return [kind] if isinstance(kind, type) and not plain and not _is(kind, os.PathLike) else []


def _subclasses(base: type) -> set[str]:
    below = {name for subclass in base.__subclasses__() for name in _subclasses(subclass)}
    public = not inspect.isabstract(base) and not base.__name__.startswith("_")
    return below | ({base.__name__} if public else set())


def _phrase(kind: Any, several: bool = False) -> str:
    """A value of a single type, or several such values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in WORDS:
        return WORDS[kind][several]
    if _is(kind, os.PathLike):
        return WORDS[os.PathLike][several]
    if _is(origin, collections.abc.Mapping):
        return WORDS[dict][several]
    if _is(origin, tuple) and Ellipsis not in arguments:
        return f"a list of {len(arguments)} {_phrase(arguments[0], several=True) or 'values'}"
    if _is(origin, collections.abc.Iterable) and arguments:
        return f"a list of {_phrase(arguments[0], several=True) or 'such'}"
    return ""


def _is(kind: Any, *bases: type) -> bool:
    """Whether this is one of these classes; `tuple[int, int]` is an instance of `type` in Python 3.10, but no class."""
    return isinstance(kind, type) and typing.get_origin(kind) is None and issubclass(kind, bases)
