"""Fuzzing of every reader of outside bytes: only the project's own errors may come out.

The default suite tries each reader for a second or two. `bash launch/test.sh -m faults` tries each
for LORY_FUZZ_SECONDS (600 by default) and prints how many inputs that were.
"""

import json
import os
import random
import resource
import string
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from lory_jax.conversion.hf_directory import read_llama_directory
from lory_jax.conversion.safetensors_files import INDEX, SINGLE, TensorFiles
from lory_jax.data.manifest import Manifest
from lory_jax.data.special_tokens import SPECIAL_TOKENS_NAME
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.preparation.sources.corpus import read_documents
from lory_jax.preparation.tokenizer_training import train_tokenizer
from lory_jax.run.checkpoints import Checkpoints
from lory_jax.run.directory import RunDirectory
from tests.support.tiny import write_prepared

SHORT_SECONDS = 1.5
LONG_SECONDS = float(os.environ.get("LORY_FUZZ_SECONDS", "600"))
LARGEST_MEMORY = 4 * 2**30  # JAX and transformers are loaded by other tests of this process

TOKENIZER = train_tokenizer(["some words to learn from"] * 3, 300)
VALUES = [None, True, -1, 0, 2**63, 2**200, 1e308, float("inf"), float("nan"), "", "..", "\ud800"]
VALUES += ["/etc/passwd", "../../x", [], {}, [[]], "x" * 1000, [1], {"a": 1}]


# ---------------------------------------------------------------- inputs


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """A seed with a few changes of its structure, where it is JSON, or of its bytes."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(hostile())
    if kind == 1:
        try:
            value = json.loads(seed)
        except ValueError:
            return with_other_bytes(seed, rng)
        for _ in range(rng.randint(1, 4)):
            value = with_other_value(value, rng)
        return json.dumps(value).encode(errors="surrogatepass")
    return with_other_bytes(seed, rng)


def hostile() -> list[bytes]:
    return [
        b"",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 10_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b"1e999",
        b"NaN",
        b"null",
        b"[]",
        b'"text"',
        b"{}\r\n{}",
        b"\x00" * 64,
        b"\xff" * 64,
    ]


def with_other_bytes(seed: bytes, rng: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(4)
        if action == 0:
            data = data[:at]
        elif action == 1:
            data[at:at] = bytes(rng.choices(range(256), k=rng.randint(1, 8)))
        elif action == 2 and at < len(data):
            data[at] = rng.randrange(256)
        else:
            end = min(len(data), at + rng.randint(1, 30))
            data[at:at] = data[at:end] if rng.random() < 0.5 else b""
            del data[at:end]
    return bytes(data)


def with_other_value(value, rng: random.Random):
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.2:
            changed["".join(rng.choices(string.printable, k=4))] = changed.pop(key)
        elif rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = with_other_value(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], with_other_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


# ---------------------------------------------------------------- readers


class Target:
    """A reader: a file that it reads, the seed of that file, and how it is called."""

    def __init__(self, directory: Path, name: str, seed: bytes, read):
        self.file, self.seed, self.read = directory / name, seed, read


def manifest(directory):
    data = write_prepared(directory / "data")
    seed = (data / "manifest.json").read_bytes()

    def read(path):
        found = Manifest.from_json(path.read_bytes(), path)
        found.verify(data, hashes=False)
        found.names("train/")

    return Target(directory, "manifest.json", seed, read)


def run_config(directory):
    from lory_jax.config import base_config

    seed = json.dumps(base_config().to_dict()).encode()
    return Target(directory, "config.json", seed, lambda path: RunDirectory(directory).model_config)


def dataset(directory):
    seed = b'{"path": "/somewhere", "manifest_sha256": "00"}'
    return Target(directory, "dataset.json", seed, lambda path: RunDirectory(directory).dataset)


def metrics(directory):
    seed = b'{"step": 1, "loss": 2.0, "step_seconds": 0.1}\n' * 3
    return Target(
        directory, "metrics.jsonl", seed, lambda path: RunDirectory(directory).read_metrics()
    )


def checkpoint_meta(directory):
    path = directory / "checkpoints" / "3" / "meta"
    path.mkdir(parents=True)
    checkpoints = Checkpoints(directory / "checkpoints")
    seed = b'{"step": 3, "phase": "experts", "sums": {"a": 1}, "validation_loss": 2.5}'
    return Target(path, "metadata", seed, lambda path: checkpoints.read_meta(3))


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
    return Target(directory, "a.json", seed, target.read)


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


def fuzz(make, directory, seconds, seed) -> int:
    """Feeds a reader with inputs for so long; returns how many there were."""
    target = make(directory)
    rng = random.Random(seed)
    target.file.write_bytes(target.seed)
    try:
        target.read(target.file)
    except InputError:
        assert make is hf_config  # whose seed lacks most of its tensors
    before = sorted(directory.rglob("*"))
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = mutated(target.seed, rng)
        target.file.write_bytes(data)
        try:
            target.read(target.file)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, data[:300]
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}: of {data[:2000]!r}") from error
        count += 1
    assert sorted(directory.rglob("*")) == before  # readers write nothing
    return count


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_only_our_own_errors_come_out(make, tmp_path):
    assert fuzz(make, tmp_path, SHORT_SECONDS, seed=0) > 10


@pytest.mark.faults
@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_only_our_own_errors_come_out_for_long(make, tmp_path):
    count = fuzz(make, tmp_path, LONG_SECONDS, seed=time.time_ns())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{make.__name__}: {count:,} inputs in {LONG_SECONDS:.0f} s, {memory / 2**20:.0f} MiB")
    assert memory < LARGEST_MEMORY
