"""The cost of a Pallas kernel on a TPU, from the instruction bundles that libtpu compiled it to.

A TensorCore issues one bundle per cycle if nothing stalls. When asked to (`dump_arguments`), libtpu
writes a kernel's final bundles and how many slots of each kind every bundle uses. The bundles of a
loop count once per iteration; its exit test and the increment of its counter give the trip count.
The outermost loop is that of the grid. It runs for two iterations more than the grid has steps,
which fill and drain the pipeline and skip the kernel's body; so it counts once per grid step.
A conditional part counts as often as its condition holds, where that is known (`mosaic.py`), and
otherwise as if it always ran. Waits for DMA count as if there were none.

Bundles show neither how long the matrix unit is busy, because products can be issued faster than
they are computed, nor how long DMA takes. A kernel takes at least the longest of the three.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:[\s>]*\{(.*)$")
_EXIT = re.compile(r"(%\w+) = scmp\.ge\.s32\.totalorder (%\w+), (\d+) /\* loop exit test")
_BACK = re.compile(r"sbr\.rel \(!(%\w+)\)")
_FORWARD = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
_COMMENT = re.compile(r"\bregion (\d+)")
_REGION = re.compile(r"^\s*\$region(\d+): .*?(?:// (\w+))?$")
DELAY = 4  # bundles after a branch that still run
FILL = 2  # iterations of the grid's loop beyond the grid's steps


@dataclass(frozen=True)
class Bundle:
    label: str  # "LB" at the first of a loop, "PF" at the first after a conditional part
    text: str


@dataclass(frozen=True)
class KernelCost:
    """The cost of one call.

    Attributes:
      bundles: how many bundles are executed, on average if conditions differ between steps.
      slots: how many instructions are issued, by kind of slot.
      busy: the share of the slots of all bundles that is used, by kind of slot.
    """

    bundles: float
    slots: Mapping[str, float]
    busy: Mapping[str, float]

    @property
    def limiting_slot(self) -> str:
        """The kind of slot that is used most."""
        return max(self.busy, key=lambda kind: self.busy[kind])


class PartsDiffer(ValueError):
    """The compiled kernel has other conditional parts than its program."""


def dump_arguments(directory: Path) -> str:
    """`LIBTPU_INIT_ARGS` that make libtpu write what `read_kernel` reads; set before it loads."""
    return (
        f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    )


def read_kernel(directory: Path, name: str, conditions: Sequence[float | None] = ()) -> KernelCost:
    """The cost of one call of a kernel, from a dump of a program with no other of its name.

    Args:
      directory: where the dump is.
      name: the beginning of the call's name in the optimised HLO.
      conditions: `KernelWork.conditions`.

    Raises:
      ValueError: the dump does not hold exactly one such kernel, or it cannot be read.
    """
    texts = []
    for suffix in ("final_bundles", "final_hlo-static-per-bundle-utilization", "original"):
        found = [
            path
            for path in sorted(directory.glob(f"*-{name}*-{suffix}.txt"))
            if "schedule-analysis" not in path.name
        ]
        if len(found) != 1:
            raise ValueError(f"{directory}: {len(found)} files *-{name}*-{suffix}.txt, expected 1")
        texts.append(found[0].read_text())
    bundles_text, slots_text, original_text = texts
    return count(bundles_text, slots_text, original_text, conditions)


def count(
    bundles_text: str,
    slots_text: str,
    original_text: str = "",
    conditions: Sequence[float | None] = (),
) -> KernelCost:
    """The bundles and slots of one call, each counted as often as it runs.

    Args:
      bundles_text: the final bundles.
      slots_text: the slots that each of them uses.
      original_text: the program before it was optimised, which shows what is a conditional part of
        the kernel, and what one of the pipeline around it. Required with `conditions`.
      conditions: `KernelWork.conditions`.

    Raises:
      PartsDiffer: there are not as many conditional parts as conditions.
      ValueError: the trip count of a loop cannot be read, or the texts do not fit together.
    """
    bundles = parse_bundles(bundles_text)
    kinds, capacity, used = parse_slots(slots_text)
    if len(bundles) != len(used):
        raise ValueError(f"{len(bundles)} bundles, but slots of {len(used)}")
    shares = {}
    if conditions:
        parts = conditional_parts(original_text)
        if len(parts) != len(conditions):
            raise PartsDiffer(
                f"{len(parts)} conditional parts in the compiled kernel, expected {len(conditions)}"
            )
        shares = {
            part: share for part, share in zip(parts, conditions, strict=True) if share is not None
        }
    times = repetitions(bundles, shares)
    total = sum(times)
    slots = {
        kind: sum(t * row[k] for t, row in zip(times, used, strict=True))
        for k, kind in enumerate(kinds)
    }
    busy = {kind: slots[kind] / (total * capacity[k]) for k, kind in enumerate(kinds)}
    return KernelCost(total, slots, busy)


def conditional_parts(original_text: str) -> list[int]:
    """The regions that follow the kernel's conditional parts, in the order of the program.

    A branch around a part names the region that follows it. Conditional parts of the pipeline
    around the kernel start or await DMA; those of the kernel only store vectors.
    """
    parts: list[int] = []
    open_parts: list[int] = []
    target = 0
    stores: set[int] = set()
    moves: set[int] = set()
    for line in original_text.splitlines():
        if branch := _FORWARD.search(line):
            target = int(branch[1])
        elif region := _REGION.match(line):
            number = int(region[1])
            if region[2] == "pred_region":
                open_parts.append(target)
                parts.append(target)
            while open_parts and open_parts[-1] == number:
                open_parts.pop()
        elif "= vst" in line:
            stores.update(open_parts)
        elif "= dma." in line:
            moves.update(open_parts)
    return [part for part in parts if part in stores - moves]


def parse_bundles(text: str) -> list[Bundle]:
    """The bundles, in order."""
    found = (_BUNDLE.match(line) for line in text.splitlines())
    return [Bundle(match[1] or "", match[2]) for match in found if match]


def repetitions(bundles: list[Bundle], shares: Mapping[int, float] | None = None) -> list[float]:
    """How often each bundle runs.

    Args:
      bundles: those of a kernel.
      shares: how often a conditional part runs each time that it is reached, by the region that
        follows it.

    Raises:
      ValueError: the trip count of a loop cannot be read.
    """
    times = [1.0] * len(bundles)
    for start, end, after in _skipped(bundles):
        for k in range(start, end):
            times[k] *= (shares or {}).get(after, 1.0)
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


def _skipped(bundles: list[Bundle]) -> list[tuple[int, int, int]]:
    """The bundles that forward branches skip: first, end, and the region where they continue.

    Branches are nested, and continue at bundles labelled PF. Where an inner part ends together with
    the one around it, both continue at the same bundle, whose comments name their regions.
    """
    loops = {match[1] for bundle in bundles for match in _EXIT.finditer(bundle.text)}
    found: list[tuple[int, int, int]] = []
    open_branches: list[tuple[int, int]] = []
    for i, bundle in enumerate(bundles):
        if bundle.label == "PF":
            here = {int(number) for number in _COMMENT.findall(bundle.text)}
            is_innermost = True
            while open_branches and (is_innermost or open_branches[-1][1] in here):
                start, after = open_branches.pop()
                found.append((start, i, after))
                is_innermost = False
        back = _BACK.search(bundle.text)
        branch = _FORWARD.search(bundle.text)
        if branch and not (back and back[1] in loops):
            open_branches.append((i + 1 + DELAY, int(branch[1])))
    return found


def parse_slots(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """The kinds of slots, how many of each a bundle has, and how many each bundle uses."""
    lines = text.splitlines()
    kinds = [kind.strip() for kind in lines[1].split(",")]
    capacity = [int(number) for number in lines[2].split()]
    start = next(i for i, line in enumerate(lines) if "UTILIZATION" in line) + 1
    used = [[int(number) for number in line.split()] for line in lines[start:] if line.strip()]
    return kinds, capacity, used
