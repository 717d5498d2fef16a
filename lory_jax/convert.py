"""Trained models to Hugging Face's LLaMA format, and LLaMA checkpoints to the start of a run.

    python -m lory_jax.convert to-hf --workdir=W --out=D --prompt=TEXT
    python -m lory_jax.convert from-hf --hf=D --workdir=W --experts=8

`to-hf --help` and `from-hf --help` explain their flags; docs/interchange.md has examples.
"""

import dataclasses
from pathlib import Path

import numpy as np

from lory_jax import api, cli
from lory_jax.conversion.hf_directory import DTYPES, check_absent, read_directory, write_directory
from lory_jax.conversion.model_card import MergedBy, model_card
from lory_jax.conversion.to_run import write_start
from lory_jax.errors import InputError
from lory_jax.evaluation.held_out import held_out_sets
from lory_jax.generation.merge import domain_routing, merged_params, text_routing
from lory_jax.parallel import make_mesh, start_process
from lory_jax.run.directory import data_directory
from lory_jax.run.step_choice import NEWEST, Step


def main(argv: list[str]) -> None:
    parser = cli.Parser("convert", __doc__)
    parser.add_argument("direction", choices=("to-hf", "from-hf"))
    verb = {"to-hf": to_hf_main, "from-hf": from_hf_main}
    verb[parser.parse_args(argv[:1]).direction](argv[1:])


# ---------------------------------------------------------------- to-hf


def to_hf_main(argv: list[str]) -> None:
    parser = cli.Parser(
        "convert to-hf",
        "Writes the model of a run as a LLaMA directory. The experts of a Lory are merged once, "
        "by one of --prompt, --text, --domain; a dense model takes none of them.",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="a run of the verb train")
    parser.add_step_flag()
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to make")
    routed_by = parser.add_mutually_exclusive_group()
    routed_by.add_argument("--prompt", metavar="TEXT", help="merge as a generation from it would")
    routed_by.add_argument(
        "--text", type=Path, metavar="FILE", help="merge by a text file, however long"
    )
    routed_by.add_argument(
        "--domain", metavar="NAME", help="merge by the mean routing of its validation documents"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the prepared data are now")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the tensors (default: exact)"
    )
    parser.add_argument(
        "--top_k_experts",
        type=int,
        metavar="K",
        help="merge only the K experts of largest weight in each layer (default: all)",
    )
    args = parser.parse(argv)
    to_hf(
        args.workdir,
        args.out,
        prompt=args.prompt,
        text=args.text,
        domain=args.domain,
        data=args.data,
        dtype=args.dtype,
        top_k_experts=args.top_k_experts,
        step=args.step,
    )
    print(f"wrote {args.out}")


def to_hf(
    workdir: Path,
    out: Path,
    *,
    prompt: str | None = None,
    text: Path | None = None,
    domain: str | None = None,
    data: Path | None = None,
    dtype: str = "float32",
    top_k_experts: int | None = None,
    step: Step = NEWEST,
) -> None:
    """Exports a checkpoint of a run; arguments are the flags.

    Raises:
      InputError: the run, the text or the domain cannot be read, `out` exists, a Lory is given
        nothing to be merged by, or a dense model something, or there are fewer experts than wanted.
    """
    check_absent(out)
    model = api.load(workdir, step)
    if top_k_experts is not None:
        model = model.with_top_k_experts(top_k_experts)
    config, params = model.config, model.params
    merged_by = _merged_by(model, workdir, prompt, text, domain, data)
    card = model_card(config, model.step, dtype, merged_by)
    if merged_by is not None:
        mesh = make_mesh(data=1, fsdp=0, tensor=1)
        params = merged_params(config, params, merged_by.weights_YxE, mesh)
        config = dataclasses.replace(config, num_experts=0)
    write_directory(out, config, params, model.tokenizer, card, dtype=dtype)


def _merged_by(
    model: api.Model,
    workdir: Path,
    prompt: str | None,
    text: Path | None,
    domain: str | None,
    data: Path | None,
) -> MergedBy | None:
    """The routing weights that the flags ask for; None for a dense model."""
    given = [
        flag
        for flag, value in (("--prompt", prompt), ("--text", text), ("--domain", domain))
        if value is not None
    ]
    if not model.config.num_experts:
        if given:
            raise InputError(f"{given[0]}: {workdir} is a dense model, which routes nothing")
        return None
    if model.config.is_sparse:
        raise InputError(
            f"{workdir}: config.model.routing is {model.config.routing}, whose experts are chosen, "
            "not merged: no LLaMA computes that; takes a dense model or routing=causal or prefix"
        )
    if len(given) != 1:
        raise InputError(
            f"{workdir}: has experts to be merged; takes one of --prompt, --text, --domain"
        )
    config, params = model.config, model.params
    if domain is not None:
        rows = _instances(workdir, domain, data)
        what = f"the mean routing of the domain {domain!r} ({len(rows)} validation instances)"
        return MergedBy(what, None, domain_routing(config, params, rows))
    if text is not None:
        prompt = cli.read_text(text, "--text")
    assert prompt is not None
    tokens = model.encode(prompt)
    what = f"the routing of this text of {len(tokens):,} tokens, BOS included"
    return MergedBy(what, prompt, text_routing(config, params, tokens))


def _instances(workdir: Path, domain: str, data: Path | None) -> np.ndarray:
    sets = held_out_sets(data_directory(workdir, data), "validation")
    if domain not in sets:
        raise InputError(f"--domain: got {domain!r}, takes one of {', '.join(sorted(sets))}")
    return sets[domain][:, :-1]


# ---------------------------------------------------------------- from-hf


def from_hf_main(argv: list[str]) -> None:
    parser = cli.Parser(
        "convert from-hf",
        "Makes a work directory at step 0 out of a LLaMA directory: the dense model, or with "
        "--experts the Lory whose experts all start as its FFNs. Train on from it with "
        "train --init_from=W.",
    )
    parser.add_argument("--hf", required=True, type=Path, metavar="DIR", help="LLaMA directory")
    parser.add_argument("--workdir", required=True, type=Path, help="work directory to make")
    parser.add_argument(
        "--experts", type=int, default=0, help="expert FFNs per layer; 0 (default) stays dense"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the router (default: 0)")
    args = parser.parse(argv)
    for flag, value in (("--experts", args.experts), ("--seed", args.seed)):
        if value < 0:
            parser.error(f"{flag}: got {value}, takes an integer of at least 0")
    from_hf(args.hf, args.workdir, args.experts, args.seed)
    print(f"wrote {args.workdir}")


def from_hf(hf: Path, workdir: Path, experts: int = 0, seed: int = 0) -> None:
    """Imports a LLaMA directory as a run at step 0, upcycled to `experts` unless 0.

    Raises:
      InputError: the directory is malformed or no LLaMA, or `workdir` exists.
    """
    check_absent(workdir)
    directory = read_directory(hf)
    start_process()
    write_start(workdir, directory, experts, seed, make_mesh(data=1, fsdp=0, tensor=1))


if __name__ == "__main__":
    cli.run(main)
