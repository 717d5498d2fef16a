"""Sets of text from outside the prepared data, such as the paper's five (section 4.1).

Letters: N samples, L sequence.
"""

from pathlib import Path

import numpy as np

from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.preparation.packing import cut_instances, tokenize
from lory_jax.preparation.sources.corpus import read_documents


def read_sets(
    directory: Path, tokenizer: Tokenizer, sequence_length: int, samples: int
) -> dict[str, np.ndarray]:
    """Returns samples of L tokens of every set, int32 `[N, L + 1]`, sets sorted by name.

    A set is `<name>.jsonl` or the UTF-8 files below `<name>/` in the directory. Its documents, each
    BOS + tokens + EOS, are laid end to end and cut. If that gives more samples than wanted, evenly
    spaced ones are kept.

    Raises:
      InputError: the directory does not exist, has no set, or a set fills no sample.
    """
    if not directory.is_dir():
        raise InputError(f"perplexity_sets: got {directory}, must be an existing directory")
    texts: dict[str, list[str]] = {}
    for document in read_documents([str(directory)]):
        texts.setdefault(document.domain, []).append(document.text)
    if not texts:
        raise InputError(f"{directory}: no text; must hold NAME.jsonl, or text files in NAME/")
    sets = {}
    for name in sorted(texts):
        stream_T = tokenize(texts[name], tokenizer, f"tokenizing {name}").tokens_T
        rows_NxL1 = cut_instances(stream_T, sequence_length)
        found = len(rows_NxL1)
        if not found:
            raise InputError(
                f"{directory}: set {name} has {len(stream_T):,} tokens, requires at least "
                f"{sequence_length + 1:,} (one sample)"
            )
        if found > samples:
            rows_NxL1 = rows_NxL1[np.arange(samples) * found // samples]
        sets[name] = rows_NxL1.astype(np.int32)
    return sets
