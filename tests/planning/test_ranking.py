"""The search for the fastest settings, on real compiles of a tiny recipe and on plans by hand."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from lory_jax.config import base_config, find_field
from lory_jax.errors import ConfigError
from lory_jax.plan import parse_prices
from lory_jax.planning import ranking, topology
from lory_jax.planning.ranking import Candidate, Choice
from lory_jax.planning.topology import parse_topology
from tests.planning.test_plan import TINY

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason=f"needs {topology.PIP}"
)
FIRST = Choice((("model.remat", "full"), ("train.microbatches", 2)), (2, 4, 1))


def candidate(rate, share, choice=FIRST):
    memory = {"total": int(share * 1000), "limit": 1000, "fits": share <= 1}
    estimate = {"tokens_per_second_per_device_upper_bound": rate, "mfu_upper_bound": 0.5}
    estimate["step_seconds_lower_bound"] = 1.0
    return Candidate(choice, {"bytes_per_device": memory, "estimate": estimate})


def test_the_fastest_that_fits_with_a_margin_is_the_best():
    fast, slow = candidate(200.0, 0.95), candidate(100.0, 0.5)
    faster, tight = candidate(150.0, 0.94), candidate(300.0, 1.2)
    assert not fast.fits and not tight.fits and faster.fits
    assert max((fast, slow, faster, tight), key=lambda c: c.rank) is faster
    # Of those that do not fit, the smallest.
    assert max((fast, tight), key=lambda c: c.rank) is fast


def test_neighbours_of_a_choice():
    config = base_config()
    config.train.global_batch_size = 24
    remats = [dict(c.fields)["model.remat"] for c in ranking._remats(config, FIRST)]
    assert remats == list(find_field("model.remat").choices)
    assert [c.mesh for c in ranking._meshes(config, FIRST)] == [(4, 2, 1), (1, 8, 1)]
    counts = [dict(c.fields)["train.microbatches"] for c in ranking._microbatches(config, FIRST)]
    assert counts == [4, 1, 8]
    assert not list(ranking._groups(config, FIRST))  # nothing is merged by a kernel
    kernel = Choice((("model.merged_ffn", "kernel"), ("model.merged_ffn_group", 0)), FIRST.mesh)
    (smaller,) = ranking._groups(config, kernel)
    assert smaller.apply(base_config()).model.merged_ffn_group == 16


def test_the_flags_are_those_of_the_choice():
    assert FIRST.flags == [
        "--config.model.remat=full",
        "--config.train.microbatches=2",
        "--config.parallel.data=2",
        "--config.parallel.fsdp=4",
        "--config.parallel.tensor=1",
    ]
    config = FIRST.apply(base_config())
    assert config.model.remat == "full" and config.train.microbatches == 2


def test_a_price_per_million_tokens():
    assert ranking.price_per_million(3.6, 1000.0) == pytest.approx(1.0)
    assert parse_prices("v5e=1.20,h100=2") == {"v5e": 1.2, "h100": 2.0}
    for text in ("v5e", "v9=1", "v5e=x"):
        with pytest.raises(ConfigError, match="--price"):
            parse_prices(text)
    # JAX sees two devices per chip of a tpu7x, and one per chip of all others.
    chips = {name: parse_topology(name).devices_per_chip for name in ("v5p-8", "v5e-4", "tpu7x-8")}
    assert chips == {"v5p-8": 1, "v5e-4": 1, "tpu7x-8": 2}
    table = ranking.table([candidate(1000.0, 0.5)], parse_topology("tpu7x-8"), 3.6)
    assert "2,000" in table and "0.5000" in table and table.endswith(" ".join(FIRST.flags))


@needs_libtpu
@pytest.mark.slow
def test_a_search_resumes_and_ends_with_the_best(tmp_path):
    """Without Pallas kernels, so that a program compiles in seconds."""

    def run(minutes):
        flags = ["--rank", "--json", "--topology=v5e-1", f"--budget={minutes}"]
        command = [sys.executable, "-m", "lory_jax.plan", *flags, *TINY]
        command += ["--config.model.num_experts=0", "--config.model.attention=xla"]
        environment = os.environ | {"LORY_PLAN_CACHE": str(tmp_path)}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=1500
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["ranking"], done.stderr.splitlines()

    first, lines = run(1e-6)
    assert len(first) == 1 and lines[-1].startswith("1 of at most 12 programs")
    kept = list((tmp_path / "steps").iterdir())
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    found, lines = run(20)
    assert kept[0].stat().st_mtime_ns == written  # read, not compiled again
    assert 4 <= len(found) <= 12
    assert any("left out" in line and "cudnn" in line for line in lines)
    fitting = [c["tokens_per_second_per_chip"] for c in found if c["fits_with_margin"]]
    assert (
        fitting == sorted(fitting, reverse=True)
        and fitting[0] >= first[0]["tokens_per_second_per_chip"]
    )
    assert len({tuple(c["flags"]) for c in found}) == len(found)
