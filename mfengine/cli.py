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
    """How the user called a command: through the script `mfengine`, or as a module."""
    return f"mfengine {command}" if Path(sys.argv[0]).name == "mfengine" else f"python -m mfengine.{command}"


def parse(arguments: type[T], args: Sequence[str], command: str, default: T | None = None) -> T:
    """Parse a command line into a dataclass.

    Args:
        arguments: the dataclass. If it raises a ValueError that names fields, the message names their options instead.
        args: the command line.
        command: what the user called, such as train.
        default: values of options that are not given; None takes the dataclass's own.

    Raises:
        InputError: the command line is wrong, or a number is not finite. For an option that does not exist, the message
            names the nearest one.
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
    except ValueError as error:  # tyro does not catch that of a nested dataclass without a name
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
    """The error message in tyro's report, which is a title and parts divided by rules, with or without a frame."""
    framed = "│" in report
    lines = [line.strip(" │") for line in report.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [list(part) for rule, part in groupby(lines, lambda line: bool(line) and not line.strip("─-")) if not rule]
    return " ".join(parts[0 if framed else 1]).strip()


def _options(arguments: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Options of a dataclass or an instance, with their values.

    Nested options are --outer.inner, or --inner if the outer field is named "".
    """
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
    """ValueError if a number is infinite or NaN."""
    for option, value in _options(parsed):
        values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for number in values:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{option} must be finite, not {number}")


def _nearest(option: str, names: list[str]) -> str | None:
    """The option most similar to a mistaken one, which may lack its prefix; None if none is similar."""

    def likeness(name: str) -> float:
        forms = {name, "--" + name.rpartition(".")[2].removeprefix("--")}
        return max(difflib.SequenceMatcher(None, option, form).ratio() for form in forms)

    nearest = max(names, key=likeness, default=None)
    return nearest if nearest is not None and likeness(nearest) >= ALIKE else None


def _with_options(message: str, names: list[str]) -> str:
    """A message about fields, with option names in place of field names: the first word, and each with underscores."""
    fields = {name.rpartition(".")[2].removeprefix("--").replace("-", "_"): name for name in reversed(names)}
    return re.sub(r"^[a-z_]+\b|(?<![\w.-])[a-z]+(_[a-z]+)+\b", lambda word: fields.get(word[0], word[0]), message)


def run(command: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command on the process's arguments and exit with its code.

    The code is 2 for what the user can fix (wrong input, a full or read-only disk) and 1 for a failed run. Both print
    one line.
    """
    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has exited, as `head` does
        _discard_output()
        code = 128 + signal.SIGPIPE
    except (InputError, TrainingError, OSError) as error:
        # Most errors occur on every rank, so the first rank reports them. Other ranks report what only they know.
        rank = int(os.environ.get("RANK", 0))
        own = isinstance(error, (RankError, RankTrainingError, OSError))
        text = reason(error) if isinstance(error, OSError) else error
        line = f"error: {f'rank {rank}: ' if rank and own else ''}{text}"
        if rank == 0 or own:
            print(line, file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun quotes this in its own report
            with contextlib.suppress(OSError):
                Path(report).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
        if isinstance(error, OSError):
            _discard_output()
        code = 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for another Ctrl-C while threads end
        sys.unraisablehook = lambda _: None  # nor from the destructors of half-constructed objects
        if int(os.environ.get("RANK", 0)) == 0:
            print("\ninterrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)


def _discard_output() -> None:
    """Redirect what is buffered for stdout to the null device, so that flushing it raises no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
