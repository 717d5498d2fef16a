"""Writes the verdict on every claim from the finished runs: docs/study.json, .md and .html.

    python -m tools.study.report [--out=docs/study] [--final]

It works with whatever runs exist, on the test set. --final writes docs/study_final.* instead, once,
when all runs are there. It reads the confirmation set, which every run is measured on and
nothing else compares.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.errors import InputError
from lory_jax.report import html, plots
from lory_jax.storage import write_atomically
from tools import tables as pages
from tools.study import arms, factors, fair_start, ladder
from tools.study.audit import AUDIT, read_audit
from tools.study.claims import (
    PENDING,
    Finding,
    Keep,
    judge_claims,
    numbers,
    of_effect,
    read_claims,
    without_domain,
)
from tools.study.headline import headline
from tools.study.results import FIRST_CORPUS, SECOND_CORPUS, Results
from tools.study.statistics import Effect, effective_origins
from tools.study.tables import (
    HEADLINES,
    Corpus,
    Report,
    Table,
    again_table,
    arms_table,
    audit_table,
    claims_table,
    domains_table,
    factors_table,
    fair_start_table,
    ladder_table,
    law_table,
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
    "12 trials of 400 steps, then trials of full length with 1, 1/2 and 1/4 of the best learning "
    "rate; if the highest or the lowest of these wins, one further out (2 or 1/8) is tried. The "
    "trials have one seed each. Arms that change the number of experts or of steps, the length of "
    "segments, the order of documents or the mask, and prefix routing, keep the settings tuned for "
    "dense or Lory. All runs of arms train on one order of the documents (tools/study/order.py). "
    "Each batch is computed as two microbatches, and tokens compete for experts only with tokens "
    "of their own microbatch."
)
NOTE = (
    "Effects are in nats per token over positions from T on (from 128 on in all arms whose names "
    "end with the length of their segments), the mean of the domains; a negative "
    "effect favours what the claim names first. Intervals (95 %) cover the noise between seeds "
    "and the choice of held-out documents, that is, of other folders of the same packages. "
    "P-values are two-sided and adjusted by Holm's method over all claims that the study plans to "
    'test on the corpus. A claim is "supported" or "contradicted" if its adjusted p is below '
    '0.05, "equivalent" if its whole unadjusted interval lies within 0.01 nats of zero, and '
    'otherwise "inconclusive"; it is "pending" until all its seeds are trained. The intervals '
    "are not adjusted, so one may exclude zero although the claim is inconclusive. A claim "
    "about every domain shows the effect and interval of the mean, and the p of the domain with "
    "the weakest evidence. A claim of equality is tested against differences of 0.01 nats, not "
    'against zero. "Experts used" is the share of all pairs of layer and expert whose weight was '
    'above 2 / E at least once in the last ten training steps. For sparse models, "experts a '
    'token" is the mean over the run, and "MaxVio" says by what part of the mean load the largest '
    "exceeds it in the last tenth of the steps; runs before 2026-11-30 did not record them."
)
LIMITS = (
    "What this cannot show: {folders}, so the intervals of the first corpus are wide however many "
    "seeds there are. Specialisation is measured on validation, and its interval covers seeds "
    "alone. The prompt of prompt routing is the first 32 tokens of an instance, often of another "
    "document, while the paper's are the demonstrations of a task. Four seeds are too few to show "
    "that Lory's gain is the same with and without attention across documents to within 0.01 nats."
)

LADDER = (
    "The ladder's models have widths of 16 to 96 and 0 to 32 experts, and see 3.1M or 6.1M tokens. "
    "Their losses are fitted by c(tokens) + a N^-(alpha - gamma ln E) E^-delta, where N are the "
    "active parameters in units of 100,000 and E the experts. Learning rate and start were tuned "
    "on the dense model of every width at 6.1M tokens; at 3.1M tokens, all models have twice that "
    "rate. Most points have one seed, those of the far ends three, and those that other stages "
    "made up to ten. A multiplier above 1 that does not change with the width still means a gain "
    "in nats that shrinks as models grow, because their losses come closer together."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--final", action="store_true", help="read the confirmation set")
    args = parser.parse_args()
    (write_final if args.final else write_report)(args.out)


def write_report(out: Path, claims_file: Path = CLAIMS) -> None:
    """Writes OUT.json, OUT.md and OUT.html from the runs in OUT/runs, and README's headline."""
    report = make_report(out, "test", claims_file)
    _write(report, out)
    if out == OUT:
        pages.replace_marked(ROOT / "README.md", "tools/study/report.py", headline(report))


def write_final(out: Path, claims_file: Path = CLAIMS) -> None:
    """Writes OUT_final.json, .md and .html: all claims on the confirmation set.

    Raises:
      InputError: it is written already, or runs are missing.
    """
    final = out.with_name(f"{out.name}_final")
    if final.with_suffix(".json").exists():
        raise InputError(f"{final}.json: exists; the confirmation set is compared once")
    on_test = make_report(out, "test", claims_file)
    waiting = [
        f"{f.claim.id} on {corpus.name}"
        for corpus in on_test.corpora
        for f in corpus.findings
        if f.verdict == PENDING
    ]
    waiting += on_test.ladder.get("missing", []) + ([] if on_test.factors else ["stage B"])
    if waiting:
        raise InputError(f"{out}: runs are missing, so nothing is final: {', '.join(waiting)}")
    _write(make_report(out, "confirmation", claims_file), final)


