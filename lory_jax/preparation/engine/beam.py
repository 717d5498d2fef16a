"""The Beam engine: the tasks of a stage as elements of a Beam pipeline.

Beam is given numbers of tasks, never documents, so a runner that keeps its data in memory, as the
DirectRunner does, holds almost nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lory_jax.errors import InputError
from lory_jax.preparation.engine.work import Stage, Work, find_stage, run_task


class BeamPipelines:
    """Runs each stage as a pipeline of its own, so that a stage begins when the last one ended.

    Args of the constructor:
      workers: processes of the DirectRunner; other runners have options of their own.
      options: options of Beam, such as `runner=DataflowRunner`.
    """

    def __init__(self, workers: int, options: Sequence[str]):
        _import_beam()
        direct = [
            "--runner=DirectRunner",
            f"--direct_num_workers={workers}",
            f"--direct_running_mode={'multi_processing' if workers > 1 else 'in_memory'}",
        ]
        has_runner = any(option.startswith("runner=") for option in options)
        self._options = [*([] if has_runner else direct), *(f"--{option}" for option in options)]

    def run(self, work: Work, stage: Stage, tasks: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs tasks; yields number and rows of each when all have ended."""
        beam = _import_beam()
        from apache_beam.options.pipeline_options import PipelineOptions

        root, name = str(work.root), stage.name
        try:
            with beam.Pipeline(options=PipelineOptions(self._options)) as pipeline:
                _ = (
                    pipeline
                    | "tasks" >> beam.Create(list(tasks), reshuffle=True)
                    | name >> beam.Map(_run, root, name)
                )
        except RuntimeError as error:
            raise InputError(f"stage {name}: Beam's pipeline failed: {_cause(error)}") from error
        for task in tasks:
            yield task, work.marker(name, task)["rows"]

    def close(self) -> None:
        """Nothing outlives a pipeline."""


def _run(task: int, root: str, stage: str) -> int:
    from lory_jax.preparation.stages import STAGES

    return run_task(root, find_stage(STAGES, stage), task)


def _import_beam() -> Any:
    try:
        import apache_beam
    except ImportError as error:
        raise InputError(
            f"engine: beam requires Apache Beam ({error}); pip install -r requirements-beam.txt"
        ) from None
    return apache_beam


def _cause(error: RuntimeError) -> str:
    """The line of the task's own error, which Beam wraps in the traceback of its worker."""
    lines = [line.strip() for line in str(error).splitlines() if "Error" in line]
    return lines[-1] if lines else str(error).strip().splitlines()[-1]
