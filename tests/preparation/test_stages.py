"""The stages together: many tasks and shards, several engines, kills, changed corpora."""

import json
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from lory_jax.preparation.stages import STAGES
from tests.support.corpora import (
    SETTINGS,
    SHARDED,
    contents,
    prepare_here,
    read_drop_lists,
    start_prepare,
    write_corpus,
    write_records,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "documents")


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare_here(corpus, out, *SHARDED, "--workers=1")
    return out


def test_the_result_has_several_shards_and_no_leftovers(prepared):
    assert os.listdir(prepared.parent) == ["data"]
    data = PreparedData.open(prepared)
    data.verify(hashes=True)
    assert len(data.manifest.names("train/")) >= 4
    assert data.manifest.similarity["similar"]["mean_cosine"] > 0.9
    page = (prepared / "report.html").read_text()
    assert "<h1>Prepared data</h1>" in page
    assert re.search(r"cosine 0\.\d+: domain\d, source-\d+ → domain\d, source-\d+", page)


def test_two_workers_give_the_same_bytes(prepared, corpus, tmp_path):
    assert prepare_here(corpus, tmp_path / "data", *SHARDED, "--workers=2") == contents(prepared)


def test_stages_by_hand_give_the_same_bytes(prepared, corpus, tmp_path):
    out = tmp_path / "data"
    for stage in STAGES:
        for task in (1, 0):
            flags = (f"--stage={stage.name}", f"--task={task}/2")
            prepare_here(corpus, out, *SHARDED, *flags)
    assert contents(out) == contents(prepared)
    assert os.listdir(tmp_path) == ["data"]


def test_a_stage_out_of_turn_is_refused(corpus, tmp_path):
    with pytest.raises(InputError, match=r"^stage: order found no work"):
        prepare_here(corpus, tmp_path / "data", *SHARDED, "--stage=order")
    prepare_here(corpus, tmp_path / "data", *SHARDED, "--stage=plan")
    with pytest.raises(InputError, match=r"^stage: deduplicate requires stage read"):
        prepare_here(corpus, tmp_path / "data", *SHARDED, "--stage=deduplicate")
    with pytest.raises(InputError, match=r"^stage: got 'sort'"):
        prepare_here(corpus, tmp_path / "data", *SHARDED, "--stage=sort")


def kill_after(process, work, markers):
    """Kills a whole process group once so many markers exist; returns the markers it left."""
    while process.poll() is None and len(list(work.glob("*/*.json"))) < markers:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return {path: path.read_bytes() for path in work.glob("*/*.json")}


def test_killed_and_resumed_gives_the_same_bytes(prepared, corpus, tmp_path):
    """No task that left a marker runs again: its marker, with its times, is the same at the end."""
    out, work = tmp_path / "data", tmp_path / "data.tmp-prepare"
    for markers in sorted(random.Random(0).sample(range(1, 25), 2)):
        process = start_prepare(corpus, out, *SHARDED, "--workers=1")
        done = kill_after(process, work, markers)
        assert len(done) >= markers and not out.exists()
    for stage in STAGES[:-1]:
        prepare_here(corpus, out, *SHARDED, f"--stage={stage.name}")
    assert done.items() <= {path: path.read_bytes() for path in work.glob("*/*.json")}.items()
    assert prepare_here(corpus, out, *SHARDED, "--workers=1") == contents(prepared)
    assert os.listdir(tmp_path) == ["data"]


def test_workers_end_with_their_parent(corpus, tmp_path):
    process = start_prepare(corpus, tmp_path / "data", *SHARDED, "--workers=2")
    work = tmp_path / "data.tmp-prepare"
    while not (work / "read").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)  # ends when no process holds the pipe any more


def test_one_work_directory_has_one_owner(corpus, tmp_path):
    out = tmp_path / "data"
    process = start_prepare(corpus, out, *SHARDED, "--workers=1")
    while not (tmp_path / "data.tmp-prepare" / "plan").exists():
        time.sleep(0.01)
    try:
        with pytest.raises(InputError, match=r"^out: another prepare"):
            prepare_here(corpus, out, *SHARDED)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def grown(directory):
    record = {"text": "one more " * 60, "domain": "domain0", "source": "source-0"}
    write_records(directory / "part-9.jsonl", [record])


def edited(directory):
    path = directory / "part-1.jsonl"
    path.write_text(path.read_text().replace("w", "v", 1))


def shrunk(directory):
    (directory / "part-2.jsonl").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [(grown, "1 new: .*part-9"), (edited, "1 changed: .*part-1"), (shrunk, "1 missing: .*part-2")],
)
def test_a_corpus_that_changed_is_not_called_done(prepared, corpus, tmp_path, change, words):
    copy, out = shutil.copytree(corpus, tmp_path / "documents"), tmp_path / "data"
    prepare_here(copy, out, *SETTINGS, "--workers=1")
    before = contents(out)
    assert prepare_here(copy, out, *SETTINGS, "--workers=1") == before
    change(copy)
    with pytest.raises(InputError, match=rf"^out: .*another state of the corpus \({words}"):
        prepare_here(copy, out, *SETTINGS)
    assert contents(out) == before


