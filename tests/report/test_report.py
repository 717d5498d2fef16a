import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lory_jax.report import html as pages
from lory_jax.report import plots
from lory_jax.report.comparison import comparison_page, percent

HOSTILE = "$x_ </pre><script>alert('x')</script>&amp;\"onload=\" \u202e\x00 ünï €"
DOMAINS = ["python code", "C/C++ headers", "a $b^ <script>"]


def metrics(steps=40, seed=0):
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": step * 4096, "loss": 7 * step**-0.2 + 0.1 * rng.normal()}
        if step % 10 == 0:
            line["validation_loss"] = 7 * step**-0.2
        lines.append(line)
    return lines


def analysis(layers=4, experts=8):
    rng = np.random.default_rng(0)
    weights = {d: rng.dirichlet(np.ones(experts), layers).tolist() for d in DOMAINS}
    distances = [
        {
            "layer": y,
            "between": 0.1 * y,
            "domains": DOMAINS[:2],
            "shuffled": 0.01,
            "shuffled_high": 0.02,
        }
        for y in range(layers)
    ]
    active = {"step": [1, 2, 3], "experts_active": [3, 20, 30], "pairs": layers * experts}
    return {"routing_weights": weights, "routing_distance": distances, "utilisation": active}


def report(names=("dense", "lory")):
    def measure(scale):
        return {n: {d: scale + i + j for j, d in enumerate(DOMAINS)} for i, n in enumerate(names)}

    means = {n: 20.0 - i for i, n in enumerate(names)}
    model = {"num_layers": 4, "routing": "causal"}
    description = {
        "parameters": {"total": 9_000_000, "active": 1_000_000},
        "steps": 40,
        "tokens": 40 * 4096,
        "global_batch_size": 8,
        "learning_rate": 2e-3,
        "seed": 0,
        "model": model,
        "flops_per_token": 2e6,
        "experts_active": 12,
        "expert_pairs": 32,
        "dropped_tokens": 0.125,
    }
    against = {
        "active_parameters": 0.5,
        "flops_per_token": 0.25,
        "training_seconds": 0.5,
        "tokens_to_first_loss": None,
    }
    return {
        "perplexity": measure(10.0),
        "perplexity_all_positions": measure(12.0),
        "bits_per_byte": measure(1.0),
        "geometric_mean": {
            key: means for key in ("perplexity", "perplexity_all_positions", "bits_per_byte")
        },
        "tasks": {"piqa": {n: 0.5 + 0.1 * i for i, n in enumerate(names)}},
        "tokens_to_first_loss": {n: None if i else 2e6 for i, n in enumerate(names)},
        "against_first": {n: against for n in names[1:]},
        "models": {name: description for name in names},
        "seconds": {n: {"training": 60.0 + 30 * i, "evaluation": 3.0} for i, n in enumerate(names)},
        "test": {"split": "test", "instances": dict.fromkeys(DOMAINS, 7)},
        "samples": {
            "run": names[-1],
            "settings": {"max_new_tokens": 8},
            "texts": {d: {"prompt": HOSTILE, "continuation": HOSTILE[::-1]} for d in DOMAINS},
        },
        "versions": {"jax": "1.2.3"},
    }


class Checker(HTMLParser):
    """Collects tags, attributes and text; checks that tags nest."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def checked():
    text = comparison_page(
        report(), {"dense": metrics(), "lory": metrics(seed=1)}, {"lory": analysis()}
    )
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    return text, checker


def test_the_page_is_self_contained(checked):
    text, checker = checked
    assert not {"script", "link", "iframe", "a"} & checker.tags
    for name, value in checker.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith("data:image/svg+xml;base64,")
    assert "url(" not in text and "@import" not in text


def test_document_text_is_escaped(checked):
    text, checker = checked
    assert "<script" not in text
    assert HOSTILE.replace("\x00", "\ufffd") in "".join(checker.text)
    assert "\x00" not in text


def test_the_page_opens_with_the_table(checked):
    text, _ = checked
    assert text.index("<table>") < text.index("<img")
    first = re.sub(r"<[^>]*>", "|", text[text.index("<table>") : text.index("</table>")])
    for cell in (
        "python code",
        "10.00",
        "11.00",
        "+10.0 %",
        "geometric mean",
        "−5.0 %",
        "1 min 30 s",
    ):
        assert f"|{cell}|" in first
    assert (
        "5.0 % lower than that of dense (geometric mean over 3 domains; lower in 0 of them)" in text
    )
    assert "Its training took 1.50 times as long" in text


def test_costs_and_tasks_stand_beside_their_differences(checked):
    text, _ = checked
    cells = re.sub(r"<[^>]*>", "|", text)
    for row in (
        ["active parameters", "1.00 M", "1.00 M", "+50.0 %"],
        ["FLOPs per token", "2.0 M", "2.0 M", "+25.0 %"],
        ["tokens to the final loss of dense", "2.00 M", "never", "–"],
        ["experts in use at the end", "12 of 32", "12 of 32"],
        ["dropped in training", "12.5 %", "12.5 %"],
        ["piqa", "50.0", "60.0", "+10.0"],
    ):
        assert "||".join(row) in cells


@pytest.mark.parametrize("names", [("only",), ("a", "b", "c")])
def test_any_number_of_runs(names):
    text = comparison_page(report(names), {name: metrics(seed=3) for name in names}, {})
    for name in names:
        assert f"<th>{name}</th>" in text


def test_percent():
    assert [percent(x) for x in (0.1234, -0.05, 0.0, -0.0001)] == [
        "+12.3 %",
        "−5.0 %",
        "0.0 %",
        "0.0 %",
    ]


FIGURES = {
    "loss": lambda: plots.loss_curves({"dense": metrics(), "lory": metrics(seed=1)}),
    "loss of one step": lambda: plots.loss_curves({"a": metrics(1)}),
    "perplexity": lambda: plots.perplexity_change(report(("a", "b", "c"))["perplexity"]),
    "weights": lambda: plots.routing_heat_map(analysis()["routing_weights"]),
    "weights, 24 layers": lambda: plots.routing_heat_map(analysis(24, 32)["routing_weights"]),
    "weights, 1 layer": lambda: plots.routing_heat_map(analysis(1, 1)["routing_weights"]),
    "distance": lambda: plots.distance_by_layer(analysis()["routing_distance"]),
    "positions": lambda: plots.loss_by_position(
        {"self": np.linspace(6, 3, 16), "uniform": np.linspace(6, 3, 16) + 0.1}, 4
    ),
    "utilisation": lambda: plots.utilisation(analysis()["utilisation"]),
    "no utilisation": lambda: plots.utilisation({"step": [], "experts_active": [], "pairs": 8}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_pictures_are_the_same_bytes_every_time(name):
    svg = plots.to_svg(FIGURES[name]())
    assert svg.startswith(b"<?xml") and b"<script" not in svg
    assert svg == plots.to_svg(FIGURES[name]())


def test_png(tmp_path):
    path = tmp_path / "x.png"
    plots.write_png(FIGURES["distance"](), path)
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]


def test_the_smoothed_loss_is_a_mean_over_the_past():
    values = np.random.default_rng(0).normal(size=230)
    window = 5  # 2 % of 230
    expected = [values[max(0, i - window + 1) : i + 1].mean() for i in range(230)]
    np.testing.assert_allclose(plots._smoothed(values), expected, atol=1e-12)


def test_table_cells_are_escaped():
    assert "<b>" not in pages.table(["<b>"], [["<b>"]], groups=[("<b>", 1)])
