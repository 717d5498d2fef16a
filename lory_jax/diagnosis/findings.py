"""The findings of a diagnosis: printed as they come, problems counted."""

import jax


class Findings:
    """Prints every finding, once for all processes, and counts the problems.

    Attributes:
      problems: how many problems were found so far.
    """

    def __init__(self) -> None:
        self.problems = 0

    def ok(self, text: str) -> None:
        self.say(f"ok       {text}")

    def note(self, text: str) -> None:
        """Reports something that the user should know but that is not a problem."""
        self.say(f"note     {text}")

    def problem(self, text: str) -> None:
        self.problems += 1
        self.say(f"PROBLEM  {text}")

    def check(self, passed: bool, text: str) -> None:
        """Reports the result of a check: ok if it passed, else a problem."""
        (self.ok if passed else self.problem)(text)

    def say(self, text: str) -> None:
        """Prints a line that is not a finding."""
        if jax.process_index() == 0:
            print(text, flush=True)
