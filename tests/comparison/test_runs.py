"""Which results a comparison accepts; the files are really trained in tests/evaluation."""

import json
from dataclasses import replace

import pytest

from lory_jax.comparison.runs import FinishedRun, _check_step, _read_result, check_comparable
from lory_jax.errors import InputError
from lory_jax.run.directory import RunDirectory
from tests.support.models import tiny_config


def run(**evaluation) -> FinishedRun:
    return FinishedRun(RunDirectory("run"), {}, tiny_config(num_experts=0), [], evaluation, None)


def test_runs_must_be_evaluated_on_the_same_instances():
    first = run(split="test", instances={"a": 3})
    check_comparable({"first": first, "second": replace(first, directory=RunDirectory("other"))})
    for key, value in (("split", "validation"), ("instances", {"a": 4})):
        other = replace(first, evaluation=first.evaluation | {key: value})
        with pytest.raises(InputError, match=f"^second: .*{key}"):
            check_comparable({"first": first, "second": other})


@pytest.mark.parametrize(("text", "words"), [(None, "missing"), ("{", "not JSON")])
def test_a_result_that_cannot_be_read_names_the_file_and_the_verb(tmp_path, text, words):
    path = tmp_path / "evaluation.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rf"evaluation\.json: .*{words}.*evaluate"):
        _read_result(path, "evaluate", [])
    path.write_text(json.dumps({"step": 12}))
    assert _read_result(path, "evaluate", ["step"]) == {"step": 12}
    with pytest.raises(InputError, match=r"has no perplexity; run evaluate again"):
        _read_result(path, "evaluate", ["step", "perplexity"])


def test_a_result_of_another_step_is_refused(tmp_path):
    path = tmp_path / "evaluation.json"
    _check_step(path, "evaluate", {"step": 12}, 12, "trained")
    with pytest.raises(InputError, match=r"evaluation\.json: .*step 3.*step 12.*evaluate"):
        _check_step(path, "evaluate", {"step": 3}, 12, "trained")
