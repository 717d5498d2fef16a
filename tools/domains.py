"""What one plain LLaMA per domain costs: writes docs/domains.json and the table of interchange.md.

    python tools/domains.py --workdir=runs/local/lory [--instances=N]
    python tools/domains.py

The first measures a run on the test instances of every domain (at most N of each), routed as in
training, routed by the first T tokens, merged once for that domain (what `convert to-hf --domain`
exports), merged once for another domain, and merged with equal weights. The second writes the table
from the JSON that is there.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from tables import ROOT, markdown, replace_marked, write

DATA, PAGE = ROOT / "docs" / "domains.json", ROOT / "docs" / "interchange.md"
COLUMNS = {
    "segment": "routed by segment",
    "prompt": "by the first T tokens",
    "domain": "merged for the domain",
    "other": "merged for another domain",
    "uniform": "merged with equal weights",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--instances", type=int, default=10**9)
    args = parser.parse_args()
    if args.workdir:
        write(DATA, json.dumps(measure(args.workdir, args.instances), indent=1) + "\n")
    replace_marked(PAGE, "tools/domains.py", table(json.loads(DATA.read_text())))


def measure(workdir: Path, most: int) -> dict[str, Any]:
    """Perplexity over positions >= T, by domain and by what routes or merges."""
    from lory_jax.evaluation.measure import open_model
    from lory_jax.generation.merge import domain_routing
    from lory_jax.run.directory import RunDirectory

    run = RunDirectory(workdir)
    evaluated = open_model(run)
    model, data = evaluated.model, run.open_data()
    sets = {d: evenly(rows, most) for d, rows in data.held_out_with_instances("test").items()}
    validation = data.held_out_with_instances("validation")
    weights = {
        d: domain_routing(model.config, model.params, evenly(validation[d], most)[:, :-1])
        for d in sets
    }
    found: dict[str, dict[str, Any]] = {d: {} for d in sets}
    for kind in ("segment", "prompt"):
        for domain, perplexity in perplexities(evaluated, sets, kind).items():
            found[domain][kind] = perplexity
    equal_YxE = np.full_like(next(iter(weights.values())), 1 / model.config.num_experts)
    merges = weights | {"uniform": equal_YxE}
    of_merge = {
        name: perplexities(merged(evaluated, r_YxE), sets) for name, r_YxE in merges.items()
    }
    for domain in sets:
        found[domain]["domain"] = of_merge[domain][domain]
        found[domain]["uniform"] = of_merge["uniform"][domain]
        others = [of_merge[other][domain] for other in sets if other != domain]
        found[domain]["other"] = float(np.exp(np.mean(np.log(others))))
    return {
        "step": model.step,
        "experts": model.config.num_experts,
        "segment_length": model.config.segment_length,
        "instances": {domain: len(rows) for domain, rows in sets.items()},
        "perplexity": found,
    }


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]


def merged(evaluated: Any, r_YxE: np.ndarray) -> Any:
    """The dense model whose FFNs are merged by these weights."""
    from lory_jax.api import Model
    from lory_jax.generation.merge import merged_params

    model = evaluated.model
    params = merged_params(model.config, model.params, r_YxE, evaluated.mesh)
    config = dataclasses.replace(model.config, num_experts=0)
    return evaluated._replace(model=Model(config, params, model.tokenizer, model.step))


def perplexities(evaluated: Any, sets: Any, routing: str | None = None) -> dict[str, float]:
    from lory_jax.evaluation.measure import losses
    from lory_jax.evaluation.perplexity import perplexity

    T = evaluated.model.config.segment_length
    found = losses(evaluated, sets, f"routed by {routing}" if routing else "merged", routing)
    return {domain: float(perplexity(nll_NxL[:, T:])) for domain, nll_NxL in found.items()}


def table(result: dict[str, Any]) -> str:
    rows = []
    for domain, values in result["perplexity"].items():
        rows.append([domain, *(f"{values[name]:.2f}" for name in COLUMNS)])
    logs = {
        name: np.mean([np.log(values[name]) for values in result["perplexity"].values()])
        for name in COLUMNS
    }
    rows.append(["geometric mean", *(f"{np.exp(logs[name]):.2f}" for name in COLUMNS)])
    losses = [f"{logs[name] - logs['segment']:+.3f}" for name in COLUMNS]
    rows.append(["nats above routing by segment", *losses])
    return markdown(["perplexity", *COLUMNS.values()], rows)


if __name__ == "__main__":
    main()
