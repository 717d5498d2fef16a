"""What one plain LLaMA per domain costs: writes docs/domains.json and the table of interchange.md.

    python tools/domains.py --workdir=runs/local/lory [--instances=N]
        [--finish=STEPS --config=CONFIG:experts=0]
    python tools/domains.py

The first measures a run on the test instances of every domain (at most N of each), routed as in
training, routed by the first T tokens, merged once for that domain (what `convert to-hf --domain`
exports), merged once for another domain, and merged with equal weights. With --finish, every export
is imported again and trained for so many steps on its domain alone, from a tenth of the run's
learning rate on. The second writes the table from the JSON that is there.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tables import ROOT, markdown, replace_marked, write

DATA, PAGE = ROOT / "docs" / "domains.json", ROOT / "docs" / "interchange.md"
COLUMNS = {
    "segment": "routed by segment",
    "prompt": "by the first T tokens",
    "domain": "merged for the domain",
    "finished": "and trained on it",
    "other": "merged for another domain",
    "uniform": "merged with equal weights",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--instances", type=int, default=10**9)
    parser.add_argument("--finish", type=int, default=0)
    parser.add_argument("--config")
    args = parser.parse_args()
    if args.workdir:
        result = measure(args.workdir, args.instances)
        if args.finish:
            finished = finish(args.workdir, args.instances, args.finish, args.config)
            for domain, perplexity in finished.items():
                result["perplexity"][domain]["finished"] = perplexity
            result["finish_steps"] = args.finish
        write(DATA, json.dumps(result, indent=1) + "\n")
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


def finish(workdir: Path, most: int, steps: int, config: str) -> dict[str, float]:
    """Test perplexity of every domain's export, imported and trained on the domain, by domain."""
    from lory_jax.evaluation.measure import open_model
    from lory_jax.run.directory import RunDirectory

    run = RunDirectory(workdir)
    sets = run.open_data().held_out_with_instances("test")
    rate = run.train_config["learning_rate"] / 10
    found = {}
    for domain, rows in sets.items():
        with tempfile.TemporaryDirectory() as scratch:
            exported, start, trained = (f"{scratch}/{name}" for name in ("hf", "start", "run"))
            verb(
                "convert",
                "to-hf",
                f"--workdir={workdir}",
                f"--domain={domain}",
                f"--out={exported}",
            )
            verb("convert", "from-hf", f"--hf={exported}", f"--workdir={start}")
            fields = {
                "data.mixture": f"{domain}=1",
                "train.steps": steps,
                "train.learning_rate": rate,
                "train.validate_every_steps": steps,
                "checkpoint.every_steps": steps,
            }
            flags = [f"--config.{name}={value}" for name, value in fields.items()]
            data = f"--data={run.open_data().directory}"
            where = (f"--init_from={start}", data, f"--workdir={trained}")
            verb("train", f"--config={config}", *where, *flags)
            measured = open_model(RunDirectory(Path(trained)))
            found |= perplexities(measured, {domain: evenly(rows, most)})
    return found


def verb(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, "-m", f"lory_jax.{name}", *flags], check=True)


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
    by_domain = result["perplexity"]
    columns = {
        key: title for key, title in COLUMNS.items() if key in next(iter(by_domain.values()))
    }
    rows = []
    for domain, values in by_domain.items():
        rows.append([domain, *(f"{values[name]:.2f}" for name in columns)])
    logs = {
        name: np.mean([np.log(values[name]) for values in by_domain.values()]) for name in columns
    }
    rows.append(["geometric mean", *(f"{np.exp(logs[name]):.2f}" for name in columns)])
    losses = [f"{logs[name] - logs['segment']:+.3f}" for name in columns]
    rows.append(["nats above routing by segment", *losses])
    return markdown(["perplexity", *columns.values()], rows)


if __name__ == "__main__":
    main()
