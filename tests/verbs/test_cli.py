"""The command line: flags, overrides, and errors as one line with a status."""

import os
import subprocess
import sys

import pytest

from lory_jax import cli
from lory_jax.config import SCHEMA
from lory_jax.errors import ConfigError, InputError
from tests.support.tiny import ROOT, assert_one_line_error, verb, verb_environment

LOCAL = str(ROOT / "configs" / "local.py")


def parser(default: str | None = None) -> cli.Parser:
    made = cli.Parser("verb", "Does something.")
    made.add_config_flag(default)
    made.add_argument("--data", required=True)
    made.add_argument("--no_compile", action="store_true")
    return made


def plain_parser() -> cli.Parser:
    made = cli.Parser("verb", "Does something.")
    made.add_argument("--data")
    return made


def refuse(arguments: list[str], made: cli.Parser | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        (made or parser()).parse(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("command", [[sys.executable, "-m", "lory_jax"]])
def test_all_verbs_under_one_name(command):
    def lory(*arguments):
        return subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=verb_environment() | {"PYTHONPATH": str(ROOT)},
        )

    shown = lory("--help")
    assert shown.returncode == 0
    listed = [line.split()[0] for line in shown.stdout.splitlines()[2:]]
    # Every file of the package that is a verb, by what runs it.
    files = (ROOT / "lory_jax").glob("*.py")
    verbs = [p.stem for p in files if "run(main)" in p.read_text() and p.stem != "__main__"]
    assert sorted(listed) == sorted(verbs)
    assert all(len(line.split()) > 3 for line in shown.stdout.splitlines()[2:])
    assert_one_line_error(lory("generat"), 2, "got 'generat'", "did you mean generate?")
    assert_one_line_error(lory("generate", "--prompt=a"), 2, "--workdir")


def test_flags_recipe_argument_and_overrides_anywhere():
    args = parser().parse(
        [
            "--config.train.steps=7",
            f"--config={LOCAL}:experts=3",
            "--data=d",
            "--config.model.scan_layers",
            "false",
        ]
    )
    assert args.data == "d" and not args.no_compile
    assert args.config.model.num_experts == 3
    assert args.config.train.steps == 7
    assert args.config.model.scan_layers is False


def test_a_default_recipe_may_be_left_out_and_overridden():
    args = parser(default=LOCAL).parse(["--data=d", "--config.train.steps=9"])
    assert args.config.train.steps == 9


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--data=d"], "--config"),
        ([f"--config={LOCAL}"], "--data"),
        ([f"--config={LOCAL}", "--dat=d"], "--data"),
        ([f"--config={LOCAL}", "--data=d", "--no_comp"], "--no_comp"),
        ([f"--conf={LOCAL}", "--data=d"], "--config"),
        ([f"--config={LOCAL}", "--data=d", "--colour=red"], "--colour"),
        ([f"--config={LOCAL}", "--data=d", "stray"], "stray"),
        ([f"--config={LOCAL}", "--data=d", "--config.model.num_layer=3"], "num_layers"),
        ([f"--config={LOCAL}", "--data=d", "--config.train.steps"], "config.train.steps: got ''"),
        (["--config=missing.py", "--data=d"], "missing.py"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(arguments, word):
    assert word in refuse(arguments)


def test_a_verb_without_a_recipe_refuses_config_flags():
    assert "--config.train.steps" in refuse(["--config.train.steps=3"], plain_parser())
    assert "--config" in refuse([f"--config={LOCAL}"], plain_parser())


@pytest.mark.parametrize("columns", ["40", "200"])
def test_help_names_every_field(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as caught:
        parser(default=LOCAL).parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for section, fields in SCHEMA.items():
        for name, field in fields.items():
            assert f"--config.{section}.{name}" in text
            assert field.meaning in text
            assert field.accepts in text


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("field: got 1, must be 2"), 2, "error: field: got 1, must be 2\n"),
        (InputError("no such directory"), 1, "error: no such directory\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_run_turns_errors_into_one_line_and_a_status(capfd, error, status, line):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == status
    assert capfd.readouterr().err == line


def test_run_lets_the_programs_own_faults_through():
    def main(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(main)


def test_a_reader_that_goes_away_is_not_an_error():
    code = (
        "from lory_jax import cli\n"
        "def main(argv):\n"
        "    for i in range(100_000):\n"
        "        print(i)\n"
        "cli.run(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=dict(os.environ),
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["--config.model.num_experts=-1"], 2, "config.model.num_experts"),
        (["--config.model.segment_length=1000"], 2, "config.model.segment_length"),
        ([], 1, "missing"),
    ],
)
def test_a_real_verb_ends_in_one_line_without_a_traceback(tmp_path, arguments, status, word):
    result = verb(
        "train",
        f"--config={LOCAL}",
        f"--data={tmp_path / 'missing'}",
        f"--workdir={tmp_path / 'w'}",
        *arguments,
    )
    assert_one_line_error(result, status, word)
    assert verb_environment()["JAX_PLATFORMS"] == "cpu"
