"""Which checkpoint is restored: newest, best or that of a step, among intact and damaged ones."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from lory_jax.errors import ConfigError, InputError
from lory_jax.run.checkpoints import Checkpoints
from lory_jax.run.retention import Retention
from lory_jax.run.step_choice import parse_step

# Validation losses by step: 30 is the lowest, 10 the next; 40 saw no validation.
LOSSES = {10: 2.0, 20: 3.0, 30: 1.0, 40: None, 50: math.nan}


def state_at(step: int):
    return {"step": jax.numpy.int32(step), "params": {"w": jax.numpy.full(5, step / 7)}}


def target(meta):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), state_at(0)
    )


@pytest.fixture
def directory(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=len(LOSSES))
    for step, loss in LOSSES.items():
        facts = {} if loss is None else {"validation_loss": loss}
        checkpoints.save(state_at(step), "experts", **facts)
    checkpoints.close()
    return tmp_path / "checkpoints"


def restored_step(directory, choice) -> int:
    """The step restored for a choice, whose parameters must be those that were saved."""
    checkpoints = Checkpoints(directory)
    try:
        state, meta = checkpoints.restore_chosen(choice, target)
    finally:
        checkpoints.close()
    np.testing.assert_array_equal(state["params"]["w"], state_at(meta["step"])["params"]["w"])
    return meta["step"]


def damage_state(directory, step: int) -> None:
    """Puts the arrays of another step in place of those of this one; Orbax notices nothing."""
    state = directory / str(step) / "state"
    shutil.rmtree(state)
    shutil.copytree(directory / "40" / "state", state)


def damage_meta(directory, step: int) -> None:
    """Changes the validation loss, which leaves the JSON well-formed."""
    path = directory / str(step) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"validation_loss": meta["validation_loss"] / 2}))


def test_each_choice_restores_its_checkpoint(directory):
    assert restored_step(directory, "newest") == 50
    assert restored_step(directory, "best") == 30
    for step in LOSSES:
        assert restored_step(directory, step) == step


@pytest.mark.parametrize("damage", [damage_state, damage_meta])
def test_a_damaged_best_is_named_and_the_next_best_restored(directory, damage, capsys):
    damage(directory, 30)
    assert restored_step(directory, "best") == 10
    assert str(directory / "30") in capsys.readouterr().err
    # A loss that was made lower by damage does not count.
    damage_meta(directory, 20)
    assert restored_step(directory, "best") == 10
    assert str(directory / "20") in capsys.readouterr().err


def test_a_damaged_newest_is_named_and_the_one_before_restored(directory, capsys):
    damage_state(directory, 50)
    assert restored_step(directory, "newest") == 40
    assert str(directory / "50") in capsys.readouterr().err


def test_a_damaged_step_is_refused_and_never_replaced(directory):
    damage_state(directory, 20)
    with pytest.raises(InputError, match=str(directory / "20")):
        restored_step(directory, 20)


def test_a_step_that_is_not_there_is_answered_with_those_that_are(directory):
    with pytest.raises(InputError, match=r"^step: got 31.*10, 20, 30, 40, 50") as error:
        restored_step(directory, 31)
    assert "\n" not in str(error.value)


def test_best_requires_an_intact_checkpoint_with_a_validation_loss(directory):
    for step in (10, 20, 30):
        damage_state(directory, step)
    with pytest.raises(InputError, match="validation loss"):
        restored_step(directory, "best")
    assert restored_step(directory, "newest") == 50


def test_without_any_validation_loss_there_is_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2):
        checkpoints.save(state_at(step), "experts")
    checkpoints.close()
    with pytest.raises(InputError, match=r"^step: got best.*validation loss.*1, 2"):
        restored_step(tmp_path / "c", "best")


def test_an_empty_directory_holds_no_checkpoint(tmp_path):
    (tmp_path / "c").mkdir()
    for choice in ("newest", "best", 3):
        with pytest.raises(InputError, match="no checkpoint"):
            restored_step(tmp_path / "c", choice)


def test_what_is_kept_as_best_across_processes_is_what_best_restores(tmp_path):
    """A second process must know the losses that the first one saved."""
    for steps in ((10, 20, 30), (40, 60, 70)):
        checkpoints = Checkpoints(tmp_path / "c", Retention(newest=1, best=1))
        for step in steps:
            checkpoints.save(state_at(step), "experts", validation_loss=LOSSES.get(step) or 5.0)
        checkpoints.close()
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"30", "70"}
    assert restored_step(tmp_path / "c", "best") == 30


@pytest.mark.parametrize("choice", ["newest", "best", 0, 27])
def test_choices_and_their_text(choice):
    assert parse_step(choice) == parse_step(str(choice)) == choice


@pytest.mark.parametrize("choice", ["oldest", "", "-1", "1.5", "²", -1, 1.5, True, None])
def test_other_choices_are_refused(choice):
    with pytest.raises(ConfigError, match=r"^step: "):
        parse_step(choice)


def lead_out(path, elsewhere):
    """Moves a file or directory elsewhere and puts a link in its place."""
    elsewhere.mkdir(exist_ok=True)
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


@pytest.mark.parametrize("name", ["state", "meta", "meta/metadata", "."])
def test_a_link_that_leads_out_of_a_checkpoint_is_damage(directory, tmp_path, name, capsys):
    """As an unpacked archive may hold one; what it names is not read."""
    lead_out(directory / "50" / name, tmp_path / "elsewhere")
    assert restored_step(directory, "newest") == 40
    assert "50 is damaged" in capsys.readouterr().err
    with pytest.raises(InputError, match="leads out"):
        restored_step(directory, 50)
    assert Checkpoints(directory).read_meta(50) is None


def test_the_directory_of_checkpoints_may_be_a_link_itself(directory, tmp_path):
    lead_out(directory, tmp_path / "large disk")
    assert restored_step(directory, "newest") == 50


@pytest.mark.parametrize(
    "change",
    [
        *({"phase": "other"}, {"phase": None}, {"sums": None}, {"sums": {"a": "b"}}),
        *({"validation_loss": "low"}, {"watch": {"skipped": None}}, {"goodput": [1]}),
    ],
    ids=str,
)
def test_a_forged_meta_is_damage(directory, change):
    """Well-formed and with no digest, as the first checkpoints were, but of other types."""
    path = directory / "50" / "meta" / "metadata"
    meta = json.loads(path.read_text()) | change
    del meta["digest"]
    path.write_text(json.dumps(meta))
    assert restored_step(directory, "newest") == 40
    assert restored_step(directory, "best") == 30
    assert Checkpoints(directory).read_meta(50) is None
