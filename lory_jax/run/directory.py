"""What a run leaves in its work directory, and how other verbs read it.

config.json      the config, section by section
dataset.json     where the prepared data are, and the hash of their manifest; none where the model
                 was trained elsewhere
tokenizer.json   a copy of the data's
metrics.jsonl    one object per step
lock             held by the process that trains
tensorboard/     the same for TensorBoard
checkpoints/     one directory per step

It may be in an object store (gs://, s3://): docs/storage.md.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lory_jax.config import may_change, section_defaults
from lory_jax.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, differences
from lory_jax.data.prepared import PreparedData
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import Params, build, init_params
from lory_jax.parallel import shardings
from lory_jax.run.checkpoints import Checkpoints, Meta
from lory_jax.run.lock import WorkdirLock
from lory_jax.storage import is_remote, storage_path, write_atomically
from lory_jax.training.monitoring.log_files import METRICS

CONFIG, DATASET = "config.json", "dataset.json"

DENSE, EXPERTS = "dense", "experts"  # the phases of a run


def phase_config(config: ModelConfig, phase: str) -> ModelConfig:
    """The model that a phase trains: during the dense warm-up, the dense baseline."""
    return dataclasses.replace(config, num_experts=0) if phase == DENSE else config


def open_workdir(
    workdir: Path, config: dict[str, Any], data: PreparedData, change_steps: bool = False
) -> WorkdirLock | None:
    """Makes the work directory of a new run, or checks that it belongs to this very run.

    Process 0 gets the lock, which must be kept as long as the run goes on.

    Raises:
      InputError: another process trains in it; it cannot be written; or it holds a run with
        another config or other data: the message shows how they differ.
    """
    dataset = {
        "path": str(data.directory if data.is_remote else data.directory.resolve()),
        "manifest_sha256": data.digest,
    }
    try:
        if not is_remote(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        lock = WorkdirLock(workdir) if jax.process_index() == 0 else None
        is_new = not (workdir / CONFIG).exists()
        changed: list[str] = []
        if not is_new:
            changed = check_same_run(workdir, config, dataset, change_steps)
            if changed and jax.process_index() == 0:
                print(f"changed since the run began: {'; '.join(changed)}", flush=True)
        elif lock is not None:
            write_atomically(workdir / TOKENIZER_NAME, data.tokenizer.json_text)
            write_atomically(workdir / DATASET, json.dumps(dataset, indent=1) + "\n")
        if lock is not None and (is_new or changed):
            write_atomically(workdir / CONFIG, json.dumps(config, indent=1) + "\n")
        if lock is not None:
            for rest in [] if is_remote(workdir) else workdir.glob("*.tmp-*"):
                rest.unlink()  # of a process that was killed while it wrote
    except OSError as error:
        raise InputError(f"{workdir}: cannot be written ({error.strerror or error})") from None
    return lock


def check_same_run(
    workdir: Path, config: dict[str, Any], dataset: dict[str, str], change_steps: bool
) -> list[str]:
    """Which changeable fields differ from those of a run; `InputError` if anything else does."""
    found = read_config(workdir)
    changed: list[str] = []
    wrong: list[str] = []
    for section in sorted(found.keys() | config.keys()):
        # A field that is younger than the run had its default.
        wanted, defaults = config.get(section, {}), section_defaults(section)
        before = {name: defaults[name] for name in wanted if name in defaults}
        for line in differences(before | found.get(section, {}), wanted):
            field = line.partition(":")[0]
            may = may_change(section, field)
            may |= change_steps and (section, field) == ("train", "steps")
            (changed if may else wrong).append(f"{section}.{line}")
    if any(line.startswith("train.steps:") for line in wrong):
        wrong.append("--change_steps changes the number of steps on purpose")
    trained_on = _read_json(workdir / DATASET)
    if trained_on["manifest_sha256"] != dataset["manifest_sha256"]:
        wrong.append(f"data: made from {trained_on['path']}, wanted {dataset['path']}")
    if wrong:
        raise InputError(f"{workdir}: holds a run of another config ({'; '.join(wrong)})")
    return changed


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of a run, section by section; `InputError` if `workdir` holds none."""
    return _read_json(workdir / CONFIG)


def model_config(workdir: Path) -> ModelConfig:
    """The `config.model` of a run."""
    try:
        # How attention and the merged FFN are computed is up to the machine that reads.
        computed = {"attention": "auto", "merged_ffn": "auto"}
        fields = section_defaults("model") | read_config(workdir)["model"] | computed
        return ModelConfig.for_platform(fields, jax.default_backend())
    except (KeyError, TypeError) as error:
        raise InputError(f"{workdir / CONFIG}: no usable section model ({error})") from None


def data_directory(workdir: Path, override: Path | None = None) -> PreparedData:
    """The prepared data that a run was trained on, or `override`; the manifest must be the same.

    A model that was not trained here (`convert from-hf`) takes any data made with its tokenizer.
    """
    if (workdir / CONFIG).exists() and not (workdir / DATASET).exists():
        return _data_with_tokenizer(workdir, override)
    dataset = _read_json(workdir / DATASET)
    directory = storage_path(override or dataset["path"])
    if not (directory / MANIFEST_NAME).is_file():
        raise InputError(f"{directory}: holds no prepared data; say where they are with --data=DIR")
    data = PreparedData.open(directory)
    if data.digest != dataset["manifest_sha256"]:
        raise InputError(f"{directory}: other data than {workdir} was trained on")
    return data


def _data_with_tokenizer(workdir: Path, directory: Path | None) -> PreparedData:
    if directory is None:
        raise InputError(f"{workdir}: was trained elsewhere; say which data with --data=DIR")
    data = PreparedData.open(directory)
    check_same_ids(data.tokenizer, directory, workdir)
    return data


def check_same_ids(tokenizer: Tokenizer, data: Path, workdir: Path) -> None:
    """Raises `InputError` unless prepared data have the ids of a work directory's tokenizer."""
    if not tokenizer.same_ids(Tokenizer.load(workdir / TOKENIZER_NAME)):
        raise InputError(
            f"{data}: made with another tokenizer than {workdir} has; prepare it with "
            f"--tokenizer={workdir / TOKENIZER_NAME}"
        )


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a killed run left unfinished is dropped."""
    path = workdir / METRICS
    if not path.is_file():
        raise InputError(f"{path}: missing; train first")
    lines = path.read_text("utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise InputError(f"{path}: damaged, a line is not JSON ({error})") from None


def load_params(workdir: Path, mesh: Mesh) -> tuple[ModelConfig, Params, int]:
    """The newest intact parameters of a run, the model they belong to, and their step.

    The model is the dense one while the run is in its dense warm-up.
    """
    config = model_config(workdir)
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise InputError(f"{directory}: missing; train first")
    checkpoints = Checkpoints(directory)

    def target(meta: Meta) -> dict[str, Any]:
        return {"params": abstract_params(phase_config(config, meta["phase"]), mesh)}

    restored = checkpoints.restore_newest(target)
    if restored is None:
        raise InputError(f"{directory}: holds no checkpoint yet")
    tree, meta = restored
    return phase_config(config, meta["phase"]), tree["params"], meta["step"]


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
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is {path.parent} a work directory?") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
