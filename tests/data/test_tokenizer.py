import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers

from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.preparation.tokenizer_training import train_tokenizer

TEXTS = [
    "def read(self):\n    return self.file.read()\n" * 3,
    "The quick brown fox jumps over the lazy dog, 1234 times.\r\n\t",
    "naïve café — 日本語のテキスト 🙂\x00\x01",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


def llama_style() -> Tokenizer:
    """A byte-fallback tokenizer in the form of LLaMA's."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {"▁": 259, "a": 260, "b": 261, "▁a": 262, "é": 263}
    raw = RawTokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(raw.to_str())


@given(st.text())
@settings(deadline=None, max_examples=300)
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@given(st.lists(st.integers(0, 319)))
@settings(deadline=None, max_examples=200)
def test_any_ids_decode_alike_as_bytes_and_as_text(tokenizer, ids):
    ids = [id % tokenizer.vocab_size for id in ids]
    raw = tokenizer.decode_bytes(ids)
    assert tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")
    assert len(raw) == tokenizer.token_bytes[ids].sum()


@pytest.mark.parametrize("text", ["<s>", "a</s>b", "<s></s><s>", "if x<s>y"])
def test_special_tokens_spelled_out_are_ordinary_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text]) == [ids]


def test_special_ids_give_nothing(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("x = 1"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "x = 1" and tokenizer.decode_bytes(ids) == b"x = 1"
    assert tokenizer.decode(np.array(ids, np.uint16)) == "x = 1"
    assert tokenizer.token_bytes[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]


def test_batches_equal_single_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(TEXTS[2] + "<s>") == tokenizer.encode(TEXTS[2] + "<s>")
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (0, 1, tokenizer.vocab_size)


def test_truncation_asked_for_by_a_file_is_turned_off(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    raw = RawTokenizer.from_file(str(tmp_path / "t.json"))
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    assert Tokenizer(raw.to_str()).encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_bytes_of_a_llama_style_tokenizer():
    tokenizer = llama_style()
    ids = tokenizer.encode("a é日 b")
    assert tokenizer.decode(ids) == "a é日 b"
    assert tokenizer.decode_bytes(ids) == " a é日 b".encode()  # its normaliser puts a space first
    assert tokenizer.token_bytes[[0, 1, 2, 3, 259, 262, 263]].tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not a tokenizer JSON"),
        (b"{not json", "not a tokenizer JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1, 2]", "not a tokenizer JSON"),
        (b'{"version": "1.0"}', "not a tokenizer JSON"),
    ],
)
def test_damaged_files_are_refused(tmp_path, contents, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_document_borders_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    contents = json.loads((tmp_path / "t.json").read_text())
    contents["added_tokens"] = contents["added_tokens"][:1]
    with pytest.raises(InputError, match="begin and end a document"):
        Tokenizer(json.dumps(contents))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json"):
        Tokenizer.load(tmp_path / "none.json")
