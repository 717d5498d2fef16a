"""The report of the study: from runs that were made up, and from none."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lory_jax.config import load_config
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import flops_per_token, parameter_counts, trained_flops_per_token
from tools.study import (
    arms,
    beyond,
    beyond_again,
    beyond_arms,
    fair_start,
    ladder,
    pictures,
    rivals,
    sparse,
    sparse_arms,
    words,
)
from tools.study.__main__ import RECIPE, unavailable
from tools.study.claims import diverged_runs, judge_claims, planned_seeds, read_claims
from tools.study.headline import headline, headline_table, relative_flops
from tools.study.report import CLAIMS, OUT, ROOT, make_report, write_final, write_report
from tools.study.results import Results, run_id

DOMAINS = {"a": 60, "b": 90}
SEEDS = 10  # as many as are planned of dense and lory
# Effects on the loss: what the verdicts must find again.
LOSSES = {"dense": 3.5, "lory": 3.42, "lory:prompt": 3.421, "lory_scratch": 3.421, "prefix": 3.3}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Results of made-up arms: dense is 0.08 above lory in domain a and in b."""
    out = tmp_path_factory.mktemp("docs") / "study"
    results = Results(out / "runs")
    (out / "runs").mkdir(parents=True)
    origins = {"a": [i // 3 for i in range(60)], "b": [20 + i // 3 for i in range(90)]}
    for corpus in ("packages", "debian"):
        write_held_out(results, origins, corpus, ("validation", "test"))
    rng = np.random.default_rng(0)
    of_instance = {domain: rng.normal(0, 0.5, size) for domain, size in DOMAINS.items()}
    for arm, loss in LOSSES.items():
        if ":" in arm:
            continue
        for seed in range(SEEDS):
            noise = rng.normal(0, 0.002)
            splits = {"test": loss}
            if arm == "lory":
                splits["test_prompt"] = LOSSES["lory:prompt"]
            instances = {
                split: {d: level + noise + of_instance[d] for d in DOMAINS}
                for split, level in splits.items()
            }
            routing = routing_weights(seed) if arm == "lory" else None
            write(results, arm, seed, instances, routing=routing)
    for arm, level in (("dense", 3.0), ("lory", 2.95)):
        for seed in range(2):
            losses = {d: np.full(n, level + seed / 1000) for d, n in DOMAINS.items()}
            write(results, arm, seed, {"test": losses}, "debian")
    trial = {"id": "dense-t00", "kind": "trial", "arm": "dense", "family": "dense"}
    trial |= {
        "corpus": "packages",
        "settings": {arms.RATE: 0.01, arms.START: 0.1, "train.steps": 400},
    }
    slower = trial["settings"] | {arms.RATE: 0.005, "train.steps": 1500}
    long = trial | {"id": "dense-l1", "kind": "long_trial", "settings": slower}
    results.write(long | {"status": "finished", "losses": {"validation": {"a": 2.0}}}, {})
    results.write(trial | {"status": "finished", "losses": {"validation": {"a": 3.0}}}, {})
    diverged = trial | {"id": "dense-t01", "status": "diverged"}
    results.write(diverged, {})
    overlap = {"test": {d: [0.9] * 10 + [0.1] * (n - 10) for d, n in DOMAINS.items()}}
    audit = {"digest": "d", "high": 0.5, "overlap": overlap}
    (out / "audit.json").write_text(json.dumps(audit))
    write_report(out)
    return out


def write_held_out(results, origins, corpus, splits=("test",)):
    path = results.directory / "held_out" / f"{corpus}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    origins = dict.fromkeys(splits, origins)
    path.write_text(json.dumps({"digest": "d", "origins": origins}))


def write(results, arm, seed, instances, corpus="packages", routing=None, **more):
    losses = {s: {d: float(x.mean()) for d, x in found.items()} for s, found in instances.items()}
    losses |= {s.replace("test", "validation"): found for s, found in losses.items()}
    record = {"id": run_id(arm, seed, corpus), "kind": "run", "arm": arm, "family": arm}
    record |= {"corpus": corpus, "seed": seed}
    record |= {"status": "finished", "losses": losses, "settings": {}, "step_seconds": 0.3}
    record |= {"curve": [[250, 4.0], [500, 3.5]], "flops_per_token": 1e6}
    record |= {"parameters": {"total": 90_000, "active": 80_000}, "tokens": 6e6}
    if arm == "lory" and corpus == "packages":
        record |= {"expert_cosine": 0.7, "experts_used": 0.9}
    results.write(record | more, instances | ({"routing": routing} if routing else {}))


def routing_weights(seed):
    """Of 20 and 30 folders, two experts: those of b are routed otherwise."""
    first = {"a": np.full((20, 1, 1), 0.8), "b": np.full((30, 1, 1), 0.5 - seed / 1000)}
    return {d: np.concatenate([w, 1 - w], axis=-1) for d, w in first.items()}


def test_verdicts_are_those_of_the_made_up_effects(out):
    claims = json.loads(out.with_suffix(".json").read_text())["claims"]
    assert set(claims) == {claim.id for claim in read_claims(CLAIMS)[0]}
    expected = {
        "gain": ("supported", -0.08),
        "warmup": ("equivalent", -0.001),
        "causal_over_prefix": ("contradicted", 0.12),
        "prompt_routing": ("supported", 0.001),
        "specialisation": ("supported", 0.26),
    }
    for name, (verdict, effect) in expected.items():
        got = claims[name]
        assert {"verdict", "effect", "interval", "seeds", "corpora"} <= set(got)
        assert got["verdict"] == verdict, name
        assert got["effect"] == pytest.approx(effect, abs=0.01)
        assert got["interval"][0] <= got["effect"] <= got["interval"][1]
        assert got["seeds"] == SEEDS and got["corpora"] == (2 if name == "gain" else 1)
        assert ("second_corpus" in got) == (name == "gain")
    again = claims["gain"]["second_corpus"]
    assert again["effect"] == pytest.approx(-0.05, abs=2e-3) and again["seeds"] == 2
    assert again["verdict"] == "pending" and again["planned_seeds"] == 3
    for name in ("over_remoe", "size", "equal_seconds_remoe"):
        assert claims[name]["verdict"] == "pending" and claims[name]["effect"] is None
        assert claims[name]["reason"].startswith("no runs of")
    assert claims["downstream"]["verdict"] == "not testable here"
    assert claims["gain"]["domains"].keys() == DOMAINS.keys() and len(claims["gain"]["parts"]) == 2


def test_nothing_is_final_while_claims_are_pending(out):
    with pytest.raises(InputError, match=r"runs are missing.*over_remoe on packages.*c_d16_e0_750"):
        write_final(out)
    assert not list(out.parent.glob("*_final*"))


def test_the_final_table_is_written_once_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "DRAWS", 4)
    results = Results(tmp_path / "study" / "runs")
    origins = {d: [i // 3 for i in range(n)] for d, n in DOMAINS.items()}
    for corpus in ("packages", "debian"):
        write_held_out(results, origins, corpus, ("test", "confirmation"))
    of_instance = {d: np.random.default_rng(3).normal(0, 0.5, n) for d, n in DOMAINS.items()}

    def write_all(arm, seeds, level, corpus="packages", **more):
        for seed in range(seeds):
            losses = {d: x + level + seed / 1000 for d, x in of_instance.items()}
            sunk = {d: loss + (0.05 if arm == "lory" else 0.0) for d, loss in losses.items()}
            splits = {"test": losses, "confirmation": sunk}
            write(results, arm, seed, splits, corpus, **more)

    for arm, level in (("dense", 3.5), ("lory", 3.4)):
        write_all(arm, 3, level, "debian")
    for arm in (arm for arm in arms.ARMS if arm.stage == "B"):
        rate, warmup = (arm.settings[name] for name in (arms.RATE, arms.WARMUP))
        write_all(arm.name, 3, 3.4 + 5 * rate + 100 * rate * warmup)
    by_name = {arm.name: arm for arm in arms.ARMS if arm.corpus == "packages"}
    for width, experts, steps in arms.LADDER_POINTS:
        name = arms.ladder_name(width, experts, steps)
        of_size = 4.2 - 0.2 * np.log(width) - 0.02 * experts**0.5
        level = {"dense": 3.5, "lory": 3.4}.get(name, of_size)
        counts = {"total": 1, "active": active_parameters(width)[0]}
        write_all(name, by_name[name].seeds, level, parameters=counts, tokens=4096 * steps)
    claims = json.loads(CLAIMS.read_text())
    claims["claims"] = {"gain": claims["claims"]["gain"]}
    few = tmp_path / "claims.json"
    few.write_text(json.dumps(claims))
    write_report(tmp_path / "study", few)
    before = (tmp_path / "study.json").read_text()
    write_final(tmp_path / "study", few)
    found = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("study", "study_final")]
    effects = [contents["claims"]["gain"]["effect"] for contents in found]
    np.testing.assert_allclose(effects, (-0.1, -0.05), atol=2e-3)
    assert found[0]["ladder"]["points"][0]["seeds"] == 1 and len(found[0]["ladder"]["points"]) == 32
    rows = [line.split(" | ") for line in (tmp_path / "study.md").read_text().splitlines()]
    by_change = {row[0].removeprefix("| "): row[1:] for row in rows if len(row) == 5}
    for change, effect in (
        ("learning rate of 0.024 instead of 0.006", 0.018 * (5 + 100 * 0.03)),
        ("interaction of warm-up and learning rate", 100 * 0.04 * 0.018),
        ("interaction of warm-up and router", 0.0),
    ):
        found_effect = float(by_change[change][0].replace("−", "-"))
        assert found_effect == pytest.approx(effect, abs=3e-3), change
    assert (tmp_path / "study.json").read_text() == before
    with pytest.raises(InputError, match="written once"):
        write_final(tmp_path / "study", few)


def test_the_committed_pages_are_made_from_the_committed_runs(tmp_path):
    """With everything copied, writing the pages again changes none of them."""
    for name in ("tools", "docs", "README.md"):
        ignore = shutil.ignore_patterns("__pycache__")
        source, copy = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=ignore)
        else:
            shutil.copy(source, copy)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "tools.study.pages"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True)
    for name in ("README", "docs/study", "docs/baselines", "docs/beyond", "docs/evaluation"):
        page = f"{name}.md"
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), page


