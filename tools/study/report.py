"""Writes the verdict on every claim from the finished runs: docs/study.json, .md and .html.

    python -m tools.study.report [--out=docs/study] [--final]

It works with whatever runs exist. The table is made on the test set; --final makes it on the
confirmation set, which nothing else reads.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.report import html, plots
from lory_jax.storage import write_atomically
from tools.study import arms, fair_start, ladder
from tools.study.claims import (
    Claim,
    Finding,
    Keep,
    judge_claims,
    numbers,
    read_claims,
    without_domain,
)
from tools.study.results import Record, Results, mean_loss

ROOT = Path(__file__).resolve().parent.parent.parent
CLAIMS = ROOT / "docs" / "claims.json"
HEADLINES = ("gain", "gain_redrawn")
NOTE = (
    "Effects are in nats per token over positions from T on, the mean of the domains; a negative "
    "effect favours what the claim names first. Intervals (95 %) hold the noise between seeds and "
    "the choice of held-out documents; p-values are adjusted over all claims."
)
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Report:
    """Everything that the pages show.

    Attributes:
      neighbours: validation loss of the dense baseline's neighbours minus its own.
      variants: for the headline claims, the finding on parts of the instances, by name.
    """

    split: str
    findings: list[Finding]
    variants: dict[str, dict[str, Finding]]
    records: list[Record]
    neighbours: dict[str, float]
    ladder: dict[str, Any] | None
    margin: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "study")
    parser.add_argument("--final", action="store_true", help="read the confirmation set")
    args = parser.parse_args()
    write_report(args.out, "confirmation" if args.final else "test")


def write_report(out: Path, split: str = "test", claims_file: Path = CLAIMS) -> None:
    """Writes OUT.json, OUT.md and OUT.html from the runs in OUT/runs."""
    report = make_report(out, split, claims_file)
    contents = {
        "claims": {f.claim.id: numbers(f, corpora=1) for f in report.findings},
        "tuning": tuning(report.records),
        "ladder": report.ladder,
    }
    write_atomically(out.with_suffix(".json"), json.dumps(contents, indent=1) + "\n")
    write_atomically(out.with_suffix(".md"), markdown_page(report))
    write_atomically(out.with_suffix(".html"), html_page(report))
    print(f"wrote {out}.json, .md and .html from {len(report.records)} runs")


def make_report(out: Path, split: str, claims_file: Path) -> Report:
    """Tests all claims, and the headline also on parts of the held-out instances."""
    results = Results(out / "runs")
    claims, margin = read_claims(claims_file)
    findings = judge_claims(claims, margin, results, split)
    variants: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        if finding.claim.id in HEADLINES and finding.effect is not None:
            parts = _parts(finding, out, split, results)
            variants[finding.claim.id] = {
                name: _only(finding.claim, margin, results, split, keep)
                for name, keep in parts.items()
            }
    points = ladder.read_points(results, split)
    return Report(
        split,
        findings,
        variants,
        results.records(),
        fair_start.differences(results),
        ladder.summarize(points),
        margin,
    )


def _only(claim: Claim, margin: float, results: Results, split: str, keep: Keep) -> Finding:
    (finding,) = judge_claims([claim], margin, results, split, keep)
    return finding


def _parts(finding: Finding, out: Path, split: str, results: Results) -> dict[str, Keep]:
    """The parts of the instances on which a headline is tested again, by name."""
    assert finding.effect is not None
    by_domain = finding.effect.by_domain
    dominating = max(by_domain, key=lambda domain: abs(by_domain[domain]))
    parts = {f"without {dominating}, which dominates": without_domain(dominating)}
    audit_file = out / "audit.json"
    if audit_file.is_file():
        audit = json.loads(audit_file.read_text("utf-8"))
        if audit["digest"] == results.held_out["digest"]:
            overlap, high = audit["overlap"][split], audit["high"]
            parts["without near-duplicates of training text"] = lambda domain, _: (
                np.array(overlap[domain]) < high
            )
    return parts


def tuning(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """The trials of every family: what was varied, and the validation loss (None: diverged)."""
    grids = {family.name: list(family.grid) for family in arms.FAMILIES}
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "trial":
            names = grids.get(record["family"], list(record["settings"]))
            is_finished = record["status"] == "finished"
            found.setdefault(record["family"], []).append(
                {
                    "settings": {name: record["settings"][name] for name in names},
                    "validation_loss": round(mean_loss(record), 5) if is_finished else None,
                }
            )
    return found


# ---------------------------------------------------------------- tables


def claims_table(findings: Sequence[Finding]) -> Table:
    header = ["claim", "source", "verdict", "effect", "95 % interval", "adjusted p", "seeds"]
    return header, [[f.claim.claim, f.claim.source, _verdict(f), *_figures(f)] for f in findings]


def variants_table(report: Report) -> Table:
    header = ["headline", "on", "effect", "95 % interval", "p", "seeds"]
    rows = []
    by_id = {finding.claim.id: finding for finding in report.findings}
    for name, variants in report.variants.items():
        for part, finding in {"all instances": by_id[name], **variants}.items():
            rows.append([name, part, *_figures(finding)])
    return header, rows


def domains_table(report: Report) -> Table:
    """The effect of the headline claims domain by domain."""
    headlines = [f for f in report.findings if f.claim.id in HEADLINES and f.effect is not None]
    domains = sorted({domain for f in headlines if f.effect for domain in f.effect.by_domain})
    rows = [
        [f.claim.id, *(_signed(f.effect.by_domain[domain]) for domain in domains)]
        for f in headlines
        if f.effect is not None
    ]
    return ["headline", *domains], rows


def arms_table(report: Report) -> Table:
    """One row per arm: seeds, mean loss, costs, and how its experts differ."""
    by_arm: dict[str, list[Record]] = {}
    for record in report.records:
        if record["kind"] == "run":
            by_arm.setdefault(record["arm"], []).append(record)
    rows = []
    for arm in (arm.name for arm in arms.ARMS if arm.name in by_arm):
        finished = [r for r in by_arm[arm] if r["status"] == "finished"]
        losses = [mean_loss(r, report.split) for r in finished if report.split in r["losses"]]
        rows.append(
            [
                arm,
                str(len(by_arm[arm])),
                f"{np.mean(losses):.4f}" if losses else "diverged",
                f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "",
                _mean(finished, "flops_per_token", "{:.3g}"),
                _mean(finished, "step_seconds", "{:.3f}"),
                _mean(finished, "experts_used", "{:.0%}"),
                _mean(finished, "expert_cosine", "{:.3f}"),
            ]
        )
    header = ["arm", "seeds", f"{report.split} loss", "s.d. of seeds", "FLOPs a token"]
    return [*header, "seconds a step", "experts used", "expert cosine"], rows


def tuning_table(report: Report) -> Table:
    """The best trial of every family, and which of its values are the ends of what was tried."""
    grids = {family.name: family.grid for family in arms.FAMILIES}
    rows = []
    for name, trials in tuning(report.records).items():
        done = [trial for trial in trials if trial["validation_loss"] is not None]
        if done:
            best = min(done, key=lambda trial: trial["validation_loss"])
            settings = ", ".join(f"{key}={value:g}" for key, value in best["settings"].items())
            ends = [
                key
                for key, value in best["settings"].items()
                if value in (min(grids[name][key]), max(grids[name][key]))
            ]
            loss = f"{best['validation_loss']:.4f}"
            rows.append([name, str(len(trials)), settings, loss, ", ".join(ends)])
    return ["family", "trials", "best settings", "validation loss", "at an end of its grid"], rows


def fair_start_table(report: Report) -> Table:
    """The neighbours of the dense baseline at full length."""
    rows = [[name, _signed(value)] for name, value in report.neighbours.items()]
    return ["dense, changed", "validation loss minus dense's"], rows


def ladder_table(report: Report) -> Table:
    rows = report.ladder["multipliers"] if report.ladder else []
    return ["width", "experts", "worth a dense model times", "95 % interval"], [
        [
            str(row["width"]),
            str(row["experts"]),
            f"{row['multiplier']:.2f}",
            f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}",
        ]
        for row in rows
    ]


def _verdict(finding: Finding) -> str:
    return f"{finding.verdict} ({finding.reason})" if finding.reason else finding.verdict


def _figures(finding: Finding) -> list[str]:
    effect = finding.effect
    if effect is None:
        return ["", "", "", ""]
    has_interval = not np.isnan(effect.low)
    return [
        _signed(effect.mean),
        f"{_signed(effect.low)} to {_signed(effect.high)}" if has_interval else "",
        f"{finding.adjusted_p:.2g}" if has_interval else "",
        str(effect.seeds),
    ]


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _mean(records: Sequence[Record], name: str, text: str) -> str:
    values = [record[name] for record in records if record.get(name) is not None]
    return text.format(float(np.mean(values))) if values else ""


# ---------------------------------------------------------------- pages


def _sections(report: Report) -> list[tuple[str, Table]]:
    found = [
        ("Claims", claims_table(report.findings)),
        ("The headline by domain", domains_table(report)),
        ("The headline on parts of the instances", variants_table(report)),
        ("Arms", arms_table(report)),
        ("Tuning, on validation", tuning_table(report)),
        ("The dense baseline's start", fair_start_table(report)),
        ("The ladder: Lory's dense-equivalent parameter multiplier", ladder_table(report)),
    ]
    return [(title, table) for title, table in found if table[1]]


def _intro(report: Report) -> str:
    runs = len(report.records)
    return f"{runs} finished runs, judged on the {report.split} set. {NOTE}"


def markdown_page(report: Report) -> str:
    parts = [
        "# The study",
        "What is true of Lory's claims at a scale that one machine can train, with seeds and "
        "intervals. The claims were written down before the runs ([claims.json](claims.json)); "
        "`bash launch/study.sh` makes the runs and this page. The same tables with plots are in "
        "[study.html](study.html).",
        _intro(report),
    ]
    for title, (header, rows) in _sections(report):
        lines = [header, ["---"] * len(header), *rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts += [f"## {title}", table]
    return "\n\n".join(parts) + "\n"


def html_page(report: Report) -> str:
    pieces = [html.paragraph(_intro(report), "lead")]
    for title, (header, rows) in _sections(report):
        pieces += [html.heading(title), html.table(header, rows, is_text=title == "Claims")]
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
