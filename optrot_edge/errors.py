"""The one error type a user is meant to read."""


class InputError(ValueError):
    """Bad input or usage: the message says what is wrong and what to do (exit code 2)."""