def _write(report: Report, out: Path) -> None:
    contents = {
        "split": report.split,
        "claims": {
            f.claim.id: numbers(f, again) | _parts_numbers(report, f.claim.id)
            for f, again in zip(report.first.findings, report.second.findings, strict=True)
        },
        "tuning": tuning(report.first.records),
        "ladder": report.ladder,
    }
    write_atomically(out.with_suffix(".json"), json.dumps(contents, indent=1) + "\n")
    write_atomically(out.with_suffix(".md"), markdown_page(report, out.name))
    write_atomically(out.with_suffix(".html"), html_page(report))
    runs = sum(len(corpus.records) for corpus in report.corpora)
    print(f"wrote {out}.json, .md and .html from {runs} runs")


def _parts_numbers(report: Report, claim: str) -> dict[str, Any]:
    found = report.first.variants.get(claim)
    return {"parts": {part: of_effect(f.effect, f.p) for part, f in found.items()}} if found else {}


def make_report(out: Path, split: str, claims_file: Path) -> Report:
    """Tests all claims, and the headline also on parts of the held-out instances."""
    results = Results(out / "runs")
    claims, margin = read_claims(claims_file)
    audit = read_audit(out / AUDIT, results)

    def judge(name: str, audit: dict[str, Any] | None) -> Corpus:
        findings = judge_claims(claims, margin, results, split, corpus=name)
        variants: dict[str, dict[str, Finding]] = {}
        for finding in findings:
            if finding.claim.id in HEADLINES and finding.effect is not None:
                variants[finding.claim.id] = {
                    part: judge_claims([finding.claim], margin, results, split, keep, name)[0]
                    for part, keep in _parts(finding.effect, audit, split).items()
                }
        neighbours = fair_start.differences(results, name)
        for base, checks in arms.LADDER_CHECKS.items():
            names = [arm.name for arm in checks]
            neighbours |= fair_start.differences(results, name, base, names)
        return Corpus(name, findings, variants, results.records(name), neighbours)

    points, missing = ladder.read_points(results, split)
    return Report(
        split,
        judge(FIRST_CORPUS, audit),
        judge(SECOND_CORPUS, None),
        {"missing": missing}
        if missing
        else ladder.summarize(points, results.held_out()["origins"][split]),
        audit,
        margin,
        _folders(results, split),
        factors.effects(results, split),
    )


def _folders(results: Results, split: str) -> str:
    """How few folders the held-out instances of every domain come from."""
    try:
        origins = results.held_out()["origins"][split]
    except InputError:  # no run has been made
        return "there are no held-out documents yet"
    counts = [
        f"{len({*names})} of {domain} (worth {effective_origins(np.array(names)):.1f} of one size)"
        for domain, names in origins.items()
        if names
    ]
    return f"the {split} set has few folders, of very different sizes: {', '.join(counts)}"


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
        ("Claims", claims_table(report.first.findings)),
        ("The second corpus, which is not Python", again_table(report)),
        ("The headline by domain", domains_table(report)),
        ("The headline on parts of the instances", variants_table(report)),
        ("Near-duplicates", audit_table(report)),
        ("Arms", arms_table(report.first, report.split)),
        ("Arms on the second corpus", arms_table(report.second, report.split)),
        ("Tuning, on validation", tuning_table(report)),
        ("Learning rates at full length, on validation", long_tuning_table(report)),
        ("Settings beside those that were tuned", fair_start_table(report)),
        ("Dense warm-up, router and learning rate together", factors_table(report)),
        ("The ladder: Lory's dense-equivalent parameter multiplier", ladder_table(report)),
        ("The ladder's law", law_table(report)),
    ]
    return [(title, table) for title, table in found if table[1]]


def _intro(report: Report) -> list[str]:
    """Paragraphs on the scale, the tuning and the statistics."""
    kinds = [record["kind"] for corpus in report.corpora for record in corpus.records]
    runs = kinds.count("run")
    made = (
        f"{runs} finished runs of arms, judged on the {report.split} set, and "
        f"{len(kinds) - runs} trials for tuning. {SCALE}"
    )
    limits = LIMITS.format(folders=report.folders)
    return [made, TUNING, NOTE, limits, *([LADDER] if "laws" in report.ladder else [])]


def markdown_page(report: Report, name: str) -> str:
    parts = [
        "# The study",
        "This page tests Lory's claims at a scale that one machine can train, with several seeds "
        "and intervals. Claims are written down before the runs of their arms "
        "([claims.json](claims.json)); `bash launch/study.sh` makes the runs and this page. The "
        f"same tables with plots are in [{name}.html]({name}.html).",
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
            for f in report.first.findings
            if f.effect is not None and not np.isnan(f.effect.low)
        ]
        if effects:
            svg = plots.to_svg(pictures.forest(effects, report.margin))
            return [html.figure(svg, "The effect of every claim that was tested.")]
    if title == "Arms":
        shown = {
            name: [r["curve"] for r in report.first.records if r["arm"] == name and r.get("curve")]
            for name in ("dense", "lory", "lory_redrawn", "lory_scratch")
        }
        shown = {name: curves for name, curves in shown.items() if curves}
        if shown:
            svg = plots.to_svg(pictures.curves(shown))
            return [html.figure(svg, "Validation loss of the main arms, one line per seed.")]
    if title.startswith("The ladder:"):
        svg = plots.to_svg(pictures.multipliers(report.ladder["laws"]["active"]["multipliers"]))
        return [html.figure(svg, "How many times as large an equally good dense model is.")]
    return []


if __name__ == "__main__":
    main()
