"""The claims of docs/claims.json, tested on finished runs.

A claim has a verdict once every arm that it names has all the seeds that the study plans. Until
then it is pending, whatever the runs so far say, so that nobody can stop at a moment that suits.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tools.study import arms
from tools.study.results import FIRST_CORPUS, Losses, Record, Results
from tools.study.specialisation import specialisation
from tools.study.statistics import (
    LEVEL,
    Domain,
    Effect,
    holm,
    is_within,
    p_of,
    paired_effect,
    verdict,
)

PENDING, NOT_TESTABLE = "pending", "not testable here"
STATISTICS = ("mean", "every_domain", "specialisation", "none")
ByArm = dict[str, list[Record]]
Keep = Callable[[str, np.ndarray], np.ndarray]  # (domain, instances) -> which instances count


@dataclass(frozen=True)
class Claim:
    """One claim, as it was declared before the runs.

    Attributes:
      contrast: the weight of every arm; "ARM:prompt" is the arm routed by the prompt.
      direction: the sign of the contrast if the claim is true; 0: it lies within the margin.
      statistic: "mean" over the domains; "every_domain", where the domain with the weakest
        evidence decides; "specialisation"; "none" where nothing here can test it.
      reason: why nothing here can test it.
      note: what else must be known, such as when it was declared if not with the others.
    """

    id: str
    claim: str
    source: str
    statistic: str
    contrast: Mapping[str, float]
    direction: int
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """What the runs say about a claim.

    Attributes:
      effect: None where no seed has all the runs.
      p: of the claim alone, as it enters Holm's adjustment.
      verdict: one of `statistics.verdict`, "pending" or "not testable here".
      planned: how many seeds the study plans, 0 for a claim that it does not test.
      reason: why it could not be tested, what is missing, or which domain decides.
      domains: of a claim about every domain, the effect in each.
    """

    claim: Claim
    effect: Effect | None
    p: float
    verdict: str
    adjusted_p: float = math.nan
    planned: int = 0
    reason: str = ""
    domains: Mapping[str, Effect] = field(default_factory=dict)


def read_claims(path: Path) -> tuple[list[Claim], float]:
    """The claims and the margin of equivalence in nats; `ValueError` for a malformed one."""
    contents = json.loads(path.read_text("utf-8"))
    claims = []
    for name, entry in contents["claims"].items():
        if entry["statistic"] not in STATISTICS:
            raise ValueError(f"{path}: {name}: statistic {entry['statistic']!r} is unknown")
        if (entry["statistic"] == "none") != ("reason" in entry):
            raise ValueError(f"{path}: {name}: requires a reason if and only if nothing tests it")
        claims.append(Claim(name, **{"contrast": {}, "direction": 0, **entry}))
    return claims, contents["margin"]


def judge_claims(
    claims: list[Claim],
    margin: float,
    results: Results,
    split: str,
    keep: Keep | None = None,
    corpus: str = FIRST_CORPUS,
) -> list[Finding]:
    """Tests all claims on a split of a corpus; with `keep`, on a part of its instances.

    P-values are adjusted over all of these claims that the corpus will have runs for.
    """
    by_arm: dict[str, list[Record]] = {}
    for record in results.records(corpus):
        if record["kind"] == "run":
            by_arm.setdefault(record["arm"], []).append(record)
    found = [_test(claim, by_arm, results, split, keep, corpus, margin) for claim in claims]
    planned = [planned_seeds(claim, corpus) for claim in claims]
    found = [replace(f, planned=seeds) for f, seeds in zip(found, planned, strict=True)]
    family = {f.claim.id: f.p for f in found if f.planned}
    adjusted = holm(family)
    judged = []
    for finding in found:
        adjusted_p = adjusted.get(finding.claim.id, math.nan)
        said = _verdict(finding, adjusted_p, len(family), margin)
        judged.append(replace(finding, adjusted_p=adjusted_p, verdict=said))
    return judged


def _verdict(finding: Finding, adjusted_p: float, claims: int, margin: float) -> str:
    if not finding.planned or finding.verdict:
        return NOT_TESTABLE
    if finding.effect is None or finding.effect.seeds < finding.planned:
        return PENDING
    if finding.domains:
        return verdict_on_domains(finding, adjusted_p, claims, margin)
    return verdict(finding.effect, adjusted_p, finding.claim.direction, margin)


def planned_seeds(claim: Claim, corpus: str) -> int:
    """How many seeds of all its arms and their measurements are planned on the corpus."""
    by_name = {arm.name: arm for arm in arms.ARMS if arm.corpus == corpus}
    seeds = []
    for term in claim.contrast:
        name, _, routed = term.partition(":")
        needed = {routed} if routed else set()
        needed |= {"routing"} if claim.statistic == "specialisation" else set()
        arm = by_name.get(name)
        seeds.append(arm.seeds if arm is not None and needed <= {*arm.measures} else 0)
    return min(seeds, default=0)


def verdict_on_domains(finding: Finding, adjusted_p: float, claims: int, margin: float) -> str:
    """The verdict on a claim about every domain.

    "Supported" is decided by the domain with the weakest evidence. It is "contradicted" where a
    domain differs the other way, by a p-value times the number of domains and claims (Bonferroni),
    and "equivalent" where the interval of every domain lies within the margin.
    """
    sign, effects = finding.claim.direction, finding.domains.values()
    if all(is_within(effect, margin) for effect in effects):
        return "equivalent"
    if adjusted_p < 1 - LEVEL:
        return "supported"
    wrong = min((e.p for e in effects if e.mean * sign < 0), default=1.0)
    return "contradicted" if wrong * len(effects) * claims < 1 - LEVEL else "inconclusive"


def _test(
    claim: Claim,
    by_arm: Mapping[str, list[Record]],
    results: Results,
    split: str,
    keep: Keep | None,
    corpus: str,
    margin: float,
) -> Finding:
    """A finding without verdict; NOT_TESTABLE where more runs would not help."""
    if claim.statistic == "none":
        return Finding(claim, None, math.nan, "", reason=claim.reason)
    missing = sorted({arm_of(name) for name in claim.contrast} - by_arm.keys())
    if missing:
        return Finding(claim, None, math.nan, "", reason=f"no runs of {', '.join(missing)}")
    diverged = [
        record["id"]
        for name in claim.contrast
        for record in by_arm[arm_of(name)]
        if record["status"] == "diverged"
    ]
    if diverged:
        said = f"diverged: {', '.join(diverged)}"
        return Finding(claim, None, math.nan, NOT_TESTABLE, reason=said)
    if claim.statistic == "specialisation":
        return _specialisation(claim, by_arm, results, corpus)
    domains = contrast(claim.contrast, by_arm, results, split, keep, corpus)
    if not domains:
        return Finding(
            claim, None, math.nan, "", reason=f"its arms have no seed in common on {split}"
        )
    effect = paired_effect(domains)
    if claim.statistic != "every_domain":
        return Finding(claim, effect, p_of(effect, claim.direction, margin), "")
    effects = {name: paired_effect({name: domains[name]}) for name in domains}
    weakest = max(effects, key=lambda name: _evidence(effects[name], claim.direction))
    p = _evidence(effects[weakest], claim.direction)
    return Finding(claim, effect, p, "", reason=f"weakest in {weakest}", domains=effects)


def arm_of(name: str) -> str:
    """The arm of a contrast's term, which may say how it is routed."""
    return name.partition(":")[0]


