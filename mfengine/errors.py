"""Errors that a user can mend: one line that says what was wrong and what would be right."""

from __future__ import annotations

import os


class InputError(ValueError):
    """Wrong input: a command prints the message and exits with code 2."""


class RankError(InputError):
    """Wrong input that only this rank knows of, and so has to tell: unreadable data, a missing GPU."""


class TrainingError(RuntimeError):
    """A run that cannot go on: a command prints the message and exits with code 1."""


class RankTrainingError(TrainingError):
    """A failure that only this rank knows of, and so has to tell: it ran out of memory."""


def reason(error: OSError) -> str:
    """One line about a file or disk: the reason, and which file, where the system says it."""
    text = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return f"{error.filename}: {text}" if isinstance(error.filename, (str, os.PathLike)) else text