def test_tuning_lists_every_trial_with_what_was_varied(out):
    contents = json.loads(out.with_suffix(".json").read_text())
    settings = {arms.RATE: 0.01, arms.START: 0.1}
    slower = settings | {arms.RATE: 0.005}
    assert contents["tuning"] == {
        "dense": [
            {"settings": slower, "steps": 1500, "validation_loss": 2.0},
            {"settings": settings, "steps": 400, "validation_loss": 3.0},
            {"settings": settings, "steps": 400, "validation_loss": None},
        ]
    }
    text = out.with_suffix(".md").read_text()
    assert "| dense | 2 | train.learning_rate=0.01, model.ffn_init_scale=0.1 | 3.0000 |" in text
    assert "| dense | 0.005 | 2.0000 | yes |" in text  # the only one
    assert "c_d96_e32_1500" in contents["ladder"]["missing"] and "laws" not in contents["ladder"]


def test_pages_show_claims_parts_and_pictures(out):
    text, page = (out.with_suffix(end).read_text() for end in (".md", ".html"))
    for claim in read_claims(CLAIMS)[0]:
        assert claim.claim in text
    assert "without near-duplicates" in text and "which dominates" in text
    assert page.count("data:image/svg+xml") == 2 and "<script" not in page
    arms_part = text.split("## Arms")[1].split("##")[0]
    rows = [line.split("|")[1].strip() for line in arms_part.splitlines() if line.startswith("| ")]
    assert len(rows) == len(set(rows)) > 3


