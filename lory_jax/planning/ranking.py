"""Searches the settings that decide how fast a recipe trains, by compiling its step with each.

One setting is varied at a time, the others being the best found so far: what is recomputed
(`remat`), the mesh, the number of microbatches, and which kernels run. That takes 4 to 12 programs
where trying all combinations would take hundreds. A program that was compiled before is read from
the user's cache, so an interrupted search resumes.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from lory_jax.config import find_field
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh
from lory_jax.planning.estimate import plan_step
from lory_jax.planning.gpus import GpuTopology
from lory_jax.planning.recipe import MeshShape, mesh_shape
from lory_jax.planning.topology import Topology

MARGIN = 0.06  # of the memory is left free: for batches on their way and fragmentation
MAX_PROGRAMS = 12
MAX_MICROBATCHES = 16
KERNELS = ("attention", "merged_ffn")  # fields of config.model that say which kernels run
GROUP = "merged_ffn_group"  # the field that says how large the blocks of the merging kernels are
SMALLER_GROUP = 16  # segments, where they choose 32 or 64 on most shapes

Report = Callable[[str], None]  # is given one line about every program


@dataclass(frozen=True)
class Choice:
    """What is varied: fields of a recipe by name, such as `model.remat`, and the mesh."""

    fields: tuple[tuple[str, Any], ...]
    mesh: MeshShape

    def set(self, name: str, value: Any) -> "Choice":
        return Choice(tuple({**dict(self.fields), name: value}.items()), self.mesh)

    def apply(self, config: ConfigDict) -> ConfigDict:
        """A copy of the recipe with these settings."""
        config = copy.deepcopy(config)
        for name, value in self.fields:
            section, key = name.split(".")
            config[section][key] = value
        return config

    @property
    def flags(self) -> list[str]:
        """The flags of `train` that choose it."""
        axes = zip(("data", "fsdp", "tensor"), self.mesh, strict=True)
        named = [*self.fields, *((f"parallel.{axis}", size) for axis, size in axes)]
        return [f"--config.{name}={value}" for name, value in named]


@dataclass(frozen=True)
class Candidate:
    """A choice and the plan of its compiled step."""

    choice: Choice
    plan: Mapping[str, Any]

    @property
    def fits(self) -> bool:
        """Whether it fits into memory with a margin."""
        memory = self.plan["bytes_per_device"]
        return bool(memory["fits"]) and memory["total"] <= (1 - MARGIN) * memory["limit"]

    @property
    def rate(self) -> float:
        """Tokens per second and device, at most; 0 if it was not estimated."""
        estimate = self.plan["estimate"]
        return estimate["tokens_per_second_per_device_upper_bound"] if estimate else 0.0

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Of two candidates, the one with the larger rank is better."""
        return self.fits, self.rate if self.fits else 0.0, -self.plan["bytes_per_device"]["total"]


def search(
    config: ConfigDict,
    topology: Topology | GpuTopology,
    shape: MeshShape | None,
    budget_seconds: float,
    report: Report,
) -> list[Candidate]:
    """Compiles candidates and returns them, the best first.

    Args:
      config: the recipe, whose own settings are the first candidate.
      topology: what to compile for.
      shape: the first mesh; the recipe's or the default if None.
      budget_seconds: after which no other program is begun.
      report: is given a line about every program: count, rate and time left.

    Raises:
      InputError: the recipe itself does not fit the mesh, or a compiler is missing.
    """
    devices = topology.devices()
    first = Choice(
        tuple(_settings(config, topology.platform).items()),
        shape or mesh_shape(config, len(devices), topology),
    )
    begin = time.monotonic()

    def compiled(choice: Choice) -> Candidate:
        mesh = make_mesh(*choice.mesh, devices=devices)
        plan = plan_step(choice.apply(config), mesh, topology.device, is_kept=True)
        return Candidate(choice, plan)

    found = [compiled(first)]
    seen = {first}
    report(progress_line(found, begin, budget_seconds))
    for vary in _dimensions(found[0]):
        for choice in vary(config, _ordered(found)[0].choice):
            if choice in seen:
                continue
            seen.add(choice)
            if len(found) >= MAX_PROGRAMS or time.monotonic() - begin > budget_seconds:
                return _ordered(found)
            try:
                found.append(compiled(choice))
            except InputError as error:  # this recipe cannot run so
                report(f"left out {describe(choice)}: {error}")
                continue
            report(progress_line(found, begin, budget_seconds))
    return _ordered(found)


def _settings(config: ConfigDict, platform: str) -> dict[str, Any]:
    """The recipe's own values of the fields that are varied, with "auto" resolved."""
    resolved = ModelConfig.for_platform(config.model, platform)
    names = ("remat", *KERNELS, GROUP) if config.model.num_experts else ("remat", KERNELS[0])
    return {f"model.{name}": getattr(resolved, name) for name in names} | {
        "train.microbatches": config.train.microbatches
    }


def _ordered(found: list[Candidate]) -> list[Candidate]:
    return sorted(found, key=lambda candidate: candidate.rank, reverse=True)


