"""Training whose merges keep fewer and fewer experts, down to `top_k_experts`."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lory_jax
from lory_jax.config import base_config, set_field, validate
from lory_jax.errors import ConfigError
from lory_jax.model.routing import Routing, keep_about, keep_top_k
from lory_jax.model.transformer import assemble, build
from lory_jax.parallel import make_mesh
from lory_jax.training.state import new_state
from lory_jax.training.step import make_gradients, make_train_step
from lory_jax.training.top_k import top_k_schedule
from tests.support.models import constant_rate, params_of, random_tokens, tiny_config
from tests.support.tiny import verb, write_prepared, write_recipe

R_3xE = np.array(
    [[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]], np.float32
)
CONFIG = tiny_config(top_k_experts=2)
SCHEDULE = {"steps": 10, "top_k_anneal_start": 0.2, "top_k_anneal_end": 0.6}


def keep_by_loop(r_E, kept):
    """One distribution, expert by expert in the order of their weights."""
    found, left = np.zeros(len(r_E)), kept
    for expert in sorted(range(len(r_E)), key=lambda e: (-r_E[e], e)):
        found[expert] = r_E[expert] * min(max(left, 0), 1)
        left -= 1
    return found / found.sum()


@pytest.mark.parametrize("kept", [1.0, 1.6, 2.0, 3.25, 4.0])
def test_the_last_expert_that_is_kept_fades(kept):
    found = keep_about(jnp.asarray(R_3xE), jnp.float32(kept))
    np.testing.assert_allclose(found, [keep_by_loop(row, kept) for row in R_3xE], atol=1e-6)
    if kept.is_integer():
        np.testing.assert_allclose(found, keep_top_k(jnp.asarray(R_3xE), int(kept)), atol=1e-7)


def test_gradients_are_those_of_the_kept_weights_or_go_straight_through():
    r_E, probe_E = R_3xE[0], np.array([0.3, -1.0, 2.0, 0.5], np.float32)

    def loss(r_E, straight):
        return jnp.sum(probe_E * keep_about(r_E, jnp.float32(2.5), straight))

    found = jax.grad(loss)(jnp.asarray(r_E), False)
    step, expected = 1e-3, []
    for e in range(4):
        moved = [np.where(np.arange(4) == e, r_E + s, r_E) for s in (step, -step)]
        up, down = (np.sum(probe_E * keep_by_loop(row.astype(np.float64), 2.5)) for row in moved)
        expected.append((up - down) / (2 * step))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert found[0] == 0  # the smallest is not kept
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(r_E), True), probe_E, atol=1e-6)
    np.testing.assert_allclose(loss(r_E, True), loss(r_E, False), rtol=1e-6)


def test_the_number_falls_from_all_to_k_between_two_shares_of_the_steps():
    kept = top_k_schedule(CONFIG, SCHEDULE)
    found = [float(kept(step)) for step in range(10)]
    np.testing.assert_allclose(found, [4, 4, 4, 3.5, 3, 2.5, 2, 2, 2, 2])
    at_once = SCHEDULE | {"top_k_anneal_start": 0.0, "top_k_anneal_end": 0.0}
    assert float(top_k_schedule(CONFIG, at_once)(1)) == 2
    for other in ({"top_k_experts": 0}, {"top_k_experts": 4}, {"num_experts": 0}):
        assert top_k_schedule(dataclasses.replace(CONFIG, **other), SCHEDULE) is None


def test_a_step_trains_the_number_of_its_time():
    """With all steps done, the loss is that of the model that merges two experts."""
    optimizer, mesh = constant_rate(0.0), make_mesh(1, 1, 1, jax.devices()[:1])
    step = make_train_step(CONFIG, optimizer, mesh, 2, top_k_schedule(CONFIG, SCHEDULE))
    tokens = random_tokens(4, CONFIG.sequence_length + 1)
    losses = {}
    for done in (0, 4, 9):
        # Copies, because the step takes what it is given.
        state = new_state(CONFIG, optimizer, jax.tree.map(jnp.copy, params_of(CONFIG)))
        state["step"] = jnp.int32(done)
        with jax.set_mesh(mesh):
            _, metrics = step(state, tokens)
        losses[float(metrics["experts_kept"])] = float(metrics["loss"])
    for kept, k in ((4.0, 0), (2.0, 2)):
        config = dataclasses.replace(CONFIG, top_k_experts=k)
        (expected, _), _ = jax.jit(make_gradients(config, 1))(params_of(CONFIG), tokens)
        np.testing.assert_allclose(losses[kept], expected, rtol=1e-5)
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("straight", [False, True])
def test_no_logit_depends_on_later_tokens(straight):
    """By perturbation, with the strictly causal first segment; 2.5 experts are kept."""
    config = dataclasses.replace(CONFIG, first_segment_routing="uniform")
    graph, _ = build(config)

    @jax.jit
    def logits(params, tokens):
        routing = Routing("causal", None, jnp.float32(2.5), straight)
        return assemble(graph, params)(tokens, routing)[0][0]

    params, tokens = params_of(config), random_tokens(1, config.sequence_length)
    before = np.asarray(logits(params, tokens))
    for changed in range(config.sequence_length):
        other = tokens.copy()
        other[0, changed] = (other[0, changed] + 1) % config.vocab_size
        differs = (np.asarray(logits(params, other)) != before).any(axis=-1)
        assert not differs[:changed].any() and differs[changed]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.top_k_experts": "9"}, "top_k_experts: got 9; must be at most .* .8."),
        ({"model.top_k_experts": "2", "model.routing": "top1"}, "must be 0 with .*routing=top1"),
        ({"model.top_k_experts": "2", "model.routing": "uniform"}, "must be 0 with"),
        (
            {"model.top_k_experts": "2", "train.top_k_anneal_start": "0.7"},
            "top_k_anneal_start: got 0.7; must be at most",
        ),
    ],
    ids=str,
)
def test_wrong_fields_are_refused(fields, message):
    config = base_config()
    for name, text in fields.items():
        set_field(config, name, text)
    with pytest.raises(ConfigError, match=message):
        validate(config)
    set_field(config, "model.num_experts", "0")  # a dense model ignores them
    validate(config)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with all experts, and one that finishes it with two."""
    root = tmp_path_factory.mktemp("runs")
    data, recipe = write_prepared(root / "data"), write_recipe(root)
    common = [f"--config={recipe}", f"--data={data}"]
    finish = [f"--init_from={root / 'all'}", "--config.model.top_k_experts=2"]
    finish += ["--config.train.dense_warmup_fraction=0", "--config.train.top_k_anneal_end=0.5"]
    finish += ["--config.checkpoint.keep=9"]
    for name, flags in (("all", []), ("two", finish)):
        result = verb("train", *common, f"--workdir={root / name}", *flags)
        assert result.returncode == 0, result.stderr
    return root, [*common, *finish]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_is_taken_down_to_two_experts(runs):
    root, _ = runs
    kept = [line["experts_kept"] for line in metrics(root / "two")]
    assert kept[0] == 4 and kept[6:] == [2] * 6 and kept == sorted(kept, reverse=True)
    model, tokens = lory_jax.load(root / "two"), [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert model.config.top_k_experts == 2
    assert ((model.routing_weights(tokens) > 0).sum(axis=-1) == 2).all()
    before = lory_jax.load(root / "all")
    assert before.config.top_k_experts == 0
    assert (before.routing_weights(tokens) > 0).all()
    greedy = dict(temperature=0.0, max_new_tokens=8)
    texts = [model.generate(["a", "b", "c"], ffn=ffn, **greedy) for ffn in ("merged", "experts")]
    assert texts[0] == texts[1]


def test_killed_while_the_number_falls_and_resumed_equals_never_stopped(runs):
    root, flags = runs
    again = root / "again"
    shutil.copytree(root / "two", again)
    for step in (6, 9, 12):  # as a kill after step 5 leaves it
        shutil.rmtree(again / "checkpoints" / str(step))
    resumed = verb("train", *flags, f"--workdir={again}")
    assert resumed.returncode == 0, resumed.stderr
    assert "step 3" in resumed.stdout
    names = ("step", "loss", "grad_norm", "experts_kept", "router_entropy")
    expected, found = (
        [[line[name] for name in names] for line in metrics(run)] for run in (root / "two", again)
    )
    assert found == expected
