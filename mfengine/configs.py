"""Configuration dataclasses as JSON, and checks that several of them share."""

from __future__ import annotations

import dataclasses
import json
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
