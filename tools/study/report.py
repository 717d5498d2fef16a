"""Writes the verdict on every claim from the finished runs: docs/study.json, .md and .html.

    python -m tools.study.report [--out=docs/study] [--final]

It works with whatever runs exist. The table is made on the test set; --final makes it on the
confirmation set, which nothing else reads.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.report import html, plots
from lory_jax.storage import write_atomically
from tools import tables as pages
from tools.study import fair_start, ladder
from tools.study.audit import AUDIT, read_audit
from tools.study.claims import (
    Finding,
    Keep,
    judge_claims,
    numbers,
    read_claims,
    without_domain,
)
from tools.study.results import Results
from tools.study.statistics import Effect
from tools.study.tables import (
    HEADLINES,
    Report,
    Table,
    again_table,
    arms_table,
    audit_table,
    claims_table,
    domains_table,
    fair_start_table,
    ladder_table,
    long_tuning_table,
    tuning,
    tuning_table,
    variants_table,
)

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "docs" / "study"
CLAIMS = ROOT / "docs" / "claims.json"
WORDS = ("claim", "source", "verdict", "best settings", "at an end of its grid", "on")  # columns
SCALE = (
    "The model has four layers of width 32 and contexts of 256 tokens in segments of 32 "
    "(tools/study/recipe.py), and sees 6.1M tokens. The first corpus is code, headers, stubs and "
    "documentation of Python packages with pinned versions (tools/study/corpus.py), the second "
    "is manual pages, documentation, prose and C from Debian packages (tools/debian_corpus.py)."
)
TUNING = (
    "Every family of models is tuned on validation alone (the first 256 instances of a domain): "
    "12 trials of 400 steps, and then trials of full length at the best learning rate, half and a "
    "quarter of it, and twice or an eighth of it where the end next to that is the best. The "
    "tuning tables show which trials have finished. Arms that change the number of experts or of "
    "steps, the length of segments, the order of documents or the mask, and prefix routing, keep "
    "the settings tuned "
    "for dense or Lory. All runs of arms train on one order of the documents "
    "(tools/study/order.py). Each batch is computed as two microbatches, and tokens compete for "
    "experts only with tokens of their own microbatch. Seconds a step come from shared machines "
    "and do not compare arms."
)
NOTE = (
    "Effects are in nats per token over positions from T on, the mean of the domains; a negative "
    "effect favours what the claim names first. Intervals (95 %) cover the noise between seeds "
    "and the choice of held-out documents, that is, of other folders of the same packages. "
    "P-values are adjusted by Holm's method over all claims that the corpus will have runs for, "
    'with or without runs so far. For "in every domain", p is that of the domain with the weakest '
    "evidence. Unless the whole interval lies within the margin of 0.01 nats, an adjusted p of "
    '0.05 or more means "inconclusive".'
)
LIMITS = (
    "What this cannot show: the first corpus has few folders to hold out (13 of headers, of very "
    "different sizes), so its intervals are wide however many seeds there are. Specialisation is "
    "measured on validation, and its interval covers seeds alone. The prompt of prompt routing is "
    "the first 32 tokens of an instance, often of another document, while the paper's are the "
    "demonstrations of a task. With 4 seeds, the equivalence across documents can hardly be "
    "shown."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--final", action="store_true", help="read the confirmation set")
    args = parser.parse_args()
    write_report(args.out, "confirmation" if args.final else "test")


def write_report(out: Path, split: str = "test", claims_file: Path = CLAIMS) -> None:
    """Writes OUT.json, OUT.md and OUT.html from the runs in OUT/runs."""
    report = make_report(out, split, claims_file)
    contents = {
        "claims": {
            f.claim.id: numbers(f, again)
            for f, again in zip(report.findings, report.again, strict=True)
        },
        "tuning": tuning(report.records),
        "ladder": report.ladder,
    }
    write_atomically(out.with_suffix(".json"), json.dumps(contents, indent=1) + "\n")
    write_atomically(out.with_suffix(".md"), markdown_page(report))
    write_atomically(out.with_suffix(".html"), html_page(report))
    print(f"wrote {out}.json, .md and .html from {len(report.records)} runs")
    if out == OUT:
        pages.replace_marked(ROOT / "README.md", "tools/study/report.py", headline(report))


def headline(report: Report) -> str:
    """What the README says: the paper's Lory against dense, and the recipe that redraws."""
    sentences = []
    for findings, where in (
        (report.findings, "In the study"),
        (report.again, "On its other corpus"),
    ):
        by_id = {f.claim.id: f for f in findings if f.effect is not None}
        if "gain" in by_id:
            sentences.append(_gain(by_id["gain"], where, report))
        if "gain_redrawn" in by_id:
            sentences.append(
                "With the recipe that partly redraws the experts at upcycling, the loss is "
                f"{_size(by_id['gain_redrawn'])}."
            )
    return " ".join(sentences) or "The study has no finished runs yet."


def _gain(finding: Finding, where: str, report: Report) -> str:
    assert finding.effect is not None
    flops = {r["arm"]: r.get("flops_per_token") for r in report.records if r["kind"] == "run"}
    ours, dense = (flops.get(name) for name in ("lory", "dense"))
    cost = f" Lory computes {ours / dense:.2f} times the FLOPs." if ours and dense else ""
    ratio = float(np.exp(finding.effect.mean))
    return (
        f"{where}, Lory's {report.split} loss is {_size(finding)} than that of an equally tuned "
        f"dense model: {ratio:.3f} times its perplexity.{cost} The claim that every domain gains "
        f"is {finding.verdict}."
    )


