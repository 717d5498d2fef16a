"""A trained model under segments of another length, chosen at inference."""

import dataclasses
import json

import numpy as np
import pytest

import lory_jax
from lory_jax import evaluate, generate
from lory_jax.api import Model
from lory_jax.errors import ConfigError, InputError
from lory_jax.evaluation.held_out import read_instances
from lory_jax.run.directory import RunDirectory
from tests.support import reference
from tests.support.in_process import write_run
from tests.support.models import float64
from tests.support.tiny import write_prepared


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("length")
    return write_run(directory / "lory", write_prepared(directory / "data"))


def test_evaluation_equals_loops_with_segments_of_that_length(run, tmp_path):
    T, out = 4, tmp_path / "found.json"
    evaluate.main([f"--workdir={run}", f"--out={out}", f"--segment_length={T}", "--batch_size=4"])
    found = json.loads(out.read_text())
    assert found["segment_length"] == T
    model = lory_jax.load(run).with_segment_length(T)
    sets = RunDirectory(run).open_data(None).held_out_with_instances("test")
    for domain, rows in sets.items():
        logits, _ = reference.transformer(float64(model.params), rows[:, :-1], model.config)
        nll = reference.token_losses(logits, rows[:, 1:])[:, T:]
        np.testing.assert_allclose(found["perplexity"][domain], np.exp(nll.mean()), rtol=1e-4)
    trained = lory_jax.load(run).logits(rows[:, :-1])
    assert np.abs(trained - model.logits(rows[:, :-1])).max() > 1e-3


@pytest.mark.parametrize("T", [4, 8])
def test_models_of_several_lengths_are_scored_on_the_same_positions(run, T, tmp_path):
    out, first = tmp_path / "found.json", 13
    flags = [f"--workdir={run}", f"--out={out}", f"--segment_length={T}", "--batch_size=4"]
    evaluate.main([*flags, f"--first_position={first}"])
    found = json.loads(out.read_text())
    assert (found["segment_length"], found["first_position"]) == (T, first)
    model = lory_jax.load(run).with_segment_length(T)
    losses, _ = read_instances(tmp_path / "found_instances.npz")
    for domain, rows in RunDirectory(run).open_data(None).held_out_with_instances("test").items():
        logits, _ = reference.transformer(float64(model.params), rows[:, :-1], model.config)
        nll = reference.token_losses(logits, rows[:, 1:])[:, first:]
        np.testing.assert_allclose(found["perplexity"][domain], np.exp(nll.mean()), rtol=1e-4)
        np.testing.assert_allclose(losses[domain], nll.mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize("first", [7, 24])
def test_positions_within_the_first_segment_or_beyond_the_end_are_refused(run, first, tmp_path):
    flags = [f"--workdir={run}", f"--out={tmp_path / 'found.json'}", f"--first_position={first}"]
    with pytest.raises(InputError, match=rf"first_position: got {first}, must be at least 8.*24"):
        evaluate.main(flags)
    assert not (tmp_path / "found.json").exists()


def test_generation_takes_the_length(run, capsys):
    arguments = [f"--workdir={run}", "--prompt=a", "--max_new_tokens=12", "--temperature=0"]
    texts = []
    for more in ([], ["--segment_length=8"], ["--segment_length=2"]):
        generate.main([*arguments, "--routing=segment", *more])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]  # the run was trained with 8


@pytest.mark.parametrize("T", [0, 24, 99])
def test_lengths_that_leave_one_segment_are_refused(run, T):
    with pytest.raises(InputError, match=rf"segment_length: got {T}, must be 1 to 23"):
        lory_jax.load(run).with_segment_length(T)


def test_a_model_routed_by_attention_needs_two_tokens_in_a_segment(run):
    model = lory_jax.load(run)
    config = dataclasses.replace(model.config, routing_source="attention")
    attending = Model(config, model.params, model.tokenizer, model.step)
    with pytest.raises(InputError, match="segment_length: got 1, must be 2 to 23"):
        attending.with_segment_length(1)
    assert attending.with_segment_length(2).config.segment_length == 2


def test_the_runs_own_evaluation_is_not_replaced(run):
    for flag in ("segment_length", "first_position"):
        with pytest.raises(ConfigError, match=f"--{flag}: requires --out"):
            evaluate.main([f"--workdir={run}", f"--{flag}=9"])
