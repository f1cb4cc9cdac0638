"""What the commands share: parsing with tyro, and errors as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from mfengine.configs import ALIKE
from mfengine.errors import InputError, RankError, RankTrainingError, TrainingError, reason

T = TypeVar("T")

POSITIONAL = get_args(tyro.conf.Positional[int])[1]

Checkpoint = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
Source = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
Data = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]


def program(command: str) -> str:
    """How the user called a command: by the script `mfengine`, or as a module."""
    return f"mfengine {command}" if Path(sys.argv[0]).name == "mfengine" else f"python -m mfengine.{command}"


def parse(arguments: type[T], args: Sequence[str], command: str, default: T | None = None) -> T:
    """Parse a command line into a dataclass.

    Args:
        arguments: the dataclass. A ValueError of its own, which calls fields by their names, is told with those of
            their options.
        args: the command line.
        command: what the user called, such as train.
        default: values of options that are not given; the dataclass's own if None.

    Raises:
        InputError: the command line is wrong, or a number is not finite; for an option that does not exist it names
            one that is like it.
    """
    report, prog = io.StringIO(), program(command)
    names = [name for name, _ in _options(default or arguments)]
    try:
        with contextlib.redirect_stderr(report):
            options: dict[str, Any] = {} if default is None else {"default": default}
            parsed: T = tyro.cli(arguments, args=args, prog=prog, **options)
        _check_finite(parsed)
        return parsed
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        message = re.sub(r"^Error parsing (?!--)[\w.]+: ", "", _message(report.getvalue()))
    except ValueError as error:  # tyro lets that of a nested dataclass without a name pass
        message = str(error)
    if message.startswith("Missing from "):
        missing = re.findall(r"(?:^Missing from .*?: |\(required\) )(--[\w.-]+|[A-Z]+)", message)
        message = f"{' and '.join(missing)} must be given"
    elif pairs := re.search(r"(--[\w.-]+): Failed to parse key-value pairs", message):
        message = f"{pairs[1]} takes pairs of a name and a number, as in {pairs[1]} omega 7.5"
    elif operand := re.match(r"Missing value for argument '(\w+)'", message):
        message = f"{operand[1].upper()} must be given"
    elif unknown := re.match(r"Unrecognized options: ([^\s=,]*)", message):
        message = f"unexpected argument {unknown[1]}"
        if unknown[1].startswith("-"):
            nearest = _nearest(unknown[1], names)
            message = f"there is no option {unknown[1]}{f'; the nearest is {nearest}' if nearest else ''}"
    else:
        message = _with_options(message, names)
    raise InputError(f"{message} (`{prog} --help` lists the options)")


def _message(report: str) -> str:
    """What is wrong, out of tyro's report: a title, then parts divided by rules, all of it in a frame or not."""
    framed = "│" in report
    lines = [line.strip(" │") for line in report.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [list(part) for rule, part in groupby(lines, lambda line: bool(line) and not line.strip("─-")) if not rule]
    return " ".join(parts[0 if framed else 1]).strip()


def _options(arguments: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Options of a dataclass or an instance, and their values; nested ones are --outer.inner, or --inner if the outer
    one is named ""."""
    hints = get_type_hints(arguments if isinstance(arguments, type) else type(arguments), include_extras=True)
    for field in dataclasses.fields(arguments):
        kind, *marks = get_args(hint) if get_origin(hint := hints[field.name]) is Annotated else (hint,)
        value = None if isinstance(arguments, type) else getattr(arguments, field.name)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(kind if value is None else value):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _options(kind if value is None else value, prefix if unnamed else f"{name}.")
        elif POSITIONAL not in marks:
            yield name, value


def _check_finite(parsed: Any) -> None:
    """ValueError if a number is infinite or not one."""
    for option, value in _options(parsed):
        values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for number in values:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{option} must be finite, not {number}")


def _nearest(option: str, names: list[str]) -> str | None:
    """The option that is like a mistaken one, which may lack its prefix, if one is."""

    def likeness(name: str) -> float:
        forms = {name, "--" + name.rpartition(".")[2].removeprefix("--")}
        return max(difflib.SequenceMatcher(None, option, form).ratio() for form in forms)

    nearest = max(names, key=likeness, default=None)
    return nearest if nearest is not None and likeness(nearest) >= ALIKE else None


def _with_options(message: str, names: list[str]) -> str:
    """A message about fields, with the names of their options: of the first word, and of each that has a hyphen."""
    fields = {name.rpartition(".")[2].removeprefix("--").replace("-", "_"): name for name in reversed(names)}
    return re.sub(r"^[a-z_]+\b|(?<![\w.-])[a-z]+(_[a-z]+)+\b", lambda word: fields.get(word[0], word[0]), message)


def run(command: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command on the process's arguments and exit with its code.

    2 is for what the user can mend, wrong input and disks that are full or read-only; 1 for a failed run. Either ends
    with one line.
    """
    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # who read has left, as `head` does
        _discard_output()
        code = 128 + signal.SIGPIPE
    except (InputError, TrainingError, OSError) as error:
        # What is wrong is wrong on every rank alike and the first one says it, unless only one rank can know.
        rank = int(os.environ.get("RANK", 0))
        own = isinstance(error, (RankError, RankTrainingError, OSError))
        text = reason(error) if isinstance(error, OSError) else error
        line = f"error: {f'rank {rank}: ' if rank and own else ''}{text}"
        if rank == 0 or own:
            print(line, file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends with its own report, which quotes this
            with contextlib.suppress(OSError):
                Path(report).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
        if isinstance(error, OSError):
            _discard_output()
        code = 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # again, while threads are ending: no traceback
        sys.unraisablehook = lambda _: None  # objects that were half made say nothing as they go
        if int(os.environ.get("RANK", 0)) == 0:
            print("\ninterrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)


def _discard_output() -> None:
    """What is buffered for stdout goes nowhere, without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
