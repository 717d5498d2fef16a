"""Serves a trained model over HTTP, by the completions protocol of OpenAI's clients.

    python -m lory_jax.serve --workdir=RUN_DIR [--host=127.0.0.1] [--port=8000]

The model `lory` merges its experts by each prompt; `lory:DOMAIN` merges them by the mean routing of
a domain's validation documents, as `convert to-hf --domain` does. All of them share one running
batch. http://127.0.0.1:8000/ is a page with a text box. Ctrl-C or SIGTERM finishes what was begun.

It is for evaluation and demonstrations: there are no users and no passwords, and it listens on this
machine only, unless --host says otherwise. docs/serving.md has the details.
"""

import argparse

from lory_jax import cli
from lory_jax.errors import InputError
from lory_jax.storage import storage_path

COUNTS = ("batch_size", "queue", "max_connections", "stop_seconds")


def main(argv: list[str]) -> None:
    args = parse_flags(argv)

    # Imported here, after the flags are checked, so that the command line answers fast.
    from lory_jax import api

    try:
        from lory_jax.serving import server
    except ModuleNotFoundError as error:
        raise InputError(
            f"serve: requires {error.name}; pip install -r requirements-serve.txt"
        ) from None
    from lory_jax.serving.engine import Engine
    from lory_jax.serving.models import domain_weights

    with server.listen(args.host, args.port) as socket:  # a port that is taken is found at once
        model = api.load(args.workdir, args.step)
        engine = Engine(
            model,
            domain_weights(model, args.workdir, args.step, args.domains, args.data),
            slots=args.batch_size,
            context=args.context or model.config.sequence_length,
            queue=args.queue,
            ffn=args.ffn,
        )
        server.serve(engine, socket, args.max_connections, args.stop_seconds)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("serve", __doc__)
    add = parser.add_argument
    add("--workdir", required=True, type=storage_path, help="the run directory of train")
    parser.add_step_flag()
    add("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="the port; 0 takes a free one (default: 8000)")
    add(
        "--domains",
        default="all",
        metavar="all|none|A,B",
        help="the domains that are served as lory:DOMAIN (default: all of the run's data)",
    )
    add("--data", type=storage_path, metavar="DIR", help="the prepared data, if they were moved")
    add(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a prompt and its continuation together (default: all that the model reads)",
    )
    add(
        "--batch_size",
        type=int,
        default=16,
        help="how many texts are continued at a time (default: 16)",
    )
    add(
        "--queue",
        type=int,
        default=256,
        help="how many texts may wait; more are refused with status 429 (default: 256)",
    )
    add(
        "--max_connections",
        type=int,
        default=1000,
        help="more connections are refused with status 503 (default: 1000)",
    )
    add(
        "--stop_seconds",
        type=int,
        default=30,
        help="how long a stop waits for what was begun (default: 30)",
    )
    add(
        "--ffn",
        choices=("auto", "merged", "experts"),
        default="auto",
        help="what a step reads: an FFN merged for each text, or all experts, unmerged (default: "
        "auto, what the device does faster)",
    )
    args = parser.parse(argv)
    for name in COUNTS:
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, must be at least 1")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port: got {args.port}, must be 0 to 65535")
    return args


if __name__ == "__main__":
    cli.run(main)
