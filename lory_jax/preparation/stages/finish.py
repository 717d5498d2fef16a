"""Stage `finish`: the prepared directory, as training reads it."""

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.data.manifest import TOKENIZER_NAME, Manifest, file_sha256, write_manifest
from lory_jax.data.special_tokens import SPECIAL_TOKENS_NAME
from lory_jax.errors import InputError
from lory_jax.preparation.engine.columns import read_array
from lory_jax.preparation.engine.work import Facts, Work
from lory_jax.preparation.packing import write_instance_domains
from lory_jax.preparation.stages import evaluation, order, plan, read
from lory_jax.preparation.stages.inputs import to_files
from lory_jax.preparation.stages.split import TRAIN, evaluation_splits
from lory_jax.preparation.statistics import joined_figures, split_counts
from lory_jax.storage import is_remote

DROPPED, REJECTS = "dropped", "rejects"
REPORT_NAME = "report.html"
TIMINGS_NAME = "timings.json"
NOTHING = hashlib.sha256().hexdigest()
MOD = 2**64

Files = dict[str, dict[str, Any]]


def count(work: Work) -> int:
    """One task."""
    return 1


def run(work: Work, task: int, out: Path) -> Facts:
    """Collects the files, checks that no document was lost, and writes manifest and report."""
    from lory_jax.report import preparation as page

    files: Files = {}
    fitted = work.marker("fit")["sha256"]
    names = [name for name in (TOKENIZER_NAME, SPECIAL_TOKENS_NAME) if name in fitted]
    _collect(work, "fit", 0, {name: name for name in names}, out, files)
    _collect_training(work, out, files)
    for part in range(evaluation.count(work)):
        names = _files_of(work, "evaluation", part, evaluation_splits(work))
        _collect(work, "evaluation", part, {name: name for name in names}, out, files)
    _collect_dropped(work, out, files)

    counts = {TRAIN: _training_counts(work)}
    counts |= {split: _held_out_counts(work, split) for split in evaluation_splits(work)}
    if counts[TRAIN]["instances"] < 1:
        raise InputError("corpus too small: near duplicates left out, no instance is left")
    _write_instance_domains(work, sorted(counts[TRAIN]["domains"]), out, files)
    manifest = Manifest(
        settings=work.settings,
        sequence_length=work.settings["sequence_length"],
        vocab_size=work.values("fit")["vocab_size"],
        counts=counts,
        similarity=_similarity(work),
        files=files,
        inputs=to_files(plan.load(work)["inputs"]),
        dropped=_dropped_counts(work),
    )
    _check_conserved(work, manifest)
    report = out / REPORT_NAME
    report.write_text(page.render(manifest, _for_report(work)), encoding="utf-8")
    files[REPORT_NAME] = {"sha256": file_sha256(report), "bytes": report.stat().st_size}
    # The timings are not listed in the manifest, because they differ from run to run.
    (out / TIMINGS_NAME).write_text(json.dumps(_timings(work), indent=1) + "\n")
    write_manifest(replace(manifest, files=dict(sorted(files.items()))), out)
    return Facts()


def _files_of(work: Work, stage: str, task: int, folders: tuple[str, ...]) -> list[str]:
    names = work.marker(stage, task)["sha256"]
    return [name for name in names if name.partition("/")[0] in folders and "/" in name]


def _collect(
    work: Work, stage: str, task: int, names: dict[str, str], out: Path, files: Files
) -> None:
    """Puts files of a task into the prepared directory; `names`: theirs, and the new ones."""
    hashes = work.marker(stage, task)["sha256"]
    for name, new in names.items():
        source, target = work.directory(stage, task) / name, out / new
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(source):
            with source.open("rb") as reader, target.open("wb") as writer:
                shutil.copyfileobj(reader, writer)
        else:
            os.link(source, target)
        files[new] = {"sha256": hashes[name], "bytes": target.stat().st_size}


def _collect_training(work: Work, out: Path, files: Files) -> None:
    tasks = range(order.count(work))
    parts = [(task, name) for task in tasks for name in _files_of(work, "order", task, (TRAIN,))]
    for i, (task, name) in enumerate(parts):
        new = f"{TRAIN}/part-{i:05d}-of-{len(parts):05d}.array_record"
        _collect(work, "order", task, {name: new}, out, files)


def _collect_dropped(work: Work, out: Path, files: Files) -> None:
    for stage in ("read", "select", "order", "evaluation"):
        for task in range(_count(work, stage)):
            names = {read.DROPPED_NAME: f"{DROPPED}/{stage}-{task:05d}.jsonl"}
            if stage == "read":
                names[read.REJECTS_NAME] = f"{REJECTS}/{task:05d}.jsonl"
            hashes = work.marker(stage, task)["sha256"]
            for name, new in names.items():
                if hashes[name] != NOTHING:
                    _collect(work, stage, task, {name: new}, out, files)


def _count(work: Work, stage: str) -> int:
    counts = {"order": order.count, "evaluation": evaluation.count}
    return counts.get(stage, read.count)(work)


