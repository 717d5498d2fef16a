"""Checkpoints whose files were damaged: nothing that differs from what was saved is used."""

import random
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from lory_jax.errors import InputError
from lory_jax.parallel import make_mesh
from lory_jax.run.checkpoints import Checkpoints
from lory_jax.training.state import abstract_state, new_state
from tests.faults.test_recovery import flipped
from tests.support.models import constant_rate, params_of, tiny_config

pytestmark = [
    pytest.mark.faults,
    # Orbax leaves coroutines behind when it gives up.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG, MESH = tiny_config(), make_mesh(1, 1, 1)
OPTIMIZER = constant_rate(0.01)
FLIPS = 200


def state_at(step: int):
    state = new_state(CONFIG, OPTIMIZER, jax.tree.map(jax.numpy.asarray, params_of(CONFIG, step)))
    return {**state, "step": jax.numpy.int32(step)}


@pytest.fixture
def saved(tmp_path):
    """Checkpoints at steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.save(state_at(step), "experts", validation_loss=2.5, watch={"skipped": 0})
    checkpoints.close()
    return tmp_path / "checkpoints"


def target(meta):
    return abstract_state(CONFIG, OPTIMIZER, MESH)


def newest(directory: Path):
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore_newest(target)
    finally:
        checkpoints.close()


def assert_is(restored, step: int) -> None:
    state, meta = restored
    assert meta["step"] == step and meta["phase"] == "experts" and meta["validation_loss"] == 2.5
    for a, b in zip(
        jax.tree.leaves(jax.device_get(state)),
        jax.tree.leaves(jax.device_get(state_at(step))),
        strict=True,
    ):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.stat().st_size and path.is_file())


def test_one_flipped_bit_anywhere(saved, capsys):
    """As many flips in every file: arrays, Orbax's own files, ours. Found, or without effect."""
    seed = random.randrange(10**6)
    rng, counts = random.Random(seed), Counter()
    files = files_of(saved / "2")
    for i in range(FLIPS):
        path = files[i % len(files)]
        offset, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        before = flipped(path, offset, bit)
        restored = newest(saved)
        error = capsys.readouterr().err
        found = restored[1]["step"] == 1
        assert_is(restored, 1 if found else 2)
        assert f"{saved / '2'} is damaged and skipped: " in error or not found, (seed, path, offset)
        is_array = path.parent.name == "d" and path.stat().st_size > 1000
        counts["arrays" if is_array else "other files", "found" if found else "no effect"] += 1
        path.write_bytes(before)
    with capsys.disabled():
        print(f"\nseed {seed}: {dict(counts)}")
    assert counts["arrays", "found"] and counts["other files", "found"]
    assert_is(newest(saved), 2)


@pytest.mark.parametrize("damage", ["missing", "truncated", "emptied"])
def test_files_missing_or_cut(saved, damage, capsys):
    """Every file in turn."""
    used = Counter()
    for path in files_of(saved / "2"):
        before = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(before[: len(before) // 2 if damage == "truncated" else 0])
        restored = newest(saved)
        step = restored[1]["step"]
        assert_is(restored, step)
        assert ("is damaged and skipped" in capsys.readouterr().err) == (step == 1)
        used[step] += 1
        path.write_bytes(before)
    assert used[1] >= 3, used


def test_arrays_of_every_size_are_guarded_by_their_sums(saved, tmp_path, capsys):
    """One element changed, in files that are well-formed for Orbax, is found; leaf by leaf."""
    state, names = state_at(2), []
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    for i, (path, leaf) in enumerate(leaves):
        changed = np.array(leaf)
        flat = changed.reshape(-1).view(f"u{changed.itemsize}")
        flat[flat.size // 2] ^= 1
        values = [changed if j == i else x for j, (_, x) in enumerate(leaves)]
        values = [jax.numpy.asarray(x) for x in values]
        other = tmp_path / "other"
        writer = Checkpoints(other, keep=1)
        writer.save({**jax.tree.unflatten(tree, values), "step": state["step"]}, "experts")
        writer.close()
        if jax.tree_util.keystr(path) == "['step']":
            continue
        # Its arrays with the meta of what should be there.
        shutil.rmtree(other / "2" / "meta")
        shutil.copytree(saved / "2" / "meta", other / "2" / "meta")
        with pytest.raises(InputError, match="none of the checkpoints"):
            newest(other)
        assert f"{jax.tree_util.keystr(path)} differs" in capsys.readouterr().err
        names.append(path)
        shutil.rmtree(other)
    assert len(names) == len(leaves) - 1
