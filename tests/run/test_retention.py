"""Which checkpoints are kept."""

import math
import random

from lory_jax.run.retention import Retention, best_first


def test_the_newest_always_stays_and_the_rest_as_asked():
    """Against a loop, over random histories in which checkpoints come and go one by one."""
    rng = random.Random(0)
    for _ in range(200):
        rule = Retention(rng.randint(1, 3), rng.randint(0, 2), rng.choice([0, 4]))
        stored, ever = {}, []
        for step in sorted(rng.sample(range(1, 40), 15)):
            stored[step] = rng.choice([None, math.nan, rng.random()])
            ever.append((step, stored[step]))
            kept = rule.kept(stored)
            stored = {s: loss for s, loss in stored.items() if s in kept}
            assert step in stored
            newest = [s for s, _ in ever][-rule.newest :]
            real = sorted((x, s) for s, x in ever if x is not None and x == x)
            best = [s for _, s in real[: rule.best]]
            periodic = [s for s, _ in ever if rule.every_steps and s % rule.every_steps == 0]
            assert set(stored) == set(newest) | set(best) | set(periodic)


def test_the_best_come_first_and_those_without_a_loss_not_at_all():
    losses = {3: 2.0, 6: None, 9: math.nan, 12: 1.0, 15: math.inf, 18: 1.0}
    assert best_first(losses) == [12, 18, 3]
