"""A run on two prepared directories, with a mixture, from training to evaluation."""

import json

from tests.support.tiny import assert_one_line_error, verb, write_prepared, write_recipe


def test_a_mixture_of_two_directories_is_trained_resumed_and_evaluated(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    parts = [write_prepared(tmp_path / name, 32, seed, True) for seed, name in enumerate("ab")]
    data = ",".join(map(str, parts))
    flags = [f"--config={recipe}", f"--data={data}", f"--workdir={run}"]
    mixture = "--config.data.mixture=ones=3,threes=1"

    result = verb("train", *flags, mixture)
    assert result.returncode == 0, result.stderr
    # 12 steps of 4 instances; 16 instances of each domain in each directory.
    assert "ones: 75.00% of the instances, 1.12 epochs of 32" in result.stdout
    assert "threes: 25.00% of the instances, 0.38 epochs of 32" in result.stdout
    assert "finished" in verb("train", *flags, mixture).stdout

    changed = verb("train", *flags, "--config.data.mixture=ones=1,threes=1")
    assert_one_line_error(changed, 1, "data.mixture")
    other = verb("train", f"--config={recipe}", f"--data={parts[0]}", f"--workdir={run}", mixture)
    assert_one_line_error(other, 1, "data")
    wrong = verb("train", *flags, "--config.data.mixture=ones")
    assert_one_line_error(wrong, 2, "config.data.mixture")

    result = verb("evaluate", f"--workdir={run}", f"--out={tmp_path / 'out.json'}")
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "out.json").read_text())
    assert set(table["perplexity"]) == {"ones", "threes"}
    result = verb("doctor", f"--workdir={run}")
    assert result.returncode == 0, result.stdout + result.stderr
