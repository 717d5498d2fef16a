"""SIGINT and SIGTERM at any moment of a command's life: one line at most, and never a traceback.

Moments are counted from when `lory_jax/__init__.py` has run: `-X importtime` shows it. What happens
before, while the interpreter starts, is out of the package's reach.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny import ROOT, verb_environment, write_prepared, write_recipe
from tests.support.verbs import WRITERS, Site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("interrupts")
    write_recipe(directory)
    write_prepared(directory / "data")
    (directory / "texts" / "domain").mkdir(parents=True)
    for number in range(40):
        text = f"document {number}: " + "counting, in words and in numbers. " * 20
        (directory / "texts" / "domain" / f"{number}.txt").write_text(text)
    result = subprocess.run(
        commands(directory)["train"], env=verb_environment(), capture_output=True
    )
    assert result.returncode == 0
    return directory


def commands(site: Path) -> dict[str, list[str]]:
    python = [sys.executable, "-X", "importtime", "-m"]
    recipe = f"--config={site / 'tiny.py'}"
    train = [recipe, f"--data={site / 'data'}", "--config.train.log_every_steps=1"]
    return {
        "train": [*python, "lory_jax.train", *train, f"--workdir={site / 'run'}"],
        "train_on": [
            *(*python, "lory_jax", "train", *train, "--config.train.steps=100000"),
            f"--workdir={site / 'longer'}",
        ],
        "generate": [
            *(*python, "lory_jax.generate", f"--workdir={site / 'run'}", "--prompt=a"),
            "--max_new_tokens=16",
        ],
        "prepare": [
            *(*python, "lory_jax.prepare", recipe, f"--source={site / 'texts'}"),
            f"--out={site / 'prepared'}",
        ],
    }


def after(command: list[str], seconds: float, number: signal.Signals) -> tuple[int, str]:
    """Sends the signal so long after the package is imported; returns exit status and messages."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=verb_environment(),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith("| lory_jax\n"):
            break
    time.sleep(seconds)
    process.send_signal(number)
    lines = [line for line in process.stderr if not line.startswith("import time:")]
    process.stderr.close()
    return process.wait(timeout=120), "".join(lines)


def assert_quiet(command: list[str], moments: list[float], number: signal.Signals) -> int:
    """Returns how many of the moments came before the command had ended by itself."""
    stopped = 0
    for seconds in moments:
        status, text = after(command, seconds, number)
        assert "Traceback" not in text and "Exception" not in text, (seconds, text)
        if status == 0:
            continue
        stopped += 1
        assert status in (128 + number, -number), (seconds, status, text)
        if number == signal.SIGINT and "saved at step" not in text:
            assert text.splitlines()[-1] == "interrupted", (seconds, text)
            assert status == 130, seconds
    return stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["train_on", "generate", "prepare"])
def test_a_signal_is_quiet(site, name, number):
    moments = [0.0, 0.05, 0.2, 0.7, 2.0]
    assert assert_quiet(commands(site)[name], moments, number) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_on", "generate", "prepare"])
def test_a_signal_is_quiet_at_any_moment(site, name):
    moments = [0.05 * i for i in range(60)]
    assert assert_quiet(commands(site)[name], moments, signal.SIGINT) >= 10


@pytest.fixture(scope="module")
def complete_site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("complete"))
    made.complete()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRITERS, "plan", "generate"])
def test_ctrl_c_ends_every_verb_in_one_line(complete_site, name, tmp_path):
    stopped = 0
    for number, seconds in enumerate([0.0, 0.1, 0.4, 1.0, 1.8, 3.0, 5.0]):
        out = tmp_path / str(number)
        out.mkdir()
        verb, arguments = name.partition(" ")[0], [f"--config={ROOT / 'configs' / 'local.py'}"]
        if name == "plan":
            arguments += ["--no_compile"]
        elif name == "generate":
            arguments = [f"--workdir={complete_site.root / 'run'}", "--prompt=a"]
        else:
            arguments = complete_site.commands(out)[name][1]
        command = [sys.executable, "-X", "importtime", "-m", "lory_jax", verb, *arguments]
        stopped += assert_quiet(command, [seconds], signal.SIGINT)
        left = [path for path in out.rglob("*") if ".tmp" in path.name]
        assert name in ("train", "prepare") or not left, left  # those two resume
    assert stopped >= 3


IN_MAIN = """
import sys
sys.argv[0] = "lory"
import lory_jax
from lory_jax import cli

def main(argv):
    import os, signal
    {body}

cli.run(main)
"""


def in_main(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IN_MAIN.format(body=body)],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
    )


KILL = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    "body",
    [
        KILL,
        # What a library makes of it.
        f"""
    try:
        {KILL}
    except KeyboardInterrupt:
        raise RuntimeError("broken pool")""",
        # Where Python ignores exceptions, and would go on.
        f"""
    class Thing:
        def __del__(self):
            {KILL}
    Thing()
    import time
    time.sleep(60)""",
        # When all is done: Python waits for threads, then runs what atexit was given.
        f"import atexit; atexit.register(lambda: {KILL})",
        # A forked child is quiet, its parent says it.
        f"""
    if os.fork():
        os.wait()
    {KILL}""",
    ],
)
def test_one_line_and_status_130_from_inside_main(body):
    result = in_main(body)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_files_are_cleaned_up(tmp_path):
    body = f"""
    import tempfile
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        {KILL}"""
    assert in_main(body).returncode == 130
    assert not list(tmp_path.iterdir())


def test_what_was_printed_is_not_lost():
    assert in_main(f"import atexit; atexit.register(lambda: {KILL}); print('wrote')").stdout == (
        "wrote\n"
    )


def test_an_ignored_signal_stays_ignored():
    """As in background jobs of scripts."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + IN_MAIN.format(body=KILL)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_program_that_imports_us_keeps_its_handler():
    code = (
        "import signal, lory_jax, lory_jax.cli;"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
