"""The model card of an exported model: what it is, how it was routed, how to use it."""

import textwrap
from dataclasses import dataclass

import numpy as np

from lory_jax.model.config import ModelConfig

LONGEST_QUOTE = 400  # characters of a prompt that the card shows

USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
inputs = tokenizer("PROMPT", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
"""


@dataclass(frozen=True)
class MergedBy:
    """What decided the merge: a phrase, the text it quotes if any, and the weights `[Y, E]`."""

    what: str
    text: str | None
    weights_YxE: np.ndarray


def model_card(model_config: ModelConfig, step: int, dtype: str, merged_by: MergedBy | None) -> str:
    """The README.md of a directory.

    Args:
      model_config: the config of the trained model, before its experts were merged.
      step: the training step.
      dtype: the type of the stored tensors.
      merged_by: how the experts were merged; None for a dense model.
    """
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{'lory, ' if merged_by else ''}llama]",
        "---",
        "",
        f"# A language model in LLaMA's format, made with lory_jax at training step {step:,}",
        "",
        f"{model_config.num_layers} layers, width {model_config.embed_dim}, "
        f"{model_config.num_heads} attention heads with {model_config.kv_heads} key-value heads, "
        f"FFN width {model_config.mlp_dim}, vocabulary {model_config.vocab_size:,}, trained on "
        f"sequences of up to {model_config.sequence_length:,} tokens. Tensors are stored as "
        f"{dtype}.",
        "",
        *_routing(model_config, merged_by),
        "## Use",
        "",
        "```python",
        *USE.splitlines(),
        "```",
        "",
        "Every text begins with the token BOS, which this tokenizer adds by itself.",
    ]
    return "\n".join(lines) + "\n"


def _routing(model_config: ModelConfig, merged_by: MergedBy | None) -> list[str]:
    if merged_by is None:
        return ["A dense model: it has no routing.", ""]
    E = model_config.num_experts
    lines = [
        "## Routing",
        "",
        f"The model was trained as a Lory model (arXiv 2405.03133) with {E} expert FFNs per layer"
        f"{_where(model_config)}. Here {_which(model_config)} merged, once and for all, into one "
        f"FFN per layer, by {merged_by.what}. For other kinds of text, another merge of the same "
        "model may work better.",
        "",
    ]
    if merged_by.text is not None:
        quote = merged_by.text[:LONGEST_QUOTE]
        cut = len(merged_by.text) - len(quote)
        lines += [
            *textwrap.indent(quote, "    ", lambda line: True).splitlines(),
            "",
            *([f"(and {cut:,} more characters)", ""] if cut else []),
        ]
    lines += [
        f"Weight of each expert in the merge (1/{E} = {1 / E:.3f} each would be uniform):",
        "",
        "| layer | " + " | ".join(f"expert {e}" for e in range(E)) + " |",
        "|---" * (E + 1) + "|",
        *(
            f"| {layer} | " + " | ".join(f"{weight:.3f}" for weight in row) + " |"
            for layer, row in zip(model_config.layer_numbers, merged_by.weights_YxE, strict=True)
        ),
        "",
    ]
    return lines


def _where(model_config: ModelConfig) -> str:
    return " that is listed" if model_config.dense_layer_numbers else ""


def _which(model_config: ModelConfig) -> str:
    k = model_config.top_k_experts
    return f"the {k} with the largest weights in each layer are" if k else "they are"
