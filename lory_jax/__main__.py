"""All commands under one name: `lory COMMAND --flags`, or `python -m lory_jax COMMAND --flags`."""

import ast
import difflib
import importlib
from pathlib import Path

from lory_jax import cli
from lory_jax.errors import ConfigError

VERBS = (
    "prepare",
    "train",
    "evaluate",
    "analyze",
    "generate",
    "serve",
    "convert",
    "compare",
    "plan",
    "doctor",
)


def main() -> None:
    """The entry point."""
    cli.run(dispatch)


def dispatch(argv: list[str]) -> None:
    """Runs the command named by the first argument, with the arguments that follow it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return
    verb, *rest = argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"lory: got {verb!r}, must be one of {', '.join(VERBS)}{hint}")
    importlib.import_module(f"lory_jax.{verb}").main(rest)


def overview() -> str:
    """Lists every command with the first line of its file, without importing it."""
    lines = ["usage: lory COMMAND [flags]; lory COMMAND --help explains the flags", ""]
    for verb in VERBS:
        source = (Path(__file__).parent / f"{verb}.py").read_text("utf-8")
        summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        lines.append(f"  {verb:9} {summary}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
