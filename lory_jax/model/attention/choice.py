"""Which implementation of attention runs, by platform, type and shape."""

from dataclasses import dataclass

from lory_jax.errors import ConfigError

LANES = 128  # of a TPU's registers
PAIRED_WIDTH = LANES // 2
# Whole rows of a pair of heads, 14 times 512 bytes per position, must fit on a v5p's chip.
PAIRED_LENGTH = 4096


@dataclass(frozen=True)
class AttentionShape:
    """What decides whether two heads can share the lanes of a TPU.

    Attributes:
      heads: heads of queries H.
      kv_heads: heads of keys and values G.
      head_width: K.
      length: L, `config.model.sequence_length`.
      sharding: `config.model.attention_sharding`.
    """

    heads: int
    kv_heads: int
    head_width: int
    length: int
    sharding: str = "batch"


def resolve_attention(
    choice: str,
    platform: str,
    dtype: str,
    shape: AttentionShape,
    document_mask: bool = False,
) -> str:
    """Resolves `config.model.attention` on a platform.

    Args:
      choice: "auto", "xla", "cudnn", "splash" or "paired".
      platform: "cpu", "gpu" or "tpu", where the program will run.
      dtype: `config.model.compute_dtype`.
      shape: the sizes of attention.
      document_mask: `config.model.document_mask`, which cuDNN's attention and the paired heads'
        cannot compute.

    Raises:
      ConfigError: the platform, the type or the shape cannot run this choice.
    """
    if choice == "auto":
        if platform == "tpu":
            return "splash" if paired_obstacle(shape, document_mask) else "paired"
        has_cudnn = platform == "gpu" and dtype == "bfloat16" and not document_mask
        return "cudnn" if has_cudnn else "xla"
    needed = {"xla": platform, "cudnn": "gpu", "splash": "tpu", "paired": "tpu"}[choice]
    if platform != needed:
        raise ConfigError(
            f"config.model.attention: got {choice}, which requires a {needed}, on a {platform}; "
            "must be auto or xla there"
        )
    if choice == "cudnn" and dtype != "bfloat16":
        raise ConfigError(
            "config.model.attention: got cudnn, which requires "
            f"config.model.compute_dtype=bfloat16, not {dtype}"
        )
    if choice == "cudnn" and document_mask:
        raise ConfigError(
            "config.model.attention: got cudnn, which cannot compute "
            "config.model.document_mask=True; must be xla with it on a GPU"
        )
    if choice == "paired" and (obstacle := paired_obstacle(shape, document_mask)):
        raise ConfigError(
            f"config.model.attention: got paired, which requires {obstacle}; must be auto or "
            "splash there"
        )
    return choice


def paired_obstacle(shape: AttentionShape, document_mask: bool) -> str:
    """What paired heads require that is not so, and what is; "" if they can run."""
    if shape.head_width != PAIRED_WIDTH:
        return f"heads of width {PAIRED_WIDTH}, not {shape.head_width} (config.model.head_dim)"
    if shape.kv_heads != shape.heads:
        return (
            f"as many heads of keys ({shape.kv_heads}) as of queries ({shape.heads}; "
            "config.model.num_kv_heads)"
        )
    if shape.heads % 2:
        return f"an even config.model.num_heads, not {shape.heads}"
    if shape.sharding != "batch":
        return f"config.model.attention_sharding=batch, not {shape.sharding}"
    if shape.length % LANES or shape.length > PAIRED_LENGTH:
        return (
            f"config.model.sequence_length in multiples of {LANES} up to {PAIRED_LENGTH}, not "
            f"{shape.length}"
        )
    if document_mask:
        return "config.model.document_mask=False, not True"
    return ""
