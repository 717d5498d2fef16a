"""The page of messages: each is one that the code can print."""

import ast
import functools
import re

import pytest

from tests.support.tiny import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
ELLIPSIS = "…"
# What Python, the system or an interrupt prints.
NOT_OURS = ("error: PATH", r"\xe9", "interrupted")


def messages() -> list[str]:
    rows = re.findall(r"^\| `(.+?)`.*\|.*\|.*\|$", PAGE.read_text("utf-8"), re.M)
    return [row for row in rows if not row.startswith(NOT_OURS)]


@functools.cache
def texts_of_the_code() -> list[str]:
    """Every text in the package; what an f-string inserts is a null character."""
    found = []
    for path in sorted((ROOT / "lory_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_page_has_messages_of_every_section():
    sections = PAGE.read_text("utf-8").split("\n## ")[1:]
    assert len(sections) >= 5 and all("\n| `" in section for section in sections)
    assert len(messages()) >= 25


@pytest.mark.parametrize("message", messages())
def test_a_message_is_one_that_the_code_prints(message):
    fragments = [re.escape(part) for part in message.split(ELLIPSIS)]
    pattern = re.compile(".*?".join(fragments), re.S)
    assert any(pattern.search(text) for text in texts_of_the_code()), message


def test_a_message_that_is_gone_is_noticed():
    assert not any("must be a snark" in text for text in texts_of_the_code()[:-1])
    pattern = re.compile("tokenizer: has no token for .*? of .*? words", re.S)
    assert not any(pattern.search(text) for text in texts_of_the_code())
