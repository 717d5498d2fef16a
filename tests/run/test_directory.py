"""RunDirectory: what it reads, what it refuses, and a checkpoint of choice through every verb."""

import json
import math
import shutil

import numpy as np
import pytest

import lory_jax
from lory_jax import analyze, compare, convert, doctor, evaluate, generate
from lory_jax.config import load_config
from lory_jax.conversion.hf_directory import read_llama_directory
from lory_jax.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, file_sha256
from lory_jax.data.prepared import PreparedData
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import ConfigError, InputError
from lory_jax.parallel import make_mesh
from lory_jax.run.directory import Dataset, RunDirectory
from tests.support.tiny import metric_line, verb, write_prepared, write_recipe


def test_what_may_change_in_a_run(tmp_path):
    config = {
        "model": {"embed_dim": 16, "remat": "none"},
        "train": {"steps": 12, "microbatches": 1, "learning_rate": 0.1},
        "checkpoint": {"keep": 2},
        "parallel": {"fsdp": 0},
    }
    dataset = Dataset("/data", "abc")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset._asdict()))

    def changed(change_steps=False, **fields):
        other = json.loads(json.dumps(config))
        for name, value in fields.items():
            section, _, field = name.partition("__")
            other[section][field] = value
        return RunDirectory(tmp_path).check_same_run(other, dataset, change_steps)

    assert changed() == []
    assert changed(parallel__fsdp=4, train__microbatches=2, checkpoint__keep_best=1) == [
        "checkpoint.keep_best: found 0, wanted 1",
        "parallel.fsdp: found 0, wanted 4",
        "train.microbatches: found 1, wanted 2",
    ]
    # A field that is younger than the run differs from it unless it has its default.
    assert changed(model__rope_theta=10_000.0) == []
    with pytest.raises(InputError, match=r"rope_theta: found 10000.0, wanted 2.0"):
        changed(model__rope_theta=2.0)
    with pytest.raises(InputError, match=r"model.embed_dim: found 16, wanted 32\)"):
        changed(model__embed_dim=32, model__remat="full")
    with pytest.raises(InputError, match=r"steps: found 12, wanted 24; change_steps"):
        changed(train__steps=24)
    assert changed(True, train__steps=24) == ["train.steps: found 12, wanted 24"]
    with pytest.raises(InputError, match="learning_rate"):
        changed(True, train__steps=24, train__learning_rate=0.2)
    dataset = Dataset("/other", "def")
    with pytest.raises(InputError, match="data: made from /data, wanted /other"):
        changed()


# ---------------------------------------------------------------- opening a run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared") / "data")


def opened(path, data, config):
    """Opens `path` for training on `data`; the lock ends with this call."""
    run = RunDirectory(path)
    run.open_for_training(config, PreparedData.open(data))
    return run


def test_a_new_run_is_written_and_read_back(tmp_path, data):
    config = load_config(f"{write_recipe(tmp_path)}:experts=4", []).to_dict()
    run = opened(tmp_path / "run", data, config)
    (run.path / "config.json.tmp-1").write_text("left by a process that was killed")
    again = opened(tmp_path / "run", data, config)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "config.json",
        "dataset.json",
        "lock",
        "tokenizer.json",
    ]
    for one in (run, again, RunDirectory(str(tmp_path / "run"))):
        assert one.config == json.loads(json.dumps(config))
        assert one.model_config.num_experts == 4 and one.model_config.embed_dim == 16
        assert one.tokenizer.sha256 == Tokenizer.load(data / TOKENIZER_NAME).sha256
        assert one.dataset == Dataset(str(data), file_sha256(data / MANIFEST_NAME))
        assert one.open_data().directory == data


def test_a_change_is_seen_by_the_one_who_made_it(tmp_path, data, capsys):
    config = load_config(f"{write_recipe(tmp_path)}:experts=4", []).to_dict()
    run = opened(tmp_path / "run", data, config)
    assert run.config["checkpoint"]["keep"] != 7
    config["checkpoint"]["keep"] = 7
    run.open_for_training(config, PreparedData.open(data))
    assert (
        run.config["checkpoint"]["keep"] == 7 == RunDirectory(run.path).config["checkpoint"]["keep"]
    )
    assert "checkpoint.keep" in capsys.readouterr().out
    assert RunDirectory(run.path).tokenizer.vocab_size == run.tokenizer.vocab_size


def test_data_that_the_run_was_not_trained_on_are_refused(tmp_path, data):
    config = load_config(f"{write_recipe(tmp_path)}:experts=4", []).to_dict()
    run = opened(tmp_path / "run", data, config)
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    assert run.open_data(moved).directory == moved
    for wrong in (write_prepared(tmp_path / "other", seed=1), tmp_path):
        with pytest.raises(InputError, match=rf"^data: {wrong}"):
            run.open_data(wrong)
    (run.path / "dataset.json").unlink()  # as in a run made by convert from-hf
    with pytest.raises(InputError, match=r"^data: "):
        RunDirectory(run.path).open_data()
    other = tmp_path / "other"
    assert RunDirectory(run.path).open_data(other).directory == other