def test_without_runs_nothing_is_testable(tmp_path):
    write_report(tmp_path / "study")
    contents = json.loads((tmp_path / "study.json").read_text())
    found = {name: claim["verdict"] for name, claim in contents["claims"].items()}
    assert found.pop("downstream") == "not testable here"
    assert {*found.values()} == {"pending"}
    assert contents["tuning"] == {} and len(contents["ladder"]["missing"]) == 32


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((3.2, 3.3), "supported"),
        ((3.2, 3.5), "inconclusive"),
        ((3.2, 3.52), "contradicted"),  # although the mean is lower
        ((3.7, 3.3), "contradicted"),
        ((3.5, 3.5), "equivalent"),
    ],
)
def test_a_claim_about_every_domain_needs_every_domain(levels, expected, tmp_path):
    results = Results(tmp_path / "study" / "runs")
    write_held_out(results, {d: list(range(n)) for d, n in DOMAINS.items()}, "packages")
    rng = np.random.default_rng(1)
    for arm, of_domain in (("dense", (3.5, 3.5)), ("lory", levels)):
        for seed in range(SEEDS):
            found = {
                d: level + rng.normal(0, 0.005, n)
                for (d, n), level in zip(DOMAINS.items(), of_domain, strict=True)
            }
            write(results, arm, seed, {"test": found})
    write_report(tmp_path / "study")
    claim = json.loads((tmp_path / "study.json").read_text())["claims"]["gain"]
    assert claim["effect"] == pytest.approx(sum(levels) / 2 - 3.5, abs=0.01)
    assert claim["verdict"] == expected


def test_claims_that_wait_for_their_runs_count_in_the_adjustment(tmp_path):
    results = Results(tmp_path / "runs")
    write_held_out(results, {d: list(range(n)) for d, n in DOMAINS.items()}, "packages")
    rng = np.random.default_rng(1)
    for arm, level in (("lory", 3.49), ("lory_redrawn", 3.5)):
        for seed in range(SEEDS - 1):
            found = {d: level + rng.normal(0, 0.05, n) for d, n in DOMAINS.items()}
            write(results, arm, seed, {"test": found})
    claims, margin = read_claims(CLAIMS)
    judged = {f.claim.id: f for f in judge_claims(claims, margin, results, "test")}
    planned = sum(bool(planned_seeds(claim, "packages")) for claim in claims)
    assert planned == sum(bool(claim.contrast) for claim in claims)
    found = judged["redrawing"]
    assert found.adjusted_p == pytest.approx(min(1.0, planned * found.p))
    assert 0.0 < planned * found.p < 1.0
    assert found.verdict == "pending"
    assert (found.effect.seeds, found.planned) == (SEEDS - 1, SEEDS)
    # The second corpus has runs for fewer claims, and measures neither prompts nor routing.
    on_debian = {claim.id: planned_seeds(claim, "debian") for claim in claims}
    assert on_debian["gain"] == 3 and not on_debian["specialisation"]
    assert not on_debian["prompt_routing"] and not on_debian["experts"]


def test_arms_with_other_segments_are_scored_on_the_same_positions():
    lengths = {a.name: a.first_position for a in arms.ARMS if "model.segment_length" in a.settings}
    assert set(lengths.values()) == {128} and {"lory_t16", "lory_t128"} <= lengths.keys()


def test_flops_are_the_mean_of_the_seeds():
    """With gates, seeds differ in the experts that a token has."""
    flops = (("remoe", 1.0), ("remoe", 3.0), ("lory", 1.0), ("lory", 1.0))
    records = [{"arm": arm, "kind": "run", "flops_per_token": value} for arm, value in flops]
    assert relative_flops("remoe", "lory", records) == 2.0


def test_the_headline_compares_on_both_corpora(out):
    report = make_report(out, "test", CLAIMS)
    _, rows = headline_table(report)
    (row,) = rows  # no other comparison has runs
    assert row[0] == "a dense model"
    cell = re.fullmatch(r"(.+) \((.+) to (.+); (.+) seeds\)", row[2].replace("−", "-"))
    mean, low, high, seeds = map(float, cell.groups())
    assert mean == pytest.approx(-0.08, abs=0.01) and low < mean < high and seeds == 10
    assert row[3].startswith("−0.05") and row[3].endswith("; 2 seeds)")
    text = headline(report)
    assert text.startswith("| Lory against | ")
    assert "On Python packages, Lory's perplexity is 0.92" in text
    assert "remains significant is that from a dense model on Python packages. The" in text
    assert "(lower in 2 of 2 domains, in 2 with an interval that excludes zero)" in text


def test_claims_are_listed_by_verdict_and_their_notes_by_number(out):
    text = out.with_suffix(".md").read_text()
    lines = text.split("## Claims\n\n")[1].split("\n\n##")[0].splitlines()
    verdicts = [line.split(" | ")[3].split(" (")[0] for line in lines if line.startswith("| ")]
    order = [key for key, _ in itertools.groupby(verdicts[2:])]
    assert len(order) == len(set(order)) and order[0] == "supported"
    notes = {claim.id: claim.note for claim in read_claims(CLAIMS)[0]}
    (row,) = (line for line in lines if line.startswith("| equal_seconds_remoe | "))
    number = re.search(r"\[note (\d+)\]", row).group(1)
    assert f"{number}. {notes['equal_seconds_remoe']}" in lines


def test_the_baseline_is_checked_against_its_neighbours(tmp_path, capsys, monkeypatch):
    results = Results(tmp_path / "runs")
    monkeypatch.setattr("sys.argv", ["fair_start", f"--out={tmp_path}"])

    def finish(name, loss, seed=0):
        record = {"id": f"{name}-s{seed}", "kind": "run", "arm": name, "status": "finished"}
        record |= {"seed": seed, "corpus": "packages"}
        results.write(record | {"losses": {"validation": {"a": loss, "b": loss}}}, {})

    finish("dense", 3.5)
    for name in fair_start.NEIGHBOURS[1:]:
        finish(name, 3.495)
    with pytest.raises(SystemExit) as missing:
        fair_start.main()
    finish(fair_start.NEIGHBOURS[0], 3.6)
    fair_start.main()
    finish(fair_start.NEIGHBOURS[0], 3.48)
    with pytest.raises(SystemExit) as better:
        fair_start.main()
    assert missing.value.code and better.value.code
    assert "-0.0200 nats (1 seed)" in capsys.readouterr().out
    finish("dense", 3.4, seed=1)  # its neighbour is better with one seed, and worse with the other
    finish(fair_start.NEIGHBOURS[0], 3.415, seed=1)
    fair_start.main()
    assert "-0.0025 nats (2 seeds)" in capsys.readouterr().out