def finished_runs(
    results: Results, corpus: str = FIRST_CORPUS, seeds: range | None = None
) -> ByArm:
    """The runs of a corpus by arm, with these seeds only if they are given.

    An arm with a diverged run among them is left out: the seeds that are left are not typical.
    """
    by_arm: ByArm = {}
    for record in results.records(corpus):
        if record["kind"] == "run" and (seeds is None or record["seed"] in seeds):
            by_arm.setdefault(record["arm"], []).append(record)
    lost = diverged_runs(results, corpus, seeds)
    return {arm: records for arm, records in by_arm.items() if arm not in lost}


def diverged_runs(
    results: Results, corpus: str = FIRST_CORPUS, seeds: range | None = None
) -> dict[str, list[str]]:
    """By arm, the ids of its runs that diverged."""
    found: dict[str, list[str]] = {}
    for record in results.records(corpus):
        is_lost = record["kind"] == "run" and record["status"] == "diverged"
        if is_lost and (seeds is None or record["seed"] in seeds):
            found.setdefault(record["arm"], []).append(record["id"])
    return found


def mean_of(records: Sequence[Record], name: str) -> float:
    """The mean of a number, or of the total among the counts of parameters, over the seeds."""
    values = [record[name] for record in records]
    return float(np.mean([x["total"] if isinstance(x, dict) else x for x in values]))


