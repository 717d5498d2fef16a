"""Makes training instances and evaluation sets from documents.

    python -m lory_jax.prepare --out=DIR [--config=local] [--source=python]

Writes DIR/train/*.array_record, DIR/validation/<domain>/, DIR/test/<domain>/, DIR/tokenizer.json,
DIR/manifest.json and DIR/report.html. If DIR is already prepared with the same settings, it says so
and ends. Interrupted or killed, the same command resumes.
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from lory_jax.cli import Parser, run
from lory_jax.storage import is_remote, local_path, storage_path

if TYPE_CHECKING:
    from lory_jax.preparation.engine.runner import Engine


def main(argv: list[str]) -> None:
    parser = Parser("prepare", __doc__)
    parser.add_argument(
        "--out", required=True, metavar="DIR", type=storage_path, help="directory to make"
    )
    parser.add_config_flag(default="local")
    parser.add_argument(
        "--source",
        action="append",
        metavar="SOURCE",
        help="documents: python, those of this Python installation (default); a file, a directory "
        "(the top folder is the domain) or a pattern, local or at gs:// or s3://, of text, .jsonl, "
        ".json, .csv, .tsv (also .gz and .zst of them), .parquet or .arrow; or "
        "tfds:NAME/config:split. May be repeated",
    )
    _add_reading_flags(parser)
    parser.add_argument(
        "--order",
        default="similar",
        choices=("similar", "random"),
        help="order of the training documents, on the same tokens (default: similar)",
    )
    parser.add_argument(
        "--tokenizer",
        type=local_path,
        metavar="FILE",
        help="use this tokenizer.json, or SentencePiece .model, instead of training one",
    )
    for name in ("bos", "eos"):
        parser.add_argument(
            f"--{name}_id",
            type=int,
            metavar="ID",
            help=f"the special token of --tokenizer that {'begins' if name == 'bos' else 'ends'} a "
            "document (default: as config.json beside it says, or by its usual name)",
        )
    parser.add_argument(
        "--encoder",
        metavar="DIR",
        type=local_path,
        help="embed documents with this BERT sentence encoder, such as Contriever (a directory "
        "with config.json, model.safetensors and tokenizer.json), not by latent semantic analysis",
    )
    _add_engine_flags(parser)
    args = parser.parse(argv)

    # Slow imports come after the flags, so that --help and a wrong flag answer at once.
    from lory_jax.data.prepared import PreparedData
    from lory_jax.preparation.pipeline import (
        default_work_directory,
        load_tokenizer,
        make_settings,
        prepare,
        prepare_part,
    )
    from lory_jax.preparation.staging import is_prepared
    from lory_jax.preparation.statistics import preparation_summary

    out = args.out if is_remote(args.out) else args.out.resolve()
    tokenizer = None
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer, args.bos_id, args.eos_id)
    sources = [os.path.expanduser(source) for source in args.source or ["python"]]
    settings = make_settings(
        args.config, sources, args.order, tokenizer, _reading(args), args.encoder
    )
    if is_prepared(out, settings):
        print(f"{out}: already prepared with these settings; nothing to do")
        return
    work = args.work or default_work_directory(out, settings)
    if args.stage:
        prepare_part(settings, tokenizer, work, out, args.stage, args.task)
        return
    prepare(settings, tokenizer, work, out, _engine(args))
    print(preparation_summary(PreparedData.open(out).manifest))
    print(f"wrote {out}")


# As ReadOptions and MAX_REJECTED of the stage have them; importing those is too slow for --help.
READING = {"text_key": "text", "domain_key": None, "source_key": None, "max_rejected": 0.001}


def _add_reading_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--text_key", help="the field of a record that holds the text (default: text)")
    add("--domain_key", help="the field that holds the domain (default: domain, if there is one)")
    add("--source_key", help="the field that holds the origin (default: source, if there is one)")
    add(
        "--max_rejected",
        type=_share,
        metavar="SHARE",
        help="stop if more than this share of the documents is broken; those that are rejected are "
        "listed in OUT/rejects (default: 0.001)",
    )
    parser.set_defaults(**READING)


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for beyond the defaults, which directories of earlier versions have."""
    return {name: getattr(args, name) for name in READING if getattr(args, name) != READING[name]}


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a number from 0 to 1")
    return share


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


def _engine(args: argparse.Namespace) -> "Engine":
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
