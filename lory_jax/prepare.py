"""Makes training instances and evaluation sets from documents.

    python -m lory_jax.prepare --out=DIR [--config=local] [--source=python]

Writes DIR/train/*.array_record, DIR/validation/<domain>/, DIR/test/<domain>/, DIR/tokenizer.json,
DIR/manifest.json and DIR/report.html. If DIR is already prepared with the same settings, it says so
and ends. Interrupted or killed, the same command resumes.
"""

import argparse
import os

from lory_jax.cli import Parser, run
from lory_jax.storage import is_remote, storage_path


def main(argv: list[str]) -> None:
    parser = Parser("prepare", __doc__)
    parser.add_argument(
        "--out", required=True, metavar="DIR", type=storage_path, help="directory to make"
    )
    parser.add_config_flag(default="local")
    parser.add_argument(
        "--source",
        default="python",
        metavar="python|DIR|FILE.jsonl|tfds:NAME/config:split",
        help="documents: those of this Python installation (default), a directory of text files "
        "(domain = top folder), JSON lines, or a TFDS data set",
    )
    parser.add_argument(
        "--order",
        default="similar",
        choices=("similar", "random"),
        help="order of the training documents, on the same tokens (default: similar)",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE.json", help="use this tokenizer instead of training one"
    )
    _add_engine_flags(parser)
    args = parser.parse(argv)

    # Slow imports come after the flags, so that --help and a wrong flag answer at once.
    from lory_jax.data.prepared import PreparedData
    from lory_jax.data.tokenizer import Tokenizer
    from lory_jax.preparation.pipeline import (
        default_work_directory,
        make_settings,
        prepare,
        prepare_part,
    )
    from lory_jax.preparation.staging import is_prepared
    from lory_jax.preparation.statistics import summary

    out = args.out if is_remote(args.out) else args.out.resolve()
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    settings = make_settings(args.config, args.source, args.order, tokenizer)
    if is_prepared(out, settings):
        print(f"{out}: already prepared with these settings; nothing to do")
        return
    work = args.work or default_work_directory(out, settings)
    with parser.named_as_flags():
        if args.stage:
            prepare_part(settings, tokenizer, work, out, args.stage, args.task)
            return
        prepare(settings, tokenizer, work, out, _engine(args))
    print(summary(PreparedData.open(out).manifest))
    print(f"wrote {out}")


def _add_engine_flags(parser: Parser) -> None:
    parser.add_argument(
        "--engine",
        default="local",
        choices=("local", "beam"),
        help="what runs the tasks: processes of this machine (default), or Apache Beam, which "
        "requires requirements-beam.txt",
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        metavar="N",
        help="processes; the result does not depend on them (default: one per core)",
    )
    parser.add_argument(
        "--beam_option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of Beam, such as --beam_option=runner=DataflowRunner; may be repeated",
    )
    parser.add_argument(
        "--work",
        type=storage_path,
        metavar="DIR",
        help="where unfinished work lies; jobs on several machines require one that all of them "
        "reach (default: OUT.tmp-prepare)",
    )
    parser.add_argument(
        "--stage", metavar="NAME", help="run tasks of this stage only, for arrays of jobs"
    )
    parser.add_argument(
        "--task",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="with --stage: the tasks whose number is I modulo N, I from 0 to N-1 (default: 0/1)",
    )


def _engine(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    if args.engine == "beam":
        from lory_jax.preparation.engine.beam import BeamPipelines

        return BeamPipelines(args.workers, args.beam_option)
    from lory_jax.preparation.engine.local import LocalPool

    return LocalPool(args.workers)


def _workers(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be an integer of at least 1")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise argparse.ArgumentTypeError(f"got {text!r}, must be I/N with I from 0 to N-1")
    return int(first), int(second)


if __name__ == "__main__":
    run(main)
