"""The base of all errors that are the user's to mend."""


class AuditError(Exception):
    """Something that came from outside cannot be used; the message says what came, what is allowed, what to do."""


class SettingError(AuditError, ValueError):
    """A setting, or data that a setting names, cannot be."""


class MissingFile(AuditError, FileNotFoundError):
    """A file or folder that a setting names is not there."""
