"""What README says of the study: Lory against the dense model and against the sparse mixtures."""

import numpy as np

from tools.study.claims import Finding
from tools.study.tables import Report

RIVALS = {
    "over_dropless_top1": ("dropless_top1", "dropless top-1"),
    "over_dropless_top2": ("dropless_top2", "dropless top-2"),
    "over_dropless_top2_fine": ("dropless_top2_fine", "dropless top-2 with narrower experts"),
    "over_remoe": ("remoe", "ReMoE"),
    "over_expert_threshold": ("expert_threshold", "Expert Threshold"),
}
UNADJUSTED = (
    "These intervals are not adjusted for the number of claims; the verdicts in "
    "[study.md](docs/study.md) are."
)


def headline(report: Report) -> str:
    """The paper's Lory first, then the recipe that redraws, then the rivals."""
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
                f"{size(by_id['gain_redrawn'])}."
            )
        sentences += [_rival(by_id[name], name, report) for name in RIVALS if name in by_id]
    return " ".join([*sentences, UNADJUSTED] if sentences else ["The study has no runs yet."])


def _gain(finding: Finding, where: str, report: Report) -> str:
    assert finding.effect is not None
    ratio = float(np.exp(finding.effect.mean))
    return (
        f"{where}, Lory's {report.split} loss is {size(finding)} than that of an equally tuned "
        f"dense model: {ratio:.3f} times its perplexity{_cost('lory', 'dense', report)}."
        f"{_every_domain(finding)}"
    )


def _every_domain(finding: Finding) -> str:
    effects = [effect for effect in finding.domains.values() if not np.isnan(effect.low)]
    if not effects:
        return ""
    lower = sum(effect.mean < 0 for effect in effects)
    surely = sum(effect.high < 0 for effect in effects)
    return (
        f' The claim "in every domain" is {finding.verdict}: the loss is lower in {lower} of '
        f"{len(effects)} domains, with an interval that excludes zero in {surely}."
    )


def _rival(finding: Finding, claim: str, report: Report) -> str:
    arm, name = RIVALS[claim]
    cost = _cost(arm, "lory", report)
    return f"Lory's loss is {size(finding)} than that of {name}, tuned alike{cost}."


def _cost(arm: str, base: str, report: Report) -> str:
    flops = {r["arm"]: r.get("flops_per_token") for r in report.records if r["kind"] == "run"}
    ours, other = flops.get(arm), flops.get(base)
    return f", at {ours / other:.2f} times the FLOPs" if ours and other else ""


def size(finding: Finding) -> str:
    """How large an effect is, and which way it goes."""
    effect = finding.effect
    assert effect is not None
    sign, word = (-1, "lower") if effect.mean < 0 else (1, "higher")
    text = f"{abs(effect.mean):.3f} nats per token {word}"
    if np.isnan(effect.low):
        return f"{text} (one seed)"
    low, high = sorted((sign * effect.low, sign * effect.high))
    return f"{text} (95 % interval {low:.3f} to {high:.3f}; {effect.seeds} seeds)"
