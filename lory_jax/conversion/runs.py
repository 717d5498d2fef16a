"""Run directories to LLaMA directories, and back: the work of the command `convert`."""

import dataclasses
from pathlib import Path

import numpy as np

from lory_jax.api import Model, load
from lory_jax.conversion.hf_directory import (
    check_absent,
    read_llama_directory,
    write_llama_directory,
)
from lory_jax.conversion.model_card import MergedBy, model_card
from lory_jax.conversion.to_run import write_start
from lory_jax.errors import InputError
from lory_jax.generation.merge import domain_routing, join_shared, merged_params, text_routing
from lory_jax.parallel import make_mesh, start_process
from lory_jax.run.directory import RunDirectory


def export_run(
    run: RunDirectory,
    out: Path,
    *,
    prompt: str | None = None,
    text: str | None = None,
    domain: str | None = None,
    data: Path | None = None,
    dtype: str = "float32",
    top_k_experts: int | None = None,
) -> None:
    """Exports the chosen checkpoint of a run as a LLaMA directory.

    Args:
      run: the run and its checkpoint.
      out: the directory to make.
      prompt, text, domain: what routes the merge of a Lory model's experts, exactly one of them: a
        text of either name, or the validation documents of a domain.
      data: the run's prepared data, if they were moved.
      dtype: the type of the stored tensors, "float32" or "bfloat16".
      top_k_experts: merges only this many experts of largest weight in each layer; None is all.

    Raises:
      InputError: the run, the text or the domain cannot be read, `out` exists, a Lory model is not
        given exactly one thing to be merged by, a dense model is given one, or the model has fewer
        experts than `top_k_experts`.
    """
    check_absent(out)
    model = load(run.path, run.step)
    if top_k_experts is not None:
        model = model.with_top_k_experts(top_k_experts)
    config, params = model.config, model.params
    if config.token_deltas:
        raise InputError(
            f"{run}: config.model.token_deltas is {config.token_deltas}: each token picks a delta, "
            "which a LLaMA cannot; must be 0"
        )
    merged_by = _merged_by(model, run, data, prompt=prompt, text=text, domain=domain)
    card = model_card(config, model.step, dtype, merged_by)
    if merged_by is not None:
        mesh = make_mesh(data=1, fsdp=0, tensor=1)
        params = merged_params(config, params, merged_by.weights_YxE, mesh)
        config = dataclasses.replace(config, num_experts=0)
    if config.shared_expert:
        params = join_shared(params)
        config = dataclasses.replace(config, shared_expert=False, mlp_dim=2 * config.mlp_dim)
    write_llama_directory(out, config, params, model.tokenizer, card, dtype=dtype)


def import_llama(
    hf: Path,
    workdir: Path,
    experts: int = 0,
    seed: int = 0,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> None:
    """Imports a LLaMA directory as a run at step 0, upcycled to `experts` unless that is 0.

    `bos_id` and `eos_id` override the special tokens that its files declare.

    Raises:
      InputError: the directory is malformed or not a LLaMA, or `workdir` exists.
    """
    check_absent(workdir)
    directory = read_llama_directory(hf, bos_id, eos_id)
    start_process()
    write_start(workdir, directory, experts, seed, make_mesh(data=1, fsdp=0, tensor=1))


def _merged_by(
    model: Model, run: RunDirectory, data: Path | None, **routed_by: str | None
) -> MergedBy | None:
    """The routing weights of a prompt, a text or a domain; None for a dense model."""
    given = {name: value for name, value in routed_by.items() if value is not None}
    config, params = model.config, model.params
    if not config.num_experts:
        if given:
            raise InputError(f"{next(iter(given))}: {run} is a dense model, which has no routing")
        return None
    if config.is_sparse:
        raise InputError(
            f"{run}: config.model.routing is {config.routing}, which chooses experts instead "
            "of merging them and cannot be a LLaMA; must be dense, or routing=causal or prefix"
        )
    if len(given) != 1:
        raise InputError(
            f"{run}: has experts to merge; requires exactly one of {', '.join(routed_by)}"
        )
    ((name, value),) = given.items()
    if name == "domain":
        rows = validation_instances(run, value, data)
        what = f"the mean routing of the domain {value!r} ({len(rows)} validation instances)"
        return MergedBy(what, None, domain_routing(config, params, rows))
    tokens = model.encode(value)
    what = f"the routing of this text of {len(tokens):,} tokens, BOS included"
    return MergedBy(what, value, text_routing(config, params, tokens))


def validation_instances(run: RunDirectory, domain: str, data: Path | None) -> np.ndarray:
    """The validation instances `[N, L]` of a domain of the run's data."""
    sets = run.open_data(data).held_out_with_instances("validation")
    if domain not in sets:
        raise InputError(f"domain: got {domain!r}, must be one of {', '.join(sorted(sets))}")
    return sets[domain][:, :-1]
