"""Continuations that share a row: each must see what it would see alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.evaluation.harness.scoring import Continuation, make_rows, score_continuations
from tests.support.models import params_of, tiny_config

LIMIT = 12
WORDS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@st.composite
def continuations(draw):
    """Answers to few contexts, so that many share one."""
    contexts = draw(st.lists(WORDS, min_size=1, max_size=3))
    made = []
    for _ in range(draw(st.integers(1, 8))):
        context, answer = draw(st.sampled_from(contexts)), draw(WORDS)
        prompt_length = draw(st.sampled_from([0, len(context)]))
        made.append(Continuation((*context, *answer), prompt_length, len(answer)))
    return made


@settings(max_examples=60, deadline=None)
@given(continuations(), st.booleans())
def test_every_continuation_sees_its_own_tokens_at_their_own_positions(made, share):
    rows = make_rows(made, share, LIMIT)
    members = [i for row in rows for i, _ in row.members]
    assert sorted(members) == list(range(len(made)))
    for row in rows:
        assert len(row.tokens) <= LIMIT and (share or not any(row.branch))
        start = 0
        for k, (i, scored) in enumerate(row.members, start=1):
            tokens, prompt_length, _ = made[i]
            assert (scored, row.prompt_length) == (made[i].scored, prompt_length)
            at, targets = row.at[start : start + scored], row.targets[start : start + scored]
            start += scored
            assert tuple(targets) == tokens[-scored:]
            for index, target_position in zip(
                at, range(len(tokens) - scored, len(tokens)), strict=True
            ):
                seen = [j for j in range(index + 1) if row.branch[j] in (0, k)]
                assert tuple(row.tokens[j] for j in seen) == tokens[:target_position]
                assert [row.positions[j] for j in seen] == list(range(target_position))


@settings(max_examples=20, deadline=None)
@given(continuations())
def test_a_beginning_is_read_once(made):
    beginnings = {(c.tokens[: -c.scored], c.prompt_length) for c in made}
    assert len(make_rows(made, True, limit=1000)) == len(beginnings)


@pytest.mark.parametrize(
    "kind", ["dense", "causal", "top2", "expert_choice_segment", "dropless_top2", "documents"]
)
def test_scores_do_not_depend_on_what_shares_a_row(kind):
    fields, largest = {"num_experts": 4, "routing": kind}, 37
    if kind == "dense":
        fields = {"num_experts": 0}
    elif kind == "documents":  # which begin in the context and in answers
        fields, largest = {"document_mask": True, "bos_id": 5}, 8
    config = tiny_config(**fields, segment_length=4, sequence_length=32)
    params = params_of(config)
    draw = np.random.default_rng(0)
    context = tuple(draw.integers(0, largest, 9).tolist())
    answers = [tuple(draw.integers(0, largest, n).tolist()) for n in (1, 3, 6, 2, 6)]
    made = [Continuation((*context, *answer), len(context), len(answer)) for answer in answers]

    def scores(made, batch_size):
        return score_continuations(
            config,
            params,
            made,
            routing="prompt",
            batch_size=batch_size,
            known_tokens=config.vocab_size,
        )

    together = scores(made, 2)
    alone = [scores([one], 1)[0] for one in made]
    for one, shared in zip(alone, together, strict=True):
        np.testing.assert_allclose(shared.log_likelihood, one.log_likelihood, rtol=1e-5)
        assert shared.is_greedy == one.is_greedy
