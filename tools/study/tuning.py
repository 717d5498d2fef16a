"""What was tuned: the trials of every family, in docs/study.json and in tables of the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.study import arms
from tools.study.results import Record, mean_loss
from tools.study.tables import Report, Table


def tuning(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """The trials of every family: what was varied, and the validation loss (None: diverged).

    The long ones have more steps.
    """
    grids = {family.name: list(family.grid) for family in arms.FAMILIES}
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] in ("trial", "long_trial"):
            names = grids.get(record["family"], list(record["settings"]))
            is_finished = record["status"] == "finished"
            found.setdefault(record["family"], []).append(
                {
                    "settings": {name: record["settings"][name] for name in names},
                    "steps": record["settings"]["train.steps"],
                    "validation_loss": round(mean_loss(record), 5) if is_finished else None,
                }
            )
    return found


def tuning_table(report: Report) -> Table:
    """The best short trial of every family, and which of its values are ends of what was tried."""
    grids = {family.name: family.grid for family in arms.FAMILIES}
    rows = []
    for name, trials in tuning(report.first.records).items():
        steps = min(trial["steps"] for trial in trials)
        short = [trial for trial in trials if trial["steps"] == steps]
        done = [trial for trial in short if trial["validation_loss"] is not None]
        if done:
            best = min(done, key=lambda trial: trial["validation_loss"])
            settings = ", ".join(f"{key}={value:g}" for key, value in best["settings"].items())
            ends = [
                key
                for key, value in best["settings"].items()
                if value in (min(grids[name][key]), max(grids[name][key]))
            ]
            loss = f"{best['validation_loss']:.4f}"
            rows.append([name, str(len(short)), settings, loss, ", ".join(ends)])
    return ["family", "trials", "best settings", "validation loss", "at an end of its grid"], rows


def long_tuning_table(report: Report) -> Table:
    """The learning rates that were tried at full length, with their validation losses."""
    rows = []
    for name, trials in tuning(report.first.records).items():
        long = [trial for trial in trials if trial["steps"] == arms.STEPS]
        losses = [trial["validation_loss"] for trial in long]
        best = min((loss for loss in losses if loss is not None), default=None)
        for trial, loss in zip(long, losses, strict=True):
            text = "diverged" if loss is None else f"{loss:.4f}"
            chosen = loss is not None and loss == best
            rows.append(
                [name, f"{trial['settings'][arms.RATE]:g}", text, _chosen(trial, long, chosen)]
            )
    return ["family", "learning rate", "validation loss", "chosen"], rows


def _chosen(trial: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], chosen: bool) -> str:
    """Whether a rate is the chosen one, and whether a further one was not tried."""
    rates = [other["settings"][arms.RATE] for other in trials]
    ends = {max(rates): ", the highest tried", min(rates): ", the lowest tried"}
    ends = ends if len(ends) > 1 else {}
    return "yes" + ends.get(trial["settings"][arms.RATE], "") if chosen else ""
