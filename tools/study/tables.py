"""The tables of the study's pages, and what they are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lory_jax.model.routing_rules import MERGED
from tools.study import arms
from tools.study.claims import NOT_TESTABLE, PENDING, Finding
from tools.study.results import Record, mean_loss
from tools.study.statistics import Effect
from tools.study.words import COUNTED

VERDICTS = ("supported", "contradicted", "equivalent", "inconclusive", PENDING, NOT_TESTABLE)
HEADLINES = ("gain", "gain_redrawn")  # the claims that are looked at from several sides
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Corpus:
    """What the runs on one corpus say.

    Attributes:
      findings: on every claim.
      variants: for the headline claims, the finding on parts of the instances, by name.
      neighbours: validation loss of the dense baseline's neighbours minus its own, and the seeds.
    """

    name: str
    findings: list[Finding]
    variants: dict[str, dict[str, Finding]]
    records: list[Record]
    neighbours: dict[str, tuple[float, int]]


@dataclass(frozen=True)
class Report:
    """Everything that the pages show.

    Attributes:
      first: the corpus on which everything is tuned; `second` repeats the main contrasts.
      audit: what tools/study/audit.py found about the first corpus, or None.
      folders: how few folders the held-out instances of the first corpus come from, in words.
      ladder: what tools/study/ladder.py makes of stage C, and its points that are missing or
        diverged.
      factors: the effects of stage B, in words (tools/study/factors.py).
      factors_unfinished: its combinations that are missing or diverged.
    """

    split: str
    first: Corpus
    second: Corpus
    ladder: dict[str, Any]
    audit: dict[str, Any] | None
    margin: float
    folders: str
    factors: dict[str, Effect]
    factors_unfinished: tuple[list[str], list[str]]

    @property
    def corpora(self) -> tuple[Corpus, Corpus]:
        return self.first, self.second


def by_verdict(findings: Sequence[Finding]) -> list[Finding]:
    """What is decided comes first, and what is not tested last."""
    return sorted(findings, key=lambda finding: VERDICTS.index(finding.verdict))


def claims_table(findings: Sequence[Finding]) -> Table:
    header = [
        "name",
        "claim",
        "source",
        "verdict",
        "effect",
        "95 % interval",
        "adjusted p",
        "seeds",
    ]
    notes = claim_notes(findings)
    rows = []
    for f in by_verdict(findings):
        note = f" [note {notes.index(f.claim.note) + 1}]" if f.claim.note else ""
        said = [f.claim.id, f.claim.claim + note, f.claim.source, _verdict(f)]
        rows.append([*said, *_figures(f)])
    return header, rows


def claim_notes(findings: Sequence[Finding]) -> list[str]:
    """What must be known about single claims, in the order of their table."""
    notes = (finding.claim.note for finding in by_verdict(findings))
    return list(dict.fromkeys(filter(None, notes)))


def again_table(report: Report) -> Table:
    """The claims that have runs on the second corpus."""
    header = ["name", "claim", "verdict", "effect", "95 % interval", "adjusted p", "seeds"]
    findings = by_verdict(report.second.findings)
    tested = [finding for finding in findings if finding.effect is not None]
    return header, [[f.claim.id, f.claim.claim, _verdict(f), *_figures(f)] for f in tested]


def variants_table(report: Report) -> Table:
    """The headline claims on parts of the instances; p of each alone, and of the mean."""
    header = ["corpus", "claim", "on", "effect", "95 % interval", "p of the mean", "seeds"]
    rows = []
    for corpus in report.corpora:
        by_id = {finding.claim.id: finding for finding in corpus.findings}
        for name, variants in corpus.variants.items():
            for part, finding in {"all instances": by_id[name], **variants}.items():
                if finding.effect is not None:
                    figures = _effect(finding.effect, finding.effect.p)
                    rows.append([corpus.name, name, part, *figures])
    return header, rows


def domains_table(report: Report) -> Table:
    """The effect of the headline claims domain by domain; p of each alone."""
    header = ["corpus", "claim", "domain", "effect", "95 % interval", "p", "seeds"]
    rows = [
        [corpus.name, finding.claim.id, domain, *_effect(effect, effect.p)]
        for corpus in report.corpora
        for finding in corpus.findings
        if finding.claim.id in HEADLINES
        for domain, effect in finding.domains.items()
    ]
    return header, rows


def changes(arm: arms.Arm, base: str = "") -> str:
    """How an arm differs from the best of its family, which is named unless it is `base`."""
    parts = [f"{name.rpartition('.')[2]}={value}" for name, value in arm.settings.items()]
    parts += [f"{name.rpartition('.')[2]} times {x:g}" for name, x in arm.factors.items()]
    if arm.data != "similar":
        parts.append(f"{arm.data} order")
    if arm.parents:
        parts.append(f"{arm.steps} steps from {' + '.join(arm.parents)}")
    elif arm.steps != arms.STEPS:
        parts.append(f"{arm.steps:,} steps")
    if arm.family not in (arm.name, base):
        parts.append(f"tuned as {arm.family}")
    return ", ".join(parts)


def arms_table(corpus: Corpus, split: str) -> Table:
    """One row per arm: seeds, mean loss, FLOPs, how its experts differ, and their load."""
    by_arm: dict[str, list[Record]] = {}
    for record in corpus.records:
        if record["kind"] == "run":
            by_arm.setdefault(record["arm"], []).append(record)
    rows = []
    for arm in arms.ARMS:
        if arm.corpus != corpus.name or arm.name not in by_arm:
            continue
        finished = [r for r in by_arm[arm.name] if r["status"] == "finished"]
        losses = [mean_loss(r, split) for r in finished if split in r["losses"]]
        rows.append(
            [
                arm.name,
                changes(arm),
                _seeds(len(finished), len(by_arm[arm.name])),
                f"{np.mean(losses):.4f}" if losses else "diverged",
                f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "",
                _mean(finished, "flops_per_token", "{:.3g}"),
                _mean([r for r in finished if _routes_segments(r)], "experts_used", "{:.0%}"),
                _mean(finished, "expert_cosine", "{:.3f}"),
                _mean([r.get("experts_per_token", {}) for r in finished], "mean", "{:.2f}"),
                _mean([r.get("load_violation", {}) for r in finished], "last", "{:.2f}"),
            ]
        )
    header = ["arm", "changed", "seeds", f"{split} loss", "s.d. of seeds", "FLOPs a token"]
    return [*header, "experts used", "expert cosine", "experts a token", "MaxVio"], rows


def _seeds(finished: int, all_runs: int) -> str:
    """How many seeds a mean has; those that diverged are not in it."""
    lost = all_runs - finished
    return str(finished) if not lost else f"{finished}, and {lost} diverged"


def _routes_segments(record: Record) -> bool:
    """Whether a segment's weights say what its tokens go through; of two experts, both do."""
    routing = record["settings"].get("model.routing", "causal")
    experts = record["settings"].get("model.num_experts", 8)
    return experts > 2 and routing in (*MERGED, "expert_choice_segment")


