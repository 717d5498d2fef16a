"""Writes the tables of docs/benchmarks.md about decoding.

    python tools/decoding.py

Reads docs/decoding_tpu.json, from `benchmarks/decode_tpu.py --json`, and docs/decoding.json, from
`benchmarks/decode.py --json`, where it is.
"""

import json
from typing import Any

from tables import ROOT, markdown, replace_marked

CPU, TPU = ROOT / "docs" / "decoding.json", ROOT / "docs" / "decoding_tpu.json"
PAGE = ROOT / "docs" / "benchmarks.md"
THEIRS = "transformers"
HBM_LIMIT = 15.75  # GiB of a v5e


def main() -> None:
    if CPU.exists():
        replace_marked(PAGE, "tools/decoding.py", cpu_table(json.loads(CPU.read_text())))
    replace_marked(PAGE, "tools/decoding.py, TPU", tpu_table(json.loads(TPU.read_text())))


def cpu_table(result: dict[str, Any]) -> str:
    limits = result["limits"]
    rates = result["tokens_per_second"]
    modes = list(next(iter(rates.values())))
    rows = []
    for batch, row in rates.items():
        cells = [f"{row[mode]:,.0f} ({row[mode] / row[THEIRS]:.2f})" for mode in modes]
        cells[-1] = f"{row[THEIRS]:,.0f}"
        rows.append([batch, *cells, result["chosen"][batch]])
    bounds = [
        [batch, *(f"{row[mode]:,.0f}" for mode in row)]
        for batch, row in result["ffn_bound"].items()
    ]
    names = list(next(iter(result["ffn_bound"].values())))
    ridge = limits["flops"] / limits["bytes_per_second"]
    return "\n\n".join(
        [
            markdown(["batch", *modes, "`auto` takes"], rows),
            f"In the same run, XLA's products reached {limits['flops'] / 1e9:,.0f} GFLOP/s and "
            f"{limits['bytes_per_second'] / 1e9:,.1f} GB/s, {ridge:.1f} FLOPs per byte. The FFNs "
            "alone then allow at most so many tokens per second:",
            markdown(["batch", *names], bounds),
        ]
    )


def tpu_table(result: dict[str, Any]) -> str:
    rows = []
    for batch, modes in result["per_layer"].items():
        dense = modes["dense"]
        for mode, found in modes.items():
            if mode == "expected":
                continue
            memory = found["weight_bytes"] * result["layers"] / 2**30
            expected = modes["expected"].get(mode)
            rows.append(
                [
                    batch,
                    mode,
                    f"{found['hbm_bytes'] / 1e6:,.1f}",
                    f"{found['hbm_bytes'] / dense['hbm_bytes']:.2f}",
                    f"{expected / 1e6:,.1f}" if expected else "-",
                    f"{found['cycles'] / 1e3:,.0f}",
                    f"{memory:,.1f}" + (" (does not fit)" if memory > HBM_LIMIT else ""),
                ]
            )
    header = ["batch", "mode", "HBM, MB per layer", "over dense", "FFN by the cost model, MB"]
    header += ["k cycles per layer", "weights of all layers, GiB"]
    return markdown(header, rows)


if __name__ == "__main__":
    main()