def contrast(
    weights: Mapping[str, float],
    by_arm: Mapping[str, list[Record]],
    results: Results,
    split: str,
    keep: Keep | None = None,
    corpus: str = FIRST_CORPUS,
) -> dict[str, Domain]:
    """The weighted sum of the arms' losses per seed and instance, over the seeds that all have."""
    losses: dict[str, dict[int, Losses]] = {}
    for name in weights:
        where = f"{split}_{name.partition(':')[2]}" if ":" in name else split
        losses[name] = {
            record["seed"]: found
            for record in by_arm[arm_of(name)]
            if (found := results.instances(record["id"], where))
        }
    seeds = sorted(set.intersection(*(set(of_seed) for of_seed in losses.values())))
    origins_of = results.held_out(corpus)["origins"][split] if seeds else {}
    domains = {}
    for domain, origins in origins_of.items():
        if not origins:  # a domain too small for an instance
            continue
        origin_I = np.array(origins)
        kept_I = np.ones(len(origin_I), bool) if keep is None else keep(domain, origin_I)
        if not kept_I.any():
            continue
        difference_SxI = np.stack(
            [sum(w * losses[name][seed][domain] for name, w in weights.items()) for seed in seeds]
        )
        domains[domain] = Domain(difference_SxI[:, kept_I], origin_I[kept_I])
    return domains


def _evidence(effect: Effect, direction: int) -> float:
    """The p-value of a domain for a claim: the smaller, the better; 1 if the sign is wrong."""
    return effect.p if effect.mean * direction > 0 or math.isnan(effect.p) else 1.0


def _specialisation(
    claim: Claim, by_arm: Mapping[str, list[Record]], results: Results, corpus: str
) -> Finding:
    """How much more routing differs between domains than under shuffled labels (validation)."""
    (arm,) = claim.contrast
    measured = [results.instances(record["id"], "routing") for record in by_arm[arm]]
    measured = [weights for weights in measured if weights]
    if not measured:
        reason = f"the routing of {arm} was not measured folder by folder"
        return Finding(claim, None, math.nan, "", reason=reason)
    origins = results.held_out(corpus)["origins"]["validation"]
    sizes = {domain: np.unique(origins[domain], return_counts=True)[1] for domain in measured[0]}
    effect = specialisation(measured, sizes)
    return Finding(
        claim, effect, effect.p, "", reason="its interval leaves out the choice of documents"
    )


def without_domain(domain: str) -> Keep:
    """All instances but those of a domain."""
    return lambda name, origin_I: np.full(len(origin_I), name != domain)


def numbers(finding: Finding, again: Finding) -> dict[str, Any]:
    """A claim's entry in docs/study.json: the first corpus, and the second where it has runs."""
    entry = _numbers(finding)
    entry["corpora"] = sum(found.effect is not None for found in (finding, again))
    return entry | ({"second_corpus": _numbers(again)} if again.effect else {})


def _numbers(finding: Finding) -> dict[str, Any]:
    numbers: dict[str, Any] = {"verdict": finding.verdict, **of_effect(finding.effect, finding.p)}
    numbers |= {"adjusted_p": _rounded(finding.adjusted_p), "planned_seeds": finding.planned}
    if finding.reason:
        numbers["reason"] = finding.reason
    if finding.domains:  # then p is that of the domain with the weakest evidence
        numbers["p_of_the_mean"] = _rounded(finding.effect.p if finding.effect else math.nan)
        domains = finding.domains.items()
        numbers["domains"] = {name: of_effect(effect, effect.p) for name, effect in domains}
    return numbers


def of_effect(effect: Effect | None, p: float) -> dict[str, Any]:
    """An effect's entry in docs/study.json."""
    return {
        "effect": effect and _rounded(effect.mean),
        "interval": effect and [_rounded(effect.low), _rounded(effect.high)],
        "p": _rounded(p),
        "seeds": effect.seeds if effect else 0,
    }


def _rounded(value: float) -> float | None:
    """With five significant digits, which keeps small p-values."""
    return None if math.isnan(value) else float(f"{value:.5g}")