def test_the_page_of_what_is_beyond_the_paper_compares_with_the_recipe(tmp_path):
    results = Results(tmp_path / "study" / "runs")
    write_held_out(results, {d: list(range(n)) for d, n in DOMAINS.items()}, "packages")
    rng = np.random.default_rng(2)
    for seed in range(3):
        of_instance = {d: rng.normal(3, 0.3, n) for d, n in DOMAINS.items()}
        for arm, effect in ((beyond.BEYOND_BASE, 0.0), ("source_average", -0.05)):
            noise = rng.normal(0, 0.001)
            write(
                results,
                arm,
                seed,
                {"test": {d: x + effect + noise for d, x in of_instance.items()}},
            )
    page = tmp_path / "beyond.md"
    page.write_text(f"before\n<!-- begin: {beyond.MARK} -->\nold\n<!-- end -->\nafter\n")
    beyond.write_page(tmp_path / "study", page)
    text = page.read_text()
    assert "| source_average | routing_source=average | -0.0" in text and "old" not in text
    assert "| 3 of 4 |" in text
    missing = text.split("Without runs so far: ")[1].split(".\n")[0].split(", ")
    of_stage = {arm.name for arm in beyond_arms.BEYOND_ARMS if not arm.keeps_run}
    assert {*missing} == of_stage - {"source_average"} and "source_attention" in missing
    for arm, effect in (("grown", -0.02), ("restarted", 0.01)):
        for name, seed in itertools.product((arm, f"{arm}_start"), range(3)):
            losses = {d: np.full(n, 3.0 + effect + seed / 1e3) for d, n in DOMAINS.items()}
            write(results, name, seed, {"test": losses})
    lost = {"id": "rank_4-s0", "kind": "run", "arm": "rank_4", "status": "diverged", "seed": 0}
    far = lost | {"id": "source_average-s9", "arm": "source_average", "seed": 9}
    results.write(far | {"corpus": "packages"}, {})  # a seed that does not choose
    results.write(lost | {"corpus": "packages"}, {})
    write(results, "rank_4", 1, {"test": {d: np.full(n, 3.0) for d, n in DOMAINS.items()}})
    beyond.write_page(tmp_path / "study", page)
    assert "| grown | restarted | -0.0" in page.read_text()
    start = lost | {"id": "grown_start-s3", "arm": "grown_start", "seed": 3, "corpus": "packages"}
    results.write(start, {})
    beyond.write_page(tmp_path / "study", page)
    assert "| grown | restarted |" not in page.read_text()
    assert "left out: grown_start-s3, rank_4-s0, source_average-s9." in page.read_text()
    assert "| source_average | routing_source=average | -0.0" in page.read_text()
    assert "| rank_4 | expert_rank" not in page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")


def test_the_page_of_baselines_compares_with_dense_and_with_lory(tmp_path):
    results = Results(tmp_path / "study" / "runs")
    write_held_out(results, {d: list(range(n)) for d, n in DOMAINS.items()}, "packages")
    rng = np.random.default_rng(2)
    for seed in range(3):
        of_instance = {d: rng.normal(3, 0.3, n) for d, n in DOMAINS.items()}
        for arm, level in (("dense", 0.0), ("lory", -0.05), ("remoe", -0.03)):
            noise = rng.normal(0, 0.001)
            losses = {d: x + level + noise for d, x in of_instance.items()}
            write(results, arm, seed, {"test": losses})
    seconds = {"over_base": {"lory": 1.0, "remoe": 1.1}}
    (tmp_path / "study" / "step_seconds.json").write_text(json.dumps(seconds))
    page = tmp_path / "baselines.md"
    page.write_text(f"<!-- begin: {rivals.MARK} -->\nold\n<!-- end -->\nafter\n")
    rivals.write_page(tmp_path / "study", page)
    lines = {line.split(" | ")[0]: line.split(" | ") for line in page.read_text().splitlines()}
    cells = (lines["| lory"][1], *lines["| remoe"][1:3])
    found = [float(cell.split(" (")[0]) for cell in cells]
    np.testing.assert_allclose(found, (-0.05, -0.03, 0.02), atol=0.005)
    assert lines["| lory"][2] == ""
    assert lines["| remoe"][3] == "3" and lines["| remoe"][-1] == "1.10 |"
    missing = page.read_text().split("Without runs so far: ")[1].split(".\n")[0].split(", ")
    assert {*missing} == {*rivals.SHOWN} - {"lory", "remoe"}
    write(results, "uniform", 0, {"test": {d: np.full(n, 3.0) for d, n in DOMAINS.items()}})
    lost = {"id": "uniform-s1", "kind": "run", "arm": "uniform", "status": "diverged", "seed": 1}
    results.write(lost | {"corpus": "packages"}, {})
    rivals.write_page(tmp_path / "study", page)
    text = page.read_text()
    assert "Diverged, and left out: uniform-s1." in text and "| uniform |" not in text
    assert "uniform" not in text.split("Without runs so far: ")[1].split(".\n")[0].split(", ")


