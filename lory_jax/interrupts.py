"""Ctrl-C ends a command with one line and status 130, whatever Python is doing at that moment.

Python raises KeyboardInterrupt wherever it happens to be. Inside an import, or inside code whose
exceptions are ignored (finalizers, callbacks), that ends in a traceback or in nothing at all.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

COMMANDS = ("-m", "lory", "lory-eval")
STATUS = 128 + signal.SIGINT

_process = 0  # the process that handles SIGINT; its forked children inherit the handler
_works = False  # `main` runs: it may have something to clean up
_came = False


def install_in_commands() -> None:
    """Handles SIGINT if this process is one of our commands; libraries leave signals alone.

    While Python looks for the module of `python -m lory_jax.VERB`, `sys.argv[0]` is "-m". SIGINT
    stays ignored where it is (nohup, background jobs of scripts).
    """
    global _process
    is_command = os.path.basename(sys.argv[0]) in COMMANDS if sys.argv else False
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _process = os.getpid()
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, so that temporary files are cleaned up.

    Libraries turn it into errors of their own (a broken pool, a failed callback): after Ctrl-C
    every exception is the interrupt.
    """
    global _works
    _works = True
    try:
        yield
    except Exception:
        if _came:
            raise KeyboardInterrupt from None
        raise
    finally:
        _works = False


def print_interrupted() -> None:
    """Prints the one line, below the ^C that a terminal shows."""
    line = "\ninterrupted\n" if os.isatty(2) else "interrupted\n"
    os.write(2, line.encode())  # print is not safe where a print was interrupted


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _came
    if os.getpid() != _process:
        os._exit(STATUS)  # the parent prints the line
    _came = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    if _works and not _is_importing(frame):
        raise KeyboardInterrupt
    _leave()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _unraisable(args: "sys.UnraisableHookArgs") -> None:
    if issubclass(args.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(args)


def _leave() -> None:
    print_interrupted()
    with contextlib.suppress(RuntimeError, OSError):  # interrupted inside a print; no reader
        sys.stdout.flush()
    os._exit(STATUS)
