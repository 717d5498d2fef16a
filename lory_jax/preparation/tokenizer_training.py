"""Trains a byte-level BPE tokenizer on documents."""

import sys
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lory_jax.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from lory_jax.errors import InputError


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE: every text has an encoding, which decodes to the text.

    Args:
      texts: what to learn the merges from.
      vocab_size: tokens wanted, including the 256 bytes, `<s>` (id 0) and `</s>` (id 1); a small
        corpus may give fewer.

    Raises:
      InputError: `vocab_size` is too small for the bytes, BOS and EOS.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocab_size: got {vocab_size}, must be at least {SMALLEST_VOCABULARY} "
            "(256 bytes, BOS and EOS)"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str(pretty=True))
