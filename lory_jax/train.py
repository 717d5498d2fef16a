"""Trains Lory, or its dense baseline (experts=0), on prepared data.

    python -m lory_jax.train --config=configs/local.py:experts=8 --data=DATA --workdir=RUN_DIR

Run the same command again to resume from the newest checkpoint. Ctrl-C or SIGTERM saves after the
current step and stops.

Exit status: 0 the run is finished; 1 an input cannot be used; 2 a flag or field is wrong; 3 loss
became NaN or infinite; 75 another process died, restart all processes to resume; 130, 143 stopped
by a signal and saved.
"""

import argparse
import os
import re
import signal
import sys
import time

from lory_jax import cli
from lory_jax.errors import InputError
from lory_jax.storage import storage_path
from lory_jax.tpu_flags import set_tpu_flags

PEER_DIED = 75  # exit status


def main(argv: list[str]) -> None:
    began = time.monotonic()
    set_tpu_flags()
    parser = cli.Parser("train", __doc__)
    parser.add_config_flag()
    parser.add_argument(
        "--data",
        required=True,
        type=storage_path,
        metavar="DIR[,DIR…]",
        help="directory written by prepare; several, with one tokenizer, are joined",
    )
    parser.add_argument("--workdir", required=True, type=storage_path, help="run directory")
    parser.add_argument(
        "--init_from",
        type=storage_path,
        metavar="OTHER_RUN[,OTHER_RUN…]",
        help="start at step 0 from the newest parameters of another run directory (trained, or "
        "made by convert from-hf), with fresh optimiser moments; several dense runs become one "
        "expert each, and all but their FFNs is averaged",
    )
    parser.add_argument(
        "--profile",
        type=step_range,
        metavar="FIRST:LAST",
        help="write a profiler trace of these steps, counted from 1, to RUN_DIR/profile",
    )
    parser.add_argument(
        "--change_steps",
        action="store_true",
        help="let a run resume with another config.train.steps (its schedules stretch with it)",
    )
    args = parser.parse(argv)

    # JAX and what uses it take seconds to import: a wrong flag must not wait for them.
    import jax

    from lory_jax.parallel import start_process
    from lory_jax.run.checkpoints import Checkpoints, reason

    start_process()
    # JAX's own handler only records the signal: until the loop begins there is nothing to save.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        train(args, began)
    except (InputError, SystemExit) as end:
        if not Checkpoints.has_failed_saves:
            raise
        _leave(end)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        # Without the usual clean-up, which waits for all processes.
        print(
            "error: a step failed, most likely because another process died; restart all "
            f"processes to resume: {reason(error)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PEER_DIED)
    if Checkpoints.has_failed_saves:
        _leave(SystemExit(0))


def train(args: argparse.Namespace, began: float) -> None:
    """Starts or resumes one training run; `began` is when the process did (`time.monotonic`)."""
    from lory_jax.console import say
    from lory_jax.data.prepared import split_directories
    from lory_jax.run.directory import RunDirectory
    from lory_jax.training.loop import Trainer, finish
    from lory_jax.training.monitoring.goodput import Goodput
    from lory_jax.training.restore import restore_or_initialize
    from lory_jax.training.setup import setup

    goodput = Goodput(since=began)
    directory = RunDirectory(args.workdir)
    names = split_directories(args.init_from) if args.init_from else []
    init_from = tuple(RunDirectory(storage_path(name)) for name in names)
    run = setup(args.config, args.data, directory, goodput, init_from, args.change_steps)
    position = restore_or_initialize(run)
    if position.step >= args.config.train.steps:
        say(f"{args.workdir}: finished at step {position.step}, nothing to do")
        return
    trainer = Trainer(run, position, args.profile)
    ending = trainer.train()
    finish(trainer, ending)


def step_range(text: str) -> tuple[int, int]:
    """Parses "10:12" as (10, 12); a flag's `type`."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(
        f"got {text!r}, must be FIRST:LAST with 1 <= FIRST <= LAST, such as 10:12"
    )


def _leave(end: InputError | SystemExit) -> None:
    """Ends the process at once, without waiting for threads of saves that failed."""
    if isinstance(end, InputError):
        cli.print_error(end)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.status if isinstance(end, InputError) else int(end.code or 0))


if __name__ == "__main__":
    cli.run(main)
