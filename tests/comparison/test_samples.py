import numpy as np

from lory_jax.comparison.samples import document_beginning


def test_documents_give_the_prompts_of_samples():
    rows = np.array([[9, 9, 1, 4, 2, 1, 5, 6, 7], [1, 3, 3, 3, 3, 3, 2, 1, 8]])
    assert document_beginning(rows, 1, 2, 3) == [5, 6, 7]
    assert document_beginning(rows, 1, 2, 4) == [3, 3, 3, 3]
    assert document_beginning(rows, 1, 2, 7) == [3, 3, 3, 3, 3]
    assert document_beginning(rows, 99, 2, 3) == [9, 9, 1]
