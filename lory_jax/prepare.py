"""Makes training instances and evaluation sets from documents.

    python -m lory_jax.prepare --out=DIR [--config=local] [--source=python]

Writes DIR/train/*.array_record, DIR/validation/<domain>/, DIR/test/<domain>/, DIR/tokenizer.json
and DIR/manifest.json. If DIR is already prepared with the same settings, it says so and ends.
"""

import os

from lory_jax.cli import Parser, run
from lory_jax.storage import local_path


def main(argv: list[str]) -> None:
    parser = Parser("prepare", __doc__)
    parser.add_argument(
        "--out", required=True, type=local_path, metavar="DIR", help="directory to make"
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
        "--tokenizer",
        type=local_path,
        metavar="FILE.json",
        help="use this tokenizer instead of training one",
    )
    for name in ("bos", "eos"):
        parser.add_argument(
            f"--{name}_id",
            type=int,
            metavar="ID",
            help=f"the special token of --tokenizer that {'begins' if name == 'bos' else 'ends'} a "
            "document (default: as config.json beside it says, or by its usual name)",
        )
    args = parser.parse(argv)

    # Slow imports come after the flags, so that --help and flag errors do not wait for them.
    from lory_jax.data.tokenizer import Tokenizer
    from lory_jax.preparation.pipeline import make_settings, prepare
    from lory_jax.preparation.staging import is_prepared, staging_directory
    from lory_jax.preparation.statistics import preparation_summary

    out = args.out.resolve()
    tokenizer = None
    if args.tokenizer:
        tokenizer = Tokenizer.load_foreign(args.tokenizer, args.bos_id, args.eos_id)
    settings = make_settings(args.config, os.path.expanduser(args.source), args.order, tokenizer)
    if is_prepared(out, settings):
        print(f"{out}: already prepared with these settings; nothing to do")
        return
    with staging_directory(out) as staging:
        manifest = prepare(settings, args.config, tokenizer, staging)
    print(preparation_summary(manifest))
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
