"""What the commands share: parsing with tyro, and errors as one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from mfengine.errors import DataError, InputError, TrainingError

T = TypeVar("T")


def parse(interface: type[T] | Callable[..., T], args: Sequence[str], prog: str, default: T | None = None) -> T:
    """Parse arguments into a dataclass.

    Raises:
        InputError: the arguments are wrong; names the option that was meant, where one is near.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            if default is None:
                return tyro.cli(interface, args=args, prog=prog)
            return tyro.cli(interface, args=args, prog=prog, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(errors.getvalue(), prog)) from None


def _one_line(report: str, prog: str) -> str:
    """tyro's boxed report in one line: what is wrong, and the nearest option."""
    lines = [line.strip(" │") for line in report.splitlines() if line.startswith("│")]
    rules = [i for i, line in enumerate(lines) if line.startswith("──")] or [len(lines)]
    message = " ".join(lines[: rules[0]])
    meant = "Perhaps you meant" in report and re.search(r"--[\w.-]+", " ".join(lines[rules[0] :]))
    return f"{message}{f'; did you mean {meant.group()}?' if meant else ''} (`{prog} --help` lists the options)"


def run(command: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command on the process's arguments and exit with its code: 2 for wrong input, 1 for a failed run."""
    try:
        code = command(sys.argv[1:])
    except (InputError, TrainingError) as error:
        # What is wrong is wrong on every rank alike and the first one says it, unless only one rank can know.
        rank = int(os.environ.get("RANK", 0))
        if rank == 0 or isinstance(error, DataError):
            print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        code = 2 if isinstance(error, InputError) else 1
    sys.exit(code)
