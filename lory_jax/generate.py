"""Continues prompts with a trained model.

    python -m lory_jax.generate --workdir=W --prompt="def read(self"

One prompt streams to the terminal; several are continued as a batch and printed one by one.
"""

from pathlib import Path

from lory_jax import api, cli


def main(argv: list[str]) -> None:
    parser = cli.Parser("generate", __doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="a run of the verb train")
    parser.add_argument(
        "--prompt", required=True, action="append", help="text to continue; may be given again"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="default: 128")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="only the k likeliest tokens; 0 (default) for all"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=0.95,
        help="only the likeliest tokens that together reach this probability (default: 0.95)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--routing",
        choices=("prompt", "segment"),
        default="prompt",
        help="merge the experts once, by the prompt (default), or again at every segment border",
    )
    args = parser.parse(argv)
    settings = {
        name: getattr(args, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "routing")
    }
    model = api.load(args.workdir)
    if len(args.prompt) > 1:
        continuations = model.generate(args.prompt, **settings)
        for number, (prompt, text) in enumerate(zip(args.prompt, continuations, strict=True), 1):
            print(f"--- prompt {number}\n{prompt}{text}")
        return
    pieces = model.stream(args.prompt[0], **settings)
    first = next(pieces, "")  # before anything is printed: a setting may be refused here
    print(args.prompt[0] + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.run(main)
