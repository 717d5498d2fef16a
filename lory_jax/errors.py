"""Errors that a user can cause. Commands print them as one line and exit with their status.

Raise them with a message that names the thing, what was found, and what is accepted.
"""


class InputError(ValueError):
    """An input cannot be used: a missing directory, an empty corpus, a damaged file."""

    status = 1


class ConfigError(InputError):
    """A flag or a config field has a wrong name or value."""

    status = 2


class Diverged(InputError):
    """Training stopped itself: too many losses or gradients in a row were NaN or infinite."""

    status = 3
