"""What README says of the study: Lory against the dense model and against the sparse mixtures."""

from collections.abc import Mapping, Sequence

import numpy as np

from tools.study.claims import Finding
from tools.study.results import Record
from tools.study.statistics import Effect
from tools.study.tables import Report

RIVALS = {
    "over_dropless_top1": ("dropless_top1", "dropless top-1"),
    "over_dropless_top2": ("dropless_top2", "dropless top-2"),
    "over_dropless_top2_fine": ("dropless_top2_fine", "dropless top-2 with narrower experts"),
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
    for findings, where in ((report.findings, "Python"), (report.again, "Debian")):
        by_id = {f.claim.id: f for f in findings if f.effect is not None}
        if "gain" in by_id:
            lines.append(_gain(by_id, where, report))
        rivals = [_rival(by_id[name], name, report.records) for name in RIVALS if name in by_id]
        if rivals:
            lines.append(
                f"- **{where} packages, against sparse mixtures that were tuned alike**: Lory's "
                f"{report.split} loss is {'; '.join(rivals)}."
            )
    return "\n".join([*lines, "", UNADJUSTED]) if lines else "The study has no runs yet."


def _gain(by_id: Mapping[str, Finding], where: str, report: Report) -> str:
    effect = by_id["gain"].effect
    assert effect is not None
    said = (
        f"- **{where} packages, against the dense model**: Lory's {report.split} loss is "
        f"{size(effect)}, its perplexity {np.exp(effect.mean):.3f} times the dense model's"
        f"{_cost('lory', 'dense', report.records)}.{_domains(by_id['gain'])}"
    )
    if "gain_redrawn" not in by_id:
        return said
    redrawn = by_id["gain_redrawn"].effect
    assert redrawn is not None
    return f"{said} With experts that are partly redrawn at upcycling, it is {size(redrawn)}."


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
    flops = {r["arm"]: r.get("flops_per_token") for r in records if r["kind"] == "run"}
    ours, other = flops.get(arm), flops.get(base)
    return f" ({ours / other:.2f} times the FLOPs)" if ours and other else ""


def size(effect: Effect) -> str:
    """How large an effect is, and which way it goes."""
    sign, word = (-1, "lower") if effect.mean < 0 else (1, "higher")
    text = f"{abs(effect.mean):.3f} {word}"
    if np.isnan(effect.low):
        return f"{text} (one seed)"
    low, high = sorted((sign * effect.low, sign * effect.high))
    return f"{text} ({low:.3f} to {high:.3f}; {effect.seeds} seeds)"
