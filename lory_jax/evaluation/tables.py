"""The results of an evaluation as aligned tables for the screen.

This module imports nothing heavy, because reports of finished evaluations use it, too.
"""

from typing import Any

from lory_jax.console import duration

MEASURES = ("perplexity", "perplexity_all_positions", "bits_per_byte")


def report_text(result: dict[str, Any]) -> str:
    """Everything that was measured, except for the tasks."""
    routed = f", routed by {result['routing']}" if result["routing"] else ""
    lines = [f"step {result['step']}, in {duration(result['seconds'])}"]
    if result["perplexity"]:
        lines.append(perplexity_table(f"{result['split']} set{routed}", result))
    if "perplexity_sets" in result:
        lines.append(perplexity_table(f"own sets{routed}", result["perplexity_sets"]))
    if "top_k_experts" in result:
        rows = {f"top {k}": found for k, found in result["top_k_experts"].items()}
        lines.append(domain_table(f"perplexity, fewer experts{routed}", rows))
    if "leakage" in result:
        lines.append(domain_table("perplexity, segment 1", result["leakage"]["perplexity"]))
    return "\n".join(lines)


def perplexity_table(title: str, result: dict[str, Any]) -> str:
    """One line per domain and one for the geometric mean, one column per measure."""
    names = ["geometric mean", *result["perplexity"]]
    width = max(len(name) for name in [*names, title])
    lines = [f"{title:{width}}  perplexity  (s.e.)   all positions  bits per byte"]
    rows = {name: {m: result[m][name] for m in MEASURES} for name in result["perplexity"]}
    for name, row in (rows | {"geometric mean": result["geometric_mean"]}).items():
        error = result["standard_error"].get(name)
        lines.append(
            f"{name:{width}}  {row['perplexity']:10.3f}  "
            f"{'' if error is None else f'{error:.3f}':7}  {row['perplexity_all_positions']:13.3f}"
            f"  {row['bits_per_byte']:13.4f}"
        )
    return "\n".join(lines)


def domain_table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """One line per variant of the model, one column per domain."""
    domains = list(next(iter(rows.values())))
    width = max(len(name) for name in [*rows, title])
    columns = [max(len(domain), 10) for domain in domains]
    heads = "".join(f"  {d:>{c}}" for d, c in zip(domains, columns, strict=True))
    lines = [f"{title:{width}}{heads}"]
    for name, row in rows.items():
        cells = "".join(f"  {row[d]:{c}.3f}" for d, c in zip(domains, columns, strict=True))
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)
