"""Configuration dataclasses: conversion to and from JSON, shared checks, and registries of classes by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Collection
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mfengine.errors import InputError

C = TypeVar("C")

ALIKE = 0.6  # difflib ratio from which one name may be a misspelling of another
NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "an object"}


def check_seed(seed: int) -> None:
    """InputError unless NumPy and PyTorch take it as a seed."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be at least 0 and below 2^63, not {seed}")


def check_at_least(least: int, **values: int | None) -> None:
    """ValueError that names the first value below `least`; None stands for an option that is not given."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")


# ----------------------------------------------------------------------------
# Dataclasses as JSON.


def to_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError if it cannot be read or holds something else."""
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def parse_json(text: str | bytes, where: object) -> dict[str, Any]:
    """The JSON object in a text; InputError, which names its origin `where`, if it is anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read {where}: it is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} holds {_brief(values)}, not a JSON object")
    return values


def from_json(cls: type[C], values: Any, where: object, path: str = "") -> C:
    """A dataclass from JSON values as `to_json` returns them, checked against the types of its fields.

    Args:
        cls: the dataclass. Its fields are numbers, strings, paths, None, dictionaries, tuples and other dataclasses;
            other types are not checked.
        values: of its fields; fields with a default may be missing.
        where: origin of the values, for messages.
        path: prefix of the fields in messages, such as "space." for the values of {"space": {...}}.

    Raises:
        InputError: a field is unknown or missing, its value has another type or is not finite, or the dataclass
            itself refuses it.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where}: {path.removesuffix('.')} is {_brief(values)}, not an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise InputError(f"{where}: {path}{unknown[0]} is unknown: another version of mfengine wrote it")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{where}: {path}{name} is missing")
    hints = get_type_hints(cls)
    try:
        return cls(**{name: _typed(hints[name], value, where, path + name) for name, value in values.items()})
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {path}{error}") from None


def _typed(kind: Any, value: Any, where: object, path: str) -> Any:
    """A JSON value converted to a type; InputError if it does not fit."""
    origin, kinds = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else from_json(kind, value, where, f"{path}.")
    if origin in (Union, UnionType):
        if value is None and NoneType in kinds:
            return None
        # For a union of a number and a list of numbers, the value's own type decides.
        kinds = tuple(kind for kind in kinds if kind is not NoneType)
        fitting = (kind for kind in kinds if (get_origin(kind) is tuple) == isinstance(value, (list, tuple)))
        return _typed(next(fitting, kinds[0]), value, where, path)
    if origin is tuple:
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) and isinstance(value, (list, tuple)) else kinds
        if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
            raise InputError(f"{where}: {path} is {_brief(value)}, not a list{f' of {len(kinds)}' if kinds else ''}")
        return tuple(_typed(k, v, where, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is Literal and value not in kinds:
        raise InputError(f"{where}: {path} is {_brief(value)}, not one of {', '.join(map(str, kinds))}")
    if kind is Path and isinstance(value, str):
        return Path(value)
    plain = origin or kind
    if plain not in NAMES:
        return value
    if not isinstance(value, (int, float) if plain is float else plain) or (
        isinstance(value, bool) and plain is not bool
    ):
        raise InputError(f"{where}: {path} is {_brief(value)}, not {NAMES[plain]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {path} must be finite, not {value}")
    return value


def _brief(value: Any) -> str:
    return f"{json.dumps(value, default=str)!s:.60}"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects as {outer.inner: value}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def choose(what: str, name: Any, names: Collection[str]) -> str:
    """`name` if it is among `names`; otherwise InputError that lists them and names the nearest one."""
    if isinstance(name, str) and name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=ALIKE)
    others = f"the nearest is {near[0]}, all are" if near else "there are" if names else "there are none"
    raise InputError(f"there is no {what} {name}; {others} {', '.join(names)}".rstrip())


class Registry(dict[str, type[C]]):
    """Classes by name, each with its configuration dataclass as `Config`.

    Args:
        what: kind of the classes, for messages.
        classes: by name; the first is the default for descriptions of version 0.1, which have no name.
    """

    def __init__(self, what: str, **classes: type[C]) -> None:
        super().__init__(classes)
        self.what = what

    @property
    def unnamed(self) -> dict[str, str]:
        """The name that descriptions of version 0.1 imply."""
        return {self.what: next(iter(self))}

    def name_of(self, config: Any) -> str:
        """The name of the class that this configures; InputError if it is not registered."""
        for name, cls in self.items():
            if cls.Config is type(config):  # type: ignore[attr-defined]
                return name
        raise InputError(
            f"{type(config).__name__} does not configure a known {self.what}: register it, or use {', '.join(self)}"
        )

    def build(self, config: Any, *args: Any) -> C:
        """An instance of the class that this configures."""
        return self[self.name_of(config)](config, *args)  # type: ignore[call-arg]

    def describe(self, config: Any, key: str) -> dict[str, Any]:
        """JSON values from which `read` restores the configuration: {what: name, key: fields}."""
        return {self.what: self.name_of(config), key: to_json(config)}

    def read(self, description: dict[str, Any], key: str, where: object) -> Any:
        """The configuration that `describe` wrote under this key; InputError, which names `where`, if it is wrong."""
        try:
            name = choose(self.what, {**self.unnamed, **description}[self.what], self)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return from_json(self[name].Config, description.get(key, {}), where, f"{key}.")  # type: ignore[attr-defined]
