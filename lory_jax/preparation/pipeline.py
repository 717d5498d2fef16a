"""From documents to a prepared directory: settings, the work directory, the stages, the result."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lory_jax.data.manifest import MANIFEST_NAME
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.preparation.engine.runner import Engine, run_some_tasks, run_stages
from lory_jax.preparation.engine.work import (
    SETTINGS_NAME,
    Work,
    find_stage,
    settings_hash,
)
from lory_jax.preparation.stages import STAGES, plan
from lory_jax.preparation.stages.fit import GIVEN_TOKENIZER_NAME
from lory_jax.preparation.stages.inputs import changes, inputs_of, to_records
from lory_jax.storage import (
    CHUNK_BYTES,
    cache_directory,
    is_remote,
    naming,
    storage_path,
    write_atomically,
)


def make_settings(
    config: ConfigDict,
    sources: Sequence[str],
    order: str,
    tokenizer: Tokenizer | None,
    reading: Mapping[str, Any] | None = None,
    encoder: Path | None = None,
) -> dict[str, Any]:
    """Returns everything that decides what the files hold, apart from the documents themselves.

    Args:
      config: the whole config.
      sources: where the documents come from.
      order: order of the training documents, "similar" or "random".
      tokenizer: the one to use; None trains one.
      reading: `text_key`, `domain_key`, `source_key` and `max_rejected`, where they differ from
        their defaults.
      encoder: the directory of a sentence encoder; None embeds by latent semantic analysis.

    Raises:
      InputError: the vocabulary of `tokenizer` is larger than that of the model.
    """
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"tokenizer: has {tokenizer.vocab_size} tokens, must have at most "
            f"config.model.vocab_size ({config.model.vocab_size})"
        )
    resolved = [
        str(Path(source).resolve()) if source != "python" and Path(source).exists() else source
        for source in sources
    ]
    settings = {
        "source": resolved[0] if len(resolved) == 1 else resolved,
        "order": order,
        "seed": config.train.seed,
        "sequence_length": config.model.sequence_length,
        "vocab_size": config.model.vocab_size,
        "tokenizer": tokenizer.identity if tokenizer else "trained",
        "data": {k: v for k, v in config.data.to_dict().items() if k != "mixture"},
    }
    # Directories of earlier versions have neither of these.
    if reading:
        settings["reading"] = dict(reading)
    if encoder:
        from lory_jax.preparation.embedding.sentence_encoder import SentenceEncoder

        settings["encoder"] = str(encoder.resolve())
        settings["encoder_sha256"] = SentenceEncoder.load(encoder).sha256
    return settings


def load_tokenizer(path: Path, bos_id: int | None, eos_id: int | None) -> Tokenizer:
    """Reads a tokenizer.json, whose special tokens may be named by id, or a SentencePiece model."""
    if path.suffix != ".model":
        return Tokenizer.load_foreign(path, bos_id, eos_id)
    from lory_jax.preparation.sentencepiece import load_sentencepiece

    return load_sentencepiece(path)


def default_work_directory(out: Path, settings: dict[str, Any]) -> Path:
    """Returns where the work lies: beside the result or, if that is remote, in the cache."""
    if is_remote(out):
        return cache_directory() / "prepare" / settings_hash(settings | {"out": str(out)})
    return out.with_name(out.name + ".tmp-prepare")


def prepare(
    settings: dict[str, Any], given: Tokenizer | None, work: Path, out: Path, engine: Engine
) -> None:
    """Runs all stages that are not done and puts the result at `out`.

    What was done is kept if this is interrupted or killed, and used by the next call with the same
    settings on the same corpus. An `InputError` ends it for good, so the work is removed.

    Args:
      settings: what `make_settings` returned.
      given: the tokenizer to use; None trains one.
      work: the work directory.
      out: the prepared directory.
      engine: what runs the tasks.
    """
    with locked(work, exclusive=True):
        _open(settings, given, work)
        try:
            run_stages(Work(work), STAGES, engine)
            publish(Work(work), out)
        except InputError as error:
            if not getattr(error, "keeps_work", False):
                engine.close()
                _remove(work)
            raise
        finally:
            engine.close()


def prepare_part(
    settings: dict[str, Any],
    given: Tokenizer | None,
    work: Path,
    out: Path,
    stage_name: str,
    part: tuple[int, int],
) -> None:
    """Runs a part of one stage's tasks; the last stage also puts the result at `out`.

    Args:
      settings, given, work, out: as for `prepare`. Many processes may share `work`.
      stage_name: a stage.
      part: i and n: the tasks whose number is i modulo n.
    """
    stage = find_stage(STAGES, stage_name)
    if stage in (STAGES[0], STAGES[-1]) and part[0]:
        return  # to begin the work, and to move the result, belongs to part 0
    with locked(work, exclusive=False):
        if stage is STAGES[0]:
            _open(settings, given, work)
        elif not (work / SETTINGS_NAME).exists() or Work(work).settings != settings:
            raise InputError(
                f"stage: {stage_name} found no work with these settings in {work}; begin with "
                f"stage {STAGES[0].name}"
            )
        run_some_tasks(Work(work), STAGES, stage, *part)
        if stage is STAGES[-1]:
            publish(Work(work), out)


def publish(work: Work, out: Path) -> None:
    """Moves the result to its place, where it appears whole, and removes the work directory."""
    result = work.directory(STAGES[-1].name)
    if is_remote(out) or is_remote(work.root):
        names = sorted(work.marker(STAGES[-1].name)["sha256"])
        # The manifest comes last, because its presence marks the directory as complete.
        for name in sorted(names, key=lambda name: name == MANIFEST_NAME):
            target = out / name
            if not is_remote(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            with naming(target), (result / name).open("rb") as reader, target.open("wb") as writer:
                shutil.copyfileobj(reader, writer, CHUNK_BYTES)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            out.rmdir()  # an empty directory may be given
        with naming(out):
            shutil.move(result, out)
    _remove(work.root)


@contextlib.contextmanager
def locked(work: Path, *, exclusive: bool) -> Iterator[None]:
    """Holds the lock of a work directory, which is created; an object store has no locks.

    Raises:
      InputError: it cannot be written, or another process works in it.
    """
    if is_remote(work):
        yield
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"out: cannot write {work} ({error.strerror})") from None
    try:
        # The lock ends with its process, however that ends.
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(f"out: another prepare is working in {work}") from None
    try:
        yield
    finally:
        os.close(lock)


def _open(settings: dict[str, Any], given: Tokenizer | None, work: Path) -> None:
    """Begins, or resumes what was begun with the same settings on the same corpus."""
    if (work / SETTINGS_NAME).exists():
        found = Work(work)
        if found.settings == settings and not (changed := _changed(found)):
            return
        why = f"the corpus changed ({changed})" if found.settings == settings else "other settings"
        print(f"the work in {work} is of no use: {why}; starting again", file=sys.stderr)
    if not is_remote(work):
        for leftover in work.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if given:
        given.save(storage_path(work) / GIVEN_TOKENIZER_NAME)
    write_atomically(work / SETTINGS_NAME, json.dumps(settings, indent=1, sort_keys=True) + "\n")


def _changed(work: Work) -> str:
    if not work.is_complete("plan"):
        return ""
    return changes(plan.load(work)["inputs"], to_records(inputs_of(work.settings)))


def _remove(work: Path) -> None:
    shutil.rmtree(work) if not is_remote(work) else work.rmtree()  # type: ignore[attr-defined]
