"""`generate --file`: the texts of `generate`, in order, whatever interrupts it."""

import json
import os
import signal
import subprocess
import time

import pytest

from lory_jax.errors import InputError
from lory_jax.generation import prompt_file
from lory_jax.generation.prompt_file import continue_file
from tests.support.tiny import verb, verb_command, verb_environment, write_prepared, write_recipe
from tests.verbs.test_api import make_model

SETTINGS = dict(max_new_tokens=6, seed=3)
PROMPTS = ["def read", "", "def read", "self.buffer[:size]", "return", "naïve €", "def"]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "id": f"p{n}"} for n, text in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_come_back_in_order_with_the_texts_of_generate(model, prompts, tmp_path):
    continue_file(model, prompts, tmp_path / "out.jsonl", SETTINGS, 3)
    lines = read(tmp_path / "out.jsonl")
    assert [line["prompt"] for line in lines] == PROMPTS
    assert [line["id"] for line in lines] == [f"p{n}" for n in range(len(PROMPTS))]
    assert [line["continuation"] for line in lines] == model.generate(PROMPTS, **SETTINGS)
    assert lines[0]["continuation"] != lines[2]["continuation"]  # drawn twice
    for line in lines:
        assert (line["finish_reason"] == "length") == (line["tokens"] == 6)
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_file_resumes_as_one_never_stopped(model, prompts, tmp_path, monkeypatch):
    continue_file(model, prompts, tmp_path / "whole.jsonl", SETTINGS, 3)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"

    def stop_after(found, **_):
        for count, end in enumerate(found):
            if count == 4:
                raise KeyboardInterrupt
            yield end

    monkeypatch.setattr(prompt_file, "progress", stop_after)
    with pytest.raises(KeyboardInterrupt):
        continue_file(model, prompts, out, SETTINGS, 3)
    assert not out.exists() and len(read(partial)) == 5
    with open(partial, "a") as stream:
        stream.write('{"number": 6, "continu')  # the process was killed while it wrote
    read_again = []

    def watch(found, total, **_):
        read_again.append(total)
        yield from found

    monkeypatch.setattr(prompt_file, "progress", watch)
    continue_file(model, prompts, out, SETTINGS, 3)
    assert read_again == [3]
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_partial_file_of_other_settings_is_not_mixed_in(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    continue_file(model, prompts, out, SETTINGS, 3)
    with pytest.raises(InputError, match=r"out: .*already exists"):
        continue_file(model, prompts, out, SETTINGS, 3)
    partial = tmp_path / "other.jsonl.partial"
    partial.write_text(json.dumps({"settings": {}, "batch_size": 3}) + "\n")
    message = r"out: .*other.jsonl.partial was begun with another file_sha256, model, settings;"
    with pytest.raises(InputError, match=message):
        continue_file(model, prompts, tmp_path / "other.jsonl", SETTINGS, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt"', ":2: not JSON"),
        ('{"prompt": 3}', ':1: "prompt" must be a text'),
        ("[1]", ":1: got list"),
        ('{"prompt": "a", "tokens": 1}', ':1: has the field "tokens"'),
        (json.dumps({"prompt": "x " * 70}), ":1: its prompt has 14. tokens .* must leave 6 of the"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_written(model, tmp_path, text, message):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(InputError, match=f"file: .*{message}"):
        continue_file(model, tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", SETTINGS, 2)
    assert os.listdir(tmp_path) == ["prompts.jsonl"]


@pytest.mark.faults
def test_a_killed_command_resumes(tmp_path):
    """With kill -9, in a process of its own."""
    data, run = write_prepared(tmp_path / "data"), tmp_path / "run"
    recipe = write_recipe(tmp_path)
    trained = verb("train", f"--config={recipe}", f"--data={data}", f"--workdir={run}")
    assert trained.returncode == 0, trained.stderr
    lines = [json.dumps({"prompt": f"{n}"}) for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    command = ["generate", f"--workdir={run}", f"--file={tmp_path / 'prompts.jsonl'}"]
    command += ["--max_new_tokens=8", "--batch_size=2"]
    out = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    killed = subprocess.Popen(
        verb_command(*command, f"--out={out}"), env=verb_environment(), stderr=subprocess.DEVNULL
    )
    while killed.poll() is None and (not partial.exists() or partial.read_text().count("\n") < 4):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = partial.read_text().count("\n") - 1
    assert 0 < done < 40 and not out.exists()
    again = verb(*command, f"--out={out}")
    assert again.returncode == 0, again.stderr
    assert f"generating: {40 - done} prompts" in again.stderr
    whole = verb(*command, f"--out={tmp_path / 'whole.jsonl'}")
    assert whole.returncode == 0, whole.stderr
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
