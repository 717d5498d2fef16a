"""The page of `compare`: tables of the results and costs, pictures, samples, settings and times."""

from collections.abc import Mapping, Sequence
from typing import Any

from lory_jax.console import duration
from lory_jax.report import html, plots

Report = Mapping[str, Any]


def comparison_page(
    report: Report,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    analyses: Mapping[str, Mapping[str, Any]],
) -> str:
    """The HTML of a report.

    Args:
      report: what `compare` writes as JSON.
      metrics: the lines of metrics.jsonl, by run.
      analyses: the contents of analysis.json, by run; only of runs with experts.
    """
    first, *others = report["perplexity"]
    pieces = _opening(report)
    if others:
        pieces.append(
            html.figure(
                plots.to_svg(plots.perplexity_change(report["perplexity"])),
                f"Test perplexity of each domain over positions ≥ T, compared with that of "
                f"{first}.",
            )
        )
    pieces += [
        html.heading("Loss"),
        html.figure(
            plots.to_svg(plots.loss_curves(metrics)),
            "Loss during training. Thin lines: on training batches, averaged over 2 % of the run. "
            "Lines with markers: on validation documents, positions ≥ T.",
        ),
    ]
    pieces += _costs(report)
    pieces += _tasks(report)
    for name, analysis in analyses.items():
        pieces += _specialisation(name, analysis)
    pieces += _samples(report["samples"])
    pieces += _settings(report)
    title = f"{', '.join(others)} against {first}" if others else first
    return html.page(f"Report: {title}", pieces)


def percent(ratio: float) -> str:
    """A signed percentage with one decimal, such as "−12.3 %"."""
    text = f"{100 * ratio:+.1f} %"
    return text.replace("-", "−") if float(text[:-2]) else "0.0 %"


def _opening(report: Report) -> list[str]:
    perplexity, bits = report["perplexity"], report["bits_per_byte"]
    first, *others = perplexity
    means, seconds = report["geometric_mean"], report["seconds"]
    lead = []
    for name in others:
        ratio = means["perplexity"][name] / means["perplexity"][first] - 1
        domains = perplexity[first]
        lower = sum(perplexity[name][domain] < perplexity[first][domain] for domain in domains)
        time = seconds[name]["training"] / seconds[first]["training"]
        lead.append(
            f"The test perplexity of {name} is {abs(100 * ratio):.1f} % "
            f"{'lower' if ratio < 0 else 'higher'} than that of {first} (geometric mean over "
            f"{len(domains)} domains; lower in {lower} of them). Its training took {time:.2f} "
            "times as long."
        )

    changes = ["change"] if len(others) == 1 else [f"change, {name}" for name in others]
    header = ["domain", *perplexity, *changes, *perplexity]
    groups = [("", 1), ("perplexity", len(perplexity) + len(others))]
    groups.append(("bits per byte", len(perplexity)))

    def row(label: str, figures: Mapping[str, float], byte_figures: Mapping[str, float]) -> list:
        return [
            label,
            *(f"{figures[name]:.2f}" for name in perplexity),
            *(percent(figures[name] / figures[first] - 1) for name in others),
            *(f"{byte_figures[name]:.3f}" for name in perplexity),
        ]

    rows = [
        row(
            domain,
            {n: perplexity[n][domain] for n in perplexity},
            {n: bits[n][domain] for n in bits},
        )
        for domain in perplexity[first]
    ]
    rows.append(row("geometric mean", means["perplexity"], means["bits_per_byte"]))
    times = {name: seconds[name]["training"] for name in perplexity}
    rows.append(
        [
            "training time",
            *(duration(times[name]) for name in perplexity),
            *(percent(times[name] / times[first] - 1) for name in others),
            *("" for _ in perplexity),
        ]
    )
    everywhere = means["perplexity_all_positions"]
    listed = ", ".join(f"{name} {value:.2f}" for name, value in everywhere.items())
    judged = range(1 + len(perplexity), 1 + len(perplexity) + len(others))
    return [
        *(html.paragraph(text, "lead") for text in lead),
        html.table(header, rows, groups=groups, strong_rows=[len(rows) - 2], judged_columns=judged),
        html.paragraph(
            "These figures are for positions ≥ T of held-out test documents. Over all positions, "
            f"routed as in training, the geometric means of perplexity are: {listed}.",
            "note",
        ),
    ]


