"""Base classes of the errors that the user can correct."""


class AuditError(Exception):
    """An external input is unusable; the message states what was given, what is allowed and what to do."""


class SettingError(AuditError, ValueError):
    """A setting, or data that a setting refers to, is invalid."""


class MissingFile(AuditError, FileNotFoundError):
    """A file or folder that a setting refers to does not exist."""
