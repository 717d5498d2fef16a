"""Plans the recipes for TPU slices and writes the tables of docs/scaling.md.

    python tools/scaling.py [--again]

Compiles the plans that are missing in docs/plans (with --again all of them: ten minutes on two
cores), and writes the tables between the two marks in docs/scaling.md. Requires libtpu
(requirements-plan.txt).
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from tables import ROOT, markdown, replace_marked, write

PLANS, PAGE = ROOT / "docs" / "plans", ROOT / "docs" / "scaling.md"

LONG_SEGMENTS = ("--config.model.segment_length=512",)

CASES: list[tuple[str, int, str, tuple[str, ...]]] = [
    ("lory_0_3b", 8, "v5e-64", ()),
    ("lory_0_3b", 8, "v5e-256", ()),
    ("lory_0_3b", 32, "v5e-64", ()),
    ("lory_0_3b", 32, "v5e-256", ()),
    ("lory_0_3b", 8, "v5e-64", LONG_SEGMENTS),
    ("lory_0_3b", 32, "v5e-64", LONG_SEGMENTS),
    ("lory_1_5b", 32, "v5p-128", ()),
    ("lory_1_5b", 32, "v6e-64", ()),
]
SIZES = {"lory_0_3b": "0.3B", "lory_1_5b": "1.5B"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="compile everything again")
    again = parser.parse_args().again
    plans = []
    for i, (recipe, experts, topology, fields) in enumerate(CASES):
        name = f"{SIZES[recipe]}/{experts}E" + (", T=512" if fields else "")
        suffix = "_t512" if fields else ""
        path = PLANS / f"{recipe}_{experts}e_{topology}{suffix}.json"
        if again or not path.exists():
            print(f"{i + 1} of {len(CASES)}: {name}, {topology}", flush=True)
            write(path, compile_plan(recipe, experts, topology, fields))
        plans.append((name, json.loads(path.read_text())))
    tables = "\n\n".join([memory_table(plans), time_table(plans), cycles_table(plans)])
    replace_marked(PAGE, "tools/scaling.py", tables)


def compile_plan(recipe: str, experts: int, topology: str, fields: tuple[str, ...]) -> str:
    """The output of `plan --json`."""
    command = [sys.executable, "-m", "lory_jax.plan", "--json", f"--topology={topology}"]
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
                row += ["unknown"] * 4
                continue
            mfu = estimate["mfu_upper_bound"]
            row += [
                f"{estimate['compute_seconds']:.3f}",
                f"{estimate['collective_seconds']:.3f}",
                f"{estimate['tokens_per_second_per_device_upper_bound']:,.0f}",
                "unknown" if mfu is None else f"{mfu:.1%}",
            ]
        rows.append(row)
    columns = ["computing, s", "collectives, s", "tokens/s per device at most", "MFU at most"]
    header = ["model", "slice", *columns, *(f"{column}, dense" for column in columns)]
    return markdown(header, rows)


def cycles_table(plans: Plans) -> str:
    rows = []
    for name, plan in plans:
        for version, label in ((plan, name), (plan["dense"], "its dense baseline")):
            if version["estimate"]:
                cycles = version["estimate"]["cycles"].values()
                rows.append([label, plan["topology"], *(f"{count / 1e6:,.0f}" for count in cycles)])
    scopes = next(plan["estimate"]["cycles"] for _, plan in plans if plan["estimate"])
    header = ["M cycles a step", "slice", *(scope.replace("_", " ") for scope in scopes)]
    return markdown(header, rows)


if __name__ == "__main__":
    main()
