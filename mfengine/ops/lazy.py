"""Modules imported at first use: Triton is slow to import and not available everywhere."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """A placeholder for a module."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: Any = None

    def __getattr__(self, name: str) -> Any:
        if self._module is None:
            self._module = import_module(self._name)
        return getattr(self._module, name)
