"""Exported models as transformers serves them: pipelines, batches with padding, bfloat16."""

import numpy as np
import pytest
import torch
import transformers

from lory_jax.conversion.hf_directory import write_llama_directory
from tests.verbs.test_api import TEXT, make_model

PROMPTS = [TEXT[:4], TEXT[:30], TEXT[12:17]]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model():
    return make_model(0, sequence_length=96)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "hf"
    write_llama_directory(path, model.config, model.params, model.tokenizer, "a card")
    return path


def load(directory, **options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    found = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    return tokenizer, found.eval()


def greedy_ids(model, prompt):
    """Our own greedy tokens, by full forward passes of the sequence so far."""
    ids = model.encode(prompt)
    for _ in range(NEW_TOKENS):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(
            int(model.logits(padded)[0, len(ids) - 1, : model.tokenizer.vocab_size].argmax())
        )
        if ids[-1] == model.tokenizer.eos_id:
            break
    return ids[len(model.encode(prompt)) :]


def test_a_padded_batch_draws_our_greedy_tokens(model, directory):
    tokenizer, theirs = load(directory)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert batch["attention_mask"].min() == 0  # the shorter prompts are padded
    with torch.inference_mode():
        found = theirs.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
    for row, prompt in zip(found, PROMPTS, strict=True):
        expected = greedy_ids(model, prompt)
        start = batch["input_ids"].shape[1]
        assert row[start : start + len(expected)].tolist() == expected


def test_the_pipeline_writes_our_texts(model, directory):
    tokenizer, theirs = load(directory)
    generate = transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer)
    found = generate(
        PROMPTS,
        batch_size=2,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_full_text=False,
    )
    texts = [answers[0]["generated_text"] for answers in found]
    expected = model.generate(PROMPTS, temperature=0.0, max_new_tokens=NEW_TOKENS)
    assert texts == [text.replace("\ufffd", "�") for text in expected]


def test_in_bfloat16_logits_differ_by_its_precision(model, directory):
    tokenizer, theirs = load(directory, dtype=torch.bfloat16)
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == model.encode(PROMPTS[1])
    with torch.inference_mode():
        found = theirs(ids).logits.float().numpy()
    expected = model.logits(ids.numpy())
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 3e-2
