"""A run directory: what a training run leaves on disk, and how everyone else reads it.

config.json      the config, section by section
dataset.json     where the prepared data are, and the digest of their manifest; absent where the
                 model was trained elsewhere
tokenizer.json   a copy of the tokenizer of the prepared data, with tokenizer_special.json where its
                 special tokens were declared
metrics.jsonl    one JSON object per step
lock             held by the process that trains
tensorboard/     the metrics for TensorBoard
checkpoints/     one directory per step
profile/         profiler traces
diverged-N.json  what is known about the last of many skipped steps
evaluation.json  written by `evaluate`
analysis/        written by `analyze`

A run directory may be in an object store (gs://, s3://); docs/storage.md describes this.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lory_jax.config import check_fields, check_model_fields, fields_where, section_defaults
from lory_jax.data.manifest import TOKENIZER_NAME
from lory_jax.data.prepared import PreparedData
from lory_jax.data.special_tokens import SPECIAL_TOKENS_NAME
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import ConfigError, InputError
from lory_jax.json_text import parse_object
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import Params, build, init_params
from lory_jax.parallel import shardings
from lory_jax.run.checkpoints import Checkpoints, Meta
from lory_jax.run.lock import WorkdirLock, holder
from lory_jax.run.metric_lines import read_lines
from lory_jax.run.phases import phase_config
from lory_jax.run.same_run import config_changes
from lory_jax.run.step_choice import NEWEST, Step, parse_step
from lory_jax.storage import check_links, is_remote, storage_path, write_atomically

CONFIG, DATASET, METRICS = "config.json", "dataset.json", "metrics.jsonl"


class Dataset(NamedTuple):
    """The prepared data that a run is trained on."""

    path: str
    manifest_sha256: str


class TrainedParams(NamedTuple):
    """Parameters from a checkpoint, the config of their model, and their step."""

    model_config: ModelConfig
    params: Params
    step: int


class RunDirectory:
    """A run on disk, and which of its checkpoints to open.

    Files are read on first use; opening a directory without a run raises no error.

    Attributes:
      path: the directory.
      step: "newest", "best" (the lowest validation loss) or a step.
    """

    def __init__(self, path: str | Path, step: Step = NEWEST):
        self.path = storage_path(path)
        self.step = parse_step(step)

    def __str__(self) -> str:
        return str(self.path)

    # ---------------------------------------------------------------- where things are

    @property
    def config_file(self) -> Path:
        return self.path / CONFIG

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER_NAME

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoint_directory(self) -> Path:
        return self.path / "checkpoints"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def evaluation_file(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def analysis(self) -> Path:
        return self.path / "analysis"

    def diverged_file(self, step: int) -> Path:
        return self.path / f"diverged-{step}.json"

    # ---------------------------------------------------------------- what the files say

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The config, section by section; `InputError` if the directory holds none."""
        found = _read_json(self.config_file)
        for section, fields in found.items():
            if not isinstance(fields, dict):
                raise InputError(f"{self.config_file}: damaged, {section} must be an object")
        return found

    @functools.cached_property
    def train_config(self) -> dict[str, Any]:
        """The section `train` of the config; a field younger than the run has its default."""
        fields = section_defaults("train") | self.config.get("train", {})
        try:
            check_fields("train", fields)
        except ConfigError as error:
            raise InputError(f"{self.config_file}: damaged ({error})") from None
        return fields

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        """The model config of the expert phase, with `auto` resolved for this machine."""
        given = self.config.get("model", {})
        missing = [name for name in fields_where("model", is_size=True) if name not in given]
        if missing:
            raise InputError(f"{self.config_file}: damaged, config.model has no {missing[0]}")
        try:
            chosen_here = dict.fromkeys(("attention", "merged_ffn", "grouped_product"), "auto")
            fields = section_defaults("model") | given | chosen_here
            check_model_fields(fields)
            return ModelConfig.for_platform(fields, jax.default_backend())
        except (KeyError, TypeError, ConfigError) as error:
            raise InputError(f"{self.config_file}: no usable section model ({error})") from None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_file)

    @functools.cached_property
    def dataset(self) -> Dataset | None:
        """The prepared data of the run; None if the model was trained elsewhere."""
        path = self.path / DATASET
        if self.config_file.exists() and not path.exists():
            return None
        found = _read_json(path)
        fields = [found.get(name) for name in Dataset._fields]
        if not all(isinstance(value, str) and value for value in fields):
            raise InputError(f"{path}: malformed; must name path and manifest_sha256")
        return Dataset(*map(str, fields))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, without a last line that a killed run left unfinished."""
        if not self.metrics_file.is_file():
            raise InputError(f"{self.metrics_file}: missing; train first")
        return read_lines(self.metrics_file)

    def lock_holder(self) -> str | None:
        """Who trains in this directory at the moment, or None."""
        return holder(self.path)

    # ---------------------------------------------------------------- checkpoints

    def open_checkpoints(self) -> Checkpoints:
        """The checkpoints, for reading; `InputError` if there is no directory of them."""
        if not self.checkpoint_directory.is_dir():
            raise InputError(f"{self.checkpoint_directory}: missing; train first")
        return Checkpoints(self.checkpoint_directory)

    def load_params(self, mesh: Mesh) -> TrainedParams:
        """The parameters of the chosen checkpoint, which is a dense model during dense warm-up."""
        model_config = self.model_config

        def target(meta: Meta) -> dict[str, Any]:
            return {"params": abstract_params(phase_config(model_config, meta["phase"]), mesh)}

        checkpoints = self.open_checkpoints()
        tree, meta = checkpoints.restore_chosen(self.step, target)
        checkpoints.close()
        return TrainedParams(
            phase_config(model_config, meta["phase"]), tree["params"], meta["step"]
        )

    # ---------------------------------------------------------------- the prepared data

    def data_path(self, data: Path | None = None) -> Path:
        """Where the prepared data are: `data` if given, else where the run found them."""
        if data is not None:
            return storage_path(data)
        if self.dataset is None:
            raise InputError(
                f"data: {self} does not record its data; requires the directory of prepared data"
            )
        return storage_path(self.dataset.path)

    def open_data(self, data: Path | None = None) -> PreparedData:
        """The prepared data of the run, from `data` if they were moved.

        A model that was trained elsewhere (`convert from-hf`) accepts any data made with its
        tokenizer.

        Raises:
          InputError: there are none, or they are not the ones that the run was trained on.
        """
        directory = self.data_path(data)
        try:
            prepared = PreparedData.open(directory)
        except InputError as error:
            raise InputError(
                f"data: {directory} does not hold what {self} was trained on ({error})"
            ) from None
        if self.dataset is None:
            self.check_same_ids(prepared)
        elif prepared.digest != self.dataset.manifest_sha256:
            raise InputError(f"data: {directory} is not what {self} was trained on")
        return prepared

    def check_same_ids(self, data: PreparedData) -> None:
        """Raises `InputError` unless the tokenizer of `data` has the token ids of this run."""
        if not data.tokenizer.same_ids(self.tokenizer):
            raise InputError(
                f"data: the tokenizer of {data.directory} differs from that of {self}; "
                f"prepare it with tokenizer={self.tokenizer_file}"
            )

    # ---------------------------------------------------------------- training

    def open_for_training(
        self,
        config: dict[str, Any],
        data: PreparedData,
        change_steps: bool = False,
    ) -> WorkdirLock | None:
        """Creates the directory of a new run, or checks that the run in it is the same.

        Args:
          config: the config to train with.
          data: the prepared data to train on.
          change_steps: whether `train.steps` may differ from that of the run so far.

        Returns:
          the lock, which must be kept while the run trains; None in processes other than 0.

        Raises:
          InputError: another process trains in the directory, it cannot be written, or it holds a
            run with another config or other data.
        """
        dataset = Dataset(data.address, data.digest)
        try:
            if not is_remote(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                check_links(self.path)  # nothing is written elsewhere
            lock = WorkdirLock(self.path) if jax.process_index() == 0 else None
            is_new = not self.config_file.exists()
            changed = [] if is_new else self.check_same_run(config, dataset, change_steps)
            if lock is not None:
                if is_new:
                    self._write_start(dataset, data.tokenizer)
                if changed:
                    print(f"changed since the run began: {'; '.join(changed)}", flush=True)
                if is_new or changed:
                    write_atomically(self.config_file, json.dumps(config, indent=1) + "\n")
                self._remove_temporary_files()
        except OSError as error:
            raise InputError(f"{self}: cannot be written ({error.strerror or error})") from None
        for name in ("config", "model_config", "train_config"):
            vars(self).pop(name, None)  # what was just written replaces what was read before
        return lock

    def check_same_run(
        self, config: dict[str, Any], dataset: Dataset, change_steps: bool
    ) -> list[str]:
        """The differences to the run's config that are allowed; `InputError` if others exist."""
        changed, refused = config_changes(self.config, config, change_steps)
        before = self.dataset
        if before is None:
            raise InputError(f"{self.path / DATASET}: missing, so the run cannot be resumed")
        if before.manifest_sha256 != dataset.manifest_sha256:
            refused.append(f"data: made from {before.path}, wanted {dataset.path}")
        if refused:
            raise InputError(f"{self}: holds a run with another config ({'; '.join(refused)})")
        return changed

    def _write_start(self, dataset: Dataset, tokenizer: Tokenizer) -> None:
        write_atomically(self.tokenizer_file, tokenizer.json_text)
        if tokenizer.is_declared:
            write_atomically(self.path / SPECIAL_TOKENS_NAME, tokenizer.special.to_json())
        write_atomically(self.path / DATASET, json.dumps(dataset._asdict(), indent=1) + "\n")

    def _remove_temporary_files(self) -> None:
        """Removes the temporary files of processes that were killed while writing."""
        if not is_remote(self.path):
            for path in self.path.glob("*.tmp-*"):
                path.unlink()


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """Shapes, types and shardings of a model's parameters."""
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(build(config)[1], mesh),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes(), path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is {path.parent} a run directory?") from None
