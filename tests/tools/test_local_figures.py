"""tools/local.py: the difference over the seeds of the local run, and how the README states it."""

import numpy as np
import pytest

from lory_jax.evaluation.held_out import encode_instances
from tools.local import instances, over_seeds, seeds_sentence

ORIGINS = {"prose": ["a", "a", "b", "c"], "code": ["x", "y", "y"]}


def write(run, gain, origins=ORIGINS):
    """A finished run: Lory's losses are lower by `gain`, and twice that in code."""
    rng = np.random.default_rng(3)
    losses = {domain: rng.normal(3, 0.5, len(names)) for domain, names in origins.items()}
    for name in ("dense", "lory"):
        less = {"prose": gain, "code": 2 * gain} if name == "lory" else dict.fromkeys(origins, 0)
        (run / name).mkdir(parents=True)
        (run / name / "evaluation_instances.npz").write_bytes(
            encode_instances(
                {d: (x - less[d]).astype(np.float32) for d, x in losses.items()}, origins
            )
        )
    return run


NONE = {domain: np.zeros(len(names), bool) for domain, names in ORIGINS.items()}


def test_the_difference_is_the_mean_of_domains_and_seeds(tmp_path):
    runs = [write(tmp_path / str(gain), gain) for gain in (0.04, 0.06)]
    found = over_seeds(runs, NONE)
    assert found["seeds"] == 2
    np.testing.assert_allclose(found["effect"], -0.075, atol=1e-6)
    low, high = found["interval"]
    assert low < -0.075 < high
    np.testing.assert_allclose(found["by_seed"], [-0.06, -0.09], atol=1e-6)
    assert found == over_seeds(runs, NONE)
    assert found["without_largest"]["domain"] == "code"
    np.testing.assert_allclose(found["without_largest"]["effect"], -0.05, atol=1e-6)
    assert found["without_near_duplicates"] == {n: found[n] for n in ("effect", "interval")}


def test_instances_that_repeat_training_text_are_left_out(tmp_path):
    """Only those of them have a gain."""
    is_near = {**NONE, "prose": np.array([True, False, False, False])}
    runs = [write(tmp_path / str(seed), 0.0) for seed in range(2)]
    for run in runs:
        losses, _ = instances(run / "lory")
        losses["prose"][0] -= 0.4
        file = run / "lory" / "evaluation_instances.npz"
        file.write_bytes(encode_instances(losses, ORIGINS))
    found = over_seeds(runs, is_near)
    np.testing.assert_allclose(found["effect"], -0.05, atol=1e-6)
    np.testing.assert_allclose(found["without_near_duplicates"]["effect"], 0.0, atol=1e-6)


def test_a_folder_in_two_domains_is_drawn_for_both(tmp_path):
    """So its interval is wider than that of as many folders of their own."""
    apart = {"prose": [*"abcdef"], "code": [*"uvwxyz"]}
    shared = {"prose": [*"abcdef"], "code": [*"abcdef"]}
    widths = []
    for name, origins in (("apart", apart), ("shared", shared)):
        runs = [write(tmp_path / name / str(seed), 0.0, origins) for seed in range(3)]
        for run in runs:
            losses, _ = instances(run / "lory")
            for loss_I in losses.values():
                loss_I += np.linspace(-0.3, 0.3, 6, dtype=np.float32)
            file = run / "lory" / "evaluation_instances.npz"
            file.write_bytes(encode_instances(losses, origins))
        none = {domain: np.zeros(6, bool) for domain in origins}
        low, high = over_seeds(runs, none)["interval"]
        widths.append(high - low)
    assert widths[1] > 1.2 * widths[0]


def test_other_documents_are_refused(tmp_path):
    other = {**ORIGINS, "code": ["x", "y", "z"]}
    runs = [write(tmp_path / "first", 0.04), write(tmp_path / "second", 0.04, other)]
    with pytest.raises(SystemExit, match="code: the runs were evaluated on different documents"):
        over_seeds(runs, NONE)


def test_the_sentence_turns_nats_into_percent():
    part = {"effect": -0.02, "interval": [-0.03, 0.02]}
    found = {"seeds": 2, "effect": -0.05, "interval": [-0.09, 0.01], "by_seed": [-0.06, -0.04]}
    found |= {"without_largest": {"domain": "code", **part}, "without_near_duplicates": part}
    text = seeds_sentence(found)
    assert "4.9 % lower" in text and "single seeds give 3.9 to 5.8 %" in text
    assert "from 8.6 % lower to 1.0 % higher, so it includes zero" in text
    assert "Without code, where the gain is largest, it is 2.0 % lower (from 3.0 % lower" in text
    surely = seeds_sentence(found | {"interval": [-0.09, -0.01]})
    assert "from 8.6 % lower to 1.0 % lower: it also" in surely
    assert not seeds_sentence({"seeds": 1, "effect": -0.05, "interval": [np.nan, np.nan]})
