"""What the commands share: parsing with tyro, and errors as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from mfengine.errors import InputError, RankError, RankTrainingError, TrainingError

T = TypeVar("T")


def parse(arguments: type[T], args: Sequence[str], prog: str, default: T | None = None) -> T:
    """Parse a command line into a dataclass.

    Args:
        arguments: the dataclass.
        args: the command line.
        prog: what the user called.
        default: values of options that are not given; the dataclass's own if None.

    Raises:
        InputError: the command line is wrong; for an option that does not exist it names the nearest.
    """
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            if default is None:
                return tyro.cli(arguments, args=args, prog=prog)
            return tyro.cli(arguments, args=args, prog=prog, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        message = re.sub(r"^Error parsing (?!--)[\w.]+: ", "", _message(report.getvalue()))
    except ValueError as error:  # tyro lets that of a nested dataclass without a name pass
        message = str(error)
    unknown = re.match(r"Unrecognized options: ([^\s=,]+)", message)
    if unknown and unknown[1].startswith("--"):
        message = (
            f"there is no option {unknown[1]}; the nearest is {_nearest(unknown[1], _options(default or arguments))}"
        )
    elif unknown:
        message = f"unexpected argument {unknown[1]}"
    raise InputError(f"{message} (`{prog} --help` lists the options)")


def _message(report: str) -> str:
    """What is wrong, out of tyro's report: a title, then parts divided by rules, all of it in a frame or not."""
    framed = "│" in report
    lines = [line.strip(" │") for line in report.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [list(part) for rule, part in groupby(lines, lambda line: bool(line) and not line.strip("─-")) if not rule]
    return " ".join(parts[0 if framed else 1]).strip()


def _options(arguments: Any, prefix: str = "--") -> list[str]:
    """The options of a dataclass or an instance; nested ones are --outer.inner, unless the outer one is named ""."""
    options = []
    hints = get_type_hints(arguments if isinstance(arguments, type) else type(arguments), include_extras=True)
    for field in dataclasses.fields(arguments):
        kind, *marks = get_args(hint) if get_origin(hint := hints[field.name]) is Annotated else (hint,)
        kind = kind if isinstance(arguments, type) else getattr(arguments, field.name)  # which may be of a subclass
        name = prefix + field.name.replace("_", "-")
        unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
        nested = dataclasses.is_dataclass(kind)
        options += _options(kind, prefix if unnamed else f"{name}.") if nested else [name]
    return options


def _nearest(option: str, options: list[str]) -> str:
    """The option most like a mistaken one, which may lack its prefix."""

    def likeness(candidate: str) -> float:
        names = {candidate, "--" + candidate.rpartition(".")[2].removeprefix("--")}
        return max(difflib.SequenceMatcher(None, option, name).ratio() for name in names)

    return max(options, key=likeness)


def run(command: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command on the process's arguments and exit with its code: 2 for wrong input, 1 for a failed run."""
    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # who read has left, as `head` does: what is buffered still goes nowhere, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (InputError, TrainingError) as error:
        # What is wrong is wrong on every rank alike and the first one says it, unless only one rank can know.
        rank = int(os.environ.get("RANK", 0))
        own = isinstance(error, (RankError, RankTrainingError))
        line = f"error: {f'rank {rank}: ' if rank and own else ''}{error}"
        if rank == 0 or own:
            print(line, file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends with its own report, which quotes this
            Path(report).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
        code = 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # again, while threads are ending: no traceback
        if int(os.environ.get("RANK", 0)) == 0:
            print("\ninterrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)
