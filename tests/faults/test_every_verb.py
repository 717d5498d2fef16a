"""Every verb that writes: paths of all kinds, full disks and read-only directories."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.test_disk import fill, turn_read_only
from tests.faults.test_recovery import small_disk
from tests.support.tiny import verb
from tests.support.verbs import WRITERS, Site, status_of

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Made by the verbs themselves, through a link whose target holds spaces and is not ASCII."""
    directory = tmp_path_factory.mktemp("verbs")
    (directory / "ein Ort für 河").mkdir()
    (directory / "a link").symlink_to(directory / "ein Ort für 河")
    made = Site(directory / "a link")
    made.complete()
    return made


def assert_refused(status, text, number, disk):
    """One line in the system's own words."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and "lory_jax/" not in text, text
    assert os.strerror(number) in lines[0] and str(disk) in lines[0]


def contents(disk):
    """Every file, but for what fills the disk, what `prepare` resumes from, and an empty lock."""
    files = (path for path in sorted(disk.rglob("*")) if path.is_file())
    return {
        path.relative_to(disk): path.read_bytes()
        for path in files
        if path.name not in ("ballast", "lock") and ".tmp-prepare" not in str(path)
    }


def begin(site, disk, name):
    """What an earlier command left on the disk: the same outputs, where they may be replaced."""
    (disk / "evaluation.json").write_text("an older evaluation")
    (disk / "analysis").mkdir()
    (disk / "analysis" / "analysis.json").write_text("an older analysis")
    (disk / "report.json").write_text("an older report")
    return site.commands(disk)[name], contents(disk)


def run(monkeypatch, capsys, command, name):
    main, arguments = command
    if name in ("train", "convert from-hf", "doctor"):  # a failed save ends the process at once
        result = verb(name.partition(" ")[0], *arguments)
        return result.returncode, result.stderr
    capsys.readouterr()
    return status_of(monkeypatch, main, arguments), capsys.readouterr().err


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(site, name, tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "disk", "4m") as disk:
        command, before = begin(site, disk, name)
        fill(disk)
        assert_refused(*run(monkeypatch, capsys, command, name), errno.ENOSPC, disk)
        assert contents(disk) == before


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "train"])  # test_disk.py
def test_a_disk_that_fills_up_while_it_is_written(site, name, tmp_path, monkeypatch, capsys):
    """Room for the first small files, and for nothing that is large."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        command, before = begin(site, disk, name)
        ballast = fill(disk)
        os.truncate(ballast, ballast.stat().st_size - 3 * 4096)
        status, text = run(monkeypatch, capsys, command, name)
        if name in ("evaluate", "analyze --text"):  # they find room for all they write
            assert status == 0
            return
        assert_refused(status, text, errno.ENOSPC, disk)
        after = contents(disk)
        if name == "compare":  # the figures were written, the page was not: each is whole or old
            json.loads(after.pop(Path("report.json")))
            before.pop(Path("report.json"))
        assert after == before


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_disk(site, name, tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "disk", "4m") as disk:
        command, before = begin(site, disk, name)
        turn_read_only(disk)
        try:
            assert_refused(*run(monkeypatch, capsys, command, name), errno.EROFS, disk)
            assert contents(disk) == before
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
