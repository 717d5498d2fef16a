"""A trained model under segments of another length, chosen at inference."""

import json

import numpy as np
import pytest

import lory_jax
from lory_jax import evaluate, generate
from lory_jax.errors import ConfigError, InputError
from lory_jax.run.directory import RunDirectory
from tests.conversion.test_convert import write_run
from tests.support import reference
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


def test_the_runs_own_evaluation_is_not_replaced(run):
    with pytest.raises(ConfigError, match="--segment_length: requires --out"):
        evaluate.main([f"--workdir={run}", "--segment_length=4"])
