"""tools/local.py: the difference over the seeds of the local run, and how the README states it."""

import numpy as np
import pytest

from lory_jax.evaluation.held_out import encode_instances
from tools.local import over_seeds, seeds_sentence

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


def test_the_difference_is_the_mean_of_domains_and_seeds(tmp_path):
    runs = [write(tmp_path / str(gain), gain) for gain in (0.04, 0.06)]
    found = over_seeds(runs)
    assert found["seeds"] == 2
    np.testing.assert_allclose(found["effect"], -0.075, atol=1e-6)
    low, high = found["interval"]
    assert low < -0.075 < high
    np.testing.assert_allclose(found["by_seed"], [-0.06, -0.09], atol=1e-6)
    assert found == over_seeds(runs)


def test_other_documents_are_refused(tmp_path):
    other = {**ORIGINS, "code": ["x", "y", "z"]}
    runs = [write(tmp_path / "first", 0.04), write(tmp_path / "second", 0.04, other)]
    with pytest.raises(SystemExit, match="code: the runs were evaluated on different documents"):
        over_seeds(runs)


def test_the_sentence_turns_nats_into_percent():
    found = {"seeds": 2, "effect": -0.05, "interval": [-0.09, 0.01], "by_seed": [-0.06, -0.04]}
    text = seeds_sentence(found)
    assert "4.9 % lower" in text and "single seeds give 3.9 to 5.8 %" in text
    assert "from 8.6 % lower to 1.0 % higher, so it includes zero" in text
    surely = seeds_sentence(found | {"interval": [-0.09, -0.01]})
    assert "from 8.6 % lower to 1.0 % lower: it also" in surely
    assert not seeds_sentence({"seeds": 1, "effect": -0.05, "interval": [np.nan, np.nan]})