def test_the_page_of_few_experts_compares_at_equal_tokens(tmp_path):
    """Effects of made-up runs: finishing +0.03 for k = 2, annealing +0.01, keeping 2 +0.2."""
    results = Results(tmp_path / "study" / "runs")
    for corpus in ("packages", "debian"):
        write_held_out(results, {d: list(range(n)) for d, n in DOMAINS.items()}, corpus)
    rng = np.random.default_rng(2)
    levels = {
        "sparse_parent": 0.0,
        "lory": 0.0,
        "sparse_all_finish0.1": -0.06,
        "sparse_all_finish0.3": -0.08,  # the better control
        "sparse_k2_renormalised_finish0.1": -0.02,
        "sparse_k2_straight_through_finish0.3": -0.05,  # the better of these
        "sparse_k2_renormalised_annealed": 0.01,
    }
    for seed in range(3):
        of_instance = {d: rng.normal(3, 0.3, n) for d, n in DOMAINS.items()}
        for arm, level in levels.items():
            kept = {"test_top2": 0.2, "test_top1": 0.4} if arm == "sparse_parent" else {}
            splits = {"test": level} | kept
            noise = 0.0 if arm in ("lory", "sparse_parent") else rng.normal(0, 0.001)
            instances = {
                split: {d: x + value + noise for d, x in of_instance.items()}
                for split, value in splits.items()
            }
            write(results, arm, seed, instances)
            if arm in ("sparse_parent", "sparse_k2_renormalised_annealed") and seed == 0:
                write(results, arm, seed, instances, "debian")
    page = tmp_path / "evaluation.md"
    page.write_text(f"before\n<!-- begin: {sparse.MARK} -->\nold\n<!-- end -->\nafter\n")
    sparse.write_page(tmp_path / "study", page)
    rows = [[cell.strip() for cell in line.split("|")] for line in page.read_text().splitlines()]
    by_way = {row[2]: row[3:] for row in rows if len(row) == 8 and row[1] == "2"}
    expected = {
        "kept of the finished model": ("", 0.2, "no, open"),  # one seed on debian
        "a finishing phase of 10 %": (
            "sparse_k2_straight_through_finish0.3",
            0.03,
            "no, no figure",
        ),
        "annealed in training": ("sparse_k2_renormalised_annealed", 0.01, "yes, open"),
    }
    for how, (chosen, level, aims) in expected.items():
        name, packages, _, met, _ = by_way[how]
        assert (name, met) == (chosen, aims)
        assert float(packages.split()[0]) == pytest.approx(level, abs=3e-3)
    assert "+0.01" in by_way["annealed in training"][2]
    assert "any test instance is 0 nats" in page.read_text()
    assert [row[2] for row in rows if row[1:2] == ["1"]] == ["kept of the finished model"]


# ---------------------------------------------------------------- claims and arms


def test_claims_name_arms_that_exist_with_seeds_for_an_interval():
    by_name = {arm.name: arm for arm in arms.ARMS if arm.corpus == "packages"}
    assert len({run_id(arm.name, 0, arm.corpus) for arm in arms.ARMS}) == len(arms.ARMS)
    on_debian = {*arms.ON_DEBIAN, *sparse_arms.SPARSE_ON_DEBIAN, *beyond_again.FINALISTS}
    assert {arm.name for arm in arms.ARMS if arm.corpus == "debian"} == on_debian
    claims, margin = read_claims(CLAIMS)
    assert margin == 0.01
    for claim in claims:
        assert claim.direction in (-1, 0, 1)
        for name in claim.contrast:
            arm, _, routed = name.partition(":")
            assert by_name[arm].seeds >= 3, name
            assert not routed or routed in by_name[arm].measures
        if claim.statistic in ("mean", "every_domain"):
            assert sum(claim.contrast.values()) == pytest.approx(0)


def test_what_other_seeds_and_the_second_corpus_leave_out_is_what_validation_says():
    """Checks the lists in arms.py against the committed runs."""
    first = sparse.finished_runs(Results(OUT / "runs"), "packages")
    for way in sparse.ways():
        for names in (way.variants, way.baselines):
            losses = {name: sparse.validation_losses(name, first)[0] for name in names}
            for name in {*names} & {*sparse_arms.SETTLED}:
                assert losses[name] > min(losses.values()), name
            assert sparse.best(names, first).partition(":")[0] in sparse_arms.SPARSE_ON_DEBIAN


def test_the_longer_dense_run_has_as_many_flops_as_lorys():
    dense, lory = (
        flops_per_token(ModelConfig.for_platform(load_config(f"{RECIPE}:experts={E}").model, "cpu"))
        for E in (0, 8)
    )
    assert pytest.approx(lory / dense, abs=1e-4) == arms.FLOPS_OVER_DENSE


def cost_of(arm):
    """FLOPs per token, averaged over segment lengths, and parameters."""
    (family,) = (family for family in arms.FAMILIES if family.name == arm.family)
    fields = {**family.settings, **arm.settings}
    config = load_config(RECIPE, [(name, str(value)) for name, value in fields.items()])
    model = ModelConfig.for_platform(config.model, "cpu")
    flops = trained_flops_per_token(model, config.train.segment_schedule)
    return np.array([flops, parameter_counts(model)["total"]])


def test_arms_beyond_the_paper_cost_what_their_page_says():
    by_name = {arm.name: arm for arm in arms.ARMS if arm.corpus == "packages"}
    base = cost_of(by_name[beyond.BEYOND_BASE])
    over_base = {name: cost_of(arm) / base for name, arm in by_name.items()}
    for name in ("source_average", "layers_upper_half", "layers_every_second", "shared_half"):
        np.testing.assert_allclose(over_base[name], 1.0, atol=0.005, err_msg=name)
    assert over_base["schedule_t128_t64"][0] == pytest.approx(0.98, abs=0.005)
    assert over_base["rank_1"][0] == pytest.approx(1.02, abs=0.005)
    longer = by_name["longer"].steps / arms.STEPS
    assert longer == pytest.approx(over_base["deltas_8"][0], abs=1e-3)


def test_arms_beyond_the_paper_train_for_as_many_steps_as_the_recipe():
    by_name = {arm.name: arm for arm in arms.ARMS if arm.stage == "beyond"}

    def chain(name):
        parents = {p for parent in by_name[name].parents for p in chain(parent)}
        return {name} | parents

    for name in ("grown", "restarted", "branches", "unbranched"):
        assert sum(by_name[each].steps for each in chain(name)) == arms.STEPS, name
        depths = {by_name[p].reads_on for p in by_name[name].parents}
        assert depths == {by_name[name].reads_on - 1}
    shown = {arm.name for arm in beyond.shown()}
    assert {name for pair in beyond.CONTROLS for name in pair} <= shown