def _write_instance_domains(work: Work, names: list[str], out: Path, files: Files) -> None:
    """Writes the domain of every training instance, in the order of the shards."""
    numbers = {name: i for i, name in enumerate(names)}
    all_names = work.values("split")["domains"]
    # Some domains may have held-out documents only.
    number_D = np.array([numbers.get(name, 0) for name in all_names], np.int64)
    parts = [
        read_array(work.directory("order", task), "instance_domains")
        for task in range(order.count(work))
    ]
    path = write_instance_domains(out, number_D[np.concatenate(parts)])
    files[path.name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def _training_counts(work: Work) -> dict[str, Any]:
    parts = [work.values("order", task) for task in range(order.count(work))]
    domains: dict[str, Counter[str]] = {}
    for part in parts:
        for name, numbers in part["domains"].items():
            domains.setdefault(name, Counter()).update(numbers)
    return split_counts(
        {name: dict(domains[name]) for name in sorted(domains)},
        [part["lengths"] for part in parts],
        [part["tokens"] for part in parts],
        work.settings["sequence_length"],
        by_domain=False,
    )


def _held_out_counts(work: Work, split: str) -> dict[str, Any]:
    parts = [work.values("evaluation", task) for task in range(evaluation.count(work))]
    domains = {name: numbers for part in parts for name, numbers in part["counts"][split].items()}
    return split_counts(
        {name: domains[name] for name in sorted(domains)},
        [part["lengths"][split] for part in parts],
        [numbers["tokens"] for numbers in domains.values()],
        work.settings["sequence_length"],
        by_domain=True,
    )


def _similarity(work: Work) -> dict[str, Any]:
    parts = [work.values("order", task) for task in range(order.count(work))]
    similarity: dict[str, Any] = {"method": parts[0]["method"]}
    # Random order within each of several clusters would not be random order of the corpus.
    names = parts[0]["figures"] if len(parts) == 1 else [work.settings["order"]]
    for name in names:
        similarity[name] = joined_figures([part["figures"][name] for part in parts])
    return similarity


def _dropped_counts(work: Work) -> dict[str, int]:
    dropped: Counter[str] = Counter()
    for task in range(read.count(work)):
        marker = work.marker("read", task)
        dropped["short"] += marker["values"]["pieces"] - marker["rows"]
        dropped.update(work.values("select", task)["dropped"])
    for task in range(order.count(work)):
        dropped["near duplicate"] += work.values("order", task)["near_duplicates"]
    for task in range(evaluation.count(work)):
        dropped["over eval_instances"] += work.values("evaluation", task)["dropped"]
    return {reason: number for reason, number in sorted(dropped.items()) if number}


def _check_conserved(work: Work, manifest: Manifest) -> None:
    """Checks that every document is in exactly one stream or drop list, by number and by hash."""
    tasks = {stage: range(_count(work, stage)) for stage in ("read", "select", "order")}
    tasks["evaluation"] = range(evaluation.count(work))
    markers = {s: [work.marker(s, task) for task in each] for s, each in tasks.items()}
    ends = markers["order"] + markers["evaluation"]
    # Documents that `read` itself drops are in none of its sums.
    lost = markers["select"] + ends
    hashes = sum(m["hash_sum"] for m in ends) + sum(m["values"]["dropped_hash"] for m in lost)
    wanted = sum(m["hash_sum"] for m in markers["read"])
    rows = sum(m["rows"] for m in ends) + sum(manifest.dropped.values())
    pieces = sum(m["values"]["pieces"] for m in markers["read"])
    assert rows == pieces, f"{pieces} documents were read, {rows} were written or dropped"
    assert hashes % MOD == wanted % MOD, "other documents were written than were read"


def _timings(work: Work) -> dict[str, float]:
    """Returns the seconds that the tasks of each stage took together."""
    stages = "plan read deduplicate split select fit encode cluster assign balance order evaluation"
    return {stage: _seconds(work, stage) for stage in stages.split()}


def _seconds(work: Work, stage: str) -> float:
    tasks = json.loads((work.root / f"{stage}.json").read_text("utf-8"))["tasks"]
    return round(sum(work.marker(stage, task)["seconds"] for task in range(tasks)), 2)


def _rejects_by_reason(work: Work) -> dict[str, int]:
    """Returns how often each reason occurs, without what it says in brackets about one document."""
    reasons: Counter[str] = Counter()
    for task in range(read.count(work)):
        if work.values("read", task)["read"]["rejects"]:
            path = work.directory("read", task) / read.REJECTS_NAME
            with path.open("rb") as lines:
                reasons.update(json.loads(line)["reason"].partition(" (")[0] for line in lines)
    return dict(reasons.most_common())


def _for_report(work: Work) -> dict[str, Any]:
    """Returns what the report shows and the manifest does not hold."""
    parts = [work.values("order", task) for task in range(order.count(work))]
    return {
        "shard_sizes": work.values("balance")["sizes"],
        "lengths": [part["lengths"] for part in parts],
        "cosines": [part["cosines"] for part in parts],
        "rejects": _rejects_by_reason(work),
        "examples": [example for part in parts for example in part["examples"]],
        "sample": work.values("fit")["sample"],
    }
