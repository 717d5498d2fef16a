"""The experts of a layer: their matrices, logical axes, and layout on a mesh.

Every expert has a SwiGLU FFN of three matrices, with biases where `config.model.mlp_bias` says so.
Each device holds the same slice of F of every expert (paper, section 6: expert-wise model
parallelism): D is split over FSDP and gathered where it is needed; F is split over TENSOR, over
which activations are communicated and parameters never are.

Letters: S segments, T tokens per segment, B batch, D model, F FFN, E experts.
"""

from collections.abc import Mapping

import jax
from jax import Array
from jax.typing import DTypeLike

from lory_jax.parallel import RULES, has_mesh, partition_spec

# {"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}; perhaps {"gate_bias": [E, F], ...}, too
Experts = Mapping[str, Array]

# The logical axes of every matrix, without the experts' own axis; a dense FFN has them too.
DENSE_AXES = {"gate": ("embed", "mlp"), "up": ("embed", "mlp"), "down": ("mlp", "embed")}
AXES = {name: ("experts", *axes) for name, axes in DENSE_AXES.items()}
MATRICES = tuple(AXES)
# A bias has the axis of its matrix's outputs.
BIASES = tuple(f"{name}_bias" for name in MATRICES)
DENSE_BIAS_AXES = {
    bias: ("mlp",) if DENSE_AXES[name][-1] == "mlp" else ("norm",)
    for name, bias in zip(MATRICES, BIASES, strict=True)
}
BIAS_AXES = {name: ("experts", *axes) for name, axes in DENSE_BIAS_AXES.items()}
D_AXIS = {name: axes.index("embed") for name, axes in AXES.items()}

# Mesh axes that D and F are split over, and those over which gradients are summed beside FSDP.
(FSDP,), (TENSOR,) = RULES["embed"], RULES["mlp"]
REPLICAS = tuple(axis for axis in RULES["moe_batch"] if axis != FSDP)

# How the experts and the activations around them are laid out on a mesh.
EXPERT_SPECS = {name: partition_spec(axes) for name, axes in AXES.items()}
BATCH_SPEC = partition_spec(("moe_batch",))  # [B or S, ...]
HIDDEN_SPEC = partition_spec(("moe_batch", "length", "mlp"))  # [S, T, F]


def gather_matrices(experts: Experts, dtype: DTypeLike) -> list[Array]:
    """The matrices in the order of `MATRICES` and in this type, with all of D on every device.

    Called on each device of a mesh (`on_mesh`), which holds a slice of D; F stays sliced.
    """
    matrices = {name: experts[name].astype(dtype) for name in MATRICES}
    if not has_mesh():
        return list(matrices.values())
    return [
        jax.lax.all_gather(w, FSDP, axis=D_AXIS[name], tiled=True) for name, w in matrices.items()
    ]
