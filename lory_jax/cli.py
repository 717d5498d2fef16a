"""What every command shares at the command line: the `--config` flags and errors as one line."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lory_jax import interrupts, recipes
from lory_jax.errors import ConfigError, InputError, Unsaved
from lory_jax.run.step_choice import NEWEST, Step, parse_step

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_flags: set[str] = set()  # the flags of the running command


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with no abbreviations of flags."""

    def __init__(self, verb: str, description: str | None):
        super().__init__(
            prog=f"lory {verb}"
            if Path(sys.argv[0]).name == "lory"
            else f"python -m lory_jax.{verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._has_config = False

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; see {self.prog} --help")

    def add_config_flag(self, default: str | None = None) -> None:
        """Adds `--config=RECIPE[:argument]` and `--config.field=value`."""
        self._has_config = True
        self.add_argument(
            "--config",
            default=default,
            required=default is None,
            metavar="RECIPE[:experts=E]",
            help=f"one of the package's recipes ({', '.join(recipes.names())}) or the path of a "
            "Python file; --config.SECTION.FIELD=VALUE overrides any field"
            + (f" (default: {default})" if default else ""),
        )

    def format_help(self) -> str:
        if self._has_config:
            # Imported here so that commands start fast.
            from lory_jax.config import describe_fields

            self.epilog = describe_fields()
        return super().format_help()

    def add_step_flag(self) -> None:
        """Adds `--step=newest|best|N`, which checkpoint of a run to read."""
        self.add_argument(
            "--step",
            type=_step,
            default=NEWEST,
            metavar="newest|best|N",
            help="the checkpoint to read: the newest, the one with the lowest validation loss, or "
            "that of step N (default: newest)",
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses flags; `args.config` becomes the loaded and validated ConfigDict."""
        for word in argv:
            if any("\ud800" <= character <= "\udfff" for character in word):
                self.error(f"got {word!r}, must be text in UTF-8")
        plain, overrides = _split_overrides(argv)
        _flags.update(self._option_string_actions)
        args = self.parse_args(plain)
        if "config" in args:
            args.config = _load_config(args.config, overrides)
        elif overrides:
            self.error(f"unrecognized arguments: --config.{overrides[0][0]}")
        return args


def _load_config(spec: str, overrides: list[tuple[str, str]]) -> "ConfigDict":
    # Imported here so that commands start fast.
    from lory_jax.config import load_config

    try:
        path = recipes.resolve(spec)
    except ConfigError as error:
        raise ConfigError(f"--config: {error}") from None
    return load_config(path, overrides)


def _step(text: str) -> Step:
    try:
        return parse_step(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("step: ")) from None


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    plain: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            plain.append(word)
            continue
        name, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, "")
        overrides.append((name, value))
    return plain, overrides


def read_text(path: Path, flag: str) -> str:
    """A UTF-8 file that a flag names; `InputError` if it cannot be read."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"{flag}: {path}: cannot read it ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{flag}: {path}: not UTF-8 text") from None


def print_error(error: InputError) -> None:
    """Prints an error in one line.

    Subpackages know no flags: they begin an error with the name of an argument and a colon. If the
    running command has a flag of that name, the line names the flag.
    """
    is_flag = f"--{str(error).partition(':')[0]}" in _flags
    print(f"error: {'--' if is_flag else ''}{error}", file=sys.stderr, flush=True)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a command: `InputError`s become one line on standard error and their exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    try:
        with interrupts.raised():
            try:
                main(sys.argv[1:])
            except SystemExit:  # of --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
    except InputError as error:
        print_error(error)
        if isinstance(error, Unsaved):  # the end of the process does not wait for threads
            sys.stdout.flush()
            os._exit(error.status)
        sys.exit(error.status)
    except KeyboardInterrupt:
        interrupts.print_interrupted()
        sys.exit(interrupts.STATUS)
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        _discard_output()
        sys.exit(141)
    except OSError as error:  # a disk that is full, read-only or gone, a file that is not ours
        try:
            sys.stdout.flush()
        except OSError:  # the output goes to a file on that disk
            error.filename = error.filename or "standard output"
            _discard_output()
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(InputError.status)


def _discard_output() -> None:
    """What could not be written to standard output is not tried again at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
