"""What the flags of `prepare` reach: sources, keys, rejects, encoders, tokenizers, mixtures."""

import csv
import gzip
import html
import json
import random
from collections import Counter

import numpy as np
import pytest

from lory_jax import prepare
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from lory_jax.preparation.embedding.sentence_encoder import SentenceEncoder
from lory_jax.preparation.sources.records import ReadOptions
from lory_jax.preparation.stages.read import MAX_REJECTED
from tests.preparation.test_encoder import WORDS, write_encoder
from tests.preparation.test_sentencepiece import LLAMA
from tests.support.corpora import SETTINGS, write_records

L = 64
BROKEN = '{"text": 3}\n'
FLAGS = [
    *SETTINGS,
    "--config.data.drop_near_duplicates=false",
    "--config.data.min_document_bytes=1",
    "--workers=1",
]


def make_records(count=300):
    rng = random.Random(0)
    return [
        {
            "text": f"{i} " + " ".join(rng.choices(WORDS, k=40)),
            "domain": f"domain{i % 2}",
            "source": f"source{i % 30}",
        }
        for i in range(count)
    ]


def run(out, *flags):
    prepare.main([f"--out={out}", *FLAGS, *map(str, flags)])
    return PreparedData.open(out)


def training_documents(data):
    """The texts of the training stream, in its order; the last one may be cut."""
    rows = [data.training_instances()[i] for i in range(data.manifest.counts["train"]["instances"])]
    tokens = [int(rows[0][0]), *(int(token) for row in rows for token in row[1:])]
    tokenizer, texts, current = data.tokenizer, [], []
    for token in tokens:
        if token == tokenizer.bos_id:
            current = []
        elif token == tokenizer.eos_id:
            texts.append(tokenizer.decode_bytes(current).decode())
        else:
            current.append(token)
    return texts


def test_what_is_not_given_is_what_reading_does_by_default():
    keys = {name: getattr(ReadOptions, name) for name in ("text_key", "domain_key", "source_key")}
    assert keys | {"max_rejected": MAX_REJECTED} == prepare.READING


def test_several_sources_and_other_keys_hold_what_one_file_holds(tmp_path):
    records = make_records()
    whole = run(tmp_path / "one", f"--source={write_records(tmp_path / 'one.jsonl', records)}")
    renamed = [dict(zip(("body", "kind", "site"), r.values(), strict=True)) for r in records]
    write_records(tmp_path / "in" / "first.jsonl", renamed[:100])
    with gzip.open(tmp_path / "in" / "second.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in renamed[100:200])
    with open(tmp_path / "third.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, ["body", "kind", "site"])
        writer.writeheader()
        writer.writerows(renamed[200:])
    sources = [f"--source={tmp_path / 'in' / '*.jsonl*'}", f"--source={tmp_path / 'third.csv'}"]
    keys = ["--text_key=body", "--domain_key=kind", "--source_key=site"]
    parts = run(tmp_path / "parts", *sources, *keys)
    for split, counts in whole.manifest.counts.items():
        assert parts.manifest.counts[split]["domains"] == counts["domains"], split
    assert sorted(training_documents(parts))[:200] == sorted(training_documents(whole))[:200]
    with pytest.raises(InputError, match="reading"):  # other keys are other settings
        run(tmp_path / "parts", *sources, "--text_key=body")


def test_broken_documents_are_listed_and_stop_the_run_above_a_share(tmp_path):
    source = write_records(tmp_path / "in.jsonl", make_records())
    with source.open("a") as file:
        file.write(BROKEN)
    with pytest.raises(InputError, match=r"^max_rejected: 1 of 301 documents.*in\.jsonl"):
        run(tmp_path / "data", f"--source={source}")
    assert not (tmp_path / "data").exists()
    data = run(tmp_path / "data", f"--source={source}", "--max_rejected=0.01")
    (path,) = (tmp_path / "data" / "rejects").iterdir()
    reject = json.loads(path.read_text())
    assert reject["path"] == str(source) and "int" in reject["reason"]
    assert reject["position"] == f"byte {source.stat().st_size - len(BROKEN)}"
    assert f"rejects/{path.name}" in data.manifest.files
    # The page counts them by reason.
    reason = html.escape(reject["reason"].partition(" (")[0])
    page = (tmp_path / "data" / "report.html").read_text()
    assert f'<td class="">{reason}</td><td class="">1</td>' in page


def test_documents_are_ordered_by_the_encoder_that_was_given(tmp_path):
    source = write_records(tmp_path / "in.jsonl", make_records())
    encoder = write_encoder(tmp_path / "encoder")
    data = run(tmp_path / "data", f"--source={source}", f"--encoder={encoder}")
    texts = training_documents(data)
    vectors = SentenceEncoder.load(encoder).embed(texts)
    mean = float(np.mean(np.sum(vectors[:-1] * vectors[1:], axis=1)))
    found = data.manifest.similarity
    assert found["similar"]["mean_cosine"] == pytest.approx(mean, abs=0.01)
    assert found["similar"]["mean_cosine"] > found["random"]["mean_cosine"] + 1e-3
    other = write_encoder(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(InputError, match="encoder"):
        run(tmp_path / "data", f"--source={source}", f"--encoder={other}")


def test_a_sentencepiece_model_is_a_tokenizer(tmp_path):
    import sentencepiece

    records = make_records()
    source = write_records(tmp_path / "in.jsonl", records)
    (tmp_path / "text").write_text("\n".join(record["text"] for record in records))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "words"),
        vocab_size=295,
        hard_vocab_limit=False,
        minloglevel=2,
        **LLAMA,
    )
    model = tmp_path / "words.model"
    data = run(tmp_path / "data", f"--source={source}", f"--tokenizer={model}")
    original = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for record in records[:20]:
        assert data.tokenizer.encode(record["text"]) == original.encode(record["text"])


@pytest.mark.parametrize("order", ["similar", "random"])
def test_the_domain_of_every_instance_is_written_for_mixtures(tmp_path, order):
    records = make_records()
    source = write_records(tmp_path / "in.jsonl", records)
    data = run(tmp_path / "data", f"--source={source}", f"--order={order}")
    domain_of = {record["text"]: record["domain"] for record in records}
    texts = training_documents(data)
    lengths = [len(data.tokenizer.encode(text)) + 2 for text in texts]
    owners = [domain_of[text] for text, n in zip(texts, lengths, strict=True) for _ in range(n)]
    numbers, names = data.training_domains()
    checked = (len(owners) - 1) // L
    for i in range(checked):
        counts = Counter(owners[1 + i * L : 1 + (i + 1) * L])
        assert names[numbers[i]] == min(counts, key=lambda name: (-counts[name], name)), i
    assert checked >= len(numbers) - 4 and set(numbers) == {0, 1}
