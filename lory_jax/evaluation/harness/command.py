"""`lory-eval`: lm-evaluation-harness's own command line, with our model and task files.

lory-eval --model lory --model_args workdir=RUN_DIR --tasks lory_paper --output_path results
lory-eval --model lory --model_args workdir=RUN_DIR,tasks_data=DIR --tasks piqa,boolq
"""

import argparse
import os

from lory_jax import cli
from lory_jax.errors import InputError


def main() -> None:
    """The entry point."""
    cli.run(_main)


def _main(argv: list[str]) -> None:
    # The harness forks to draw its bootstraps, and JAX's threads do not survive a fork.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        from lm_eval._cli import HarnessCLI

        parser = HarnessCLI()
        args = parser.parse_args()
        if args.command:
            _add_ours(args)
    except ModuleNotFoundError as error:
        raise InputError(
            f"lory-eval: requires {error.name}; pip install -r requirements-eval.txt"
        ) from None
    parser.execute(args)


def _add_ours(args: argparse.Namespace) -> None:
    """Registers our model with the harness, and adds the directory of our task files."""
    from lm_eval.utils import setup_logging

    from lory_jax.evaluation.harness.run import TASK_FILES

    setup_logging()
    theirs = getattr(args, "include_path", None)
    args.include_path = [str(TASK_FILES), *([theirs] if theirs else [])]


if __name__ == "__main__":
    main()