def _costs(report: Report) -> list[str]:
    """What each run cost, and how soon it reached the loss of the first."""
    models, seconds, against = report["models"], report["seconds"], report["against_first"]
    first, *others = models

    def change(key: str) -> list[str]:
        found = [against[name][key] for name in others]
        return ["–" if value is None else percent(value) for value in found]

    def line(label: str, figures: Sequence[str], key: str | None = None) -> list[str]:
        return [label, *figures, *(change(key) if key else [""] * len(others))]

    def use(model: Mapping[str, Any]) -> str:
        if model["experts_active"] is None:
            return "–"
        return f"{model['experts_active']} of {model['expert_pairs']}"

    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    reached = report["tokens_to_first_loss"].values()
    rows = [
        line(
            "active parameters",
            [f"{m['parameters']['active'] / 1e6:.2f} M" for m in models.values()],
            "active_parameters",
        ),
        line(
            "FLOPs per token",
            [f"{m['flops_per_token'] / 1e6:,.1f} M" for m in models.values()],
            "flops_per_token",
        ),
        line(
            "training time", [duration(seconds[n]["training"]) for n in models], "training_seconds"
        ),
        line(
            f"tokens to the final loss of {first}",
            ["never" if tokens is None else f"{tokens / 1e6:.2f} M" for tokens in reached],
            "tokens_to_first_loss",
        ),
        line("experts in use at the end", [use(m) for m in models.values()]),
        line("dropped in training", [share(m["dropped_tokens"]) for m in models.values()]),
    ]
    changes = ["change"] if len(others) == 1 else [f"change, {name}" for name in others]
    judged = range(1 + len(models), 1 + len(models) + len(others))
    return [
        html.heading("Costs"),
        html.table(["", *models, *changes], rows, judged_columns=judged),
        html.paragraph(
            "FLOPs are those of training, forward and backward. Tokens to the final validation "
            "loss are interpolated linearly between two validations. Experts in use: pairs of "
            "layer and expert that had a routing weight above 2/E at least once in the last 10 "
            "steps. Dropped: the share of tokens or segments that no expert processed, averaged "
            "over the training.",
            "note",
        ),
    ]


def _tasks(report: Report) -> list[str]:
    """The main metric of every task, if any was evaluated."""
    first, *others = report["models"]
    if not report["tasks"]:
        return []
    rows = [
        [
            task,
            *(f"{100 * figure:.1f}" for figure in figures.values()),
            *(f"{100 * (figures[name] - figures[first]):+.1f}" for name in others),
        ]
        for task, figures in report["tasks"].items()
    ]
    changes = ["difference"] if len(others) == 1 else [f"difference, {name}" for name in others]
    return [
        html.heading("Tasks"),
        html.table(["percent", first, *others, *changes], rows),
    ]


def _specialisation(name: str, analysis: Mapping[str, Any]) -> list[str]:
    widest = max(analysis["routing_distance"], key=lambda row: row["between"])
    return [
        html.heading(f"What the experts of {name} do"),
        html.paragraph(
            f"In layer {widest['layer']} the mean routing weights of "
            f"{' and '.join(widest['domains'])} differ most. Their total-variation distance is "
            f"{widest['between']:.3f}. If the labels of folders are shuffled, it is "
            f"{widest['shuffled']:.3f} on average, and above {widest['shuffled_high']:.3f} in 5 % "
            "of cases."
        ),
        html.figure(
            plots.to_svg(plots.routing_heat_map(analysis["routing_weights"])),
            "Mean routing weight of every expert by domain and layer, over the segments of the "
            "test set that are routed by the segment before them.",
        ),
        html.figure(
            plots.to_svg(plots.distance_by_layer(analysis["routing_distance"])),
            "How far routing differs between domains: the largest total-variation distance between "
            "the mean weights of two domains, and what it is if the labels of their folders are "
            "shuffled.",
        ),
        html.figure(
            plots.to_svg(plots.utilisation(analysis["utilisation"])),
            "Experts in use: pairs of layer and expert that had a routing weight above 2/E at "
            "least once in the last 10 steps.",
        ),
    ]


def _samples(samples: Mapping[str, Any]) -> list[str]:
    listed = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in samples["settings"].items()
    )
    return [
        html.heading(f"Samples from {samples['run']}"),
        html.paragraph(
            "Each sample is the beginning of a test document and the model's continuation "
            f"(marked). Experts are merged once, by the prompt. Settings: {listed}.",
            "note",
        ),
        *(
            html.sample_box(domain, text["prompt"], text["continuation"])
            for domain, text in samples["texts"].items()
        ),
    ]


def _settings(report: Report) -> list[str]:
    models, seconds = report["models"], report["seconds"]
    names = list(models)

    def line(label: str, value: Any) -> list[str]:
        return [label, *(value(models[name]) for name in names)]

    fields = dict.fromkeys(field for name in names for field in models[name]["model"])
    rows = [
        line("parameters", lambda m: f"{m['parameters']['total']:,}"),
        line("active per token", lambda m: f"{m['parameters']['active']:,}"),
        line("steps", lambda m: f"{m['steps']:,}"),
        line("training tokens", lambda m: f"{m['tokens']:,}"),
        line("instances per step", lambda m: f"{m['global_batch_size']:,}"),
        line("peak learning rate", lambda m: f"{m['learning_rate']:g}"),
        line("seed", lambda m: str(m["seed"])),
        *(
            line(f"model.{field}", lambda m, field=field: str(m["model"].get(field, "")))
            for field in fields
        ),
    ]
    times = [
        [f"{name}: {part}", duration(value)]
        for name, parts in seconds.items()
        for part, value in parts.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    counts = ", ".join(f"{d} {n:,}" for d, n in report["test"]["instances"].items())
    return [
        html.heading("Settings"),
        html.table(["", *names], rows),
        html.paragraph(
            f"Number of instances in the {report['test']['split']} set: {counts}.", "note"
        ),
        html.heading("Times"),
        html.table(["", "time"], times),
        html.paragraph(f"Made with {versions}.", "note"),
    ]
