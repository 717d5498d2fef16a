"""Plans the recipes for TPU slices and GPUs, and writes the tables of docs/scaling.md.

    python tools/scaling.py [--again | --no_compile] [--cuda_python=PATH]

Compiles the plans that docs/plans lacks or holds from an older version (with --again all of
them: twenty minutes on two cores; with --no_compile none), and writes the tables between the marks
in docs/scaling.md. Plans for TPUs require libtpu (requirements-plan.txt), those for GPUs an
environment with JAX's plug-in for CUDA (requirements-cuda.txt), whose interpreter --cuda_python
names; without it, the plans for GPUs stay as they are.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from tables import ROOT, markdown, replace_marked, write

PLANS, PAGE = ROOT / "docs" / "plans", ROOT / "docs" / "scaling.md"

LONG_SEGMENTS = ("--config.model.segment_length=512",)
KEEP_HIDDEN = ("--config.model.remat=attention+hidden",)

CASES: list[tuple[str, int, str, tuple[str, ...]]] = [
    ("lory_0_3b", 8, "v5e-64", ()),
    ("lory_0_3b", 8, "v5e-256", ()),
    ("lory_0_3b", 32, "v5e-64", ()),
    ("lory_0_3b", 32, "v5e-256", ()),
    ("lory_0_3b", 8, "v5e-64", LONG_SEGMENTS),
    ("lory_0_3b", 32, "v5e-64", LONG_SEGMENTS),
    ("lory_1_5b", 32, "v5p-128", ()),
    ("lory_1_5b", 32, "v5p-128", KEEP_HIDDEN),
    ("lory_1_5b", 32, "v6e-64", ()),
]
GPU_CASES: list[tuple[str, int, str, tuple[str, ...]]] = [
    ("lory_0_3b", 8, "h100-8", ()),
    ("lory_0_3b", 8, "h100-8", ("--config.model.merged_ffn=blocks",)),
    ("lory_0_3b", 32, "h100-8", ()),
    ("lory_0_3b", 8, "a100-8", ()),
    ("lory_0_3b", 8, "h200-8", ()),
]
SUFFIXES = {
    (): "",
    LONG_SEGMENTS: "_t512",
    KEEP_HIDDEN: "_hidden",
    ("--config.model.merged_ffn=blocks",): "_blocks",
}
LABELS = {
    "": "",
    "_t512": ", T=512",
    "_hidden": ", remat=attention+hidden",
    "_blocks": ", blocks",
}
SIZES = {"lory_0_3b": "0.3B", "lory_1_5b": "1.5B"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="compile everything again")
    parser.add_argument("--no_compile", action="store_true", help="only write the tables")
    parser.add_argument("--cuda_python", help="interpreter with jax[cuda12], for GPUs")
    args = parser.parse_args()
    plans = plans_of(CASES, args, sys.executable)
    tables = "\n\n".join([memory_table(plans), time_table(plans), cycles_table(plans)])
    replace_marked(PAGE, "tools/scaling.py", tables)
    replace_marked(PAGE, "tools/scaling.py ratios", ratio_table(plans))
    replace_marked(
        PAGE, "tools/scaling.py gpus", gpu_table(plans_of(GPU_CASES, args, args.cuda_python))
    )


def plans_of(
    cases: list[tuple[str, int, str, tuple[str, ...]]], args: argparse.Namespace, python: str | None
) -> "Plans":
    """The plans of docs/plans by name; compiles those that are to be compiled."""
    plans = []
    for i, (recipe, experts, topology, fields) in enumerate(cases):
        suffix = SUFFIXES[fields]
        name = f"{SIZES[recipe]}/{experts}E{LABELS[suffix]}"
        path = PLANS / f"{recipe}_{experts}e_{topology}{suffix}.json"
        is_due = args.again or not path.exists() or is_old(json.loads(path.read_text()))
        if is_due and python and not args.no_compile:
            print(f"{i + 1} of {len(cases)}: {name}, {topology}", flush=True)
            write(path, compile_plan(python, recipe, experts, topology, fields))
        if path.exists():
            plans.append((name, json.loads(path.read_text())))
    return plans


def is_old(plan: dict[str, Any]) -> bool:
    """Whether a plan is of a version that did not say what is waited for."""
    estimate = plan["estimate"] or {}
    return "awaited_seconds" not in estimate and "roofline_seconds" not in estimate


def compile_plan(
    python: str, recipe: str, experts: int, topology: str, fields: tuple[str, ...]
) -> str:
    """The output of `plan --json`."""
    command = [python, "-m", "lory_jax.plan", "--json", f"--topology={topology}"]
    command += [f"--config=configs/{recipe}.py:experts={experts}", *fields]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


# ---------------------------------------------------------------- tables

Plans = list[tuple[str, dict[str, Any]]]


def memory_table(plans: Plans) -> str:
    rows = []
    for name, plan in plans:
        memory, dense = plan["bytes_per_device"], plan["dense"]["bytes_per_device"]
        parts = [f"{memory[part] / 2**30:.2f}" for part in ("arguments", "temporaries", "total")]
        parts += [f"{dense['total'] / 2**30:.2f}", f"{memory['limit'] / 2**30:.2f}"]
        mesh = ", ".join(str(size) for size in plan["mesh"].values())
        fits = "yes" if memory["fits"] else "**no**"
        seconds = f"{plan['compile_seconds']:.0f}"
        rows.append([name, plan["topology"], mesh, *parts, fits, seconds])
    header = ["model", "slice", "mesh (data, fsdp, tensor)", "state and batch, GiB"]
    header += ["temporaries", "total", "total, dense", "limit", "fits", "compiled in, s"]
    return markdown(header, rows)


def time_table(plans: Plans) -> str:
    rows = []
    for name, plan in plans:
        row = [name, plan["topology"]]
        for version in (plan, plan["dense"]):
            estimate = version["estimate"]
            if estimate is None:
                row += ["unknown"] * 5
                continue
            mfu = estimate["mfu_upper_bound"]
            row += [
                f"{estimate['compute_seconds']:.3f}",
                f"{estimate['collective_seconds']:.3f}",
                f"{estimate['awaited_seconds']:.3f}" if "awaited_seconds" in estimate else "-",
                f"{estimate['tokens_per_second_per_device_upper_bound']:,.0f}",
                "unknown" if mfu is None else f"{mfu:.1%}",
            ]
        rows.append(row)
    columns = ["computing, s", "collectives, s", "awaited, s"]
    columns += ["tokens/s per device at most", "MFU at most"]
    header = ["model", "slice", *columns, *(f"{column}, dense" for column in columns)]
    return markdown(header, rows)


def ratio_table(plans: Plans) -> str:
    """A step's time as a multiple of the dense baseline's: computing alone, and all of it."""
    rows = []
    for name, plan in plans:
        ours, dense = plan["estimate"], plan["dense"]["estimate"]
        times = ("compute_seconds", "step_seconds_lower_bound")
        rows.append([name, plan["topology"], *(f"{ours[t] / dense[t]:.2f}" for t in times)])
    return markdown(["model", "slice", "computing", "whole step, with what is awaited"], rows)


def cycles_table(plans: Plans) -> str:
    """The compiler's cycles, and the repriced ones after a stroke, by scope."""
    rows = []
    for name, plan in plans:
        for version, label in ((plan, name), (plan["dense"], "its dense baseline")):
            if estimate := version["estimate"]:
                repriced = estimate.get("repriced_cycles", {})
                rows.append(
                    [label, plan["topology"]]
                    + [
                        f"{count / 1e6:,.0f} / "
                        + (f"{repriced[scope] / 1e6:,.0f}" if repriced else "-")
                        for scope, count in estimate["cycles"].items()
                    ]
                )
    scopes = next(plan["estimate"]["cycles"] for _, plan in plans if plan["estimate"])
    header = ["M cycles a step, compiler / repriced", "slice"]
    return markdown([*header, *(scope.replace("_", " ") for scope in scopes)], rows)


def gpu_table(plans: Plans) -> str:
    """Memory, traffic and the roofline on GPUs, beside the dense baseline."""
    rows = []
    for name, plan in plans:
        for version, label in ((plan, name), (plan["dense"], "its dense baseline")):
            memory, estimate = version["bytes_per_device"], version["estimate"]
            mfu = estimate["mfu_upper_bound"]
            rows.append(
                [
                    label,
                    plan["topology"],
                    f"{memory['total'] / 2**30:.1f} of {memory['limit'] / 2**30:.0f}",
                    "yes" if memory["fits"] else "**no**",
                    f"{estimate['flops'] / 1e12:,.0f}",
                    f"{estimate['hbm_bytes'] / 1e12:.2f}",
                    f"{estimate['compute_seconds']:.2f}",
                    f"{estimate['collective_seconds']:.3f}",
                    "unknown" if mfu is None else f"{mfu:.0%}",
                ]
            )
    header = ["model", "GPUs", "GiB per GPU", "fits", "TFLOP", "memory traffic, TB"]
    return markdown([*header, "roofline, s", "NVLink, s", "MFU at most"], rows)


if __name__ == "__main__":
    main()
