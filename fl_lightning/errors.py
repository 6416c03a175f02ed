"""Base classes of the errors that the user can correct, and the checks that settings share."""

import math


class AuditError(Exception):
    """An external input is unusable; the message states what was given, what is allowed and what to do."""


class SettingError(AuditError, ValueError):
    """A setting, or data that a setting refers to, is invalid."""


class MissingFile(AuditError, FileNotFoundError):
    """A file or folder that a setting refers to does not exist."""


def positive(*numbers: float) -> bool:
    """Whether all numbers are finite and above 0; comparisons alone let NaN and infinity pass."""
    return all(math.isfinite(number) and number > 0 for number in numbers)


def non_negative(*numbers: float) -> bool:
    """Whether all numbers are finite and at least 0."""
    return all(math.isfinite(number) and number >= 0 for number in numbers)


def in_short(error: Exception) -> str:
    """Type and message of an error of other code, in one line of at most 150 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1."""
    return f"{number} {noun if number == 1 else f'{noun}s'}"