def _size(finding: Finding) -> str:
    effect = finding.effect
    assert effect is not None
    sign, word = (-1, "lower") if effect.mean < 0 else (1, "higher")
    size = f"{abs(effect.mean):.3f} nats per token {word}"
    if np.isnan(effect.low):
        return f"{size} (one seed)"
    low, high = sorted((sign * effect.low, sign * effect.high))
    return f"{size} (95 % interval {low:.3f} to {high:.3f}; {effect.seeds} seeds)"


def make_report(out: Path, split: str, claims_file: Path) -> Report:
    """Tests all claims, and the headline also on parts of the held-out instances."""
    results = Results(out / "runs")
    claims, margin = read_claims(claims_file)
    findings = judge_claims(claims, margin, results, split)
    again = judge_claims(claims, margin, results, split, corpus="debian")
    audit = read_audit(out / AUDIT, results)
    variants: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        if finding.claim.id in HEADLINES and finding.effect is not None:
            variants[finding.claim.id] = {
                name: judge_claims([finding.claim], margin, results, split, keep)[0]
                for name, keep in _parts(finding.effect, audit, split).items()
            }
    return Report(
        split,
        findings,
        again,
        variants,
        results.records(),
        fair_start.differences(results),
        ladder.summarize(ladder.read_points(results, split)),
        audit,
        margin,
    )


def _parts(effect: Effect, audit: dict[str, Any] | None, split: str) -> dict[str, Keep]:
    """The parts of the instances on which a headline is tested again, by name."""
    dominating = max(effect.by_domain, key=lambda domain: abs(effect.by_domain[domain]))
    parts = {f"without {dominating}, which dominates": without_domain(dominating)}
    if audit is not None:
        overlap, high = audit["overlap"][split], audit["high"]
        parts["without near-duplicates of training text"] = lambda domain, _: (
            np.array(overlap[domain]) < high
        )
    return parts


# ---------------------------------------------------------------- pages


def _sections(report: Report) -> list[tuple[str, Table]]:
    found = [
        ("Claims", claims_table(report.findings)),
        ("The second corpus, which is not Python", again_table(report)),
        ("The headline by domain", domains_table(report)),
        ("The headline on parts of the instances", variants_table(report)),
        ("Near-duplicates", audit_table(report)),
        ("Arms", arms_table(report)),
        ("Tuning, on validation", tuning_table(report)),
        ("Learning rates at full length, on validation", long_tuning_table(report)),
        ("The dense baseline's start", fair_start_table(report)),
        ("The ladder: Lory's dense-equivalent parameter multiplier", ladder_table(report)),
    ]
    return [(title, table) for title, table in found if table[1]]


def _intro(report: Report) -> list[str]:
    """Paragraphs on the scale, the tuning and the statistics."""
    runs = sum(record["kind"] == "run" for record in report.records)
    made = (
        f"{runs} finished runs of arms, judged on the {report.split} set, and "
        f"{len(report.records) - runs} trials for tuning. {SCALE}"
    )
    return [made, TUNING, NOTE, LIMITS]


def markdown_page(report: Report) -> str:
    parts = [
        "# The study",
        "This page tests Lory's claims at a scale that one machine can train, with several seeds "
        "and intervals. Claims are written down before the runs of their arms "
        "([claims.json](claims.json)); `bash launch/study.sh` makes the runs and this page. The "
        "same tables with plots are in [study.html](study.html).",
        *_intro(report),
    ]
    for title, (header, rows) in _sections(report):
        lines = [header, ["---"] * len(header), *rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts += [f"## {title}", table]
    return "\n\n".join(parts) + "\n"


def html_page(report: Report) -> str:
    pieces = [html.paragraph(text, "lead") for text in _intro(report)]
    for title, (header, rows) in _sections(report):
        words = [i for i, name in enumerate(header) if name in WORDS]
        pieces += [html.heading(title), html.table(header, rows, text_columns=words)]
        pieces += _pictures(title, report)
    return html.page("The study: what is true of Lory's claims", pieces)


def _pictures(title: str, report: Report) -> list[str]:
    # Imported here, because matplotlib is slow to import.
    from tools.study import pictures

    if title == "Claims":
        effects = [
            (f.claim.id, f.effect.mean, f.effect.low, f.effect.high)
            for f in report.findings
            if f.effect is not None and not np.isnan(f.effect.low)
        ]
        if effects:
            svg = plots.to_svg(pictures.forest(effects, report.margin))
            return [html.figure(svg, "The effect of every claim that was tested.")]
    if title == "Arms":
        shown = {
            name: [r["curve"] for r in report.records if r["arm"] == name and r.get("curve")]
            for name in ("dense", "lory", "lory_redrawn", "lory_scratch")
        }
        shown = {name: curves for name, curves in shown.items() if curves}
        if shown:
            svg = plots.to_svg(pictures.curves(shown))
            return [html.figure(svg, "Validation loss of the main arms, one line per seed.")]
    if title.startswith("The ladder") and report.ladder:
        svg = plots.to_svg(pictures.multipliers(report.ladder["multipliers"]))
        return [html.figure(svg, "How many times as large an equally good dense model is.")]
    return []


if __name__ == "__main__":
    main()
