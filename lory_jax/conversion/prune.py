"""A run directory that holds only the experts that a domain uses.

Letters: Y layers, E experts, K experts that are kept, D model.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lory_jax.api import load
from lory_jax.conversion.hf_directory import check_absent
from lory_jax.conversion.runs import validation_instances
from lory_jax.conversion.to_run import write_run
from lory_jax.errors import InputError
from lory_jax.generation.merge import domain_routing
from lory_jax.model.low_rank import shared_by_experts
from lory_jax.model.transformer import Params
from lory_jax.run.directory import RunDirectory


class Pruned(NamedTuple):
    """What pruning did: bytes of the parameters, before and after, and the routing that is left.

    `kept_Y` is the share of the domain's mean routing weights that the kept experts had, by layer.
    """

    bytes_before: int
    bytes_after: int
    kept_Y: np.ndarray


def prune_run(
    run: RunDirectory, out: Path, domain: str, experts: int, data: Path | None = None
) -> Pruned:
    """Writes a run at step 0 with the experts that a domain's segments weight most, in each layer.

    Its routers choose among the kept experts as before: the softmax over them is the old one,
    renormalised.

    Args:
      run: the run and its checkpoint.
      out: the run directory to make.
      domain: the domain, by its validation instances.
      experts: K, how many experts each layer keeps.
      data: where the run's prepared data are, if they were moved.

    Raises:
      InputError: `out` exists, the model merges no experts or has fewer, or there is no such
        domain.
    """
    check_absent(out)
    model = load(run.path, run.step)
    config, params = model.config, model.params
    if not config.num_experts or config.is_sparse:
        raise InputError(f"{run}: requires a model whose experts are merged")
    if not 1 <= experts <= config.num_experts:
        raise InputError(f"experts: got {experts}, must be 1 to {config.num_experts}")
    r_YxE = domain_routing(config, params, validation_instances(run, domain, data))
    kept_YxK = np.sort(np.argsort(-r_YxE, axis=-1, kind="stable")[:, :experts], axis=-1)
    pruned = keep_experts(params, kept_YxK)
    k = config.top_k_experts
    fields = {"num_experts": experts, "top_k_experts": k if k < experts else 0}
    written = {**run.config, "model": {**run.config["model"], **fields}}
    write_run(out, written, run.tokenizer, pruned, run.dataset)
    return Pruned(
        _bytes(params), _bytes(pruned), np.take_along_axis(r_YxE, kept_YxK, axis=-1).sum(axis=-1)
    )


def keep_experts(params: Params, kept_YxK: np.ndarray) -> Params:
    """The parameters with these experts of every layer, and the routers' columns for them."""

    def keep(w_YxEx: jax.Array, axis: int) -> jax.Array:
        shape = [1] * w_YxEx.ndim
        shape[0], shape[axis] = kept_YxK.shape
        return jnp.take_along_axis(w_YxEx, jnp.asarray(kept_YxK).reshape(shape), axis=axis)

    ffn = dict(params["layers"]["ffn"])
    for name in ffn.keys() - {*shared_by_experts(ffn)}:
        ffn[name] = keep(ffn[name], 2 if name == "router" else 1)
    return {**params, "layers": {**params["layers"], "ffn": ffn}}


def _bytes(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
