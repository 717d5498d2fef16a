"""The loop in this process: the order of what it does, and that nothing in it waits unnoticed."""

import time

import jax
import pytest

from lory_jax.config import load_config
from lory_jax.run.directory import RunDirectory
from lory_jax.training import loop
from lory_jax.training.monitoring.goodput import Goodput
from lory_jax.training.restore import restore_or_initialize
from lory_jax.training.setup import setup
from tests.support.tiny import write_prepared, write_recipe


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loop")
    write_recipe(directory)
    write_prepared(directory / "data")
    return directory


@pytest.fixture
def trainer(site, tmp_path, monkeypatch):
    """Before its first step: 7 steps, of which the first 2 are dense; saves after 3, 6 and 7."""
    monkeypatch.setattr(loop, "StopRequest", lambda: type("NoSignal", (), {"signal": 0}))
    overrides = {"train.steps": 7, "train.validate_every_steps": 4, "checkpoint.keep": 9}
    config = load_config(
        f"{site / 'tiny.py'}:experts=4", [(name, str(value)) for name, value in overrides.items()]
    )
    directory = RunDirectory(tmp_path / "run")
    run = setup(config, site / "data", directory, Goodput(since=time.monotonic()))
    return loop.Trainer(run, restore_or_initialize(run))


def recorded(events, name, function):
    def record(*arguments, **fields):
        events.append(name)
        return function(*arguments, **fields)

    return record


def test_the_order_of_dispatch_reading_and_saving(trainer, monkeypatch):
    """Metrics are read one step late, except before a validation or a save; a save comes after the
    step's line of metrics and before the next batch is drawn."""
    events: list[str] = []
    log, checkpoints = trainer.log, trainer.run.checkpoints
    saw = log.watch.saw
    monkeypatch.setattr(log.watch, "saw", recorded(events, "read", saw))
    monkeypatch.setattr(checkpoints, "save", recorded(events, "save", checkpoints.save))
    losses = recorded(events, "validate", loop.validation_losses)
    monkeypatch.setattr(loop, "validation_losses", losses)
    monkeypatch.setattr(loop, "place_batch", recorded(events, "draw", loop.place_batch))
    loop.finish(trainer, trainer.train())
    late, at_once = ["draw", "read"], ["draw"]
    expected = [
        *at_once,  # step 1: nothing to read yet
        *late,  # step 2, and the metrics of step 1
        *late,  # step 3, and the metrics of step 2
        *["read", "save"],
        *at_once,  # step 4
        *["validate", "read"],
        *at_once,  # step 5
        *late,  # step 6, and the metrics of step 5
        *["read", "save"],
        *at_once,  # step 7, the last
        *["validate", "read", "save"],
    ]
    assert events == expected
    assert checkpoints.directory.is_dir() and trainer.position.step == 7
    assert {path.name for path in checkpoints.directory.iterdir()} == {"3", "6", "7"}
    assert trainer.position.phase.model_config.num_experts == 4


def test_a_hidden_transfer_in_the_loop_raises(trainer):
    train_step = trainer._train_step

    def hidden() -> None:
        train_step()
        trainer.position.state["step"] + 1  # the 1 travels to the device unasked

    trainer._train_step = hidden
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        trainer.train()
    trainer.run.checkpoints.close()
    trainer.log.close()
