"""Every verb that writes, on a tiny site of its own, in this process."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lory_jax import analyze, cli, compare, convert, doctor, evaluate, generate, prepare, train
from tests.support.tiny import write_prepared, write_recipe

Main = Callable[[list[str]], None]

PREPARE = (
    "--config.data.validation_fraction=0.2",
    "--config.data.test_fraction=0.2",
    "--config.data.min_document_bytes=1",
    "--order=random",
)


WRITERS = (
    *("prepare", "train", "evaluate", "analyze", "analyze --text", "compare"),
    *("convert to-hf", "convert from-hf", "doctor"),
)


class Site:
    """Documents, prepared data, runs and a LLaMA directory below `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.recipe = f"--config={write_recipe(root)}"
        (root / "texts" / "a domain").mkdir(parents=True)
        for number in range(30):
            text = f"document {number}\r\n" + "counting, in words and in numbers. " * 20
            (root / "texts" / "a domain" / f"{number}.txt").write_text(text)
        (root / "text.txt").write_text("counting by steps\r\nin words")
        write_prepared(root / "data")

    def commands(self, out: Path) -> dict[str, tuple[Main, list[str]]]:
        """Each verb that writes, and its arguments; it writes below `out`, one name each."""
        run = f"--workdir={self.root / 'run'}"
        return {
            "prepare": (
                prepare.main,
                [self.recipe, f"--source={self.root / 'texts'}", f"--out={out / 'new'}", *PREPARE],
            ),
            "train": (
                train.main,
                [self.recipe, f"--data={self.root / 'data'}", f"--workdir={out / 'run'}"],
            ),
            "evaluate": (evaluate.main, [run, f"--out={out / 'evaluation.json'}"]),
            "analyze": (analyze.main, [run, f"--out={out / 'analysis'}"]),
            "analyze --text": (
                analyze.main,
                [run, f"--out={out / 'analysis'}", f"--text={self.root / 'text.txt'}"],
            ),
            "compare": (
                compare.main,
                [f"a={self.root / 'run'}", f"b={self.root / 'run'}", f"--out={out / 'report'}"],
            ),
            "convert to-hf": (
                convert.main,
                ["to-hf", run, f"--out={out / 'hf'}", f"--text={self.root / 'text.txt'}"],
            ),
            "convert from-hf": (
                convert.main,
                ["from-hf", f"--hf={self.root / 'hf'}", f"--workdir={out / 'start'}"],
            ),
            "doctor": (doctor.main, ["--size=small", f"--scratch={out / 'scratch'}"]),
        }

    def complete(self) -> None:
        """Runs the verbs into `root` itself, so that each finds what the others wrote."""
        for name, (main, arguments) in self.commands(self.root).items():
            if name in ("compare", "doctor"):
                continue
            main(arguments)
            if name == "evaluate":
                shutil.copy(self.root / "evaluation.json", self.root / "run")
            if name == "analyze":
                shutil.copytree(self.root / "analysis", self.root / "run" / "analysis")
        generate.main([f"--workdir={self.root / 'run'}", "--prompt=a", "--max_new_tokens=2"])


def status_of(monkeypatch: pytest.MonkeyPatch, main: Main, arguments: list[str]) -> int:
    """The exit status of a verb, run as `cli.run` runs it in a process of its own."""
    monkeypatch.setattr(sys, "argv", ["lory", *arguments])
    try:
        cli.run(main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