def test_arms_that_are_said_to_cost_as_much_do():
    """Token deltas beside a narrower FFN as the recipe, and without experts as with them."""
    by_name = {arm.name: arm for arm in beyond_arms.BEYOND_ARMS}

    def costs(name, experts):
        fields = by_name[name].settings if name in by_name else {}
        overrides = [(field, str(value)) for field, value in fields.items()]
        model = ModelConfig(**load_config(f"{RECIPE}:experts={experts}", overrides).model)
        return flops_per_token(model), parameter_counts(model)["total"]

    recipe, narrow = costs("lory_redrawn", 8), costs("deltas_8_narrow", 8)
    assert narrow == pytest.approx(recipe, rel=0.02)
    with_experts, without = costs("deltas_8", 8), costs("deltas_8_dense_wide", 0)
    assert without[0] == pytest.approx(with_experts[0], rel=0.01)
    assert with_experts[0] / recipe[0] == pytest.approx(beyond_arms.DELTAS_OVER_BASE, abs=1e-3)


def test_labels_of_a_picture_are_apart_and_near_their_points():
    heights = [0.0, 0.001, 0.002, 0.3, 0.95, 1.0]
    found = pictures.apart(heights, 0.1)
    assert np.diff(found).min() > 0.0999 and found[3] == 0.3
    assert np.mean(found[:3]) == pytest.approx(np.mean(heights[:3]))
    assert np.mean(found[4:]) == pytest.approx(np.mean(heights[4:]))
    chained = pictures.apart([0.0, 0.0, 0.14, 0.24], 0.1)  # the first two push the third
    assert np.diff(chained).min() > 0.0999
    places = pictures.label_places({"near": (1.0, 0.2), "above": (1.001, 0.2), "far": (2.0, 0.2)})
    assert places["near"][0] == places["above"][0] and places["near"][1] != places["above"][1]
    assert places["far"][1] == 0.2 and places["far"][0] > 2.0


def test_finalists_are_tried_again_where_they_were_not_chosen(tmp_path):
    again = beyond_again.arms_again(("shared_half", "rank_4"))
    assert {(arm.name, arm.corpus, arm.seeds) for arm in again} == {
        ("shared_half", "debian", 3),
        ("rank_4", "debian", 3),
        *((f"{name}_d64", "packages", 3) for name in (beyond.BEYOND_BASE, "shared_half", "rank_4")),
    }
    wider = {arm.name: arm for arm in again}
    base = cost_of(wider["lory_redrawn_d64"])
    np.testing.assert_allclose(cost_of(wider["shared_half_d64"]) / base, 1.0, atol=0.01)
    assert wider["rank_4_d64"].settings["model.expert_rank"] == 8
    seeds = {a.name: a.seeds for a in beyond_again.with_all_seeds(arms.BEYOND_ARMS, ("rank_4",))}
    assert seeds["rank_4"] == 10 and seeds["rank_1"] == 4
    for name in ("grown", "branches", "longer", "rank_4_rate_doubled", "deltas_8_dense", "none"):
        with pytest.raises(ValueError, match=f"finalists: got {name}, must be of source_"):
            beyond_again.arms_again((name,))

    results = Results(tmp_path)
    origins = {d: list(range(n)) for d, n in DOMAINS.items()}
    for corpus in ("packages", "debian"):
        write_held_out(results, origins, corpus, ("test", "confirmation"))

    def write_pair(names, effects, seeds, split, corpus="packages"):
        for name, effect in zip(names, effects, strict=True):
            for seed in seeds:
                level = 3.0 + effect + seed / 1e3
                losses = {d: np.full(n, level) for d, n in DOMAINS.items()}
                write(results, name, seed, {split: losses, "test": losses}, corpus)

    pair = (beyond.BEYOND_BASE, "rank_4")
    write_pair(pair, (0.0, -0.5), range(4), "confirmation")  # the seeds that chose it
    write_pair(pair, (0.0, -0.03), range(4, 10), "confirmation")
    write_pair(pair, (0.0, -0.02), range(3), "test", "debian")
    write_pair([f"{name}_d64" for name in pair], (0.0, 0.01), range(3), "test")
    write_pair(("shared_half",), (-0.7,), range(4, 6), "confirmation")  # a lucky start
    finalists = ("shared_half", "rank_4")
    rows = beyond.tried_again(results, finalists)
    assert [(*row[:2], row[4]) for row in rows] == [
        ("shared_half", "other seeds, confirmation set", "2 of 6"),
        ("shared_half", "the second corpus, test set", "0 of 3"),
        ("shared_half", "D = 64, test set", "0 of 3"),
        ("rank_4", "other seeds, confirmation set", "6"),
        ("rank_4", "the second corpus, test set", "3"),
        ("rank_4", "D = 64, test set", "3"),
    ]
    assert {(row[2], row[3], row[5]) for row in rows[:3]} == {("", "", "")}
    found = [float(row[2]) for row in rows[3:]]
    np.testing.assert_allclose(found, (-0.03, -0.02, 0.01), atol=2e-3)
    for seed in range(4, 10):  # p is adjusted for both
        losses = {d: np.full(n, 2.98 + seed**2 / 1e3) for d, n in DOMAINS.items()}
        write(results, "shared_half", seed, {"confirmation": losses, "test": losses})
        losses = {d: np.full(n, 2.94 + seed**2 / 1e3) for d, n in DOMAINS.items()}
        write(results, "rank_4", seed, {"confirmation": losses, "test": losses})
    both = {row[0]: row for row in beyond.tried_again(results, finalists) if "other" in row[1]}
    (alone,) = (row for row in beyond.tried_again(results, ("rank_4",)) if "other" in row[1])
    assert both["rank_4"][:5] == alone[:5]
    assert 0.001 < float(alone[5]) < float(both["shared_half"][5])
    assert float(both["rank_4"][5]) == pytest.approx(2 * float(alone[5]), rel=0.1)
    lost = {"id": "rank_4-s7", "kind": "run", "arm": "rank_4", "status": "diverged", "seed": 7}
    results.write(lost | {"corpus": "packages"}, {})
    (row,) = (row for row in beyond.tried_again(results, ("rank_4",)) if "other" in row[1])
    assert row[2:] == ["diverged", "", "", ""]


