"""The expert FFNs, merged in parameter space once per segment (paper, section 2.2).

Experts are a dict `{"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}`, the layout in which
the model stores them. `merged_ffn` is the one entry; it picks an implementation:

    "einsum"  the plain reference: merges everything, then applies it; JAX makes the gradients
    "whole"   a hand-derived gradient that keeps no merged weights; one merged matrix at a time
    "blocks"  the same, blocks of F at a time, where a whole merged matrix needs too much memory
    "kernel"  the same by Pallas kernels for TPUs, whose merged weights never leave the chip

docs/performance.md says what each costs where. Letters: S segments (B * N), T tokens per segment,
D model, F FFN, E experts.
"""

import jax
from jax import Array

from lory_jax.errors import ConfigError
from lory_jax.model.experts import BIASES, MATRICES, Experts
from lory_jax.model.merged_ffn.blocks import block_products, whole_products
from lory_jax.model.merged_ffn.reference import (
    SAVED_HIDDEN,
    apply_ffn,
    einsum_ffn,
    merge,
    merge_experts,
    swiglu,
)
from lory_jax.model.merged_ffn.vjp import Products, products_ffn

__all__ = [
    "IMPLEMENTATIONS",
    "SAVED_HIDDEN",
    "apply_ffn",
    "merge",
    "merge_experts",
    "merged_ffn",
    "resolve_merged_ffn",
    "swiglu",
]

IMPLEMENTATIONS = ("auto", "einsum", "whole", "blocks", "kernel")

SMALLEST_VMEM, LARGEST_VMEM = 64 * 2**20, 128 * 2**20  # bytes: of a v5p; of a v5e or v6e


def merged_ffn(
    x_SxTxD: Array,
    experts: Experts,
    r_SxE: Array,
    implementation: str = "auto",
    group: int = 0,
) -> Array:
    """Merges the experts with `r_SxE` and applies each segment's FFN to its tokens.

    Args:
      x_SxTxD: hidden states of S segments, in the compute type.
      experts: `{"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}`; perhaps also their biases
        `{"gate_bias": [E, F], "up_bias": [E, F], "down_bias": [E, D]}`, for "einsum" alone.
      r_SxE: routing weights.
      implementation: one of `IMPLEMENTATIONS`; "auto" is for JAX's default backend.
      group: the most segments that "kernel" merges at a time; 0 lets it choose.

    Returns:
      `[S, T, D]` in the type of `x_SxTxD`; differentiable in all three.

    Raises:
      ConfigError: the backend cannot run the implementation with these shapes.
    """
    has_bias = BIASES[0] in experts
    experts = {name: experts[name] for name in (*MATRICES, *(BIASES if has_bias else ()))}
    if implementation == "auto" or has_bias:
        (E, D, _), (_, T, _) = experts["gate"].shape, x_SxTxD.shape
        itemsize, platform = x_SxTxD.dtype.itemsize, jax.default_backend()
        implementation = resolve_merged_ffn(implementation, platform, T, D, E, itemsize, has_bias)
    if implementation == "einsum":
        return einsum_ffn(x_SxTxD, experts, r_SxE)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: got {implementation!r}; must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    return products_ffn(_products(implementation, group), x_SxTxD, experts, r_SxE)


def _products(implementation: str, group: int) -> Products:
    if implementation == "whole":
        return whole_products()
    if implementation == "blocks":
        return block_products()
    # Pallas is imported where it is used: not every installation of JAX has it.
    from lory_jax.model.merged_ffn.kernel_products import kernel_products

    return kernel_products(most=group) if group else kernel_products()


def resolve_merged_ffn(
    choice: str, platform: str, T: int, D: int, E: int, itemsize: int, has_bias: bool = False
) -> str:
    """Resolves `config.model.merged_ffn` on a platform.

    Args:
      choice: one of `IMPLEMENTATIONS`.
      platform: "cpu", "gpu" or "tpu", where the program will run.
      T: tokens per segment.
      D: model width.
      E: experts.
      itemsize: bytes of the compute type.
      has_bias: whether the experts have biases, which the hand-derived gradients leave out.

    Raises:
      ConfigError: the platform cannot run the requested implementation.
    """
    if has_bias:
        if choice not in ("auto", "einsum"):
            raise ConfigError(
                f"config.model.merged_ffn: got {choice}, which has no biases; must be auto or "
                "einsum with config.model.mlp_bias"
            )
        return "einsum"
    if choice == "auto":
        # On any TPU: which one it is, is known when the program is traced.
        if platform == "tpu" and not kernel_obstacle(T, D, E, itemsize, SMALLEST_VMEM):
            return "kernel"
        # On GPUs it moves less than `blocks`, and takes more memory (docs/performance.md).
        return "blocks" if platform == "tpu" else "whole"
    if choice == "kernel":
        obstacle = kernel_obstacle(T, D, E, itemsize, LARGEST_VMEM)
        if platform != "tpu":
            obstacle = f"which requires a tpu, on a {platform}"
        if obstacle:
            raise ConfigError(
                f"config.model.merged_ffn: got kernel, {obstacle}; must be auto, einsum, whole or "
                "blocks there"
            )
    return choice


def kernel_obstacle(T: int, D: int, E: int, itemsize: int, capacity: int) -> str:
    """Why kernels cannot run these shapes with this much on-chip memory; "" if they can."""
    from lory_jax.model.merged_ffn import tiling

    if D % tiling.LANES:
        return f"which requires config.model.embed_dim in multiples of {tiling.LANES}, with {D}"
    # Whatever S and F are, the least that is held at a time is the same.
    problems = [
        tiling.Problem(*call, S=1, T=T, D=D, F=tiling.LANES, E=E, itemsize=itemsize)
        for call in tiling.CALLS
    ]
    if not all(tiling.fits(problem, tiling.vmem_budget(capacity)) for problem in problems):
        return f"which cannot hold segments of {T} x {D} and blocks of {E} experts on the chip"
    return ""
