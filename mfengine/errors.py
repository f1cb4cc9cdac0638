"""Errors that a user can fix. Their message is one line that says what was wrong and what would be right."""

from __future__ import annotations

import os


class InputError(ValueError):
    """Wrong input: a command prints the message and exits with code 2."""


class RankError(InputError):
    """Wrong input that only this rank knows of and therefore reports: unreadable data, a missing GPU."""


class TrainingError(RuntimeError):
    """A run that cannot continue: a command prints the message and exits with code 1."""


class RankTrainingError(TrainingError):
    """A failure that only this rank knows of and therefore reports, such as running out of memory."""


def reason(error: OSError) -> str:
    """One line about an error of a file or disk: the reason, and the file if the system names it."""
    text = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return f"{error.filename}: {text}" if isinstance(error.filename, (str, os.PathLike)) else text
