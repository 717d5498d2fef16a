"""One run of the study: training in a process on one core, then all measurements in another."""

import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.errors import InputError
from lory_jax.evaluation.held_out import read_instances
from lory_jax.run.directory import RunDirectory
from tools.study.queue import MEASURED, Job
from tools.study.results import Results, training_digest

DIVERGED = 3  # exit status of train
POLL_SECONDS = 0.2
MODULES = {
    "train": "lory_jax.train",
    "evaluate": "lory_jax.evaluate",
    "measure": "tools.study.measure",
}


class Stopped(Exception):
    """The run was asked to stop; it is saved and can be resumed."""


@dataclass(frozen=True)
class Runner:
    """Makes runs one at a time; several threads may each make their own.

    Attributes:
      recipe: what `--config` names.
      data: returns the prepared data of a corpus and order of documents, made if need be.
      work: run directories, which are removed when their result is written, but for those that
        other runs start from.
      results: where results go.
      splits: the held-out sets that the data have.
      stop: when it is set, the run under way is saved and `Stopped` is raised.
      modules: what is run to train, to evaluate and to measure.
      digest: what identifies training data, by their directory.
    """

    recipe: str
    data: Callable[[str, str], Path]
    work: Path
    results: Results
    splits: tuple[str, ...]
    stop: threading.Event
    modules: Mapping[str, str] = field(default_factory=lambda: MODULES)
    digest: Callable[[Path], str] = training_digest

    def run(self, job: Job, settings: Mapping[str, Any], core: int) -> None:
        """Makes or resumes a run and writes its result.

        Raises:
          Stopped: `stop` was set.
          InputError: a process failed.
        """
        workdir = self.work / job.id
        fields = [f"--config.{name}={value}" for name, value in settings.items()]
        data = self.data(*job.data)
        flags = [f"--config={self.recipe}", *fields, f"--data={data}"]
        if job.parents:
            flags.append("--init_from=" + ",".join(str(self.work / name) for name in job.parents))
        status = self._process(
            self.modules["train"], job, core, *flags, f"--workdir={workdir}", may_diverge=True
        )
        if status == DIVERGED:
            self.results.write(self._describe(job, settings, data) | {"status": "diverged"}, {})
        elif job.trial is not None:
            self.results.write(self._describe(job, settings, data) | trial_result(workdir), {})
        else:
            self._measure(job, settings, core, workdir, data)
        if not job.keeps_run:
            shutil.rmtree(workdir)

    def _measure(
        self, job: Job, settings: Mapping[str, Any], core: int, workdir: Path, data: Path
    ) -> None:
        wanted = [f"--{name}" for name in job.measures if name == "routing"]
        measured, evaluations = workdir / MEASURED, self._evaluations(job)
        todo = [("evaluate", workdir / f"{name}.json", f) for name, f in evaluations.items()]
        todo.append(("measure", measured, wanted))
        where = (f"--workdir={workdir}", f"--data={data}")
        commands = [
            [self.modules[verb], *where, f"--out={out}", *flags]
            for verb, out, flags in todo
            if not out.is_file()
        ]
        if commands:
            self._process("tools.study.in_turn", job, core, json.dumps(commands))
        losses, instances, seconds = {}, {}, {}
        for name in evaluations:
            out = workdir / f"{name}.json"
            found = json.loads(out.read_text("utf-8"))
            perplexity = {"": found["perplexity"]}
            perplexity |= {f"_top{k}": of_k for k, of_k in found.get("top_k_experts", {}).items()}
            for end, by_domain in perplexity.items():
                losses[name + end] = {d: math.log(x) for d, x in by_domain.items()}
                path = out.with_name(f"{name}{end}_instances.npz")
                instances[name + end], _ = read_instances(path)
            seconds[name] = found["seconds"]
        record = self._describe(job, settings, data) | {"status": "finished", "losses": losses}
        found = json.loads(measured.read_text("utf-8"))
        if by_origin := found.pop("routing_by_origin", None):
            instances["routing"] = {d: np.array(w_OxYxE) for d, w_OxYxE in by_origin.items()}
        record |= found | {"evaluation_seconds": seconds}
        self.results.write(record, instances)

    def _describe(self, job: Job, settings: Mapping[str, Any], data: Path) -> dict[str, Any]:
        """What a result says about its run, before it is measured."""
        return {
            "id": job.id,
            "kind": job.kind,
            "arm": job.source.name,
            "family": job.family,
            "seed": job.seed,
            "corpus": job.corpus,
            "data": job.data[1],
            "training_digest": self.digest(data),
            "settings": dict(settings),
        }

    def _evaluations(self, job: Job) -> dict[str, list[str]]:
        """The flags of every evaluation of an arm."""
        kept = [name.removeprefix("top") for name in job.measures if name.startswith("top")]
        more = [f"--top_k_experts={','.join(kept)}"] if kept else []
        if job.first_position:
            more.append(f"--first_position={job.first_position}")
        flags = {split: [f"--split={split}", *more] for split in self.splits}
        if "prompt" in job.measures:
            for split in self.splits[1:]:
                flags[f"{split}_prompt"] = [f"--split={split}", "--routing=prompt"]
        return flags

    def _process(
        self, module: str, job: Job, core: int, *flags: str, may_diverge: bool = False
    ) -> int:
        """Runs a module to its end; returns 0 or, of a training run, `DIVERGED`."""
        if self.stop.is_set():
            raise Stopped
        log = self.work / "logs" / f"{job.id}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tools.study.pinned", str(core), module]
        with log.open("a") as file:
            # In a session of its own: Ctrl-C reaches this process alone, which then asks once.
            process = subprocess.Popen(
                [*command, *flags], stdout=file, stderr=file, start_new_session=True
            )
            status = self._wait(process)
        if self.stop.is_set() and status != 0:
            raise Stopped
        if status != 0 and not (may_diverge and status == DIVERGED):
            last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
            raise InputError(f"{job.id}: {module} failed with status {status}; {log}: {last}")
        return status

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Waits for the end; passes a stop on, once, and waits until the process has saved."""
        while not self.stop.is_set():
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        process.send_signal(signal.SIGTERM)
        return process.wait()


def trial_result(workdir: Path) -> dict[str, Any]:
    """What a finished trial is judged by: the last validation of its training, and nothing else."""
    lines = RunDirectory(workdir).read_metrics()
    return {
        "status": "finished",
        "steps": lines[-1]["step"],
        "step_seconds": statistics.median(line["step_seconds"] for line in lines),
        "losses": {"validation": lines[-1]["validation_loss_by_domain"]},
    }
