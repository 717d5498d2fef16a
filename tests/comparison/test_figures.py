from lory_jax.comparison.figures import headline, task_figures, tokens_to_reach


def test_tokens_to_reach_a_loss():
    lines = [{"tokens": 10 * i} | ({"validation_loss": 5.0 - i} if i % 2 else {}) for i in range(6)]
    assert tokens_to_reach(lines, 4.0) == 10  # at the first validation
    assert tokens_to_reach(lines, 2.5) == 25  # a line falls from 4.0 at 10 to 2.0 at 30
    assert tokens_to_reach(lines, 0.0) == 50
    assert tokens_to_reach(lines, -0.1) is None
    assert tokens_to_reach(lines, None) is None


def test_figures_of_tasks_that_all_runs_have():
    def one(x):
        return {"metric": "acc,none", "acc,none": x}

    mine = {"t": one(0.5), "u": one(0.1), "v": {"metric": None}}
    found = task_figures({"a": mine, "b": {"t": one(0.7), "v": {"metric": None}}})
    assert found == {"t": {"a": 0.5, "b": 0.7}}


def test_the_headline_sets_every_run_beside_the_first():
    report = {
        "perplexity": {"a": {"x": 4.0, "long name": 9.0}, "b": {"x": 5.0, "long name": 9.0}},
        "geometric_mean": {"perplexity": {"a": 6.0, "b": 3.0}},
        "seconds": {"a": {"training": 10.4}, "b": {"training": 20.8}},
    }
    title, names, *rows = headline(report).splitlines()
    assert "change from a" in title and names.split() == ["a", "b", "b"]
    assert [row.split("  ")[0] for row in rows[:2]] == ["x", "long name"]
    assert rows[0].split() == ["x", "4.000", "5.000", "+25.0", "%"]
    assert rows[1].split()[-2:] == ["0.0", "%"]
    assert rows[2].split() == ["geometric", "mean", "6.000", "3.000", "−50.0", "%"]
    assert rows[3].split() == ["training,", "seconds", "10", "21", "+100.0", "%"]
    assert len({len(row) for row in rows}) == 1  # aligned at the right
