"""Errors that a user can mend: one line that says what was wrong and what would be right."""


class InputError(ValueError):
    """Wrong input: a command prints the message and exits with code 2."""


class DataError(InputError):
    """Data that cannot be read: the rank that reads it tells of it, the others cannot know."""


class TrainingError(RuntimeError):
    """A run that cannot go on: a command prints the message and exits with code 1."""
