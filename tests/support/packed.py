"""Documents of random tokens, for tests of how they are packed and counted."""

import numpy as np
from hypothesis import strategies as st

from lory_jax.preparation.packing import TokenizedDocuments

DOCUMENTS = st.lists(st.lists(st.integers(2, 99), max_size=12), max_size=20)


def as_tokenized(documents: list[list[int]]) -> TokenizedDocuments:
    """Puts BOS 0 and EOS 1 around every document."""
    tokens = [token for document in documents for token in [0, *document, 1]]
    starts = np.cumsum([0] + [len(document) + 2 for document in documents])
    return TokenizedDocuments(np.array(tokens, np.uint16), starts.astype(np.int64))
