"""Dataclasses from and to plain data: field names, types and nested dataclasses are read from annotations.

A `Schema` is what a family of dataclasses (the parts of a recipe, the parts of a manifest) has in common:
the exception, the noun in messages, and the largest whole number. The fields of such a dataclass are
annotated with `int`, `float`, `str`, `bool`, `None`, `Literal`, unions of these, or another dataclass, which
its own `from_dict` reads if it has one.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from ..errors import W2A4Error, shown

T = TypeVar("T")


class Schema:
    """Reads and checks the dataclasses of one kind of file.

    Args:
        noun: what a file of this kind is called in messages, e.g. `recipe`.
        error: what is raised.
        largest: no whole number has a larger absolute value; None is no limit.
    """

    def __init__(self, noun: str, error: type[W2A4Error], largest: int | None = None):
        self.noun, self.error, self.largest = noun, error, largest

    def from_dict(self, cls: type[T], data: Any, prefix: str = "", root: type | None = None) -> T:
        """An instance of `cls`, fields that `data` lacks at their defaults; inverse of `to_dict`.

        Args:
            cls: dataclass that calls `check` in `__post_init__`.
            data: mapping of field names to values, nested mappings for nested dataclasses.
            prefix, root: path of `cls` in the whole (`rotation.`) and the whole's class, for messages.

        Raises:
            error: not a mapping, an unknown key, a field without a default missing, or a wrong value.
        """
        root = root or cls
        if not isinstance(data, Mapping):
            known = ", ".join(keys(cls))
            if prefix:
                raise self.error(f"{prefix[:-1]}={shown(data)}: give a mapping of {known}")
            raise self.error(f"{shown(data)} is no {self.noun}: give a mapping of {known}")
        hints, fields = (
            typing.get_type_hints(cls),
            {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))},
        )
        for key in data:
            if key not in fields:
                raise self.unknown(key if not prefix else f"{prefix}{key}", root)
        for name, f in fields.items():
            if name not in data and f.default is f.default_factory is dataclasses.MISSING:
                needed = describe(hints[name])
                raise self.error(f"{prefix}{name} is missing in the {self.noun}: give {needed}")
        values = {key: self._value(hints[key], data[key], f"{prefix}{key}.", root) for key in data}
        return cls(**values)

    def _value(self, hint: Any, value: Any, prefix: str, root: type) -> Any:
        nested: Any = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        optional = type(None) in typing.get_args(hint)
        if nested is None or (optional and value is None):
            return value
        if hasattr(nested, "from_dict"):  # it reads itself, in a way of its own
            return nested.from_dict(value)
        return self.from_dict(nested, value, prefix, root)

    def override(self, config: T, changes: Mapping[str, Any]) -> T:
        """A copy of a dataclass with fields replaced; nested ones as `{"rotation.r4": "none"}`."""
        data = to_dict(config)
        for key, value in changes.items():
            target: Any = data
            rest = key.split(".")
            for part in rest[:-1]:
                target = target.get(part) if isinstance(target, dict) else None
            if not isinstance(target, dict) or rest[-1] not in target:
                raise self.unknown(key, type(config))
            target[rest[-1]] = value
        return self.from_dict(type(config), data)

    def unknown(self, key: Any, root: type) -> W2A4Error:
        """The exception for a key that no field has, with the keys that are spelled nearly so."""
        known = keys(root)
        advice = did_you_mean(key, known)
        return self.error(f"unknown {self.noun} key {shown(key)}; known keys: {', '.join(known)}{advice}")

    def check(self, config: Any) -> None:
        """Every field against its annotation; an int given for a float is taken as one."""
        for name, hint in typing.get_type_hints(type(config)).items():
            value = getattr(config, name)
            if self.largest is not None and isinstance(value, int) and abs(value) > self.largest:
                told = f"a number of {value.bit_length()} bits" if abs(value) >> 64 else str(value)
                raise self.error(f"{name} is {told}: give one from {-self.largest} to {self.largest}")
            if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
                raise self.error(
                    f"{name}={value!r} is not text: it holds half a surrogate pair, which UTF-8 has not"
                )
            if float in (hint, *typing.get_args(hint)) and type(value) is int:
                object.__setattr__(config, name, float(value))
            elif not _matches(value, hint):
                raise self.error(f"{name}={shown(value)}: give {describe(hint)}")

    def check_least(self, config: Any, least: Mapping[str, int], prefix: str = "") -> None:
        """Raise the error unless each named field is at least the number beside it."""
        for key, smallest in least.items():
            if getattr(config, key) < smallest:
                raise self.error(f"{prefix}{key}={getattr(config, key)}: give a number >= {smallest}")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data with every field: mappings, lists, numbers, text and None."""
    return dataclasses.asdict(config)


def ordered(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data in the order of the fields of `cls`, keys that are none at the end; nothing is checked."""
    hints = typing.get_type_hints(cls)
    out = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data} | dict(data)
    for key, value in out.items():
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hints.get(key)):
            out[key] = ordered(hints[key], value)
    return out


def keys(cls: type, prefix: str = "") -> list[str]:
    """Paths of all fields: `["name", "rotation.r1", …]`."""
    hints, out = typing.get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        nested = isinstance(hints[f.name], type) and dataclasses.is_dataclass(hints[f.name])
        out += keys(hints[f.name], f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return out


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """`; did you mean 'group_size'?`, or nothing where no known name is near.

    Sections are known names too, and a key is found without its section: `steps` is near `training.steps`.
    """
    paths = list(known)
    sections = {path.rpartition(".")[0] for path in paths} - {""}
    near = difflib.get_close_matches(str(name), [*paths, *sections], 1, 0.75)
    if not near:
        leaves = [path.rpartition(".")[2] for path in paths]
        nearest = difflib.get_close_matches(str(name).rpartition(".")[2], leaves, 1, 0.7)
        near = [path for path, leaf in zip(paths, leaves, strict=True) if leaf in nearest]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def describe(hint: Any) -> str:
    """What a field takes, in words: `one of 2, 4, 16`, `a value of type float`."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(hint))
    if typing.get_args(hint):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    return {"NoneType": "nothing"}.get(hint.__name__, f"a value of type {hint.__name__}")


def _matches(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(hint))
    if typing.get_args(hint):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if hint is int and isinstance(value, bool):
        return False
    return isinstance(value, hint)
