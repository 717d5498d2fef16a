import io
import sys

import pytest

from lory_jax import console
from lory_jax.console import duration, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_yields_every_item_once_and_ends_with_a_count(capsys):
    assert list(progress(iter(range(5)), 5, "reading", "files")) == [0, 1, 2, 3, 4]
    line = capsys.readouterr().err
    assert line.startswith("reading: 5 files in ") and line.count("\n") == 1


def test_an_empty_loop_divides_by_nothing(capsys):
    assert list(progress([], 0, "reading")) == []
    assert "0 docs" in capsys.readouterr().err


def test_a_terminal_gets_one_updating_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console, "TERMINAL_SECONDS", 0.0)
    list(progress(range(3), 3, "embedding"))
    text = terminal.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    assert text.count("\r") == 4
    assert "embedding: 2/3 docs (67%)" in text and "left" in text


def test_a_log_gets_plain_lines_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    list(progress(range(2), 2, "embedding"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and not any("\r" in line or "\x1b" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (18_420, "5 h 07 min"),
        (270_000, "3 d 3 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
