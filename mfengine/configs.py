"""Configuration dataclasses as JSON, checks that several of them share, and what they configure, by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection
from typing import Any, TypeVar

from mfengine.errors import InputError

C = TypeVar("C")


def check_seed(seed: int) -> None:
    """InputError unless NumPy and PyTorch take it as a seed."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be at least 0 and below 2^63, not {seed}")


def to_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(cls: type[C], values: dict[str, Any]) -> C:
    """A flat configuration dataclass from what `to_json` made; InputError for a field that it has not."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - names)
    if unknown:
        raise InputError(f"{cls.__name__} has no {', '.join(unknown)}: written by another version of mfengine")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects as {outer.inner: value}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def choose(what: str, name: str, names: Collection[str]) -> str:
    """`name` if it is among `names`; otherwise InputError that names the nearest `what`."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0)
        others = f"; the nearest is {near[0]}, all are {', '.join(names)}" if near else ""
        raise InputError(f"there is no {what} {name}{others}")
    return name


class Registry(dict[str, type[C]]):
    """Classes by name, each with its configuration dataclass as `Config`.

    Args:
        what: they are, for messages.
        classes: by name; the first is meant where version 0.1 wrote no name.
    """

    def __init__(self, what: str, **classes: type[C]) -> None:
        super().__init__(classes)
        self.what = what

    @property
    def unnamed(self) -> dict[str, str]:
        """What a description of version 0.1 means."""
        return {self.what: next(iter(self))}

    def name_of(self, config: Any) -> str:
        """Whose configuration it is; InputError if that was not put in."""
        for name, cls in self.items():
            if cls.Config is type(config):  # type: ignore[attr-defined]
                return name
        raise InputError(f"no {self.what} has the configuration {type(config).__name__}: {', '.join(self)} do not")

    def build(self, config: Any, *args: Any) -> C:
        """An instance of the class whose configuration it is."""
        return self[self.name_of(config)](config, *args)  # type: ignore[call-arg]

    def describe(self, config: Any, key: str) -> dict[str, Any]:
        """JSON values from which `read` makes the configuration again: {what: name, key: fields}."""
        return {self.what: self.name_of(config), key: to_json(config)}

    def read(self, description: dict[str, Any], key: str) -> Any:
        """The configuration that `describe` wrote under this key; InputError for a name that is not known."""
        name = choose(self.what, {**self.unnamed, **description}[self.what], self)
        return from_json(self[name].Config, description.get(key, {}))  # type: ignore[attr-defined]
