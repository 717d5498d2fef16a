"""A plan as text on the screen."""

from collections.abc import Mapping
from typing import Any

from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import baselines, flops_per_token, parameter_counts
from lory_jax.parallel import MESH_AXES

WIDTH = 20  # of a column of figures


def plan_table(plan: Mapping[str, Any]) -> str:
    """A plan for the screen, with the recipe and its dense baseline side by side.

    Cycles are two sums: the compiler's, and the repriced one (`cycles.py`) that bounds the time.
    """
    counts = plan["parameters"]
    lines = [
        f"parameters        {counts['total'] / 1e6:,.1f}M total, {counts['active'] / 1e6:,.1f}M "
        "active",
        f"FLOPs per token   {plan['flops_per_token'] / 1e9:,.2f} G",
    ]
    if "topology" not in plan:
        return "\n".join(lines)
    shape = " x ".join(f"{axis}={plan['mesh'][axis]}" for axis in MESH_AXES)
    lines += [f"{plan['topology']:<17} {plan['devices']} of {plan['device']}, mesh {shape}"]
    columns = [plan] if plan["dense"] is None else [plan, plan["dense"]]
    if len(columns) > 1:
        lines += ["", f"{'per device and step':<36}{'experts':>{WIDTH}}{'dense':>{WIDTH}}"]
    rows = [figures_of(column) for column in columns]
    names = [name for row in rows for name in row]
    for name in dict.fromkeys(names):
        lines.append(f"{name:<36}" + "".join(f"{row.get(name, '-'):>{WIDTH}}" for row in rows))
    for column in columns:
        lines += omissions_of(column)
    return "\n".join(lines)


def figures_of(plan: Mapping[str, Any]) -> dict[str, str]:
    """One column of the table: figures as text, by the name of their row."""
    memory = plan["bytes_per_device"]
    rows = {
        f"{name}, GiB": f"{memory[name] / 2**30:.2f}"
        for name in ("arguments", "temporaries", "total", "limit")
    }
    rows["fits"] = "yes" if memory["fits"] else "NO"
    for kind, axes in (plan["collective_bytes"] or {}).items():
        rows |= {f"{kind} over {axis}, GB": f"{b / 1e9:.3f}" for axis, b in axes.items()}
    rows["compile, s"] = f"{plan['compile_seconds']:.0f}"
    estimate = plan["estimate"]
    if estimate is None:
        return rows
    for scope, seconds in estimate.get("roofline_seconds", {}).items():
        rows[f"{scope.replace('_', ' ')}, s"] = f"{seconds:.4f}"
    if "flops" in estimate:
        rows["products, TFLOP"] = f"{estimate['flops'] / 1e12:.2f}"
        rows["memory traffic, GB"] = f"{estimate['hbm_bytes'] / 1e9:.1f}"
    for scope, cycles in estimate.get("cycles", {}).items():
        repriced = estimate["repriced_cycles"][scope]
        name = f"{scope.replace('_', ' ')}, M cycles"
        rows[name] = f"{cycles / 1e6:,.1f} / {repriced / 1e6:,.1f}"
    for kernel, cycles in estimate.get("kernel_cycles", {}).items():
        rows[f"  of which {kernel}"] = f"{cycles / 1e6:,.1f}"
    rows["computing, s"] = f"{estimate['compute_seconds']:.4f}"
    rows["memory traffic, s"] = f"{estimate['hbm_seconds']:.4f}"
    rows["collectives, s"] = f"{estimate['collective_seconds']:.4f}"
    if "awaited_seconds" in estimate:
        rows["  of which awaited, s"] = f"{estimate['awaited_seconds']:.4f}"
    rows["step at least, s"] = f"{estimate['step_seconds_lower_bound']:.4f}"
    rate = estimate["tokens_per_second_per_device_upper_bound"]
    rows["tokens/s per device at most"] = f"{rate:,.0f}"
    mfu = estimate["mfu_upper_bound"]
    rows["MFU at most"] = "unknown" if mfu is None else f"{mfu:.1%}"
    return rows


def omissions_of(plan: Mapping[str, Any]) -> list[str]:
    """What the cycles of a plan leave out or overstate, one line each."""
    estimate = plan["estimate"]
    if estimate is None:
        return []
    uncounted = estimate.get("uncounted_kernels", {}).items()
    lines = [
        f"not in the compiler's sum: kernel {name}, {calls} calls" for name, calls in uncounted
    ]
    for name, price in estimate.get("kernels", {}).items():
        if price["counted_always"]:
            lines.append(
                f"kernel {name}: {price['counted_always']} conditional parts count as if they "
                "always ran"
            )
        if price["unread"]:
            lines.append(f"kernel {name}: its bundles are not counted: {price['unread']}")
    lines += [
        f"counted once: loop {loop}, whose trip count is not known"
        for loop in estimate["loops_counted_once"]
    ]
    return lines


def baselines_table(model_config: ModelConfig) -> str:
    """Parameters and FLOPs of a recipe and of the baselines it is compared with, side by side."""
    title = f"with {model_config.num_experts} experts"
    lines = [f"{title:<24}{'total':>12}{'active':>12}{'FLOPs/token':>14}"]
    for name, baseline in baselines(model_config).items():
        counts, flops = parameter_counts(baseline), flops_per_token(baseline)
        lines.append(
            f"{name:<24}{counts['total'] / 1e6:>11,.1f}M{counts['active'] / 1e6:>11,.1f}M"
            f"{flops / 1e9:>12,.3f} G"
        )
    return "\n".join(lines)
