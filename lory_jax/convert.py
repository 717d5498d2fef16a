"""Exports trained models to Hugging Face's LLaMA format, and starts runs from LLaMA checkpoints.

    python -m lory_jax.convert to-hf --workdir=RUN_DIR --out=DIR --prompt=TEXT
    python -m lory_jax.convert from-hf --hf=DIR --workdir=RUN_DIR --experts=8
    python -m lory_jax.convert prune --workdir=RUN_DIR --out=OTHER_RUN --domain=NAME --experts=2

`to-hf --help`, `from-hf --help` and `prune --help` explain their flags; docs/interchange.md has
examples.
"""

from lory_jax import cli
from lory_jax.storage import local_path


def main(argv: list[str]) -> None:
    parser = cli.Parser("convert", __doc__)
    parser.add_argument("direction", choices=("to-hf", "from-hf", "prune"))
    verb = {"to-hf": to_hf, "from-hf": from_hf, "prune": prune}
    verb[parser.parse_args(argv[:1]).direction](argv[1:])


def to_hf(argv: list[str]) -> None:
    parser = cli.Parser(
        "convert to-hf",
        "Writes the model of a run as a LLaMA directory. A Lory model's experts are merged once, "
        "by exactly one of --prompt, --text and --domain; a dense model needs none of them.",
    )
    add = parser.add_argument
    add("--workdir", required=True, type=local_path, help="the run directory of train")
    parser.add_step_flag()
    add("--out", required=True, type=local_path, metavar="DIR", help="the directory to make")
    routed_by = parser.add_mutually_exclusive_group()
    routed_by.add_argument("--prompt", metavar="TEXT", help="merge as generation from it would")
    routed_by.add_argument(
        "--text", type=local_path, metavar="FILE", help="merge by a text file of any length"
    )
    routed_by.add_argument(
        "--domain", metavar="NAME", help="merge by the mean routing of its validation documents"
    )
    add("--data", type=local_path, metavar="DIR", help="where the prepared data are now, if moved")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the stored tensors (default: float32, which is exact)",
    )
    add(
        "--top_k_experts",
        type=int,
        metavar="K",
        help="merge only the K experts of largest weight in each layer (default: all)",
    )
    args = parser.parse(argv)

    # Imported here, after the flags are checked, so that the command line answers fast.
    from lory_jax.conversion import runs
    from lory_jax.run.directory import RunDirectory

    runs.export_run(
        RunDirectory(args.workdir, args.step),
        args.out,
        prompt=args.prompt,
        text=None if args.text is None else cli.read_text(args.text, "--text"),
        domain=args.domain,
        data=args.data,
        dtype=args.dtype,
        top_k_experts=args.top_k_experts,
    )
    print(f"wrote {args.out}")


def from_hf(argv: list[str]) -> None:
    parser = cli.Parser(
        "convert from-hf",
        "Makes a run directory at step 0 from a LLaMA directory: the dense model or, with "
        "--experts, a Lory model whose experts all start as copies of its FFNs. train "
        "--init_from=RUN_DIR continues training from it.",
    )
    add = parser.add_argument
    add("--hf", required=True, type=local_path, metavar="DIR", help="the LLaMA directory")
    add("--workdir", required=True, type=local_path, help="the run directory to make")
    add("--experts", type=int, default=0, help="expert FFNs per layer; 0 (default) stays dense")
    add("--seed", type=int, default=0, help="seed of the router (default: 0)")
    add("--bos_id", type=int, help="the token that begins a document (default: as its files say)")
    add("--eos_id", type=int, help="the token that ends a document (default: as its files say)")
    args = parser.parse(argv)
    for flag, value in (("--experts", args.experts), ("--seed", args.seed)):
        if value < 0:
            parser.error(f"{flag}: got {value}, must be an integer of at least 0")

    # Imported here, after the flags are checked, so that the command line answers fast.
    from lory_jax.conversion import runs

    runs.import_llama(args.hf, args.workdir, args.experts, args.seed, args.bos_id, args.eos_id)
    print(f"wrote {args.workdir}")


def prune(argv: list[str]) -> None:
    parser = cli.Parser(
        "convert prune",
        "Makes a run directory at step 0 that holds, in every layer, only the experts that the "
        "segments of a domain weight most. train --init_from=OTHER_RUN trains it further.",
    )
    add = parser.add_argument
    add("--workdir", required=True, type=local_path, help="the run directory of train")
    parser.add_step_flag()
    add("--out", required=True, type=local_path, metavar="OTHER_RUN", help="the directory to make")
    add("--domain", required=True, metavar="NAME", help="a domain of the run's data")
    add("--experts", required=True, type=int, help="experts to keep in every layer")
    add("--data", type=local_path, metavar="DIR", help="where the prepared data are now, if moved")
    args = parser.parse(argv)

    # Imported here, after the flags are checked, so that the command line answers fast.
    from lory_jax.conversion.prune import prune_run
    from lory_jax.run.directory import RunDirectory

    run = RunDirectory(args.workdir, args.step)
    found = prune_run(run, args.out, args.domain, args.experts, args.data)
    shares = ", ".join(f"{share:.2f}" for share in found.kept_Y)
    print(f"share of the routing of {args.domain} that is kept, by layer: {shares}")
    print(
        f"parameters: {found.bytes_before / 2**20:,.1f} MiB before, "
        f"{found.bytes_after / 2**20:,.1f} MiB now"
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
