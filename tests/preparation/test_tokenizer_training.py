import pytest

from lory_jax.errors import InputError
from lory_jax.preparation.tokenizer_training import train_tokenizer

TEXTS = [
    "def read(self):\n    return self.file.read()\n" * 3,
    "The quick brown fox jumps over the lazy dog, 1234 times.\r\n\t",
    "naïve café — 日本語のテキスト 🙂\x00\x01",
]


def test_training_twice_gives_the_same_file(tmp_path):
    for name in ("first.json", "again.json"):
        train_tokenizer(TEXTS, 320).save(tmp_path / name)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "first.json").read_bytes()


def test_a_small_corpus_gives_a_small_vocabulary():
    assert train_tokenizer(["ab" * 5], 1000).vocab_size <= 262


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(InputError, match="vocab_size: got 200"):
        train_tokenizer(TEXTS, 200)


def test_every_byte_has_a_token():
    tokenizer = train_tokenizer(TEXTS, 320)
    single = {tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single


def test_documents_begin_and_end_with_the_first_two_ids():
    tokenizer = train_tokenizer(TEXTS, 320)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size == 320


def test_frequent_pairs_are_merged():
    """The most frequent pair of bytes is the first to get a token of its own."""
    tokenizer = train_tokenizer(["ababab" * 4, "ab"], 259)
    assert tokenizer.decode_bytes([258]) == b"ab"
    assert tokenizer.encode("ab") == [258]
