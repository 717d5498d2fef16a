"""Trains a byte-level BPE tokenizer on documents."""

import re
import sys
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lory_jax.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from lory_jax.errors import InputError

# A longer run of letters, digits, white space or other characters is cut before merges are learnt
# from it: the trainer's time grows with the square of the length of such a word.
LONGEST_WORD = 1000
LONG_WORD = re.compile(
    "|".join(f"{kind}{{{LONGEST_WORD + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"\s", r"[^\w\s]"))
    + f"|_{{{LONGEST_WORD + 1},}}"
)


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
    tokenizer.train_from_iterator(_with_bounded_words(texts), trainer)
    return Tokenizer(tokenizer.to_str(pretty=True))


def _with_bounded_words(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts inside words longer than `LONGEST_WORD`; other texts come through as they are."""
    for text in texts:
        start = 0
        for match in LONG_WORD.finditer(text):
            for cut in range(match.start() + LONGEST_WORD, match.end(), LONGEST_WORD):
                yield text[start:cut]
                start = cut
        yield text[start:] if start else text
