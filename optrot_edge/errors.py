"""The errors a user is meant to read."""


class InputError(ValueError):
    """Bad input or usage: the message says what is wrong and what to do (exit code 2)."""


class StorageError(InputError):
    """The disk refused, a full one for example; what was finished before is kept."""
