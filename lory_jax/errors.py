"""Errors that a user can cause. Commands print them as one line and exit with their status.

Raise them with a message that names the thing, what was found, and what is accepted.
"""

LONGEST_MESSAGE = 1500  # characters


class InputError(ValueError):
    """An input cannot be used: a missing directory, an empty corpus, a damaged file.

    Its message is one line, whatever it quotes.
    """

    status = 1

    def __init__(self, message: str):
        line = " ".join(message.splitlines())
        cut = len(line) > LONGEST_MESSAGE
        super().__init__(line[: LONGEST_MESSAGE - 3] + "..." if cut else line)


class ConfigError(InputError):
    """A flag or a config field has a wrong name or value."""

    status = 2


class Unsaved(InputError):
    """A checkpoint could not be written; Orbax's threads may then wait for its files."""


class Diverged(InputError):
    """Training stopped itself: too many losses or gradients in a row were NaN or infinite."""

    status = 3


def shorten(text: str, longest: int = 200) -> str:
    """A text on one line, cut where it is very long."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
