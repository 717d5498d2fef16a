"""Writes the verdict on every claim from the finished runs: docs/study.json, .md and .html.

    python -m tools.study.report [--out=docs/study] [--final]

It works with whatever runs exist, on the test set. --final writes docs/study_final.* instead, once,
when all runs are there. It reads the confirmation set, on which every run is measured and no claim
or setting is chosen; only what docs/beyond.md adopts is decided on it, with seeds of its own.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.errors import InputError
from lory_jax.report import html, plots
from lory_jax.storage import write_atomically
from tools import tables as pages
from tools.study import arms, factors, fair_start, ladder, words
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
from tools.study.headline import headline, headline_notes, headline_table
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
    claim_notes,
    claims_table,
    domains_table,
    factors_table,
    fair_start_table,
    ladder_table,
    law_table,
    variants_table,
)
from tools.study.tuning import long_tuning_table, tuning, tuning_table

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "docs" / "study"
CLAIMS = ROOT / "docs" / "claims.json"
WORDS = (
    "claim",
    "changed",
    "Lory against",
    "source",
    "verdict",
    "best settings",
    "at an end of its grid",
    "on",
)  # columns
STYLE = (
    "body { max-width: 80rem; } figure { max-width: 52rem; } "
    "td.text:nth-child(2) { min-width: 18rem; }"  # claims are sentences
)
LADDER_TITLE = "The ladder: Lory's dense-equivalent parameter multiplier"


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
        raise InputError(f"{final}.json: exists; the final table is written once")
    on_test = make_report(out, "test", claims_file)
    waiting = [
        f"{f.claim.id} on {corpus.name}"
        for corpus in on_test.corpora
        for f in corpus.findings
        if f.verdict == PENDING
    ]
    waiting += on_test.ladder["missing"] + on_test.factors_unfinished[0]
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
    """The mean of the domains on parts of the instances; its p is not that of every domain."""
    found = report.first.variants.get(claim, {})
    effects = {part: finding.effect for part, finding in found.items()}
    parts = {part: of_effect(effect, effect.p) for part, effect in effects.items() if effect}
    return {"parts": parts} if parts else {}


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

    steps = ladder.read_points(results, split)
    rungs: dict[str, Any] = {"missing": steps.missing, "diverged": steps.diverged}
    if not steps.missing:
        rungs |= ladder.summarize(steps.points, results.held_out()["origins"][split])
    return Report(
        split,
        judge(FIRST_CORPUS, audit),
        judge(SECOND_CORPUS, None),
        rungs,
        audit,
        margin,
        _folders(results, split),
        factors.effects(results, split),
        factors.unfinished(results),
    )


def _folders(results: Results, split: str) -> str:
    """How few folders the held-out instances of every domain come from."""
    try:
        origins = results.held_out()["origins"][split]
    except InputError:  # no run has been made
        return "There are no held-out documents yet"
    counts = [
        f"{len({*names})} of {domain} (as good as "
        f"{effective_origins(np.array(names)):.1f} of equal size)"
        for domain, names in origins.items()
        if names
    ]
    return f"The {split} set has few folders, of very different sizes: {', '.join(counts)}"


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


@dataclass(frozen=True)
class Section:
    """A part of the page: sentences, a table and what must be known about it.

    A section whose table has no rows yet says in `waits` what it waits for, or is left out; one of
    sentences alone has no table.
    """

    title: str
    lead: Sequence[str] = ()
    table: Table | None = None
    notes: Sequence[str] = ()
    numbered: bool = False
    waits: Sequence[str] = ()


def _sections(report: Report) -> list[Section]:
    kinds = [record["kind"] for corpus in report.corpora for record in corpus.records]
    runs = kinds.count("run")
    made = (
        f"There are {runs} finished runs of arms, judged on the {report.split} set, and "
        f"{len(kinds) - runs} trials for tuning."
    )
    limits = [text.format(folders=report.folders) for text in words.LIMITS]
    first, second = report.corpora
    found = [
        Section("What came out", (), headline_table(report), headline_notes(report)),
        Section("Claims", (), claims_table(first.findings), claim_notes(first.findings), True),
        Section("The second corpus, which is not Python", (), again_table(report)),
        Section("How to read the tables", words.READING),
        Section("What this cannot show", limits),
        Section("How it was made", [made, *words.METHOD]),
        Section("The claims gain and gain_redrawn, by domain", (), domains_table(report)),
        Section(
            "The claims gain and gain_redrawn, on parts of the instances",
            (),
            variants_table(report),
        ),
        Section("Near-duplicates", (), audit_table(report)),
        Section("Arms", (), arms_table(first, report.split)),
        Section("Arms on the second corpus", (), arms_table(second, report.split)),
        Section("Tuning, on validation", (), tuning_table(report)),
        Section("Learning rates at full length, on validation", (), long_tuning_table(report)),
        Section("Settings beside those that were tuned", (), fair_start_table(report)),
        Section(
            "Dense warm-up, router and learning rate together",
            (),
            factors_table(report),
            waits=[words.ABOUT_FACTORS, *words.unfinished(*report.factors_unfinished)],
        ),
        Section(
            LADDER_TITLE,
            words.LADDER,
            ladder_table(report),
            words.with_diverged(report.ladder["diverged"]),
            waits=[
                words.ABOUT_THE_LADDER,
                *words.unfinished(report.ladder["missing"], report.ladder["diverged"]),
            ],
        ),
        Section("The ladder's law", (), law_table(report), words.at_bounds(report.ladder)),
    ]
    shown = (
        section
        if section.table is None or section.table[1]
        else replace(section, lead=section.waits, table=None, notes=())
        for section in found
    )
    return [section for section in shown if section.table or section.lead]


def markdown_page(report: Report, name: str) -> str:
    parts = [
        "# The study",
        f"{words.SUBJECT} Claims are in [claims.json](claims.json); `bash launch/study.sh` makes "
        f"the runs and this page. The same tables with plots are in [{name}.html]({name}.html).",
    ]
    for section in _sections(report):
        parts.append(f"## {section.title}")
        if section.lead:
            parts.append("\n".join(f"- {text}" for text in section.lead))
        if section.table is not None:
            parts.append(pages.markdown(*section.table))
        if section.notes:
            marks = (f"{i}." if section.numbered else "-" for i in range(1, 1 + len(section.notes)))
            texts = zip(marks, section.notes, strict=True)
            parts.append("\n".join(f"{mark} {text}" for mark, text in texts))
    return "\n\n".join(parts) + "\n"


def html_page(report: Report) -> str:
    pieces = [html.style(STYLE), html.paragraph(words.SUBJECT, "lead")]
    for section in _sections(report):
        pieces.append(html.heading(section.title))
        pieces += [html.items(section.lead)] if section.lead else []
        if section.table is not None:
            header, rows = section.table
            text_columns = [i for i, name in enumerate(header) if name in WORDS]
            pieces.append(html.table(header, rows, text_columns=text_columns))
        if section.notes:
            pieces.append(html.items(section.notes, numbered=section.numbered))
        pieces += _pictures(section.title, report)
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
    if title == LADDER_TITLE and "laws" in report.ladder:
        svg = plots.to_svg(pictures.multipliers(report.ladder["laws"]["active"]["multipliers"]))
        return [html.figure(svg, "How many times as large an equally good dense model is.")]
    return []


if __name__ == "__main__":
    main()
