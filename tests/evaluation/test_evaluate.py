"""Evaluation, analysis, generation and comparison of runs that were really trained."""

import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import lory_jax
from lory_jax import analyze, compare, evaluate, generate
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import ConfigError, InputError
from lory_jax.evaluation.held_out import read_instances
from lory_jax.evaluation.measure import evaluate_run
from lory_jax.evaluation.tables import MEASURES
from lory_jax.run.directory import RunDirectory
from tests.support.in_process import write_run
from tests.support.task_data import write_task_data
from tests.support.tiny import (
    SEQUENCE_LENGTH,
    assert_one_line_error,
    verb,
    verb_command,
    verb_environment,
    write_prepared,
    write_recipe,
)

T = 8
ROUTED_BY = {"expert_choice_segment": "segment", "top2": "token"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Prepared data and finished runs on them: `dense`, `lory` and two sparse baselines."""
    directory = tmp_path_factory.mktemp("site")
    recipe, data = write_recipe(directory), write_prepared(directory / "data")
    trainings = [
        subprocess.Popen(
            verb_command(
                "train",
                f"--config={recipe}:experts={0 if name == 'dense' else 4}",
                f"--config.model.routing={name if name in ROUTED_BY else 'causal'}",
                f"--data={data}",
                f"--workdir={directory / name}",
            ),
            stdout=subprocess.DEVNULL,
            env=verb_environment(),
        )
        for name in ("dense", "lory", *ROUTED_BY)
    ]
    assert [training.wait(300) for training in trainings] == [0] * len(trainings)
    return directory


@pytest.fixture(scope="module")
def evaluated(site):
    for name in ("dense", "lory", *ROUTED_BY):
        out = site / name / "evaluation.json"
        more = ["--top_k_experts=1,2,4", "--leakage"] if name == "lory" else []
        evaluate.main([f"--workdir={site / name}", f"--out={out}", *more])
        if name != "dense":
            analyze.main([f"--workdir={site / name}"])
    return site


def expected_measures(workdir, rows, routing, prompt_length):
    """Perplexities from the logits of the Python API, token by token."""
    model = lory_jax.load(workdir)
    lengths = None if routing == "training" else [prompt_length] * len(rows)
    logits = model.logits(rows[:, :-1], routing, lengths).astype(np.float64)
    nll = np.array(
        [
            [
                np.log(np.exp(logits[i, p]).sum()) - logits[i, p, rows[i, p + 1]]
                for p in range(len(row) - 1)
            ]
            for i, row in enumerate(rows)
        ]
    )
    size = sum(len(model.tokenizer.decode_bytes([token])) for row in rows for token in row[1 + T :])
    return {
        "perplexity": np.exp(nll[:, T:].mean()),
        "perplexity_all_positions": np.exp(nll.mean()),
        "bits_per_byte": nll[:, T:].sum() / np.log(2) / size,
    }


@pytest.mark.parametrize("name", ["dense", "lory", *ROUTED_BY])
def test_evaluation_is_what_the_logits_say(evaluated, name):
    result = json.loads((evaluated / name / "evaluation.json").read_text())
    assert result["step"] == 12 and result["tasks"] == {} and result["seconds"] > 0
    assert result["routing"] == ({"dense": None, "lory": "segment"} | ROUTED_BY)[name]
    for domain, rows in PreparedData.open(evaluated / "data").held_out("test").items():
        # In training, tokens of a sparse model compete: it is measured as it infers.
        routing = "segment" if name in ROUTED_BY else "training"
        expected = expected_measures(evaluated / name, rows, routing, T)
        for measure, value in expected.items():
            assert result[measure][domain] == pytest.approx(value, rel=1e-5)
    for measure in expected:
        ones, threes = result[measure].values()
        assert result["geometric_mean"][measure] == pytest.approx((ones * threes) ** 0.5)


def test_losses_of_instances_make_up_the_perplexity(evaluated):
    result = json.loads((evaluated / "lory" / "evaluation.json").read_text())
    losses, origins = read_instances(evaluated / "lory" / "evaluation_instances.npz")
    assert list(losses) == list(result["perplexity"]) == ["ones", "threes"]
    for domain, loss_N in losses.items():
        assert loss_N.dtype == np.float32 and loss_N.shape == (3,)
        assert np.exp(loss_N.mean()) == pytest.approx(result["perplexity"][domain], rel=1e-6)
        # These data do not say where they come from: every instance is on its own.
        assert len(set(origins[domain])) == 3


def test_a_split_that_was_not_prepared_is_named(evaluated):
    done = verb("evaluate", f"--workdir={evaluated / 'lory'}", "--split=confirmation")
    assert_one_line_error(done, 1, "confirmation", "confirmation_fraction")


MODELS = {
    "lory": {},
    "remoe": {"routing": "remoe"},
    "expert_threshold": {"routing": "expert_threshold", "shared_expert": "true"},
    "token_deltas": {"token_deltas": "2", "mlp_dim": "32", "routing_source": "average"},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_the_confirmation_set_is_scored_where_it_was_prepared(fields, tmp_path):
    data, out = write_prepared(tmp_path / "data", with_confirmation=True), tmp_path / "out.json"
    workdir = write_run(tmp_path / "run", data, **fields)
    evaluate.main([f"--workdir={workdir}", "--split=confirmation", f"--out={out}"])
    result, model = json.loads(out.read_text()), lory_jax.load(workdir)
    for domain, rows in PreparedData.open(data).held_out("confirmation").items():
        assert result["perplexity"][domain] == pytest.approx(perplexity_of(model, rows), rel=1e-5)


def perplexity_of(model, rows):
    """Over the positions from T on, from logits."""
    logits = model.logits(rows[:, :-1]).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_probabilities, rows[:, 1:, None].astype(int), -1)[..., 0]
    return np.exp(nll[:, T:].mean())


def test_fewer_experts_are_what_their_logits_say(evaluated):
    result = json.loads((evaluated / "lory" / "evaluation.json").read_text())
    by_k = result["top_k_experts"]
    assert list(by_k) == ["1", "2", "4"]
    assert by_k["4"] == pytest.approx(result["perplexity"], rel=1e-6)
    for k, perplexity in by_k.items():
        losses, _ = read_instances(evaluated / "lory" / f"evaluation_top{k}_instances.npz")
        means = {domain: np.exp(loss_N.mean()) for domain, loss_N in losses.items()}
        assert means == pytest.approx(perplexity, rel=1e-6)
    model = lory_jax.load(evaluated / "lory").with_top_k_experts(2)
    for domain, rows in PreparedData.open(evaluated / "data").held_out("test").items():
        assert by_k["2"][domain] == pytest.approx(perplexity_of(model, rows), rel=1e-5)
        assert by_k["1"][domain] != pytest.approx(by_k["2"][domain], rel=1e-6)


def test_leakage_is_in_segment_1_alone(evaluated):
    result = json.loads((evaluated / "lory" / "evaluation.json").read_text())
    leakage = result["leakage"]["perplexity"]
    assert leakage["positions_from_T"] == pytest.approx(result["perplexity"], rel=1e-6)
    everywhere = result["perplexity_all_positions"]
    assert leakage["all_positions_self"] == pytest.approx(everywhere, rel=1e-6)
    assert leakage["all_positions_uniform"] != leakage["all_positions_self"]
    itself, uniform = map(np.array, result["leakage"]["loss_by_position"].values())
    assert len(itself) == SEQUENCE_LENGTH
    mean = np.log(list(everywhere.values())).mean()  # as many instances in either domain
    assert itself.mean() == pytest.approx(mean, rel=1e-6)
    assert np.all(itself[:T] != uniform[:T])
    picture = (evaluated / "lory" / "evaluation_positions.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "flag", "words"),
    [
        ("lory", "--top_k_experts=5", "top_k_experts: got 5, must be 1 to 4"),
        ("dense", "--top_k_experts=1", "top_k_experts: got 1, requires a model"),
        ("dense", "--leakage", "leakage: .* is a dense model"),
    ],
)
def test_variants_that_a_model_does_not_have_are_refused(site, tmp_path, name, flag, words):
    with pytest.raises(InputError, match=words):
        evaluate.main([f"--workdir={site / name}", f"--out={tmp_path / 'out.json'}", flag])
    assert not list(tmp_path.iterdir())


def test_evaluation_routed_by_the_prompt(evaluated):
    workdir = evaluated / "lory"
    run = RunDirectory(workdir)
    result = evaluate_run(run, routing="prompt", split="validation", batch_size=2)
    for domain, rows in PreparedData.open(evaluated / "data").held_out("validation").items():
        expected = expected_measures(workdir, rows, "prompt", T)
        everywhere = expected_measures(workdir, rows, "training", 0)
        assert result["perplexity"][domain] == pytest.approx(expected["perplexity"], rel=1e-5)
        assert result["bits_per_byte"][domain] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
        assert result["perplexity_all_positions"][domain] == pytest.approx(
            everywhere["perplexity_all_positions"], rel=1e-5
        )


def write_perplexity_sets(directory):
    """`long` fills more samples than are wanted, `short` fewer."""
    (directory / "long" / "part").mkdir(parents=True)
    for i in range(30):
        text = f"in {i} steps and words, " * (1 + i % 3)
        (directory / "long" / "part" / f"{i:02}.txt").write_text(text)
    lines = [json.dumps({"text": f"counting by {i} in numbers"}) for i in range(12)]
    (directory / "short.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.mark.parametrize("routing", ["segment", "prompt"])
def test_perplexity_of_own_sets(evaluated, tmp_path, capsys, routing):
    sets, workdir = write_perplexity_sets(tmp_path / "sets"), evaluated / "lory"
    evaluate.main(
        [
            f"--workdir={workdir}",
            f"--out={tmp_path / 'e.json'}",
            f"--routing={routing}",
            f"--perplexity_sets={sets}",
            "--perplexity_samples=7",
            "--split=none",
        ]
    )
    assert "own sets" in capsys.readouterr().out
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["perplexity"] == result["tasks"] == {}
    tokenizer = lory_jax.load(workdir).tokenizer
    texts = {
        "long": [p.read_text() for p in sorted((sets / "long" / "part").iterdir())],
        "short": [json.loads(x)["text"] for x in (sets / "short.jsonl").read_text().splitlines()],
    }
    found = result["perplexity_sets"]
    for name, documents in texts.items():
        stream = []
        for text in documents:
            stream += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        starts = range(0, len(stream) - SEQUENCE_LENGTH, SEQUENCE_LENGTH)
        rows = np.array([stream[start : start + SEQUENCE_LENGTH + 1] for start in starts])
        if len(rows) > 7:
            rows = rows[[i * len(rows) // 7 for i in range(7)]]
        assert found["instances"][name] == len(rows)
        expected = expected_measures(workdir, rows, routing, T)
        assert found["perplexity"][name] == pytest.approx(expected["perplexity"], rel=1e-5)
        alone = [expected_measures(workdir, rows[[i]], routing, T) for i in range(len(rows))]
        means = np.log([measures["perplexity"] for measures in alone])
        error = expected["perplexity"] * means.std(ddof=1) / len(rows) ** 0.5
        assert found["standard_error"][name] == pytest.approx(error, rel=1e-4)
    assert found["instances"]["long"] == 7


def test_tasks_beside_perplexity(evaluated, tmp_path):
    task_data = write_task_data(tmp_path / "tasks")
    arguments = ["--tasks=sst2,nq_open", f"--tasks_data={task_data}", "--limit=2"]
    workdir = evaluated / "lory"
    printed = verb("evaluate", f"--workdir={workdir}", f"--out={tmp_path / 'e.json'}", *arguments)
    assert printed.returncode == 0, printed.stderr
    assert "exact_match" in printed.stdout and "geometric mean" in printed.stdout
    result = json.loads((tmp_path / "e.json").read_text())
    before = json.loads((workdir / "evaluation.json").read_text())
    assert result["perplexity"] == before["perplexity"]
    assert set(result["tasks"]) == {"sst2", "nq_open"}
    assert result["tasks"]["sst2"]["shots"] == 16 and result["tasks"]["sst2"]["documents"] == 2
    harness = json.loads((tmp_path / "e_harness.json").read_text())
    assert harness["results"]["sst2"]["acc,none"] == result["tasks"]["sst2"]["acc,none"]

    # The harness's own command line comes to the same.
    command = [sys.executable, "-m", "lory_jax.evaluation.harness.command", "--model", "lory"]
    command += ["--model_args", f"workdir={workdir},tasks_data={task_data}", "--limit", "2"]
    command += ["--tasks", "lory_paper", "--output_path", str(tmp_path / "theirs")]
    environment = {**verb_environment(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())
    assert len(theirs["results"]) == 17 + 1  # the group has a line of its own
    for name in ("sst2", "nq_open"):
        for key, value in result["tasks"][name].items():
            if "," in key:
                assert theirs["results"][name][key] == value


def test_the_command_line_of_the_harness_names_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "lory_jax.evaluation.harness.command", "--model", "lory"]
    command += ["--model_args", f"workdir={tmp_path}", "--tasks", str(tmp_path / "task.yaml")]
    (tmp_path / "task.yaml").write_text("task: mine\ndataset_path: json\n")
    result = subprocess.run(command, capture_output=True, text=True, env=verb_environment())
    assert_one_line_error(result, 1, "config.json: no such file")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks=piqa", "--limit=0"], "--limit: got 0"),
        (["--limit=3"], "--limit: .*--tasks"),
        (["--perplexity_samples=0"], "--perplexity_samples: got 0"),
        (["--split=none"], "--split=none: .*--tasks"),
        (["--routing=training"], "--routing: invalid choice"),
    ],
)
def test_bad_flags_are_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.main([f"--workdir={tmp_path}", *arguments])


def test_bad_sets_are_named(evaluated, tmp_path):
    flags = [f"--workdir={evaluated / 'dense'}", "--split=none", f"--out={tmp_path / 'e.json'}"]
    for directory, message in (
        (tmp_path / "none", "perplexity_sets: got .*none"),
        (tmp_path / "empty", "empty holds no file"),
        (tmp_path / "tiny", "set tiny has 3 tokens, .* 25"),
    ):
        if directory.name != "none":
            directory.mkdir()
        if directory.name == "tiny":
            (directory / "tiny.jsonl").write_text('{"text": "a"}\n')
        with pytest.raises(InputError, match=message):
            evaluate.main([*flags, f"--perplexity_sets={directory}"])
    with pytest.raises(ConfigError, match="required: --workdir"):
        evaluate.main(["--tasks=piqa"])


@pytest.mark.parametrize("name", ["lory", "top2"])
def test_analysis_is_what_the_routing_weights_say(evaluated, name):
    directory = evaluated / name / "analysis"
    analysis = json.loads((directory / "analysis.json").read_text())
    model = lory_jax.load(evaluated / name)
    means = {}
    for domain, rows in PreparedData.open(evaluated / "data").held_out("test").items():
        means[domain] = model.routing_weights(rows[:, :-1])[:, :, 1:].mean((1, 2))
        np.testing.assert_allclose(analysis["routing_weights"][domain], means[domain], atol=1e-6)
    for layer, row in enumerate(analysis["routing_distance"]):
        between = 0.5 * np.abs(means["ones"][layer] - means["threes"][layer]).sum()
        assert row["between"] == pytest.approx(between, abs=1e-5)
        assert row["domains"] == ["ones", "threes"]
        assert 0 < row["shuffled"] <= row["shuffled_high"]
    assert {*analysis["origins"]} == {"ones", "threes"} and min(analysis["origins"].values()) > 1
    assert analysis["utilisation"]["step"] == list(range(4, 13))
    assert analysis["utilisation"]["pairs"] == 2 * 4
    assert sorted(path.name for path in directory.iterdir()) == [
        "analysis.html",
        "analysis.json",
        "distance.png",
        "routing_weights.png",
        "utilisation.png",
    ]


def test_telling_texts_have_the_greatest_weights(evaluated):
    """The first of each expert decides the greatest weight that the API gives to any segment."""
    found = json.loads((evaluated / "lory/analysis/analysis.json").read_text())["telling_texts"]
    model = lory_jax.load(evaluated / "lory")
    sets = PreparedData.open(evaluated / "data").held_out("test")
    weights = {d: model.routing_weights(rows[:, :-1])[:, :, 1:] for d, rows in sets.items()}
    assert list(found) == ["0", "1"]
    for layer, experts in found.items():
        for expert, best in enumerate(experts):
            mine = {d: r[int(layer), :, :, expert] for d, r in weights.items()}
            domain = max(mine, key=lambda d: mine[d].max())
            assert best[0]["weight"] == pytest.approx(mine[domain].max(), abs=1e-6)
            assert best[0]["domain"] == domain
            row, segment = np.unravel_index(mine[domain].argmax(), mine[domain].shape)
            ids = sets[domain][row, segment * T : (segment + 1) * T]
            assert best[0]["text"] == model.tokenizer.decode_bytes(ids).decode("utf-8", "replace")
            assert [text["weight"] for text in best] == sorted(
                (text["weight"] for text in best), reverse=True
            )


def test_analysis_is_one_page_without_scripts_or_links(evaluated):
    page = (evaluated / "lory" / "analysis" / "analysis.html").read_text()
    assert page.count("data:image/svg+xml") == 3
    assert not re.search(r"<script|https?:|<link|href=", page)


def test_a_text_is_shown_with_the_experts_that_read_it(evaluated, tmp_path, capsys):
    text = "<script>alert(1)</script> counting ó by steps, in words and in numbers, " * 2
    (tmp_path / "text.txt").write_text(text)
    workdir = evaluated / "lory"
    analyze.main([f"--workdir={workdir}", f"--text={tmp_path / 'text.txt'}", f"--out={tmp_path}"])
    page = (tmp_path / "text.html").read_text()
    assert "<script" not in page
    shown = [html.unescape(part) for part in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)]
    assert "".join(shown) == text  # no character is lost at a segment's border
    widths = np.array(re.findall(r"width:([\d.]+)%", page), float).reshape(-1, 2, 4) / 100

    model = lory_jax.load(workdir)
    tokens = np.array([[model.tokenizer.bos_id, *model.tokenizer.encode(text)]])
    assert len(widths) == len(shown) == -(-tokens.shape[1] // T) > 2 * SEQUENCE_LENGTH // T
    first = model.routing_weights(tokens[:, :SEQUENCE_LENGTH])[:, 0]
    np.testing.assert_allclose(widths[:3], first.swapaxes(0, 1), atol=1e-4)
    # Segment 4 is routed by segment 3, in a window that begins with it.
    second = model.routing_weights(tokens[:, 2 * T : 2 * T + SEQUENCE_LENGTH])[:, 0, 1]
    np.testing.assert_allclose(widths[3], second, atol=1e-4)
    assert len(capsys.readouterr().out.splitlines()) == len(shown) + 2


def test_a_text_that_cannot_be_shown_is_refused(evaluated, tmp_path):
    (tmp_path / "empty.txt").touch()
    for name, words in (("empty.txt", "at least one character"), ("none.txt", "cannot read it")):
        with pytest.raises(InputError, match=f"text: .*{words}"):
            analyze.main([f"--workdir={evaluated / 'lory'}", f"--text={tmp_path / name}"])
    with pytest.raises(InputError, match="dense model"):
        (tmp_path / "a.txt").write_text("a")
        analyze.main([f"--workdir={evaluated / 'dense'}", f"--text={tmp_path / 'a.txt'}"])


def test_comparison(evaluated, capsys):
    out = evaluated / "report"
    runs = [f"{name}={evaluated / name}" for name in ("dense", "lory")]
    compare.main([*runs, f"--out={out}"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith("report.html")
    report = json.loads((evaluated / "report.json").read_text())
    for name in ("dense", "lory"):
        evaluation = json.loads((evaluated / name / "evaluation.json").read_text())
        for measure in MEASURES:
            assert report[measure][name] == evaluation[measure]
        assert f"{evaluation['geometric_mean']['perplexity']:.3f}" in printed
        lines = (evaluated / name / "metrics.jsonl").read_text().splitlines()
        seconds = sum(json.loads(line)["step_seconds"] for line in lines)
        assert report["seconds"][name]["training"] == pytest.approx(seconds)
        assert report["models"][name]["tokens"] == 12 * 4 * SEQUENCE_LENGTH
        own = [json.loads(line) for line in lines if "validation_loss" in line]
        assert report["models"][name]["validation_loss"] == own[-1]["validation_loss"]
    lory = report["against_first"]["lory"]
    means = report["geometric_mean"]["perplexity"]
    assert lory["perplexity"] == pytest.approx(means["lory"] / means["dense"] - 1)
    assert lory["flops_per_token"] > 0 and lory["active_parameters"] == 0 and not lory["tasks"]
    assert report["tokens_to_first_loss"]["dense"] == 12 * 4 * SEQUENCE_LENGTH
    assert set(report["samples"]["texts"]) == {"ones", "threes"}
    assert report["samples"]["run"] == "lory"
    pages = [(evaluated / f"report.{kind}").read_bytes() for kind in ("json", "html")]
    compare.main([*runs, f"--out={out}"])
    assert pages == [(evaluated / f"report.{kind}").read_bytes() for kind in ("json", "html")]
    compare.main([str(evaluated / "dense"), f"--out={evaluated / 'alone'}"])
    assert "dense" in (evaluated / "alone.html").read_text()


def test_sparse_baselines_are_compared(evaluated, capsys):
    out = evaluated / "sparse"
    compare.main([*(str(evaluated / name) for name in ("lory", *ROUTED_BY)), f"--out={out}"])
    models = json.loads((evaluated / "sparse.json").read_text())["models"]
    assert list(models) == ["lory", *ROUTED_BY]
    assert models["lory"]["dropped_tokens"] is None and 0 <= models["top2"]["dropped_tokens"] < 1
    assert models["top2"]["parameters"]["active"] > models["lory"]["parameters"]["active"]


def test_generation(evaluated, capsys):
    workdir = f"--workdir={evaluated / 'lory'}"
    generate.main([workdir, "--prompt=in", "--max_new_tokens=8"])
    single = capsys.readouterr().out
    assert single.startswith("in")
    generate.main([workdir, "--prompt=in", "--prompt=by", "--max_new_tokens=8"])
    assert single.rstrip("\n") in capsys.readouterr().out
    with pytest.raises(InputError, match="max_new_tokens: got 99 after a prompt"):
        generate.main([workdir, "--prompt=in", "--max_new_tokens=99"])
    assert capsys.readouterr().out == ""


def test_generation_line_by_line(evaluated, capsys):
    """A prompt that is too long is refused in one line, and the next one continued."""
    workdir = f"--workdir={evaluated / 'lory'}"
    result = subprocess.run(
        verb_command("generate", workdir, "--interactive", "--max_new_tokens=4", "--stop=qqq"),
        input=f"in\n{'x' * 10_000}\n\nby\n",
        capture_output=True,
        text=True,
        env=verb_environment(),
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert len(re.findall("^error: prompt: got .* tokens", result.stderr, re.MULTILINE)) == 1
    generate.main([workdir, "--prompt=in", "--max_new_tokens=4"])
    generate.main([workdir, "--prompt=", "--max_new_tokens=4"])
    generate.main([workdir, "--prompt=by", "--max_new_tokens=4"])
    assert result.stdout == capsys.readouterr().out


def test_what_is_missing_is_named(evaluated, tmp_path):
    with pytest.raises(InputError, match="a dense model, which has no routing"):
        analyze.main([f"--workdir={evaluated / 'dense'}"])
    with pytest.raises(InputError, match=r"config\.json"):
        evaluate.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'x.json'}"])
    with pytest.raises(ConfigError, match="runs: "):
        compare.main([f"a={evaluated / 'lory'}", "a=b", f"--out={tmp_path / 'r'}"])
    with pytest.raises(ConfigError, match="--top_k_experts: got '1,x'"):
        evaluate.main([f"--workdir={tmp_path}", "--top_k_experts=1,x"])
    with pytest.raises(ConfigError, match="batch_size: got 0"):
        evaluate.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'x'}", "--batch_size=0"])
    result = tmp_path / "lory" / "evaluation.json"
    result.parent.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (result.parent / name).write_bytes((evaluated / "lory" / name).read_bytes())
    with pytest.raises(InputError, match=r"evaluation\.json: missing"):
        compare.main([f"lory={result.parent}", f"--out={tmp_path / 'r'}"])
    found = json.loads((evaluated / "lory" / "evaluation.json").read_text())
    result.write_text(json.dumps(found | {"step": 3}))
    with pytest.raises(InputError, match=r"evaluation\.json: .* step 3, .* step 12"):
        compare.main([f"lory={result.parent}", f"--out={tmp_path / 'r'}"])


def test_where_nothing_can_be_written_nothing_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("lory_jax.evaluation.measure.open_model", pytest.fail)
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    for out in (tmp_path / "file" / "x.json", tmp_path / "directory"):
        with pytest.raises(InputError, match=f"^out: {out}"):
            evaluate.main([f"--workdir={tmp_path}", f"--out={out}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_results_are_printed_before_the_disk_refuses_them(site, tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "write_atomically", full)
    with pytest.raises(InputError, match=r"^out: .*No space left"):
        evaluate.main([f"--workdir={site / 'dense'}", f"--out={tmp_path / 'x.json'}"])
    assert "geometric mean" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--help"], ["--no_such_flag=1"], ["--workdir=x", "--step=x"]])
def test_flags_are_answered_before_anything_heavy_is_imported(flags):
    """What the configs import is not counted: it is there before the verb's own imports."""
    code = (
        "import sys, lory_jax.cli; before = set(sys.modules)\n"
        "from lory_jax import evaluate\n"
        "from lory_jax.errors import ConfigError\n"
        "try: evaluate.main(sys.argv[1:])\n"
        "except (SystemExit, ConfigError): pass\n"
        "print(sorted(set(sys.modules) - before))"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", code, *flags], env=verb_environment(), text=True
    )
    loaded = printed.splitlines()[-1]
    assert "'lory_jax.evaluate'" in loaded
    heavy = ("jax", "numpy", "orbax", "matplotlib", "lm_eval", "grain", "lory_jax.api")
    assert not [name for name in heavy if f"'{name}'" in loaded]


def test_errors_are_one_line(tmp_path):
    assert_one_line_error(verb("generate", f"--workdir={tmp_path}", "--prompt=x"), 1, "config.json")


def test_loading_as_the_readme_says(evaluated):
    code = f"import lory_jax; m = lory_jax.load({str(evaluated / 'lory')!r})"
    code += "; print(m.logits([[1, 2, 3]]).shape)"
    printed = subprocess.check_output([sys.executable, "-c", code], env=verb_environment())
    assert printed.split(b"\n")[-2] == b"(1, 3, 300)"
