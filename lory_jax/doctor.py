"""Checks the devices of this machine, or a run directory and its data.

    python -m lory_jax.doctor [--size=small|full] [--scratch=DIR|gs://...]
    python -m lory_jax.doctor --workdir=RUN_DIR [--data=DIR]

Without --workdir it is the first thing to run on a new machine. In a few minutes it lists the
devices, compares each kernel with its reference in values and gradients, runs 20 training steps and
measures their MFU, and saves and restores a checkpoint.

With --workdir it reads every checkpoint and compares its sums, and hashes every file of the
prepared data. It changes nothing and requires memory for one train state.

The exit status is 1 if there is any problem.
"""

import time

from lory_jax import cli
from lory_jax.errors import InputError
from lory_jax.storage import storage_path


def main(argv: list[str]) -> None:
    parser = cli.Parser("doctor", __doc__)
    add = parser.add_argument
    add(
        "--size",
        choices=("small", "full"),
        help="size of the model that the devices are checked with (default: full on accelerators, "
        "small on a CPU)",
    )
    add(
        "--scratch",
        type=storage_path,
        metavar="DIR",
        help="where to save and restore a checkpoint; several hosts require a directory that all "
        "of them can reach, such as gs://... (default: a temporary directory)",
    )
    add("--workdir", type=storage_path, metavar="RUN_DIR", help="check this run instead")
    add(
        "--data",
        type=storage_path,
        metavar="DIR",
        help="prepared data of the run (default: where the run found them)",
    )
    args = parser.parse(argv)
    if args.workdir is None and args.data is not None:
        parser.error("--data: requires --workdir, the run that was trained on them")
    for name in ("size", "scratch"):
        if args.workdir is not None and getattr(args, name) is not None:
            parser.error(f"--{name}: checks this machine and cannot be combined with --workdir")

    # Imported here so that --help and flag errors do not wait for JAX.
    from lory_jax.diagnosis.devices import examine_devices
    from lory_jax.diagnosis.findings import Findings
    from lory_jax.diagnosis.run import examine_run
    from lory_jax.parallel import start_process
    from lory_jax.run.directory import RunDirectory

    start_process()
    begin, findings = time.perf_counter(), Findings()
    if args.workdir is None:
        examine_devices(args.size, args.scratch, findings)
    else:
        examine_run(RunDirectory(args.workdir), args.data, findings)
    if findings.problems:
        noun = "problem" if findings.problems == 1 else "problems"
        raise InputError(f"doctor: {findings.problems} {noun} found; see above")
    findings.say(f"all checks passed in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    cli.run(main)
