"""What README and the study's page say first: Lory against the dense model and sparse mixtures."""

from collections.abc import Mapping, Sequence

import numpy as np

from tools.study.claims import Finding, mean_of
from tools.study.results import Record
from tools.study.statistics import Effect
from tools.study.tables import Report, Table, signed
from tools.tables import markdown

# By claim, what Lory is compared with: the arm, and what a reader calls it.
COMPARED = {
    "gain": ("dense", "a dense model"),
    "gain_flops": ("dense_flops", "the dense model with 6 % more steps (as many FLOPs in all)"),
    "over_dropless_top1": ("dropless_top1", "dropless top-1"),
    "over_dropless_top2": ("dropless_top2", "dropless top-2"),
    "over_dropless_top2_fine": (
        "dropless_top2_fine",
        "dropless top-2, experts half as wide, not tuned anew",
    ),
    "over_remoe": ("remoe", "ReMoE"),
    "over_expert_threshold": ("expert_threshold", "Expert Threshold"),
}
DECIDED = ("supported", "contradicted")
CORPORA = ("Python packages", "Debian packages")
UNADJUSTED = (
    "Differences of the {split} loss in nats per token, with 95 % intervals that are not adjusted "
    "for the number of claims. Below zero, Lory is better. FLOPs are per token, divided by Lory's."
)


def headline_table(report: Report) -> Table:
    """By what Lory is compared with: FLOPs, and on each corpus the difference of losses."""
    by_corpus = [{f.claim.id: f.effect for f in corpus.findings} for corpus in report.corpora]
    header = ["Lory against", "FLOPs per token", *CORPORA]
    rows = []
    for claim, (arm, name) in COMPARED.items():
        found = [effects.get(claim) for effects in by_corpus]
        if any(found):
            cost = f"{relative_flops(arm, 'lory', report.first.records):.2f}"
            cells = [_cell(effect) if effect else "" for effect in found]
            rows.append([name, cost, *cells])
    return header, rows


def headline_notes(report: Report) -> list[str]:
    """What the figures of the table are, and what it leaves out."""
    lines = [UNADJUSTED.format(split=report.split), _decided(report)]
    for corpus, where in zip(report.corpora, CORPORA, strict=True):
        by_id = {f.claim.id: f for f in corpus.findings if f.effect is not None}
        if "gain" in by_id:
            lines.append(_gain(by_id, where))
    return lines


def _decided(report: Report) -> str:
    """Which of the differences are more than chance once all claims are counted."""
    by_corpus = [
        (finding, where)
        for corpus, where in zip(report.corpora, CORPORA, strict=True)
        for finding in corpus.findings
        if finding.effect is not None
    ]
    decided = [
        f"that from {COMPARED[finding.claim.id][1]} on {where}"
        for finding, where in by_corpus
        if finding.claim.id in COMPARED and finding.verdict in DECIDED
    ]
    if not decided:
        said = "no difference remains significant"
    elif len(decided) == 1:
        said = f"the only difference that remains significant is {decided[0]}"
    else:
        said = f"these differences remain significant: {'; '.join(decided)}"
    every_domain = [f"{f.verdict} on {where}" for f, where in by_corpus if f.claim.id == "gain"]
    lines = [f"After the adjustment for all claims that are tested on the same corpus, {said}."]
    if every_domain:
        lines.append(
            "The claim of the first row is that Lory is better in every domain: it is "
            f"{' and '.join(every_domain)}."
        )
    return " ".join(lines)


def headline(report: Report) -> str:
    """README's part: the table and what it means."""
    header, rows = headline_table(report)
    if not rows:
        return "The study has no runs yet."
    return f"{markdown(header, rows)}\n\n{' '.join(headline_notes(report))}"


def _gain(by_id: Mapping[str, Finding], where: str) -> str:
    effect = by_id["gain"].effect
    assert effect is not None
    said = (
        f"On {where}, Lory's perplexity is {np.exp(effect.mean):.3f} times the dense model's"
        f"{_domains(by_id['gain'])}"
    )
    redrawn = by_id["gain_redrawn"].effect if "gain_redrawn" in by_id else None
    if redrawn is None:
        return f"{said}."
    return f"{said}; with experts that are partly redrawn at upcycling, {np.exp(redrawn.mean):.3f}."


def _domains(finding: Finding) -> str:
    effects = [effect for effect in finding.domains.values() if not np.isnan(effect.low)]
    if not effects:
        return ""
    lower = sum(effect.mean < 0 for effect in effects)
    surely = sum(effect.high < 0 for effect in effects)
    return (
        f" (lower in {lower} of {len(effects)} domains, in {surely} with an interval that "
        "excludes zero)"
    )


def relative_flops(arm: str, base: str, records: Sequence[Record]) -> float:
    """FLOPs per token, the mean of an arm's runs, divided by another's."""
    ours, other = (
        mean_of(
            [r for r in records if r["arm"] == name and "flops_per_token" in r], "flops_per_token"
        )
        for name in (arm, base)
    )
    return ours / other


def _cell(effect: Effect) -> str:
    """A difference, its interval and its number of seeds."""
    mean = signed(effect.mean, 3)
    if np.isnan(effect.low):
        return f"{mean} (one seed)"
    low, high = signed(effect.low, 3), signed(effect.high, 3)
    return f"{mean} ({low} to {high}; {effect.seeds} seeds)"
