"""Continues prompts with a trained model.

    python -m lory_jax.generate --workdir=RUN_DIR --prompt="def read(self"
    python -m lory_jax.generate --workdir=RUN_DIR --interactive
    python -m lory_jax.generate --workdir=RUN_DIR --file=PROMPTS.jsonl --out=FILE.jsonl

One prompt streams to the terminal; several are continued as a batch and printed one by one.
Interactively, every line is a prompt of its own, until the input ends. A file holds one JSON object
a line, with the field "prompt"; every line comes back with the fields "continuation",
"finish_reason" ("stop" or "length") and "tokens". If the command is stopped, run it again to
resume.
"""

import io
import sys
from typing import TYPE_CHECKING, Any

from lory_jax import cli
from lory_jax.errors import InputError
from lory_jax.storage import local_path, storage_path

if TYPE_CHECKING:
    from lory_jax.api import Model

SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "routing", "stop", "ffn")


def main(argv: list[str]) -> None:
    parser = cli.Parser("generate", __doc__)
    add = parser.add_argument
    add("--workdir", required=True, type=storage_path, help="the run directory of train")
    parser.add_step_flag()
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    source.add_argument("--interactive", action="store_true", help="read prompts line by line")
    source.add_argument(
        "--file", type=local_path, metavar="PROMPTS.jsonl", help="read prompts from a file"
    )
    add("--out", type=local_path, metavar="FILE.jsonl", help="with --file: the file to write")
    add(
        "--batch_size",
        type=int,
        default=16,
        help="with --file: how many prompts are continued at a time (default: 16)",
    )
    add(
        "--max_new_tokens",
        type=int,
        help="default: 128, or fewer where the model cannot read that many positions",
    )
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="0 always chooses the most likely token (default: 0.8)",
    )
    add("--top_k", type=int, default=0, help="draw among the k most likely tokens; 0 (default) all")
    add(
        "--top_p",
        type=float,
        default=0.95,
        help="draw among the most likely tokens that together reach this probability "
        "(default: 0.95)",
    )
    add("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    add("--stop", action="append", default=[], help="text to stop at; may be repeated")
    add(
        "--routing",
        choices=("prompt", "segment"),
        default="prompt",
        help="merge the experts once, by the prompt (default), or again at every segment border",
    )
    add("--top_k_experts", type=int, metavar="K", help="merge only the K experts of largest weight")
    add(
        "--segment_length",
        type=int,
        metavar="T",
        help="tokens per routing segment (default: as in training)",
    )
    add(
        "--ffn",
        choices=("auto", "merged", "experts"),
        default="auto",
        help="what a step of a batch reads: an FFN merged for each prompt, or all experts, "
        "unmerged; both compute the same up to rounding (default: auto, the faster one)",
    )
    args = parser.parse(argv)
    if (args.file is None) != (args.out is None):
        parser.error("--out: requires --file" if args.out else "--file: requires --out")
    settings = {name: getattr(args, name) for name in SETTINGS}

    # Imported here, after the flags are checked, so that the command line answers fast.
    from lory_jax import api

    model = api.load(args.workdir, args.step)
    if args.top_k_experts is not None:
        model = model.with_top_k_experts(args.top_k_experts)
    if args.segment_length is not None:
        model = model.with_segment_length(args.segment_length)
    if args.file:
        # Imported here, so that one prompt does not wait for it.
        from lory_jax.generation.prompt_file import continue_file

        continue_file(model, args.file, args.out, settings, args.batch_size)
        print(f"wrote {args.out}")
    elif args.interactive:
        converse(model, settings)
    elif len(args.prompt) == 1:
        stream(model, args.prompt[0], settings)
    else:
        continuations = model.generate(args.prompt, **settings)
        pairs = zip(args.prompt, continuations, strict=True)
        for number, (prompt, text) in enumerate(pairs, start=1):
            print(f"--- prompt {number}\n{prompt}{text}")


def stream(model: "Model", prompt: str, settings: dict[str, Any]) -> None:
    """Prints a prompt and its continuation as it is generated."""
    pieces = model.stream(prompt, **settings)
    first = next(pieces, "")  # before anything is printed: a setting may be refused here
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def converse(model: "Model", settings: dict[str, Any]) -> None:
    """Continues every line of the input; a refused prompt does not end the conversation."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = read_line()
        if not line:
            return
        try:
            stream(model, line.removesuffix("\n"), settings)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def read_line() -> str:
    """The next line of the input, which is UTF-8 whatever the terminal is; "" at its end."""
    if not isinstance(sys.stdin, io.TextIOWrapper):
        return sys.stdin.readline()
    try:
        return sys.stdin.buffer.readline().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 text ({error.reason})") from None


if __name__ == "__main__":
    cli.run(main)
