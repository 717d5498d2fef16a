"""A file of prompts, continued: one JSON object a line, in and out, and resumable.

Finished lines are appended to OUT.partial, whose first line says what they were made with. When
all are done they are written to OUT in the order of the prompts.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lory_jax.console import progress
from lory_jax.errors import InputError, shorten
from lory_jax.generation.batch import ContinuousBatch
from lory_jax.generation.settings import Settings
from lory_jax.generation.text_batch import Request, continue_queue
from lory_jax.json_text import parse_json, parse_object
from lory_jax.storage import check_writable, write_atomically

if TYPE_CHECKING:
    from lory_jax.api import Model

ADDED = ("continuation", "finish_reason", "tokens")


def continue_file(
    model: "Model", file: Path, out: Path, settings: Mapping[str, Any], batch_size: int
) -> None:
    """Continues every prompt of a file.

    A line's continuation depends on its prompt, the settings and how many equal prompts precede it.
    It depends neither on the lines that are continued beside it nor on interruptions.

    Args:
      model: the model.
      file: JSON lines, each an object with the text "prompt"; other fields are kept.
      out: the file to make: the same objects with the fields of `ADDED`.
      settings: the arguments of `Settings`.
      batch_size: how many prompts are continued at a time.

    Raises:
      InputError: a line is malformed or its prompt too long, a setting is out of its range, or
        `out` exists or was begun with another file, model or other settings.
    """
    if out.exists():
        raise InputError(f"out: {out} already exists; must be a new file")
    check_writable(out, "out")
    how = Settings(**settings)
    lines = _read_lines(file)
    requests = _requests(model, file, lines, how)
    longest = max(_length(model, request) for request in requests)
    made_with = {
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "model": [str(model.config), model.step],
        "settings": dict(settings),
        "batch_size": batch_size,
    }
    partial = out.with_name(out.name + ".partial")
    with open(partial, "a+", encoding="utf-8") as stream:
        done = _resume(stream, partial, json.loads(json.dumps(made_with)))
        left = [request for request in requests if request.number not in done]
        batch = ContinuousBatch(
            model.config,
            model.params,
            slots=batch_size,
            cache_length=longest,
            routing=how.routing,
            ffn=how.ffn,
            vocab_size=model.tokenizer.vocab_size,
        )
        found = continue_queue(batch, model.tokenizer, left)
        for end in progress(found, total=len(left), label="generating", unit="prompts"):
            done[end.number] = dict(
                zip(ADDED, (end.text, end.finish_reason, end.tokens), strict=True)
            )
            _append(stream, {"number": end.number, **done[end.number]})
        texts = [json.dumps(line | done[n], ensure_ascii=False) for n, line in enumerate(lines)]
        write_atomically(out, "".join(f"{text}\n" for text in texts))
    partial.unlink()


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"file: {file}: cannot read it ({error.strerror})") from None
    lines = []
    for number, text in enumerate(data.splitlines(), start=1):
        where = f"file: {file}:{number}"
        line = parse_object(text, where)
        if not isinstance(line.get("prompt"), str):
            raise InputError(f'{where}: "prompt" must be a text; got {shorten(str(line), 80)}')
        if taken := [name for name in ADDED if name in line]:
            raise InputError(f'{where}: has the field "{taken[0]}", which the results add')
        lines.append(line)
    if not lines:
        raise InputError(f"file: {file} is empty; must hold one JSON object a line")
    return lines


def _requests(
    model: "Model", file: Path, lines: list[dict[str, Any]], settings: Settings
) -> list[Request]:
    limit = model.config.sequence_length
    seen: dict[str, int] = {}
    requests = []
    for number, line in enumerate(lines):
        text = line["prompt"]
        seen[text] = seen.get(text, -1) + 1
        prompt = model.encode(text)
        most = limit - len(prompt)
        if most < settings.new_tokens(len(prompt), limit):
            raise InputError(
                f"file: {file}:{number + 1}: its prompt has {len(prompt)} tokens (BOS included); "
                f"must leave {settings.max_new_tokens or 1} of the {limit} positions that the "
                "model reads"
            )
        requests.append(Request(number, prompt, settings, seen[text]))
    return requests


def _length(model: "Model", request: Request) -> int:
    length = len(request.prompt)
    return length + request.settings.new_tokens(length, model.config.sequence_length)


def _resume(stream: TextIO, partial: Path, made_with: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What an earlier process has finished, by number; a line that it could not finish is cut."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"out: {partial} is being written by another process") from None
    whole = partial.read_bytes().rpartition(b"\n")[0].splitlines()
    os.truncate(partial, sum(len(line) + 1 for line in whole))
    if not whole:
        _append(stream, made_with)
        return {}
    found = parse_json(whole[0], partial)
    if found != made_with:
        differs = [name for name in made_with if found.get(name) != made_with[name]]
        raise InputError(
            f"out: {partial} was begun with another {', '.join(differs)}; remove it or choose "
            "another file"
        )
    return dict(_finished(whole[1:], partial))


def _finished(lines: list[bytes], partial: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in lines:
        fields = parse_object(line, partial)
        yield fields.pop("number"), fields


def _append(stream: TextIO, fields: dict[str, Any]) -> None:
    stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
    stream.flush()
