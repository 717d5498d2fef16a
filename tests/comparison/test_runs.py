"""Which results a comparison accepts; the files are really trained in tests/evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lory_jax.comparison.runs import FinishedRun, _read_result, check_comparable
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig


def run(**evaluation) -> FinishedRun:
    config = ModelConfig(
        vocab_size=32,
        num_layers=1,
        embed_dim=8,
        num_heads=1,
        mlp_dim=8,
        num_experts=0,
        sequence_length=8,
        segment_length=4,
    )
    return FinishedRun(Path("w"), {}, config, [], evaluation, None)


def test_runs_must_be_evaluated_on_the_same_instances():
    first = run(split="test", instances={"a": 3})
    check_comparable({"first": first, "second": replace(first, workdir=Path("v"))})
    for key, value in (("split", "validation"), ("instances", {"a": 4})):
        other = replace(first, evaluation=first.evaluation | {key: value})
        with pytest.raises(InputError, match=f"^second: .*{key}"):
            check_comparable({"first": first, "second": other})


@pytest.mark.parametrize(
    ("text", "words"), [(None, "missing"), ("{", "not JSON"), ('{"step": 3}', "step 3.*step 12")]
)
def test_a_result_that_cannot_be_used_names_the_file_and_the_verb(tmp_path, text, words):
    path = tmp_path / "evaluation.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rf"evaluation\.json: .*{words}.*run evaluate"):
        _read_result(path, "evaluate", 12)
    path.write_text(json.dumps({"step": 12}))
    assert _read_result(path, "evaluate", 12) == {"step": 12}
