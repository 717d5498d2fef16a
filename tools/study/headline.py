"""What README says of the study: Lory against the dense model and against the sparse mixtures."""

from collections.abc import Mapping, Sequence

import numpy as np

from tools.study.claims import Finding, mean_of
from tools.study.results import Record
from tools.study.statistics import Effect
from tools.study.tables import Report

RIVALS = {
    "over_dropless_top1": ("dropless_top1", "dropless top-1"),
    "over_dropless_top2": ("dropless_top2", "dropless top-2"),
    "over_dropless_top2_fine": (
        "dropless_top2_fine",
        "dropless top-2 with narrower experts, at the same settings",
    ),
    "over_remoe": ("remoe", "ReMoE"),
    "over_expert_threshold": ("expert_threshold", "Expert Threshold"),
}
UNADJUSTED = (
    "Differences are in nats per token. Their 95 % intervals are not adjusted for the number of "
    "claims; the verdicts in [study.md](docs/study.md) are."
)


def headline(report: Report) -> str:
    """A list: by corpus, the paper's Lory, the recipe that redraws, and the rivals."""
    lines = []
    for corpus, where in zip(report.corpora, ("Python", "Debian"), strict=True):
        by_id = {f.claim.id: f for f in corpus.findings if f.effect is not None}
        if "gain" in by_id:
            lines.append(_gain(by_id, where, report.split, corpus.records))
        rivals = [_rival(by_id[name], name, corpus.records) for name in RIVALS if name in by_id]
        if rivals:
            lines.append(
                f"- **{where} packages, against sparse mixtures that were tuned alike**: Lory's "
                f"{report.split} loss is {'; '.join(rivals)}."
            )
    return "\n".join([*lines, "", UNADJUSTED]) if lines else "The study has no runs yet."


def _gain(by_id: Mapping[str, Finding], where: str, split: str, records: Sequence[Record]) -> str:
    effects = {name: finding.effect for name, finding in by_id.items() if finding.effect}
    said = (
        f"- **{where} packages, against the dense model**: Lory's {split} loss is "
        f"{size(effects['gain'])}, its perplexity {np.exp(effects['gain'].mean):.3f} times the "
        f"dense model's{_cost('lory', 'dense', records)}.{_domains(by_id['gain'])}"
    )
    if "gain_flops" in effects:
        said += (
            " Against a dense model that is trained for as many FLOPs in all, it is "
            f"{size(effects['gain_flops'])}."
        )
    if "gain_redrawn" in effects:
        said += (
            " With experts that are partly redrawn at upcycling, it is "
            f"{size(effects['gain_redrawn'])}."
        )
    return said


def _domains(finding: Finding) -> str:
    effects = [effect for effect in finding.domains.values() if not np.isnan(effect.low)]
    if not effects:
        return ""
    lower = sum(effect.mean < 0 for effect in effects)
    surely = sum(effect.high < 0 for effect in effects)
    return (
        f" It is lower in {lower} of {len(effects)} domains, with an interval that excludes zero "
        f"in {surely}."
    )


def _rival(finding: Finding, claim: str, records: Sequence[Record]) -> str:
    arm, name = RIVALS[claim]
    assert finding.effect is not None
    return f"{size(finding.effect)} than that of {name}{_cost(arm, 'lory', records)}"


def _cost(arm: str, base: str, records: Sequence[Record]) -> str:
    ours, other = (
        mean_of(
            [r for r in records if r["arm"] == name and "flops_per_token" in r], "flops_per_token"
        )
        for name in (arm, base)
    )
    return f" ({ours / other:.2f} times the FLOPs)"


def size(effect: Effect) -> str:
    """How large an effect is, and which way it goes."""
    sign, word = (-1, "lower") if effect.mean < 0 else (1, "higher")
    text = f"{abs(effect.mean):.3f} {word}"
    if np.isnan(effect.low):
        return f"{text} (one seed)"
    low, high = sorted((sign * effect.low, sign * effect.high))
    return f"{text} ({low:.3f} to {high:.3f}; {effect.seeds} seeds)"