def progress_line(found: list[Candidate], begin: float, budget_seconds: float) -> str:
    """Count, rate and the most time left."""
    last, spent = found[-1], time.monotonic() - begin
    each = spent / len(found)
    left = max(0.0, min(budget_seconds - spent, each * (MAX_PROGRAMS - len(found))))
    speed = f"{last.rate:,.0f} tokens/s" if last.fits else "does not fit"
    return (
        f"{len(found)} of at most {MAX_PROGRAMS} programs, {each:.0f} s each, at most "
        f"{left / 60:.0f} min left: {describe(last.choice)}: {speed}"
    )


def describe(choice: Choice) -> str:
    """A choice in a few words."""
    fields = " ".join(f"{name.split('.')[1]}={value}" for name, value in choice.fields)
    return f"{fields} mesh={','.join(map(str, choice.mesh))}"


# ---------------------------------------------------------------- what is varied

Vary = Callable[[ConfigDict, Choice], Iterator[Choice]]


def _dimensions(first: Candidate) -> list[Vary]:
    """What to vary, in order: what may make it fit first if it does not."""
    order: list[Vary] = [_remats, _meshes, _microbatches, _groups, _kernels]
    return order if first.fits else [_microbatches, *order]


def _remats(config: ConfigDict, choice: Choice) -> Iterator[Choice]:
    for name in find_field("model.remat").choices:
        yield choice.set("model.remat", name)


def _meshes(config: ConfigDict, choice: Choice) -> Iterator[Choice]:
    """Half and twice as many devices on `fsdp`, and the rest on `data`."""
    data, fsdp, tensor = choice.mesh
    if fsdp % 2 == 0:
        yield Choice(choice.fields, (data * 2, fsdp // 2, tensor))
    if data % 2 == 0:
        yield Choice(choice.fields, (data // 2, fsdp * 2, tensor))


def _microbatches(config: ConfigDict, choice: Choice) -> Iterator[Choice]:
    """Half and twice as many; twice as many again may be needed to fit."""
    count = dict(choice.fields)["train.microbatches"]
    for other in (count * 2, count // 2, count * 4):
        if 1 <= other <= MAX_MICROBATCHES and config.train.global_batch_size % other == 0:
            yield choice.set("train.microbatches", other)


def _groups(config: ConfigDict, choice: Choice) -> Iterator[Choice]:
    """Smaller blocks of the merging kernels than those that they choose."""
    if dict(choice.fields).get("model.merged_ffn") == "kernel":
        yield choice.set(f"model.{GROUP}", SMALLER_GROUP)


def _kernels(config: ConfigDict, choice: Choice) -> Iterator[Choice]:
    """Every implementation that is not the chosen one; what cannot run there is left out."""
    for name in (f"model.{kernel}" for kernel in KERNELS):
        if name not in dict(choice.fields):
            continue
        for value in find_field(name).choices:
            if value not in ("auto", "einsum", "xla"):  # the references are slower everywhere
                yield choice.set(name, value)


# ---------------------------------------------------------------- the table


def as_json(candidates: list[Candidate], topology: Topology | GpuTopology) -> dict[str, Any]:
    """The ranking for `--json`."""
    return {
        "topology": topology.name,
        "ranking": [
            {
                "flags": candidate.choice.flags,
                "fits_with_margin": candidate.fits,
                "tokens_per_second_per_chip": candidate.rate * topology.devices_per_chip,
                "bytes_per_device": dict(candidate.plan["bytes_per_device"]),
                "estimate": candidate.plan["estimate"],
            }
            for candidate in candidates
        ],
    }


def table(
    candidates: list[Candidate], topology: Topology | GpuTopology, price: float | None
) -> str:
    """The candidates with their rate, memory and time, and the flags of the best.

    Args:
      candidates: the best first.
      topology: what they were compiled for.
      price: of a chip and hour, if known.
    """
    names = [name.split(".")[1] for name, _ in candidates[0].choice.fields]
    header = [*names, "mesh", "GiB", "fits", "tokens/s/chip", "step, s", "MFU"]
    header += ["per 1M tokens"] if price is not None else []
    rows = [header]
    for candidate in candidates:
        plan, estimate = candidate.plan, candidate.plan["estimate"]
        rate = candidate.rate * topology.devices_per_chip
        row = [str(value) for _, value in candidate.choice.fields]
        row += [",".join(map(str, candidate.choice.mesh))]
        row += [f"{plan['bytes_per_device']['total'] / 2**30:.2f}"]
        row += ["yes" if candidate.fits else "NO"]
        if estimate is None:
            row += ["-"] * (3 + (price is not None))
        else:
            mfu = estimate["mfu_upper_bound"]
            row += [f"{rate:,.0f}", f"{estimate['step_seconds_lower_bound']:.3f}"]
            row += ["-" if mfu is None else f"{mfu:.1%}"]
            row += [f"{price_per_million(price, rate):.4f}"] if price is not None else []
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    best = candidates[0]
    last = " ".join(best.choice.flags) if best.fits else "none of them fits"
    return "\n".join([f"{topology.name}, the best first:", *lines, "", last])


def price_per_million(price: float, rate: float) -> float:
    """What a million tokens cost, from the price of a chip and hour and its tokens per second."""
    return price / 3600 / rate * 1e6
