"""Reads pickles without executing their code: files of `torch.save`, and dicts of NumPy arrays.

A pickle is a program: it names functions by module and name, and calls them. For files of `torch.save`, PyTorch has a
restricted unpickler. For dicts of arrays, the unpickler here imports nothing. The few names that NumPy uses to pickle
arrays and numbers are mapped to functions of this file, and every other name is refused. The unpickled objects cannot
be modified or subclassed, so one record cannot affect the next.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

warnings.filterwarnings("ignore", message="Detected pickle protocol")  # it is read, or refused with a reason


class Refused(pickle.UnpicklingError):
    """The pickle contains something other than arrays and plain values; the message names it."""


def load_tensors(source: Path | BytesIO) -> Any:
    """The content of a file of `torch.save`, on the host: tensors, containers and plain values.

    Raises:
        Refused: the file contains something else.
        OSError: the file cannot be read.
        ValueError: it is not a complete file of `torch.save`.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler and the zip reader raise many types of errors on other files
        raise explained(error) from None


def explained(error: BaseException) -> ValueError | Refused:
    """An error of `torch.load` reduced to its cause: PyTorch's message recommends executing the file."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return Refused(named[1])
    if reason := re.search(r"WeightsUnpickler error:\s*(.+)", str(error)):
        return ValueError(reason[1])
    if str(error).startswith("Weights only load failed"):
        return ValueError("it holds more than tensors and plain values")
    return ValueError(str(error).partition("\n")[0] or type(error).__name__)


def load_record(data: bytes) -> dict[Any, Any]:
    """A flat dict of numpy arrays of numbers, numbers, strings, bytes and None.

    Args:
        data: the result of `pickle.dumps`, in any protocol.

    Returns:
        The dict; arrays are read-only, and NumPy's numbers are converted to Python's.

    Raises:
        Refused: the pickle contains something else.
        ValueError: it is not a complete pickle of a dict.
    """
    try:
        record = _Unpickler(BytesIO(data)).load()
    except Refused:
        raise
    except Exception as error:  # pickle raises many types of errors on other data
        raise ValueError(f"it is not a pickle: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"it is a pickled {_brief(record)}, not a dict")
    return {key: _plain(value) for key, value in record.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 calls its internals numpy._core, numpy 1 numpy.core; a pickle of either is read under both.
        function = _FUNCTIONS.get((module.replace("numpy._core", "numpy.core"), name))
        if function is None:
            raise Refused(f"{module}.{name}")
        return _Function(function)


class _Function:
    """What a name in the pickle refers to. The pickle can only call it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise Refused("a change of a function")


class _Dtype:
    """A dtype as numpy pickles it: `numpy.dtype('f4', False, True)`, then the byte order as state."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any) -> None:
        # Only these kinds and widths: NumPy's parser of codes also accepts objects, strings and structures.
        if not (isinstance(code, str) and code[:1] in tuple("fiub") and code[1:] in ("1", "2", "4", "8")):
            raise Refused(f"numpy.dtype({_brief(code)})")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise Refused(f"numpy.dtype with {_brief(state)}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array as numpy pickles it: `_reconstruct(numpy.ndarray, (0,), b'b')`, then shape, dtype and bytes as state."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise Refused(f"an array of {_brief(raw)}")
    return np.frombuffer(bytes(raw), dtype.dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _buffered(*args: Any) -> _Array:
    """`_frombuffer`, which protocol 5 uses to pickle a contiguous array."""
    array = _Array()
    array.array = _array(*args)
    return array


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array(raw, dtype, (1,))[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, which protocols below 3 use to pickle bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"_codecs.encode to {_brief(encoding)}")
    return str.encode(text, "latin-1")


def _no_bytes() -> bytes:
    """`bytes()`, which protocols below 3 use to pickle the data of an empty array."""
    return b""


def _no_call(*_: Any) -> None:
    raise Refused("numpy.ndarray(...)")


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _no_call,  # only handed to _reconstruct
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _buffered,
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): _no_bytes,
}


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.array is None:
            raise ValueError("it has an array without content")
        return value.array
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise Refused(_brief(value))


def _brief(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}" if isinstance(value, (str, int)) else type(value).__name__
