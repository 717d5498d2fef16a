"""The cost of a Pallas kernel on a TPU, from the instruction bundles that libtpu compiled it to.

A TensorCore issues one bundle per cycle if nothing stalls. When asked to (`dump_arguments`), libtpu
writes a kernel's final bundles and how many slots of each kind every bundle uses. The bundles of a
loop count once per iteration; its exit test and the increment of its counter give the trip count.
The outermost loop is that of the grid. It runs for two iterations more than the grid has steps,
which fill and drain the pipeline and skip the kernel's body; so it counts once per grid step.
Conditional parts count as if they always ran, and waits for DMA as if there were none.

Bundles show neither how long the matrix unit is busy, because products can be issued faster than
they are computed, nor how long DMA takes. A kernel takes at least the longest of the three.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:[\s>]*\{(.*)$")
_EXIT = re.compile(r"(%\w+) = scmp\.ge\.s32\.totalorder (%\w+), (\d+) /\* loop exit test")
_BACK = re.compile(r"sbr\.rel \(!(%\w+)\)")
DELAY = 4  # bundles after a branch that still run
FILL = 2  # iterations of the grid's loop beyond the grid's steps


@dataclass(frozen=True)
class Bundle:
    label: str  # "LB" at the first of a loop
    text: str


@dataclass(frozen=True)
class KernelCost:
    """The cost of one call.

    Attributes:
      bundles: how many bundles are executed.
      slots: how many instructions are issued, by kind of slot.
      busy: the share of the slots of all bundles that is used, by kind of slot.
    """

    bundles: int
    slots: Mapping[str, int]
    busy: Mapping[str, float]

    @property
    def limiting_slot(self) -> str:
        """The kind of slot that is used most."""
        return max(self.busy, key=lambda kind: self.busy[kind])


def dump_arguments(directory: Path) -> str:
    """`LIBTPU_INIT_ARGS` that make libtpu write what `read_kernel` reads; set before it loads."""
    return (
        f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    )


def read_kernel(directory: Path, instruction: str) -> KernelCost:
    """The cost of one call of a kernel, from a dump of the program that it is in.

    Equal kernels are compiled and written once, so a call without files of its own has those of the
    other calls of its name, if these all cost the same.

    Args:
      directory: where the dump is.
      instruction: the name of the call in the optimised HLO.

    Raises:
      ValueError: the dump holds no such kernel, or several that differ.
    """
    found = _dumped(directory, instruction) or _dumped(directory, base_name(instruction) + ".*")
    costs = {files: count(*(path.read_text() for path in files)) for files in found}
    if len({cost.bundles for cost in costs.values()}) != 1:
        raise ValueError(
            f"{directory}: {len(found)} different kernels have names like {instruction!r}, "
            "expected one"
        )
    return next(iter(costs.values()))


def base_name(instruction: str) -> str:
    """The name that `pallas_call` was given."""
    return re.sub(r"(\.\d+|\.clone)*$", "", instruction)


def _dumped(directory: Path, name: str) -> list[tuple[Path, Path]]:
    """Bundles and slots of all kernels whose name matches a pattern."""
    bundles = sorted(
        path
        for path in directory.glob(f"*-{name}-*-final_bundles.txt")
        if "schedule-analysis" not in path.name
    )
    slots = sorted(directory.glob(f"*-{name}-*-final_hlo-static-per-bundle-utilization.txt"))
    return list(zip(bundles, slots, strict=True))


def count(bundles_text: str, slots_text: str) -> KernelCost:
    """The bundles and slots of one call, each counted as often as it runs."""
    bundles = parse_bundles(bundles_text)
    kinds, capacity, used = parse_slots(slots_text)
    if len(bundles) != len(used):
        raise ValueError(f"{len(bundles)} bundles, but slots of {len(used)}")
    times = repetitions(bundles)
    total = sum(times)
    slots = {
        kind: sum(t * row[k] for t, row in zip(times, used, strict=True))
        for k, kind in enumerate(kinds)
    }
    busy = {kind: slots[kind] / (total * capacity[k]) for k, kind in enumerate(kinds)}
    return KernelCost(total, slots, busy)


def parse_bundles(text: str) -> list[Bundle]:
    """The bundles, in order."""
    found = (_BUNDLE.match(line) for line in text.splitlines())
    return [Bundle(match[1] or "", match[2]) for match in found if match]


def repetitions(bundles: list[Bundle]) -> list[int]:
    """How often each bundle runs.

    Raises:
      ValueError: the trip count of a loop cannot be read.
    """
    times = [1] * len(bundles)
    text = "\n".join(bundle.text for bundle in bundles)
    tests = {predicate: (counter, int(end)) for predicate, counter, end in _EXIT.findall(text)}
    open_loops: list[int] = []
    for i, bundle in enumerate(bundles):
        if bundle.label == "LB":
            open_loops.append(i)
        back = _BACK.search(bundle.text)
        if back is None or back[1] not in tests:
            continue
        start = open_loops.pop()
        counter, end = tests[back[1]]
        step = re.search(re.escape(counter) + r" = sadd\.s32 (\d+), ", text)
        if step is None:
            raise ValueError(f"the loop's counter {counter} is not a sum with a constant")
        turns = -(-end // int(step[1])) - (0 if open_loops else FILL)
        for k in range(start, min(i + 1 + DELAY, len(bundles))):
            times[k] *= turns
    if open_loops:
        raise ValueError(f"{len(open_loops)} loops have no exit test that can be read")
    return times


def parse_slots(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """The kinds of slots, how many of each a bundle has, and how many each bundle uses."""
    lines = text.splitlines()
    kinds = [kind.strip() for kind in lines[1].split(",")]
    capacity = [int(number) for number in lines[2].split()]
    start = next(i for i, line in enumerate(lines) if "UTILIZATION" in line) + 1
    used = [[int(number) for number in line.split()] for line in lines[start:] if line.strip()]
    return kinds, capacity, used
