"""The seventeen tasks on small local documents: prompts, shots, results, errors. Offline."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lory_jax.api import Model
from lory_jax.errors import ConfigError, InputError
from lory_jax.evaluation.harness import run as run_tasks
from lory_jax.evaluation.harness.model import LoryLM
from lory_jax.evaluation.harness.tasks import data, documents
from lory_jax.preparation.tokenizer_training import train_tokenizer
from tests.support.models import params_of, tiny_config
from tests.support.task_data import DOCUMENTS, document, phrase, phrases, write_task_data
from tests.support.tiny import ROOT, assert_one_line_error, verb, verb_environment

SHOTS = {
    **dict.fromkeys(("piqa", "social_iqa", "boolq", "hellaswag", "winogrande"), 0),
    **dict.fromkeys(("race_middle", "race", "arc_easy", "arc_challenge"), 0),
    **dict.fromkeys(("nq_open", "triviaqa"), 5),
    **dict.fromkeys(("ag_news", "amazon", "sst2", "yelp", "fever", "mrpc"), 16),
}
LIMIT = 6
UPDATE = "update these when prompts, routing or scoring change on purpose, and say so in the commit"
GOLDEN_RESULTS = {
    "piqa": 0.0,
    "social_iqa": 0.1667,
    "boolq": 0.5,
    "hellaswag": 0.3333,
    "winogrande": 0.1667,
    "race_middle": 0.1667,
    "race": 0.6667,
    "arc_easy": 0.3333,
    "arc_challenge": 0.3333,
    "nq_open": 0.0,
    "triviaqa": 0.0,
    "ag_news": 0.3333,
    "amazon": 0.5,
    "sst2": 0.5,
    "yelp": 0.5,
    "fever": 0.5,
    "mrpc": 0.5,
}
GOLDEN_LOG_LIKELIHOODS = {
    "piqa": [-26.8232, -22.6558],
    "winogrande": [-50.9786, -51.1913],
    "race_middle": [-25.7506, -23.2596, -25.0604, -23.9832],
    "ag_news": [-34.9265, -47.1421, -56.57, -54.8032],
}


@functools.cache
def make_model() -> Model:
    text = "\n".join(phrase(i) for i in range(11)) + "\nQuestion: Answer: title: content: label"
    tokenizer = train_tokenizer([text * 4], 300)
    config = tiny_config(
        vocab_size=300,
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        mlp_dim=24,
        num_experts=4,
        sequence_length=256,
        segment_length=16,
    )
    return Model(config, params_of(config), tokenizer)


@pytest.fixture(scope="module")
def task_data(tmp_path_factory):
    return write_task_data(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def results(task_data):
    return run_tasks.run_tasks(make_model(), "lory_paper", limit=LIMIT, tasks_data=task_data)


def contexts(task_data, name, count=1):
    """What the model is given for the first documents of a task, and the right answers."""
    task = run_tasks._load([name], task_data)[name]
    task.set_fewshot_seed(seed=1)
    task.build_all_requests(limit=count)
    pairs = {}
    for instance in task.instances:
        pairs.setdefault(instance.doc_id, []).append(instance.args)
    return task, [pairs[i] for i in range(count)]


def test_the_group_is_the_paper():
    assert {name: item["num_fewshot"] for name, item in data.members().items()} == SHOTS
    assert len(SHOTS) == 17
    listing = run_tasks.list_tasks()
    assert all(f"  {name} " in listing for name in SHOTS)


def test_results_in_the_layout_of_the_harness(results):
    assert results["n-shot"] == SHOTS
    assert set(results["results"]) == set(results["versions"]) == set(results["configs"])
    assert results["n-samples"]["piqa"] == {"original": DOCUMENTS, "effective": LIMIT}
    assert results["config"]["model"] == "lory" and results["config"]["limit"] == LIMIT
    assert results["lm_eval_version"] == "0.4.13"
    tasks = run_tasks.task_summary(results)
    assert list(tasks) == list(SHOTS)
    for name, task in tasks.items():
        assert task["shots"] == SHOTS[name] and task["documents"] == LIMIT
        assert 0 <= task[task["metric"]] <= 1
    assert tasks["nq_open"]["metric"].startswith("exact_match,")
    assert tasks["piqa"]["metric"] == "acc_norm,none"
    assert tasks["sst2"]["metric"] == "acc,none" and "acc_stderr,none" in tasks["sst2"]
    lines = run_tasks.task_table("tasks, routed by prompt", tasks).splitlines()
    assert len(lines) == 1 + 17 + 1
    mean = sum(task[task["metric"]] for task in tasks.values()) / 17
    assert float(lines[-1].split()[-1]) == pytest.approx(mean, abs=1e-4)


def test_golden_results(results, task_data):
    found = {
        name: round(task[task["metric"]], 4)
        for name, task in run_tasks.task_summary(results).items()
    }
    assert found == GOLDEN_RESULTS, UPDATE
    lm = LoryLM(make_model())
    for name, golden in GOLDEN_LOG_LIKELIHOODS.items():
        task, _ = contexts(task_data, name)
        scores = [score[0] for score in lm.loglikelihood(task.instances)]
        assert scores == pytest.approx(golden, abs=1e-3), f"{name}: {UPDATE}"


def test_two_runs_are_identical(results, task_data):
    names = "amazon,race_middle"
    first, second = (
        json.dumps(run_tasks.run_tasks(make_model(), names, limit=2, tasks_data=task_data))
        for _ in range(2)
    )
    assert first == second
    # A task alone is what it is in the group.
    alone = run_tasks.run_tasks(make_model(), names, limit=LIMIT, tasks_data=task_data)
    assert alone["results"]["amazon"] == results["results"]["amazon"]


# ---------------------------------------------------------------- prompts of our own files


@pytest.mark.parametrize(
    "name, text, labels",
    [
        ("ag_news", lambda i: phrase(i), ["World", "Sports", "Business", "Sci/Tech"]),
        (
            "amazon",
            lambda i: f"title: {phrase(i)} content: {phrase(i + 1)}",
            ["negative", "positive"],
        ),
        ("yelp", lambda i: phrase(i), ["negative", "positive"]),
        ("fever", lambda i: phrase(i), ["SUPPORTS", "REFUTES"]),
    ],
)
def test_classification_is_laid_out_as_in_metaicl(task_data, name, text, labels):
    task, found = contexts(task_data, name, 3)
    for i, pairs in enumerate(found):
        assert [continuation for _, continuation in pairs] == [f"\n{label}" for label in labels]
        blocks = pairs[0][0].split("\n\n\n")
        assert len(blocks) == 17 and blocks[-1] == text(i)
        demonstrations = {f"{text(j)}\n{labels[j % len(labels)]}" for j in range(DOCUMENTS)}
        assert set(blocks[:-1]) <= demonstrations
        right = task.doc_to_target(task.eval_docs[i])
        assert right in (i % len(labels), labels[i % len(labels)])


def test_race_middle_asks_the_last_question_of_an_article(task_data):
    task, found = contexts(task_data, "race_middle", 2)
    for i, pairs in enumerate(found):
        answer = phrases(2 * i, 4)["ABCD".index(document("race_middle", 2 * i)["answer"])]
        article = f"Article: The {phrase(i)} house stood here.\n\n"
        assert {context for context, _ in pairs} == {f"{article}It was {answer}\nWho?"}
        assert [c for _, c in pairs] == [f" {option}" for option in phrases(2 * i + 1, 4)]
        assert task.doc_to_target(task.eval_docs[i]) == (2 * i + 1) % 4
    assert len(task.eval_docs) == DOCUMENTS // 2


def test_race_middle_reads_as_race_does(task_data):
    """The same article and questions through our file and through the harness's."""
    problems = [
        {"question": "It was  _  .", "options": phrases(0, 4), "answer": "B"},
        {"question": "What else?", "options": phrases(1, 4), "answer": "A"},
        {"question": "Who?", "options": phrases(2, 4), "answer": "D"},
    ]
    rows = [{"article": "A house.", **problem} for problem in problems]
    (ours,) = documents.race_articles(data.Dataset.from_list(rows))
    theirs = run_tasks._load(["race"], task_data)["race"]
    doc = {"article": "A house.", "problems": repr(problems)}
    assert documents.race_prompt(ours) == theirs.doc_to_text(doc)
    assert ours["options"][-1] == theirs.doc_to_choice(doc)
    assert ours["answers"][-1] == theirs.doc_to_target(doc)