def test_a_directory_that_is_no_run_is_named_when_it_is_read(tmp_path):
    run = RunDirectory(tmp_path)
    for read in (
        lambda: run.config,
        lambda: run.model_config,
        lambda: run.tokenizer,
        lambda: run.dataset,
        run.read_metrics,
        run.open_checkpoints,
    ):
        with pytest.raises(InputError, match=str(tmp_path)):
            read()
    assert run.lock_holder() is None and not list(tmp_path.iterdir())


def test_a_config_without_a_size_is_damaged_and_one_without_a_younger_field_is_not(tmp_path, data):
    config = load_config(f"{write_recipe(tmp_path)}:experts=4", []).to_dict()
    run = opened(tmp_path / "run", data, config)
    del config["model"]["rope_theta"]
    run.config_file.write_text(json.dumps(config))
    assert RunDirectory(run.path).model_config.rope_theta == 10_000.0
    del config["model"]["embed_dim"]
    run.config_file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: .*embed_dim"):
        _ = RunDirectory(run.path).model_config


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "checkpoints", "lock"])
def test_a_run_whose_links_lead_out_is_not_written_to(name, tmp_path, data):
    """As an unpacked archive may hold them."""
    config = load_config(f"{write_recipe(tmp_path)}:experts=4", []).to_dict()
    (tmp_path / "run").mkdir()
    (tmp_path / "private").write_text("kept")
    (tmp_path / "run" / name).symlink_to(tmp_path / "private")
    with pytest.raises(InputError, match=f"{name}: a symbolic link that leads out"):
        opened(tmp_path / "run", data, config)
    assert (tmp_path / "private").read_text() == "kept"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_metrics_without_the_line_that_a_killed_run_left_unfinished(tmp_path):
    run = RunDirectory(tmp_path)
    lines = [metric_line(step) for step in (1, 2)]
    first, second = (json.dumps(line) + "\n" for line in lines)
    run.metrics_file.write_text(first + second + '{"st')
    assert run.read_metrics() == lines
    run.metrics_file.write_text(first + '{"st\n' + second)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        run.read_metrics()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step", None), ("step", 1.5), ("loss", "2"), ("loss", None), ("step_seconds", [])),
        *(("tokens", 2**70), ("experts_active", "all"), ("validation_loss", {})),
    ],
)
def test_metrics_whose_numbers_are_none_are_refused(field, value, tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics_file.write_text(json.dumps(metric_line(1) | {field: value}) + "\n")
    with pytest.raises(InputError, match=rf"metrics\.jsonl:1: damaged, .*{field}"):
        run.read_metrics()


# ---------------------------------------------------------------- a checkpoint of choice

STEPS = 12


@pytest.fixture(scope="module")
def kept(tmp_path_factory, data):
    """A run that kept two checkpoints: the newest, and an earlier one that is the best."""
    directory = tmp_path_factory.mktemp("kept")
    trained = verb(
        "train",
        f"--config={write_recipe(directory)}:experts=4",
        f"--data={data}",
        f"--workdir={directory / 'run'}",
        # The learning rate rises until the end, far past what is sound: losses rise with it.
        "--config.train.learning_rate=2",
        "--config.train.warmup_fraction=1",
        "--config.train.dense_warmup_fraction=0",
        "--config.train.validate_every_steps=3",
        "--config.checkpoint.keep=1",
        "--config.checkpoint.keep_best=1",
    )
    assert trained.returncode == 0, trained.stderr
    return directory / "run"


@pytest.fixture(scope="module")
def best(kept) -> int:
    """The step of the lowest validation loss, from the log of the run."""
    lines = map(json.loads, (kept / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line.get("validation_loss", math.inf) for line in lines}
    step = min(losses, key=losses.__getitem__)
    assert step != STEPS
    assert {path.name for path in (kept / "checkpoints").iterdir()} == {str(step), str(STEPS)}
    return step


@pytest.fixture(scope="module")
def evaluated(kept, best):
    """The evaluations of all choices."""
    results = {}
    for choice in ("newest", "best", str(best)):
        out = kept.parent / f"{choice}.json"
        evaluate.main([f"--workdir={kept}", f"--out={out}", f"--step={choice}"])
        results[choice] = json.loads(out.read_text())
    return results


def test_load_takes_the_step_from_its_argument(kept, best):
    assert lory_jax.load(kept).step == lory_jax.load(kept, step="newest").step == STEPS
    chosen = lory_jax.load(kept, step="best")
    assert chosen.step == best == lory_jax.load(kept, best).step
    router = np.asarray(chosen.params["layers"]["ffn"]["router"])
    assert np.any(router != np.asarray(lory_jax.load(kept).params["layers"]["ffn"]["router"]))


def test_evaluate_measures_the_checkpoint_of_choice(evaluated, best):
    timeless = {
        choice: {k: v for k, v in result.items() if k not in ("seconds", "checkpoint")}
        for choice, result in evaluated.items()
    }
    assert timeless["best"] == timeless[str(best)] != timeless["newest"]
    assert evaluated["best"]["step"] == best and evaluated["newest"]["step"] == STEPS
    assert [evaluated[c]["checkpoint"] for c in ("newest", "best", str(best))] == [
        "newest",
        "best",
        best,
    ]


def test_generate_reads_the_checkpoint_of_choice(kept, capsys):
    texts = {}
    for choice in ("newest", "best"):
        generate.main(
            [
                f"--workdir={kept}",
                "--prompt=in",
                "--temperature=0",
                "--max_new_tokens=16",
                f"--step={choice}",
            ]
        )
        texts[choice] = capsys.readouterr().out.rstrip("\n")
        model = lory_jax.load(kept, choice)
        (expected,) = model.generate("in", temperature=0, max_new_tokens=16)
        assert texts[choice] == "in" + expected


def test_convert_exports_the_checkpoint_of_choice(kept, best, tmp_path):
    for choice, step in (("best", best), ("newest", STEPS), (str(best), best)):
        out = tmp_path / choice
        convert.main(
            ["to-hf", f"--workdir={kept}", f"--out={out}", "--prompt=in", f"--step={choice}"]
        )
        exported = read_llama_directory(out).params(make_mesh(1, 1, 1))
        expected = lory_jax.load(kept, step).params
        for name in ("embedding", "final_norm"):
            np.testing.assert_array_equal(np.asarray(exported[name]), np.asarray(expected[name]))


def test_compare_takes_the_step_that_was_evaluated(kept, best, evaluated, tmp_path):
    run, out = tmp_path / "run", tmp_path / "report"
    shutil.copytree(kept, run)
    evaluate.main([f"--workdir={run}", "--step=best"])
    analyze.main([f"--workdir={run}"])
    with pytest.raises(InputError, match=f"analysis.*step={best}"):
        compare.main([str(run), f"--out={out}"])
    analyze.main([f"--workdir={run}", "--step=best"])
    assert json.loads((run / "analysis" / "analysis.json").read_text())["step"] == best
    compare.main([str(run), f"--out={out}"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["models"]["run"]["evaluated_step"] == best
    assert report["models"]["run"]["steps"] == STEPS
    assert report["perplexity"]["run"] == evaluated["best"]["perplexity"]
    prompts = [text["prompt"] for text in report["samples"]["texts"].values()]
    drawn = lory_jax.load(run, best).generate(prompts, **report["samples"]["settings"])
    assert [text["continuation"] for text in report["samples"]["texts"].values()] == drawn


@pytest.fixture
def damaged(kept, best, tmp_path):
    """The run with the arrays of the newest in place of those of the best."""
    shutil.copytree(kept, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / str(best) / "state")
    shutil.copytree(checkpoints / str(STEPS) / "state", checkpoints / str(best) / "state")
    return tmp_path / "run"


def test_the_doctor_names_the_intact_checkpoints_and_the_best(kept, best, damaged, capsys):
    doctor.main([f"--workdir={kept}"])
    assert f"intact checkpoints: {best}, {STEPS}; the best is {best}" in capsys.readouterr().out
    with pytest.raises(InputError):
        doctor.main([f"--workdir={damaged}"])
    assert f"intact checkpoints: {STEPS}; the best is {STEPS}" in capsys.readouterr().out


def test_a_damaged_best_is_named_and_the_next_best_read(damaged, best, capsys):
    assert lory_jax.load(damaged, "best").step == STEPS
    assert f"checkpoints/{best} is damaged" in capsys.readouterr().err
    with pytest.raises(InputError, match=rf"^step: .*checkpoints/{best} is damaged"):
        lory_jax.load(damaged, best)


def test_a_step_that_is_not_there(kept, best):
    with pytest.raises(InputError, match=rf"^step: got 5, .*{best}, {STEPS}"):
        lory_jax.load(kept, 5)
    for main, arguments in (
        (evaluate.main, []),
        (analyze.main, []),
        (generate.main, ["--prompt=in"]),
        (lambda flags: convert.main(["to-hf", *flags]), [f"--out={kept / 'hf'}", "--prompt=in"]),
    ):
        with pytest.raises(InputError, match=rf"^step: got 5, .*{best}, {STEPS}"):
            main([f"--workdir={kept}", "--step=5", *arguments])
        with pytest.raises(ConfigError, match=r"--step: .*last"):
            main([f"--workdir={kept}", "--step=last", *arguments])
