"""Every verb that writes: paths of all kinds, full disks and read-only directories."""

import errno
import os
import subprocess

import pytest

from tests.faults.test_disk import fill, turn_read_only
from tests.faults.test_recovery import small_disk
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


def assert_refused(status, capsys, number, disk, before):
    """One line of the system's own words; nothing that was there is harmed or left half-written."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1, lines
    assert os.strerror(number) in lines[0] and str(disk) in lines[0]
    assert contents(disk) == before


def contents(disk):
    files = (path for path in sorted(disk.rglob("*")) if path.is_file())
    return {path.relative_to(disk): path.read_bytes() for path in files if path.name != "ballast"}


def begin(site, disk, name):
    """What an earlier command left on the disk: the same outputs, where they may be replaced."""
    (disk / "evaluation.json").write_text("an older evaluation")
    (disk / "analysis").mkdir()
    (disk / "analysis" / "analysis.json").write_text("an older analysis")
    (disk / "report.json").write_text("an older report")
    return site.commands(disk)[name], contents(disk)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(site, name, tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "disk", "4m") as disk:
        (main, arguments), before = begin(site, disk, name)
        fill(disk)
        status = status_of(monkeypatch, main, arguments)
        assert_refused(status, capsys, errno.ENOSPC, disk, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_while_it_is_written(site, name, tmp_path, monkeypatch, capsys):
    """Room for the first small files, and for nothing that is large."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        (main, arguments), before = begin(site, disk, name)
        ballast = fill(disk)
        os.truncate(ballast, ballast.stat().st_size - 3 * 4096)
        status = status_of(monkeypatch, main, arguments)
        assert_refused(status, capsys, errno.ENOSPC, disk, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_disk(site, name, tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "disk", "4m") as disk:
        (main, arguments), before = begin(site, disk, name)
        turn_read_only(disk)
        try:
            status = status_of(monkeypatch, main, arguments)
            assert_refused(status, capsys, errno.EROFS, disk, before)
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