def test_large_sets_are_sampled_and_long_texts_cut():
    rows = [{"text": f"{i} " * 600, "label": i} for i in range(2500)]
    sampled = documents.sampled(data.Dataset.from_list(rows))
    labels = sampled["label"]
    assert len(labels) == 2000 and sorted(set(labels)) == list(labels)
    assert {len(text) for text in sampled["text"]} == {1000}
    assert list(documents.sampled(data.Dataset.from_list(rows))["label"]) == list(labels)


# ---------------------------------------------------------------- local documents


def test_parquet_and_json_lines_are_read_alike(task_data, tmp_path):
    rows = [document("piqa", i) for i in range(DOCUMENTS)]
    (tmp_path / "piqa").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "piqa" / "validation.parquet"
    )
    found = [data.read_split(place, "piqa", "validation") for place in (task_data, tmp_path)]
    assert found[0].to_list() == found[1].to_list() == rows


def test_fetching_writes_what_is_read(tmp_path, task_data, monkeypatch):
    """The hub is played by directories of its layout: `datasets` loads those in the same way."""
    hub = tmp_path / "hub"
    for split in ("train", "test"):
        source = task_data / "yelp" / f"{split}.jsonl"
        target = hub / "fancyzhx" / "yelp_polarity" / f"{split}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    monkeypatch.chdir(hub)
    run_tasks.fetch_tasks(tmp_path / "local", "yelp")
    for split in ("train", "test"):
        found = data.read_split(tmp_path / "local", "yelp", split)
        assert found.to_list() == data.read_split(task_data, "yelp", split).to_list()
    assert sorted(p.name for p in (tmp_path / "local" / "yelp").iterdir()) == [
        "test.parquet",
        "train.parquet",
    ]
    with pytest.raises(ConfigError, match=r"tasks: got 'mmlu', .*lory_paper or one of piqa"):
        run_tasks.fetch_tasks(tmp_path / "local", "mmlu")


