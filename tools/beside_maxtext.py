"""Compares our training step with MaxText's: same shape, mesh, batch and compiler.

    python tools/beside_maxtext.py [--maxtext_python=PATH]

Writes the table between the two marks in docs/scaling.md from docs/maxtext.json and docs/plans.
With --maxtext_python, the interpreter of an environment that has MaxText and libtpu, it first
compiles MaxText's step again and writes docs/maxtext.json. Such an environment needs Python 3.12:

    python3.12 -m venv ENV
    ENV/bin/pip install jax==0.10.2 libtpu==0.0.42.1 flax==0.12.8 maxtext==0.2.4
    ENV/bin/pip install omegaconf packaging pathwaysutils jinja2 qwix aqtp tokamax grain drjax
    ENV/bin/pip install transformers huggingface_hub pillow tiktoken sentencepiece
    ENV/bin/pip install ml-goodput-measurement

All lines but the first two are packages that MaxText imports and its wheel does not ask for. Both
programs are read and priced alike (lory_jax/planning/cycles.py).
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tables import ROOT, markdown, replace_marked, write

from lory_jax.planning.cycles import count_cycles
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.kernels import price_kernels
from lory_jax.planning.topology import DEVICES

FILE, PAGE = ROOT / "docs" / "maxtext.json", ROOT / "docs" / "scaling.md"
WORKER = Path(__file__).with_name("beside_maxtext_worker.py")
DEVICE = "v5e"

# The 0.3B dense model of configs/lory_0_3b.py, 256 sequences of 4,096 on 64 devices of `fsdp`.
FIELDS = {
    "decoder_block": "llama2",
    "base_emb_dim": 1024,
    "base_num_query_heads": 16,
    "base_num_kv_heads": 16,
    "head_dim": 64,
    "base_mlp_dim": 2816,
    "base_num_decoder_layers": 24,
    "mlp_activations": '["silu","linear"]',
    "vocab_size": 32000,
    "logits_via_embedding": False,
    "normalization_layer_epsilon": 1e-5,
    "max_target_length": 4096,
    "per_device_batch_size": 4,
    "dtype": "bfloat16",
    "weight_dtype": "float32",
    "remat_policy": "full",
    "scan_layers": True,
    "attention": "flash",
    "ici_fsdp_parallelism": 64,
    "opt_type": "adamw",
    "compile_topology": "v5e-64",
    "compile_topology_num_slices": 1,
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "skip_jax_distributed_system": True,
    "run_name": "compare",
    "base_output_directory": "/nonexistent",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maxtext_python", help="interpreter of MaxText's environment")
    python = parser.parse_args().maxtext_python
    if python:
        write(FILE, json.dumps(compile_theirs(python), indent=1) + "\n")
    replace_marked(PAGE, "tools/beside_maxtext.py", table(json.loads(FILE.read_text())))


def compile_theirs(python: str) -> dict[str, Any]:
    """MaxText's figures: both sums of cycles, bytes, and what was compiled."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "program.txt"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        # libtpu must not ask what this host is.
        environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        environment |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
        fields = [f"{name}={value}" for name, value in FIELDS.items()]
        done = subprocess.run(
            [python, str(WORKER), str(program), *fields],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=directory,
            check=True,
        )
        module = parse(program.read_text())
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    runs = executions(module)
    device = DEVICES[DEVICE]
    cycles = count_cycles(module, runs, device, price_kernels(module, runs, device))
    return {
        "date": time.strftime("%Y-%m-%d"),
        **json.loads(line.removeprefix("RESULT ")),
        "cycles": cycles.compiler_total,
        "repriced_cycles": cycles.repriced_total,
        "kernel_cycles": dict(cycles.kernels),
        "uncounted_kernels": dict(cycles.uncounted),
        "loops_counted_once": list(runs.unknown_loops),
        "fields": FIELDS,
    }


def table(theirs: dict[str, Any]) -> str:
    version = theirs["versions"]["maxtext"]
    rows = [row(f"MaxText {version}, dense", theirs, theirs["bytes_per_device"], theirs)]
    plans = {
        experts: json.loads(
            (ROOT / "docs" / "plans" / f"lory_0_3b_{experts}e_v5e-64.json").read_text()
        )
        for experts in (8, 32)
    }
    ours = {"lory_jax, dense": plans[8]["dense"]}
    ours |= {f"lory_jax, {experts} experts": plan for experts, plan in plans.items()}
    for name, plan in ours.items():
        estimate = plan["estimate"]
        figures = {
            "cycles": estimate["cycles"]["total"],
            "repriced_cycles": estimate.get("repriced_cycles", {}).get("total"),
        }
        rows.append(row(name, figures, plan["bytes_per_device"]["total"], theirs))
    header = ["0.3B, v5e-64", "M cycles, compiler", "repriced", "over MaxText's, repriced"]
    return markdown([*header, "GiB per device"], rows)


def row(name: str, figures: dict[str, Any], size: int, theirs: dict[str, Any]) -> list[str]:
    repriced = figures["repriced_cycles"]
    return [
        name,
        f"{figures['cycles'] / 1e6:,.0f}",
        f"{repriced / 1e6:,.0f}" if repriced else "-",
        f"{repriced / theirs['repriced_cycles']:.2f}" if repriced else "-",
        f"{size / 2**30:.2f}",
    ]


if __name__ == "__main__":
    main()
