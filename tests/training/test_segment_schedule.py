"""Segment lengths that change over training: when they do, and what a step then computes."""

import time

import jax
import numpy as np
import pytest

from lory_jax.config import load_config
from lory_jax.errors import ConfigError
from lory_jax.model.flops import flops_per_token, trained_flops_per_token
from lory_jax.parallel import place_batch
from lory_jax.run.directory import RunDirectory
from lory_jax.segment_schedule import SegmentSchedule, is_schedule, shares_of_lengths
from lory_jax.training import loop
from lory_jax.training.monitoring.goodput import Goodput
from lory_jax.training.restore import restore_or_initialize
from lory_jax.training.setup import setup
from lory_jax.training.step import make_train_step
from tests.support.models import tiny_config
from tests.support.tiny import write_prepared, write_recipe


def test_the_length_of_every_step_is_that_of_the_shares():
    schedule = SegmentSchedule.of("128:0.25,64:0.5", last=32, steps=20)
    assert [schedule.at(step) for step in range(20)] == [128] * 5 + [64] * 5 + [32] * 10
    assert [step for step in range(20) if schedule.changes_at(step)] == [5, 10]
    assert schedule.lengths == {128, 64, 32}
    constant = SegmentSchedule.of("", last=32, steps=20)
    assert constant.lengths == {32} and not any(map(constant.changes_at, range(20)))


def test_flops_are_the_mean_over_the_steps():
    config = tiny_config(segment_length=2)
    by_length = {T: flops_per_token(tiny_config(segment_length=T)) for T in (2, 4, 8)}
    schedule = SegmentSchedule.of("8:0.25,4:0.5", last=2, steps=8)
    mean = np.mean([by_length[schedule.at(step)] for step in range(8)])
    assert trained_flops_per_token(config, "8:0.25,4:0.5") == pytest.approx(mean)
    assert trained_flops_per_token(config, "") == by_length[2] > by_length[8]
    assert shares_of_lengths("8:0.25,2:0.5", 2) == {8: 0.25, 2: 0.75}


@pytest.mark.parametrize(
    "text", ["64", "64:0", "64:1", "64:0.5,32:0.5", "64:0.5,32:0.2", "0:0.5", "x:0.5", "64:nan"]
)
def test_other_forms_are_refused(text):
    assert not is_schedule(text)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("schedule")
    write_recipe(directory)
    write_prepared(directory / "data")
    return directory


def config_of(site, **overrides):
    return load_config(f"{site / 'tiny.py'}:experts=4", list(overrides.items()))


@pytest.mark.parametrize(
    ("schedule", "routing", "message"),
    [
        ("24:0.5", "causal", r"segment_schedule: got 24; must be less than .* \(24\)"),
        ("12:0.5", "uniform", "segment_schedule: .* must be empty with .*routing=uniform"),
        ("12:2", "causal", "segment_schedule: got '12:2'; must be length:share"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(site, schedule, routing, message):
    with pytest.raises(ConfigError, match=message):
        config_of(site, **{"train.segment_schedule": schedule, "model.routing": routing})


def test_segments_of_one_token_cannot_attend_to_each_other(site):
    fields = {"train.segment_schedule": "1:0.5", "model.routing_source": "attention"}
    with pytest.raises(ConfigError, match="segment_schedule: got 1; must be at least 2"):
        config_of(site, **fields)
    assert config_of(site, **{**fields, "model.routing_source": "average"})


def test_every_step_of_a_run_is_a_step_with_the_length_of_its_time(site, tmp_path, monkeypatch):
    """Seven steps: two dense ones, two with segments of 12 tokens, three with segments of 8."""
    monkeypatch.setattr(loop, "StopRequest", lambda: type("NoSignal", (), {"signal": 0}))
    fields = {"train.steps": "7", "train.segment_schedule": "12:0.6"}
    config = config_of(site, **fields)
    run = setup(config, site / "data", RunDirectory(tmp_path / "W"), Goodput(time.monotonic()))
    trainer = loop.Trainer(run, restore_or_initialize(run))
    loop.finish(trainer, trainer.train())
    logged = {line["step"]: line["loss"] for line in RunDirectory(tmp_path / "W").read_metrics()}

    position = restore_or_initialize(setup_again(config, site, tmp_path))
    state, phase = position.state, position.phase
    batches, losses, mesh = run.batches.iterate(0), {}, run.mesh
    by_length = {}
    with jax.set_mesh(mesh):
        for step in range(7):
            batch = place_batch(next(batches), mesh)
            if step == run.phases.dense_steps == 2:
                phase = run.phases.after(phase)
                state = phase.upcycle(state)
            T = 12 if step < 4 else 8
            if (T, phase.name) not in by_length:
                model = phase.model_config.__class__(
                    **{**vars(phase.model_config), "segment_length": T}
                )
                by_length[T, phase.name] = make_train_step(model, run.optimizer, mesh)
            state, metrics = by_length[T, phase.name](state, batch)
            losses[step + 1] = float(metrics["loss"])
    assert losses == logged
    other = {step: phase.train_steps[12] is phase.train_step(step) for step in range(7)}
    assert other == {step: step < 4 for step in range(7)}


def setup_again(config, site, tmp_path):
    return setup(config, site / "data", RunDirectory(tmp_path / "V"), Goodput(time.monotonic()))
