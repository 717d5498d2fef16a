"""Reads JSON: one record a line, or the elements of one array, without holding the file."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from lory_jax.preparation.sources.streams import open_stream

CHUNK_BYTES = 1 << 20
LONGEST_RECORD = 1 << 28  # characters; whatever seems longer is a string without an end
LONGEST_TOKEN = 16  # characters of a literal or an escape that a chunk may cut
BYTE_ORDER_MARK = codecs.BOM_UTF8
SPACE = re.compile(r"\s*")
SPACE_AND_COMMAS = re.compile(r"[\s,]*")

Record = tuple[str, int, Any]  # position, size, and the record or the ValueError


def read_lines(stream: IO[bytes], part: tuple[int, int] | None) -> Iterator[Record]:
    """Yields the record of each line that begins in the part."""
    position, end = part or (0, None)
    if position:
        # The line that holds the byte before the part belongs to the part before.
        stream.seek(position - 1)
        position += len(stream.readline()) - 1
    while end is None or position < end:
        line = stream.readline()
        if not line:
            return
        if not line.isspace():
            yield f"byte {position}", len(line), parse_line(line, is_first=position == 0)
        position += len(line)


def parse_line(line: bytes, is_first: bool) -> Any:
    """Returns the value of a line, or the `ValueError` that says why it has none."""
    if is_first:
        line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(
            f"not UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x})"
        )
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON ({error})")


def sniff(path: str) -> str:
    """Returns "jsonl" if the first line of a `.json` file is a whole object, else "json"."""
    with open_stream(path) as stream:
        line = stream.readline(LONGEST_RECORD)
    return "jsonl" if isinstance(parse_line(line, is_first=True), dict) else "json"


def read_values(stream: IO[bytes]) -> Iterator[Record]:
    """Yields the elements of one array, or values that only white space separates.

    After a broken value, the next line is tried; inside an array, the rest is given up, because
    nothing marks where the next element begins.
    """
    text = _Window(stream)
    text.skip(SPACE)
    is_array = text.peek() == "["
    separators = SPACE_AND_COMMAS if is_array else SPACE
    text.at += is_array
    number = 0
    while True:
        text.skip(separators)
        if (character := text.peek()) == "" or (is_array and character == "]"):
            break
        number += 1
        value, size = text.take_value()
        if is_array and isinstance(value, ValueError):
            lost = size + text.count_rest()
            yield f"element {number}", lost, ValueError(f"{value}; the rest of the array is lost")
            return
        yield f"element {number}", size, value
    if is_array and character == "":
        yield f"element {number + 1}", 0, ValueError("the array has no end: the file was cut")


class _Window:
    """A piece of a UTF-8 stream that moves on and grows where a value needs it.

    Attributes:
      at: where the next character is.
    """

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        # What is not UTF-8 becomes surrogates, which no document may hold.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._scan = json.JSONDecoder().raw_decode
        self._text = ""
        self._is_whole = False
        self.at = 0

    def peek(self) -> str:
        """The next character, or "" at the end of the stream."""
        while self.at >= len(self._text) and not self._is_whole:
            self._grow()
        return self._text[self.at : self.at + 1]

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Moves past what the pattern matches."""
        while self.peek():
            self.at = pattern.match(self._text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self._text):
                return

    def take_value(self) -> tuple[Any, int]:
        """Moves past a value and returns it with its length; a broken one as a `ValueError`."""
        while True:
            try:
                value, end = self._scan(self._text, self.at)
            except RecursionError:
                return self._give_up("nested too deeply")
            except json.JSONDecodeError as error:
                if self._is_whole or not self._may_be_cut(error):
                    return self._give_up(error.msg)
                self._grow()
                continue
            except ValueError:  # Python refuses to read integers of thousands of digits
                return self._give_up("a number is too long")
            if end < len(self._text) or self._is_whole:  # else a number may go on
                size, self.at = end - self.at, end
                return value, size
            self._grow()

    def count_rest(self) -> int:
        """The length of what was not read."""
        size = len(self._text) - self.at
        while chunk := self._stream.read(CHUNK_BYTES):
            size += len(chunk)
        return size

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether more text may complete the value."""
        if len(self._text) - self.at > LONGEST_RECORD:
            return False
        is_at_end = error.pos >= len(self._text) - LONGEST_TOKEN
        return is_at_end or error.msg.startswith("Unterminated string")

    def _give_up(self, reason: str) -> tuple[ValueError, int]:
        """Moves to the next line."""
        start = self.at
        line_end = self._text.find("\n", start)
        self.at = len(self._text) if line_end < 0 else line_end
        return ValueError(f"not JSON ({reason})"), self.at - start

    def _grow(self) -> None:
        # At least doubled, so that a long value is scanned few times.
        chunk = self._stream.read(max(CHUNK_BYTES, len(self._text) - self.at))
        self._is_whole = not chunk
        self._text = self._text[self.at :] + self._decoder.decode(chunk, final=not chunk)
        self.at = 0
