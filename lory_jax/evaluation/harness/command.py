"""`lory-eval`: lm-evaluation-harness's own command line, with our model and task files.

lory-eval --model lory --model_args workdir=W --tasks lory_paper --output_path results
lory-eval --model lory --model_args workdir=W,routing=segment,tasks_data=DIR --tasks lory_paper
"""

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
        from lm_eval.utils import setup_logging

        from lory_jax.evaluation import harness  # noqa: F401  registers the model
        from lory_jax.evaluation.harness.run import TASK_FILES
    except ModuleNotFoundError as error:
        raise InputError(
            f"lory-eval: needs {error.name}; pip install -r requirements-eval.txt"
        ) from None
    setup_logging()
    parser = HarnessCLI()
    args = parser.parse_args()
    if args.command:
        theirs = getattr(args, "include_path", None)
        args.include_path = [str(TASK_FILES), *([theirs] if theirs else [])]
    parser.execute(args)


if __name__ == "__main__":
    main()
