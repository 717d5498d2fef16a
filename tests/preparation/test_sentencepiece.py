"""SentencePiece models as tokenizers: the same ids as the package sentencepiece gives."""

import ast
import json
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.errors import InputError
from lory_jax.preparation.sentencepiece import PROBES, load_sentencepiece

# As LLaMA 2's was trained.
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}
KINDS = {
    "llama": LLAMA,
    "default_bpe": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "unigram_bytes": {"model_type": "unigram", "byte_fallback": True},
    "no_prefix": LLAMA | {"add_dummy_prefix": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    import sentencepiece

    directory = tmp_path_factory.mktemp("sentencepiece")
    sources = [Path(module.__file__) for module in (json.decoder, json.encoder, ast)]
    corpus = "".join(path.read_text("utf-8") for path in sources)
    (directory / "corpus.txt").write_text(corpus, "utf-8")

    def train(kind: str, **changes):
        prefix = directory / "-".join([kind, *changes])
        if not prefix.with_suffix(".model").exists():
            sentencepiece.SentencePieceTrainer.train(
                input=str(directory / "corpus.txt"),
                model_prefix=str(prefix),
                vocab_size=500,
                minloglevel=2,
                **KINDS[kind] | changes,
            )
        model = prefix.with_suffix(".model")
        return model, sentencepiece.SentencePieceProcessor(model_file=str(model))

    return train


PIECES = ["  ", " ", "\n", "▁", "self", "return", "1", "99", "é", "漢", "🦊", "<s>", "<0x0A>", "\t"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text("aeinrst_().", max_size=6), max_size=14)


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_ids_are_those_of_sentencepiece(trained, kind, pieces):
    model, original = trained(kind)
    text = "".join(pieces)
    assert converted(model).encode(text) == original.encode(text)


@cache
def converted(model):
    return load_sentencepiece(model)


def test_a_llama_model_loses_nothing(trained):
    model, original = trained("llama")
    tokenizer = load_sentencepiece(model)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (original.bos_id(), original.eos_id())
    assert tokenizer.vocab_size == original.get_piece_size()
    for text in PROBES:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
        assert original.encode(text) == tokenizer.encode(text)


def test_the_probes_see_the_known_mistake(trained, monkeypatch):
    """Without the space before a text that begins with one, the model is refused."""
    from tokenizers import normalizers

    from lory_jax.preparation import sentencepiece

    monkeypatch.setattr(
        sentencepiece, "_normalizers", lambda rules: [normalizers.Replace(" ", "▁")]
    )
    with pytest.raises(InputError, match="cannot be converted"):
        load_sentencepiece(trained("llama")[0])


def test_what_is_no_model_is_named(trained, tmp_path, monkeypatch):
    (tmp_path / "x.model").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"x\.model: not a SentencePiece model"):
        load_sentencepiece(tmp_path / "x.model")
    with pytest.raises(InputError, match=r"y\.model: cannot read"):
        load_sentencepiece(tmp_path / "y.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match="pip install sentencepiece"):
        load_sentencepiece(trained)