def test_missing_and_damaged_documents_are_named(task_data, tmp_path):
    local = shutil.copytree(task_data, tmp_path / "tasks")

    def run(name):
        run_tasks.run_tasks(make_model(), name, limit=1, tasks_data=local)

    (local / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(InputError, match=r"piqa/validation\.parquet: missing.* --tasks=piqa --fe"):
        run("piqa")
    (local / "yelp" / "train.jsonl").write_text('{"text": "a", "label": 0}\n[1]\n')
    with pytest.raises(InputError, match=r"yelp/train\.jsonl:2: got '\[1\]'"):
        run("yelp")
    (local / "yelp" / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    with pytest.raises(InputError, match="yelp: got 1 documents for 16 demonstrations"):
        run("yelp")
    (local / "sst2" / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"sst2/train\.parquet: not parquet"):
        run("sst2")
    (local / "ag_news" / "test.jsonl").write_text('{"text": "a", "label": 0}\n{"text": 3}\n')
    with pytest.raises(InputError, match=r"ag_news/test\.jsonl: not jsonl of one type per column"):
        run("ag_news")
    (local / "arc_easy" / "test.jsonl").write_text('{"query": "a"}\n')
    with pytest.raises(InputError, match=r"arc_easy: its documents lack a column .*question"):
        run("arc_easy")
    (local / "race_middle" / "test.jsonl").write_text('{"query": "a"}\n')
    with pytest.raises(InputError, match=r"race_middle: its documents lack a column .*article"):
        run("race_middle")
    (local / "boolq" / "validation.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"boolq/validation\.jsonl: no documents"):
        run("boolq")


def test_an_unreachable_hub_is_named(tmp_path):
    environment = {**verb_environment(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "lory_jax.evaluate", "--tasks=boolq", f"--fetch_tasks={tmp_path}"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert_one_line_error(result, 1, "aps/super_glue", "tasks_data=DIR")


def test_a_group_of_the_harness_is_run_by_its_name(task_data, tmp_path, monkeypatch):
    """`swag` of the harness, its documents from a directory in the place of the hub."""
    rows = [
        {"startphrase": f"He {phrase(i)}", "label": i % 4}
        | {f"ending{k}": ending for k, ending in enumerate(phrases(i, 4))}
        for i in range(4)
    ]
    directory = tmp_path / "allenai" / "swag"
    directory.mkdir(parents=True)
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{split}.parquet")
    (directory / "README.md").write_text("---\nconfigs:\n- config_name: regular\n---\n")
    monkeypatch.chdir(tmp_path)
    results = run_tasks.run_tasks(make_model(), "swag,piqa", limit=2, tasks_data=task_data)
    assert list(run_tasks.task_summary(results)) == ["swag", "piqa"]
    assert run_tasks.task_summary(results)["swag"]["shots"] == 0


def test_unknown_tasks_are_refused_with_the_nearest_name(task_data):
    with pytest.raises(ConfigError, match=r"tasks: got 'lory_papr', .* did you mean lory_paper"):
        run_tasks.run_tasks(make_model(), "lory_papr", tasks_data=task_data)


def test_a_name_that_is_near_none_gets_no_suggestion():
    with pytest.raises(ConfigError, match="tasks: got 'my_colours'") as refused:
        run_tasks.run_tasks(make_model(), "my_colours")
    assert "did you mean" not in str(refused.value)


# ---------------------------------------------------------------- task files of one's own

COLOURS = """\
task: my_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc}}
"""


@pytest.fixture
def colours(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": "The colour of grain is", "choices": [" yellow", " blue"], "label": 0},
        {"question": "", "choices": [" a", " b"], "label": 1},
        {"question": "Long " * 300, "choices": ["", " b"], "label": 1},
    ]
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine").mkdir()
    task_file = tmp_path / "mine" / "colours.yaml"
    task_file.write_text(COLOURS.format(path=documents))
    return task_file


def test_a_task_file_is_run_by_its_path_and_from_its_directory(colours):
    by_path = run_tasks.run_tasks(make_model(), str(colours))
    by_name = run_tasks.run_tasks(make_model(), "my_colours", include_path=colours.parent)
    assert by_path["results"] == by_name["results"]
    summary = run_tasks.task_summary(by_path)["my_colours"]
    assert (summary["metric"], summary["documents"]) == ("acc,none", 3)
    assert summary["acc,none"] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)


@pytest.mark.parametrize(
    "contents, reason",
    [("task: [", "cannot load"), ("a: 1", "cannot load"), ("task: t\nno_field: 1", "no_field")],
)
def test_a_damaged_task_file_is_named(colours, contents, reason):
    colours.write_text(contents)
    with pytest.raises(InputError, match=rf"colours\.yaml: .*{reason}"):
        run_tasks.run_tasks(make_model(), str(colours))


def test_missing_task_files_and_directories_are_named(tmp_path):
    with pytest.raises(InputError, match=r"tasks: .*none\.yaml: no such file"):
        run_tasks.run_tasks(make_model(), str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match=r"include_path: .*none: no such directory"):
        run_tasks.run_tasks(make_model(), "piqa", include_path=tmp_path / "none")


def test_the_list_needs_no_model():
    result = verb("evaluate", "--list_tasks")
    assert result.returncode == 0 and "race_middle" in result.stdout


def test_without_the_harness_the_command_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from lory_jax import cli, evaluate\n"
        "sys.argv = ['evaluate', '--list_tasks']\n"
        "cli.run(evaluate.main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert_one_line_error(result, 1, "lm_eval", "requirements-eval.txt")