def test_finalists_are_the_best_by_validation():
    ranking = beyond.ranking(Results(OUT / "runs"))
    if beyond_again.FINALISTS:
        assert {*ranking[: beyond_again.NUMBER]} == {*beyond_again.FINALISTS}
        lost = diverged_runs(Results(OUT / "runs"), seeds=beyond.CHOOSING)
        assert {*ranking} | lost.keys() >= {*beyond_again.CANDIDATES}


def test_candidates_are_ranked_by_validation_with_the_seeds_that_choose(tmp_path):
    """Not by the test set, not by other seeds, and not before all four seeds are there."""
    results = Results(tmp_path)
    for name, validation, test, seeds in (
        (beyond.BEYOND_BASE, 3.0, 3.0, 10),
        ("rank_1", 2.95, 3.1, 4),
        ("source_average", 2.99, 2.5, 4),
        ("shared_half", 2.5, 2.5, 3),
        ("longer", 2.5, 2.5, 4),
    ):
        for seed in range(seeds):
            losses = {"validation": {"a": validation}, "test": {"a": test}}
            write(results, name, seed, {}, losses=losses)
    assert beyond.ranking(results) == ["rank_1", "source_average"]


def test_every_family_has_the_same_number_of_trials():
    names = [family.name for family in arms.FAMILIES]
    assert len(set(names)) == len(names)
    for family in arms.FAMILIES:
        assert len(family.trials()) == arms.TRIALS
        assert len(family.grid[arms.RATE]) == 4
        assert family.long_factors == arms.LONG_FACTORS
        assert family.end_factors == arms.END_FACTORS
    assert {arm.family for arm in arms.ARMS} <= set(names)
    assert set(fair_start.NEIGHBOURS) <= {arm.name for arm in arms.ARMS}


def test_every_arm_of_this_version_can_be_trained():
    assert not unavailable([*arms.FAMILIES, *arms.ARMS])


# ---------------------------------------------------------------- the ladder


def active_parameters(width):
    """Of the ladder's models, with and without embedding and head."""
    inner = 49 * width**2  # four layers, F = 2.75 D
    return inner + 2 * 512 * width, inner


def made_up(law, noise=0.0, counted="active", of_documents=0.0):
    """Points on a law; documents of 12 folders differ in what experts are worth on them."""
    rng = np.random.default_rng(0)
    of_folder = of_documents * rng.normal(size=12)
    points = []
    for width, experts in itertools.product((16, 32, 64, 96), (0, 2, 8, 32)):
        active, inner = active_parameters(width)
        N = np.array([active if counted == "active" else inner])
        for horizon, tokens in enumerate((3.0, 6.0)):
            loss = float(ladder.predict(law, N, np.array([experts]), horizon)[0])
            loss += rng.normal(0, noise)
            losses = {"a": loss + np.log(max(experts, 1)) * np.repeat(of_folder, 5)}
            level = float(losses["a"].mean())
            away = noise * rng.choice([-1, 1])  # their mean has the variance noise^2
            of_seeds = {0: level - away, 1: level + away}
            of_point = width, experts, active, inner, tokens, of_seeds
            points.append(ladder.Point(*of_point, losses))
    return points


ORIGINS = {"a": np.repeat(np.arange(12), 5).tolist()}
LAW = np.array([-0.3, 0.35, 0.03, 0.06, 1.7, 1.5])


def test_the_ladder_finds_the_law_again(monkeypatch):
    monkeypatch.setattr(ladder, "DRAWS", 5)
    for counted in ladder.COUNTS:
        found = ladder.summarize(made_up(LAW, counted=counted), ORIGINS)["laws"][counted]
        values = [found["parameters"][name]["value"] for name in ladder.NAMES]
        np.testing.assert_allclose(values, LAW[:4], rtol=1e-2)
        assert found["lack_of_fit"] < 1e-4


@pytest.mark.parametrize("gamma", [0.0, 0.03])
def test_the_ladder_finds_the_multiplier_of_the_law_again(gamma, monkeypatch):
    monkeypatch.setattr(ladder, "DRAWS", 100)
    law = LAW.copy()
    law[2] = gamma
    found = ladder.summarize(made_up(law, noise=0.01), ORIGINS)["laws"]["active"]
    covered = []
    for row in found["multipliers"]:
        active, _ = active_parameters(row["width"])
        true = ladder.multiplier(law, active, row["experts"])
        # The definition: the dense model of so many times the parameters has the same loss.
        dense, lory = (
            ladder.predict(law, np.array([N]), np.array([E]), 0)[0]
            for N, E in ((active * true, 0), (active, row["experts"]))
        )
        assert dense == pytest.approx(lory, abs=1e-9)
        assert row["multiplier"] == pytest.approx(true, rel=0.3)
        low, high = row["interval"]
        covered.append(low <= true <= high)
    assert sum(covered) >= len(covered) - 2


def test_the_ladders_intervals_cover_the_choice_of_documents(monkeypatch):
    monkeypatch.setattr(ladder, "DRAWS", 100)
    widths = []
    for of_documents in (0.0, 0.02):
        points = made_up(LAW, noise=0.001, of_documents=of_documents)
        rows = ladder.summarize(points, ORIGINS)["laws"]["active"]["multipliers"]
        widths.append([row["interval"][1] - row["interval"][0] for row in rows])
    assert np.all(np.array(widths[1]) > 2 * np.array(widths[0]))


