"""Every reader of outside bytes, as the fuzzing calls it."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from lory_jax.analysis.routing import expert_use
from lory_jax.comparison.figures import final_validation_loss, tokens_to_reach
from lory_jax.config import section_defaults
from lory_jax.conversion.hf_directory import read_llama_directory
from lory_jax.conversion.safetensors_files import INDEX, SINGLE, TensorFiles
from lory_jax.data.manifest import Manifest
from lory_jax.data.special_tokens import SPECIAL_TOKENS_NAME
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import build
from lory_jax.preparation.sources.corpus import read_documents
from lory_jax.preparation.tokenizer_training import train_tokenizer
from lory_jax.run.checkpoints import Checkpoints
from lory_jax.run.directory import Dataset, RunDirectory
from lory_jax.run.phases import phase_config
from lory_jax.run.retention import best_first
from lory_jax.training.monitoring.goodput import Goodput
from lory_jax.training.monitoring.loss_watch import LossWatch
from lory_jax.training.optimizer import make_optimizer
from tests.support.tiny import write_prepared

MODEL = ModelConfig.for_platform(section_defaults("model"), "cpu")
TOKENIZER = train_tokenizer(["some words to learn from"] * 3, 300)


class Target:
    """A reader: a file that it reads, the seed of that file, and how it is called."""

    def __init__(self, directory: Path, name: str, seed: bytes, call):
        self.file, self.seed, self.call = directory / name, seed, call


def read(target: Target) -> None:
    """Reads the file; any exception but the project's own, in one short line, comes out."""
    try:
        target.call(target.file)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)


def manifest(directory):
    data = directory / "data"
    if not data.exists():
        write_prepared(data)
    seed = (data / "manifest.json").read_bytes()

    def read(path):
        found = Manifest.from_json(path.read_bytes(), path)
        found.verify(data, hashes=False)
        found.names("train/")

    return Target(directory, "manifest.json", seed, read)


def run_config(directory):
    from lory_jax.config import base_config

    seed = json.dumps(base_config().to_dict()).encode()

    def call(path):
        run = RunDirectory(directory)
        run.check_same_run(json.loads(seed), Dataset("/somewhere", "00"), change_steps=True)
        make_optimizer(run.train_config)
        build(run.model_config)

    (directory / "dataset.json").write_bytes(b'{"path": "/somewhere", "manifest_sha256": "00"}')
    return Target(directory, "config.json", seed, call)


def dataset(directory):
    seed = b'{"path": "/somewhere", "manifest_sha256": "00"}'
    return Target(directory, "dataset.json", seed, lambda path: RunDirectory(directory).dataset)


def metrics(directory):
    line = {"step": 1, "tokens": 9, "loss": 2.0, "step_seconds": 0.1, "experts_active": 3}
    seed = (json.dumps(line | {"validation_loss": 2.5}) + "\n").encode() * 3

    def call(path):
        lines = RunDirectory(directory).read_metrics()
        LossWatch([line["loss"] for line in lines])
        math.fsum(line["step_seconds"] for line in lines)
        tokens_to_reach(lines, final_validation_loss(lines))
        expert_use(lines, 8)

    return Target(directory, "metrics.jsonl", seed, call)


def checkpoint_meta(directory):
    path = directory / "checkpoints" / "3" / "meta"
    path.mkdir(parents=True)
    checkpoints = Checkpoints(directory / "checkpoints")
    seed = b'{"step": 3, "phase": "experts", "sums": {"a": 1}, "validation_loss": 2.5, '
    seed += b'"watch": {"skipped": 0, "in_a_row": 0}, "goodput": {"save": 1.5}}'

    def call(path):
        if meta := checkpoints.read_meta(3):
            phase_config(MODEL, meta["phase"])
            meta["sums"].get("a")
            Goodput(0.0).resume(meta.get("goodput") or {})
            LossWatch([], meta.get("watch"))
        best_first(checkpoints.validation_losses())

    return Target(path, "metadata", seed, call)


LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=8,
    intermediate_size=8,
    num_attention_heads=2,
    num_hidden_layers=1,
    vocab_size=300,
    max_position_embeddings=16,
    rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    bos_token_id=0,
    eos_token_id=[1],
)


def hf_config(directory):
    (directory / SINGLE).write_bytes(save({"model.norm.weight": np.ones(8, np.float32)}))
    TOKENIZER.save(directory / "tokenizer.json")
    seed = json.dumps(LLAMA).encode()
    return Target(directory, "config.json", seed, lambda path: read_llama_directory(directory))


def hf_tokenizer_config(directory):
    TOKENIZER.save(directory / "tokenizer.json")
    seed = b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ a }}"}'

    def read(path):
        Tokenizer.load_foreign(directory / "tokenizer.json").special.to_json()

    return Target(directory, "tokenizer_config.json", seed, read)


def special_tokens(directory):
    TOKENIZER.save(directory / "tokenizer.json")
    seed = b'{"bos_id": 0, "eos_ids": [1], "pad_id": null, "chat_template": null}'
    return Target(
        directory,
        SPECIAL_TOKENS_NAME,
        seed,
        lambda path: Tokenizer.load(directory / "tokenizer.json"),
    )


def tokenizer_json(directory):
    def read(path):
        found = Tokenizer.load(path)
        found.decode(found.encode("some words — ünd 河"))

    return Target(directory, "tokenizer.json", TOKENIZER.json_text.encode(), read)


def json_lines(directory):
    seed = b'{"text": "some words", "domain": "d", "source": "s"}\n' * 3

    def read(path):
        list(read_documents([str(path)]))

    return Target(directory, "a.jsonl", seed, read)


def json_documents(directory):
    seed = b'[{"text": "some words", "domain": "d", "source": "s"}]'
    target = json_lines(directory)
    return Target(directory, "a.json", seed, target.call)


def safetensors_header(directory):
    seed = save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)})
    return Target(directory, SINGLE, seed, lambda path: read_tensors(directory))


def safetensors_index(directory):
    (directory / "x.safetensors").write_bytes(save({"a": np.ones((2, 3), np.float32)}))
    seed = b'{"metadata": {"total_size": 24}, "weight_map": {"a": "x.safetensors"}}'
    return Target(directory, INDEX, seed, lambda path: read_tensors(directory))


def read_tensors(directory):
    files = TensorFiles(directory)
    for name in files.shapes:
        files.read(name)


READERS = [
    manifest,
    run_config,
    dataset,
    metrics,
    checkpoint_meta,
    hf_config,
    hf_tokenizer_config,
    special_tokens,
    tokenizer_json,
    json_lines,
    json_documents,
    safetensors_header,
    safetensors_index,
]