def test_a_corpus_that_changed_in_between_begins_again(corpus, tmp_path, capsys):
    copy, out = shutil.copytree(corpus, tmp_path / "documents"), tmp_path / "data"
    prepare_here(copy, out, *SETTINGS, "--stage=plan")
    prepare_here(copy, out, *SETTINGS, "--stage=read")
    grown(copy)
    changed = prepare_here(copy, out, *SETTINGS, "--workers=1")
    assert "the corpus changed" in capsys.readouterr().err
    assert changed == prepare_here(copy, tmp_path / "again", *SETTINGS, "--workers=1")
    inputs = PreparedData.open(out).manifest.inputs
    assert {os.path.basename(each["path"]) for each in inputs} == set(os.listdir(copy))


FATES = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 11), st.sampled_from(["", " ", "\n"])),
    min_size=60,
    max_size=140,
)


@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(FATES, st.integers(0, 3))
def test_every_document_is_in_one_stream_or_drop_list(tmp_path_factory, fates, seed):
    """Documents that repeat each other, are too short, or over a cap, at random."""
    directory = tmp_path_factory.mktemp("conserved")
    rng = random.Random(seed)
    pool = [" ".join(rng.choices(["ab", "cd", "ef", "gh"], k=90)) for _ in range(30)] + ["short"]
    records = [
        {"text": pool[i] + end, "domain": f"d{origin % 2}", "source": f"s{origin}"}
        for i, origin, end in fates
    ]
    for i in range(24):  # so that every set has an instance
        text = " ".join(rng.choices(["ab", "cd", "ef", "gh"], k=300))
        records.append({"text": text, "domain": f"d{i % 2}", "source": f"t{i}"})
    source = write_records(directory / "corpus.jsonl", records)
    flags = [
        "--config.data.shard_documents=20",
        "--config.data.eval_instances=20",
        "--config.data.validation_fraction=0",
        "--config.data.test_fraction=0.3",
        f"--config.train.seed={seed}",
    ]
    work = directory / "data.tmp-prepare"
    for stage in STAGES[:-1]:
        prepare_here(source, directory / "data", *SETTINGS, *flags, f"--stage={stage.name}")
    places = np.concatenate(
        [
            np.load(path)
            for stage in ("order", "evaluation")
            for path in sorted(work.glob(f"{stage}/*/places.npy"))
        ]
    )
    prepare_here(source, directory / "data", *SETTINGS, *flags, "--workers=1")
    dropped = read_drop_lists(directory / "data")
    assert len(set(map(tuple, places.tolist()))) == len(places)
    assert len(places) + len(dropped) == len(records)
    manifest = PreparedData.open(directory / "data").manifest
    assert sum(manifest.dropped.values()) == len(dropped)
    written = sum(
        domain["documents"]
        for split in manifest.counts.values()
        for domain in split["domains"].values()
    )
    assert written == len(places)
    reasons = {line["reason"] for line in dropped}
    assert reasons <= {"short", "exact duplicate", "near duplicate", "over eval_instances"}
    distinct = {record["text"].strip() for record in records} - {"short"}
    repeats = [line for line in dropped if line["reason"] == "exact duplicate"]
    shorts = [record for record in records if record["text"].strip() == "short"]
    assert len(repeats) == len(records) - len(shorts) - len(distinct)


def test_held_out_sets_are_cut_to_a_number(corpus, tmp_path):
    prepare_here(corpus, tmp_path / "data", *SHARDED, "--config.data.eval_instances=3")
    data = PreparedData.open(tmp_path / "data")
    for split in ("validation", "test"):
        for rows in data.held_out(split).values():
            # The document that completes the last instance may complete more.
            assert 3 <= len(rows) <= 3 + 8
    assert data.manifest.dropped["over eval_instances"] > 0


def test_a_random_order_of_several_shards_deals_documents_at_random(corpus, tmp_path):
    flags = [*SHARDED, "--workers=1", "--config.data.drop_near_duplicates=false"]
    similar, mixed = tmp_path / "similar", tmp_path / "random"
    prepare_here(corpus, similar, *flags)
    prepare_here(corpus, mixed, *flags, "--order=random")
    by_topic, at_random = (PreparedData.open(path).manifest for path in (similar, mixed))
    # The same documents, and so the same tokens of every domain.
    assert at_random.counts["train"]["domains"] == by_topic.counts["train"]["domains"]
    assert at_random.similarity["random"]["same_domain_rate"] < 0.5
    assert by_topic.similarity["similar"]["same_domain_rate"] > 0.8
    assert "several shards" in at_random.similarity["method"]
    domains = np.load(mixed / "instance_domains.npy")
    # Every shard holds every domain: of its first and of its last instances alike.
    for part in np.array_split(domains, 4):
        assert set(part.tolist()) == {0, 1, 2}


def test_a_random_order_of_several_shards_keeps_near_duplicates(corpus, tmp_path):
    with pytest.raises(InputError, match=r"^order: .*shard_documents \(\d+, 120\)"):
        prepare_here(corpus, tmp_path / "data", *SHARDED, "--order=random", "--workers=1")


def test_timings_are_by_stage(prepared):
    seconds = json.loads((prepared / "timings.json").read_text())
    assert list(seconds) == [stage.name for stage in STAGES[:-1]]