def points_of_noise(common, own, seeds=3, points=80):
    """Points whose seeds move all of them alike, and each of them a little more."""
    rng = np.random.default_rng(0)
    of_seed_S = rng.normal(0, common, 10)
    found = []
    for number in range(points):
        kept = range(seeds + number % 2)
        of_seeds = {seed: 3.0 + of_seed_S[seed] + rng.normal(0, own) for seed in kept}
        found.append(ladder.Point(16, 0, 1e5, 1e5, 3.0, of_seeds))
    return found, of_seed_S


def test_what_seeds_do_to_all_points_alike_is_told_from_the_rest():
    points, of_seed_S = points_of_noise(0.02, 0.006)
    noise = ladder.seed_noise(points)
    assert noise.own == pytest.approx(0.006**2, rel=0.1)
    drawn = [np.var(of_seed_S[:n], ddof=1) for n in (3, 4)]
    assert min(drawn) * 0.9 < noise.common < max(drawn) * 1.1
    alone = ladder.seed_noise(points_of_noise(0.0, 0.006)[0])
    assert alone.common < 0.2 * alone.own
    # Two points with the seeds 0 to 2, and a third with 0 to 3.
    covariance = noise.covariance([points[0], points[2], points[1]])
    assert covariance[0, 1] == pytest.approx(noise.common / 3)
    assert covariance[0, 2] == pytest.approx(noise.common * 3 / (3 * 4))
    assert covariance[2, 2] == pytest.approx((noise.common + noise.own) / 4)


def test_noise_that_points_share_widens_no_multiplier(monkeypatch):
    """All points higher by as much are the same law with other constants."""
    monkeypatch.setattr(ladder, "DRAWS", 60)
    widths = {}
    for name, noise in (
        ("shared", ladder.Noise(0.02**2, 1e-10)),
        ("own", ladder.Noise(0, 0.02**2)),
    ):
        monkeypatch.setattr(ladder, "seed_noise", lambda points, noise=noise: noise)
        found = ladder.summarize(made_up(LAW), ORIGINS)["laws"]["active"]
        widths[name] = [row["interval"][1] - row["interval"][0] for row in found["multipliers"]]
    assert np.all(np.array(widths["shared"]) < 0.05 * np.array(widths["own"]))


def test_lack_of_fit_is_what_noise_does_not_explain():
    """The mean over many noisy fits of a straight line is the variance that was added."""
    rng = np.random.default_rng(0)
    jacobian = np.stack([np.ones(12), np.arange(12.0)], axis=1)
    noise = 0.3 * np.eye(12) + 0.5  # some of it common to all
    line = jacobian @ np.linalg.pinv(jacobian)
    found = []
    for _ in range(2_000):
        values = rng.multivariate_normal(np.zeros(12), noise) + rng.normal(0, 2.0, 12)
        found.append(ladder.lack_of_fit(values - line @ values, jacobian, noise))
    assert np.mean(found) == pytest.approx(4.0, rel=0.05)


def test_a_fit_that_ends_at_a_bound_says_so(monkeypatch):
    """Losses that fall with the logarithm of the size have no constant above zero."""
    monkeypatch.setattr(ladder, "DRAWS", 3)
    points = []
    for width, experts in itertools.product((16, 32, 64, 96), (0, 2, 8, 32)):
        active, inner = active_parameters(width)
        for horizon, tokens in enumerate((3.0, 6.0)):
            level = 2.6 - 0.35 * np.log(active / 1e5) - 0.03 * np.log(max(experts, 1))
            level -= 0.15 * horizon
            losses = {"a": np.full(60, level)}
            points.append(
                ladder.Point(width, experts, active, inner, tokens, {0: level, 1: level}, losses)
            )
    found = ladder.summarize(points, ORIGINS)
    assert "constant" in found["laws"]["active"]["at_bound"]
    assert words.at_bounds(found)[0].startswith("With all active parameters, the fit ended at its")
    assert not words.at_bounds({"laws": {}})


def test_a_point_with_a_diverged_run_is_named_and_left_out(tmp_path):
    results = Results(tmp_path)
    write_held_out(results, {"a": [0, 1]}, "packages")
    write(results, "c_d16_e2_1500", 0, {"test": {"a": np.array([3.0, 4.0])}}, tokens=6e6)
    write(results, "c_d96_e2_750", 0, {}, status="diverged")
    found = ladder.read_points(results, "test")
    assert found.diverged == ["c_d96_e2_750"] and len(found.points) == 1
    assert len(found.missing) == 30


def test_a_point_without_all_its_seeds_is_missing(tmp_path):
    results = Results(tmp_path)
    write_held_out(results, {"a": [0, 1]}, "packages")
    splits = {"test": {"a": np.array([3.0, 4.0])}}
    seeds = next(arm.seeds for arm in arms.ARMS if arm.name == "c_d16_e32_1500")
    for name, number in (("c_d16_e32_1500", seeds - 1), ("c_d16_e2_1500", 1)):
        for seed in range(number):
            write(results, name, seed, splits, tokens=6e6)
    found = ladder.read_points(results, "test")
    assert [(p.width, p.experts, p.loss) for p in found.points] == [(16, 2, 3.5)]
    assert len(found.missing) == 31 and "c_d16_e32_1500" in found.missing


def test_the_ladders_known_runs_have_the_settings_of_its_other_points():
    """Dense and Lory were tuned apart; at D = 32 their best settings are the same."""
    results = Results(OUT / "runs")
    rates = {750: 2.0, 1500: 1.0}
    for (_, experts, steps), name in arms.LADDER_KNOWN.items():
        found, dense = (results.read(f"{arm}-s0")["settings"] for arm in (name, "dense"))
        expected = {**dense, arms.EXPERTS: experts, "train.steps": steps}
        assert found == expected | {arms.RATE: rates[steps] * dense[arms.RATE]}


def test_arms_that_are_contrasted_are_scored_on_the_same_positions():
    first = {arm.name: arm.first_position for arm in arms.ARMS if arm.corpus == "packages"}
    for claim in read_claims(CLAIMS)[0]:
        assert len({first[name.partition(":")[0]] for name in claim.contrast}) <= 1, claim.id