def fair_start_table(report: Report) -> Table:
    """The neighbours of the dense baseline, and of the ladder's far ends, at full length."""
    rows = [
        [corpus.name, name, signed(value), str(seeds)]
        for corpus in report.corpora
        for name, (value, seeds) in corpus.neighbours.items()
    ]
    return ["corpus", "changed", "validation loss minus that of the unchanged", "seeds"], rows


def ladder_table(report: Report) -> Table:
    """The multipliers, by both ways to count parameters."""
    laws = report.ladder.get("laws", {})
    pairs = zip(*(laws[count]["multipliers"] for count in COUNTED if laws), strict=True)
    header = ["width", "experts"]
    for words in COUNTED.values():
        header += [f"worth a dense model times ({words})", "95 % interval"]
    return header, [
        [
            str(of_counts[0]["width"]),
            str(of_counts[0]["experts"]),
            *(text for row in of_counts for text in _multiplier(row)),
        ]
        for of_counts in pairs
    ]


def law_table(report: Report) -> Table:
    """What the law's parameters are, by both ways to count parameters."""
    rows = []
    for count, law in report.ladder.get("laws", {}).items():
        for name, found in law["parameters"].items():
            rows.append([COUNTED[count], name, *_ranged(found["value"], found["interval"])])
        rows.append([COUNTED[count], "lack of fit, nats", f"{law['lack_of_fit']:.4f}", ""])
    return ["parameters counted", "of the law", "value", "95 % interval"], rows


def _multiplier(row: Mapping[str, Any]) -> list[str]:
    value, interval = _ranged(row["multiplier"], row["interval"])
    return [f"{value} (extrapolated)" if row["beyond"] else value, interval]


def _ranged(value: float, interval: Sequence[float]) -> list[str]:
    return [f"{value:.3g}", f"{interval[0]:.3g} to {interval[1]:.3g}"]


def factors_table(report: Report) -> Table:
    """Stage B: main effects and interactions."""
    rows = [[words, *_effect(effect, effect.p)] for words, effect in report.factors.items()]
    return ["changed", "effect on Lory's loss", "95 % interval", "p", "seeds"], rows


def _verdict(finding: Finding) -> str:
    return f"{finding.verdict} ({finding.reason})" if finding.reason else finding.verdict


def _figures(finding: Finding) -> list[str]:
    effect = finding.effect
    if effect is None:
        return ["", "", "", f"0 of {finding.planned}" if finding.planned else ""]
    *figures, seeds = _effect(effect, finding.adjusted_p)
    is_short = effect.seeds < finding.planned
    return [*figures, f"{seeds} of {finding.planned}" if is_short else seeds]


def _effect(effect: Effect, p: float) -> list[str]:
    """The mean, its interval, a p-value, and the number of seeds."""
    has_interval = not np.isnan(effect.low)
    return [
        signed(effect.mean),
        f"{signed(effect.low)} to {signed(effect.high)}" if has_interval else "",
        f"{p:.2g}" if has_interval else "",
        str(effect.seeds),
    ]


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, which is a proper minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _mean(records: Sequence[Record], name: str, text: str) -> str:
    values = [record[name] for record in records if record.get(name) is not None]
    return text.format(float(np.mean(values))) if values else ""


def audit_table(report: Report) -> Table:
    """How much of the held-out instances was seen in training, on the splits that are compared."""
    found = report.audit or {"overlap": {}, "high": 1.0}
    rows = [
        [
            split,
            domain,
            f"{np.mean(shares):.1%}",
            f"{np.mean(np.array(shares) >= found['high']):.1%}",
        ]
        for split, domains in found["overlap"].items()
        if split in ("validation", report.split)
        for domain, shares in domains.items()
    ]
    return ["held-out set", "domain", "13-grams seen in training", "instances with most seen"], rows
