"""Tensors in safetensors files: written in shards with an index, read one by one, never pickled."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lory_jax.console import progress
from lory_jax.errors import InputError
from lory_jax.json_text import parse_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
STORED_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MAX_SHARD_BYTES = 5 * 10**9


class Entry(NamedTuple):
    """A tensor to write: its name, its size, and a function that returns it (C-contiguous)."""

    name: str
    nbytes: int
    load: Callable[[], np.ndarray]


class TensorFiles:
    """The tensors of a directory, none of them read yet.

    Attributes:
      shapes: shape of every tensor by name.
      types: "float32", "bfloat16" or "float16" by name.
    """

    def __init__(self, directory: Path):
        """Opens `model.safetensors`, or the shards that the index names.

        Raises:
          InputError: there is neither, the weights are pickled, or a file is missing or damaged.
        """
        self.directory = directory
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        if (directory / SINGLE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif (directory / INDEX).is_file():
            self._file_of = self._read_index()
        else:
            raise InputError(_no_weights(directory))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        for name, file in self._file_of.items():
            slice_ = self._handles[file].get_slice(name)
            if slice_.get_dtype() not in STORED_TYPES:
                raise InputError(
                    f"{directory / file}: {name}: stored as {slice_.get_dtype()}; must be one of "
                    f"{', '.join(STORED_TYPES)}"
                )
            self.shapes[name] = tuple(slice_.get_shape())
            self.types[name] = STORED_TYPES[slice_.get_dtype()]

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, which holds all stored types exactly."""
        return self._handles[self._file_of[name]].get_tensor(name).astype(np.float32, copy=False)

    def _open(self, file: str) -> Any:
        path = self.directory / file
        try:
            self._handles[file] = safe_open(path, framework="numpy")
        except FileNotFoundError:
            raise InputError(f"{path}: missing, although {INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged ({error})") from None
        return self._handles[file]

    def _read_index(self) -> dict[str, str]:
        path = self.directory / INDEX
        weight_map = read_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{path}: has no weight_map")
        for file in weight_map.values():
            # The index is external input: it must not make us read outside the directory.
            is_name = isinstance(file, str) and file.isprintable() and Path(file).name == file
            if not is_name or file in ("", ".", ".."):
                raise InputError(f"{path}: names {file!r}; must name files in its own directory")
        for file in dict.fromkeys(weight_map.values()):
            held = set(self._open(file).keys())
            wanted = {name for name, where in weight_map.items() if where == file}
            if missing := sorted(wanted - held):
                raise InputError(f"{self.directory / file}: tensor {missing[0]} is missing")
        return weight_map


def write_safetensors(
    directory: Path, entries: Sequence[Entry], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes shards and their index; every shard is read back and compared bit by bit.

    At most one shard is held in memory.

    Raises:
      InputError: a shard cannot be written, or reads back differently.
    """
    shards = _plan(entries, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in progress(
        enumerate(shards, 1), total=len(shards), label="writing", unit="shards"
    ):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {entry.name: entry.load() for entry in shard}
        try:
            save_file(arrays, directory / file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise InputError(f"{directory / file}: cannot write it ({error})") from None
        _compare(directory / file, arrays)
        weight_map |= dict.fromkeys(arrays, file)
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_object(directory / INDEX, index)
    for file in dict.fromkeys(weight_map.values()):
        # safetensors makes its files readable by their owner only, whatever the umask says.
        shutil.copymode(directory / INDEX, directory / file)


def _plan(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Fills shards with the entries in order; an entry larger than a shard has one of its own."""
    shards: list[list[Entry]] = []
    room = -math.inf
    for entry in entries:
        if entry.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def _compare(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with safe_open(path, framework="numpy") as file:
        for name, written in arrays.items():
            found = file.get_tensor(name)
            same = found.dtype == written.dtype and found.shape == written.shape
            if not same or not np.array_equal(found.view(np.uint8), written.view(np.uint8)):
                raise InputError(f"{path}: {name} reads back differently from what was written")


def _no_weights(directory: Path) -> str:
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
    if pickled:
        return (
            f"{directory}: has weights only in {pickled[0]}, a pickle, which is not read as it "
            "can run code; safetensors are required (transformers: model.save_pretrained(DIR))"
        )
    return f"{directory}: holds neither {SINGLE} nor {INDEX}"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `InputError` if it is missing or something else."""
    try:
        return parse_object(path.read_bytes(), path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def write_object(path: Path, contents: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented, in the order of its keys."""
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
