"""The launch scripts: Cloud TPUs are played by a stand-in, the processes of GPUs run on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.emulators import free_port
from tests.support.tiny import ROOT, assert_one_line_error, write_prepared, write_recipe

SCRIPTS = [
    *sorted(ROOT.glob("launch/*.sh")),
    ROOT / ".ci" / "run",
    ROOT / "tests" / "support" / "gcloud.sh",
]
BASE = ("--name=lory", "--zone=us-west4-a")
COMPARED = ("loss", "grad_norm", "experts_active", "router_entropy")


def test_shellcheck():
    tool = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run(
        [tool, "--shell=bash", "--external-sources", *SCRIPTS],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout


# ---------------------------------------------------------------- Cloud TPUs


class Play:
    """A queued resource in a directory; `gcloud.sh` says how it behaves."""

    def __init__(self, directory: Path):
        self.directory = directory
        (directory / "bin").mkdir()
        shutil.copy(ROOT / "tests" / "support" / "gcloud.sh", directory / "bin" / "gcloud")
        (directory / "bin" / "gcloud").chmod(0o755)
        self.set("state", "MISSING")
        self.set("plan", "ok")
        self.trainer("exit 0")

    def set(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text + "\n")

    def trainer(self, body: str) -> None:
        """What stands in for Python over there: it writes its arguments down, then runs `body`."""
        script = self.directory / "python"
        script.write_text(
            "#!/usr/bin/env bash\n"
            f'{{ echo "distributed $LORY_DISTRIBUTED"; printf "<%s>\\n" "$@"; }} '
            f">>{self.directory}/started\n{body}\n"
        )
        script.chmod(0o755)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.directory / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", ROOT / "launch" / "tpu.sh", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ
            | {
                "PATH": path,
                "PLAY": str(self.directory),
                "CHECKOUT": str(ROOT),
                "LORY_POLL_SECONDS": "0",
            },
        )

    def calls(self, verb: str) -> list[str]:
        path = self.directory / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        prefix = f"compute tpus queued-resources {verb} "
        return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]

    def started(self) -> list[str]:
        return (self.directory / "started").read_text().splitlines()


@pytest.fixture
def play(tmp_path):
    return Play(tmp_path)


RUN = ("run", *BASE, "--type=v5litepod-16", "--spot", "--", "train")


def fails(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr


def test_a_run_waits_installs_starts_and_follows(play):
    play.trainer("echo step 1; exit 0")
    argument = "--data=gs://bucket/my data; $HOME 'quoted'"
    result = play.run(*RUN, "--config=a.py:experts=8", argument)
    assert result.returncode == 0, result.stderr
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert f"lory: {state}" in result.stdout
    assert "step 1" in result.stdout and "done; lory costs money until" in result.stdout
    assert play.calls("create") == [
        "lory --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite "
        "--node-id=lory --spot --zone=us-west4-a"
    ]
    assert play.started() == [
        "distributed 1",
        "<-m>",
        "<lory_jax.train>",
        "<--config=a.py:experts=8>",
        f"<{argument}>",
    ]
    assert all("--node=all --worker=all" in call for call in play.calls("scp"))
    again = play.run(*RUN, "--config=a.py:experts=8", argument)  # a finished run resumes
    assert again.returncode == 0 and "lory already exists: ACTIVE" in again.stdout


def test_a_preempted_run_is_started_again_with_the_same_command(play):
    play.set("plan", "preempted\npreempted\nok")
    play.trainer(f"[ $(grep -c distributed {play.directory}/started) = 3 ] || sleep 60; exit 0")
    result = play.run(*RUN, "--config=a.py")
    assert result.returncode == 0, result.stderr
    assert "requesting it again (2 of at most 20)" in result.stdout
    assert len(play.calls("create")) == 3 and len(play.calls("delete")) == 2
    assert len(set(play.calls("create"))) == 1
    assert play.started() == [*play.started()[:4]] * 3


def test_a_run_that_lost_a_process_is_started_again_on_the_same_tpu(play):
    play.trainer(f"[ $(grep -c distributed {play.directory}/started) = 2 ] || exit 134; exit 0")
    result = play.run(*RUN, "--config=a.py")
    assert result.returncode == 0, result.stderr
    assert "lost a process: restarting all of them (1 of at most 20)" in result.stdout
    assert len(play.calls("create")) == 1
    assert any("worker.sh kill" in call for call in play.calls("ssh"))
    assert play.started() == [*play.started()[:4]] * 2


def test_restarts_are_bounded(play):
    play.set("plan", "preempted")
    play.trainer("sleep 60")
    result = play.run("--restarts=2", *RUN, "--config=a.py")
    fails(result, "--restarts=2")
    assert len(play.calls("create")) == 3


def test_a_failing_run_is_not_started_again(play):
    play.trainer("echo error: no such file; exit 7")
    result = play.run(*RUN)
    fails(result, "status 7; lory is still there")
    assert "no such file" in result.stdout
    assert play.started().count("distributed 1") == 1 and len(play.calls("create")) == 1


def test_a_lost_connection_is_followed_again_without_a_second_start(play):
    play.set("plan", "dropped\ndropped\nok")
    play.trainer("sleep 2; exit 0")
    result = play.run(*RUN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("lost the connection: reconnecting") == 2
    assert play.started().count("distributed 1") == 1


def test_a_connection_that_stays_lost_ends(play):
    play.set("plan", "dropped")
    play.trainer("sleep 20")
    fails(play.run(*RUN), "lost the connection 10 times")


def test_a_refused_request_says_why(play):
    play.set("refuse", "")
    fails(play.run(*RUN), "lory: the request failed: no such type in this zone")
    assert len(play.calls("create")) == 1
    (play.directory / "refuse").unlink()
    result = play.run(*RUN)  # what is left of it goes away first
    assert result.returncode == 0, result.stderr
    assert "lory is FAILED: deleting it" in result.stdout


def test_commands_can_be_repeated(play):
    create = ("create", *BASE, "--type=v6e-64", "--slices=4", "--reserved", "--project=p")
    assert play.run(*create).returncode == 0
    assert play.calls("create") == [
        "lory --accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --node-count=4 "
        "--node-prefix=lory --reserved --zone=us-west4-a --project=p"
    ]
    again = play.run(*create)
    assert again.returncode == 0 and "lory already exists: " in again.stdout
    assert play.run("wait", *BASE).returncode == 0
    assert play.run("status", *BASE).stdout == "ACTIVE\n"
    assert play.run("delete", *BASE).returncode == 0
    again = play.run("delete", *BASE)
    assert again.returncode == 0 and again.stdout == "lory does not exist\n"
    fails(play.run("wait", *BASE), "lory: MISSING; create it first")


def test_stop_lets_the_run_save(play):
    play.trainer("trap 'echo saved; exit 143' TERM; echo started; while :; do sleep 0.1; done")
    play.set("state", "ACTIVE")
    (play.directory / "worker").mkdir()
    path = ("PATH", f"{play.directory / 'bin'}:{os.environ['PATH']}")
    process = subprocess.Popen(
        ["bash", ROOT / "launch" / "tpu.sh", *RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | dict([path])
        | {"PLAY": str(play.directory), "CHECKOUT": str(ROOT), "LORY_POLL_SECONDS": "0"},
    )
    for line in process.stdout:
        if line == "started\n":
            break
    assert play.run("stop", *BASE).returncode == 0
    output, errors = process.communicate(timeout=60)
    assert "saved" in output and "the run failed with status 143" in errors


def test_another_run_is_not_mistaken_for_this_one(play):
    play.trainer("sleep 20")
    play.set("plan", "dropped")
    play.run(*RUN)
    result = play.run(*RUN, "--other")
    assert result.returncode == 1
    assert "error: another command is running: train;" in result.stderr


def test_dry_run_prints_every_command_and_runs_none(tmp_path):
    result = subprocess.run(
        ["bash", ROOT / "launch" / "tpu.sh", "--dry-run", *RUN, "--data=a b"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    told = [line.split()[4] if line.startswith("gcloud") else line.split()[0] for line in lines]
    assert told == ["create", "describe", "git", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert r"'--command=bash lory_jax/launch/worker.sh start train --data=a\ b'" in lines[-2]
    check = subprocess.run(
        ["bash", ROOT / "launch" / "tpu.sh", "check", *BASE, "--type=v5p-8", "--dry-run"],
        capture_output=True,
        text=True,
    )
    assert "worker.sh start doctor" in check.stdout and check.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND: missing; must be check, run, create"),
        (("fly", *BASE), "fly: unknown command; must be check, run"),
        (("create", "--zone=z"), "--name: missing"),
        (("create", "--name=n"), "--zone: missing"),
        (("create", *BASE), "--type: missing"),
        (("create", *BASE, "--slices=two"), "--slices: got 'two'"),
        (("create", *BASE, "--slices=0"), "--slices: got 0"),
        (("create", *BASE, "--spoon"), "--spoon: unknown"),
        (("run", *BASE), "run: requires -- VERB ARGUMENTS"),
        (("create", *BASE, "--", "train"), "create: got arguments after --"),
        (("create", "wait", *BASE), "wait: got a second command after create"),
    ],
)
def test_wrong_arguments_are_one_line(play, arguments, message):
    fails(play.run(*arguments), message)
    assert not play.calls("create")


@pytest.mark.parametrize("script", ["tpu.sh", "gpu.sh"])
def test_help(script):
    result = subprocess.run(["bash", ROOT / "launch" / script, "--help"], capture_output=True)
    assert result.returncode == 0 and b"--restarts=N" in result.stdout


# ---------------------------------------------------------------- GPUs: the processes, on CPUs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Recipe, data, and a virtual environment that counts as installed: this one."""
    directory = tmp_path_factory.mktemp("gpu")
    write_recipe(directory)
    write_prepared(directory / "data")
    (directory / "venv" / "bin").mkdir(parents=True)
    python = directory / "venv" / "bin" / "python"
    python.write_text(
        "#!/bin/sh\n"
        'if [ "$1 $2" = "-m pip" ]; then echo "no pip in tests" >&2; exit 9; fi\n'
        f'echo start >>{directory}/starts\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    lists = "".join(path.read_text() for path in sorted(ROOT.glob("requirements*.txt")))
    (directory / "venv" / ".installed-requirements-cuda.txt").write_text(lists)
    return directory


def environment(site: Path, **more: str) -> dict[str, str]:
    names = ("VENV", "JAX_PLATFORMS", "XLA_FLAGS")
    return (
        {name: value for name, value in os.environ.items() if name not in names}
        | {"VENV": str(site / "venv"), "JAX_PLATFORMS": "cpu"}
        | more
    )


def command(site: Path, workdir: str, *options: str) -> list[str]:
    return [
        "bash",
        str(ROOT / "launch" / "gpu.sh"),
        f"--coordinator=localhost:{free_port()}",
        *options,
        "train",
        f"--config={site / 'tiny.py'}",
        f"--data={site / 'data'}",
        f"--workdir={site / workdir}",
    ]


def gpu(site: Path, words: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=300, env=environment(site, **more)
    )


def losses(workdir: Path) -> list[list]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], *(line[name] for name in COMPARED)] for line in lines]


@pytest.fixture(scope="module")
def one_process(site):
    result = gpu(site, command(site, "one"), JAX_NUM_CPU_DEVICES="2")
    assert result.returncode == 0, result.stderr
    assert "'fsdp': 2" in result.stdout
    return losses(site / "one")


def assert_same(found: list[list], expected: list[list]) -> None:
    assert [line[0] for line in found] == list(range(1, 13))
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x == y or abs(x - y) <= 1e-5 * abs(y), (a, b)


def test_two_processes_give_the_losses_of_one(site, one_process):
    result = gpu(site, command(site, "two", "--processes=2"))
    assert result.returncode == 0, result.stderr
    assert "'fsdp': 2" in result.stdout
    assert_same(losses(site / "two"), one_process)


@pytest.mark.slow
def test_if_one_process_dies_all_start_again(site, one_process):
    words = [*command(site, "killed", "--processes=2"), "--config.train.log_every_steps=1"]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(site),
        start_new_session=True,
    )
    output, killed = [], False
    for line in process.stdout:
        output.append(line)
        if not killed and " 5/12" in line:
            killed = True
            os.kill(trainers(process.pid)[1], signal.SIGKILL)
    assert process.wait(timeout=60) == 0, "".join(output)
    text = "".join(output)
    assert "restarting all of them (1 of at most 3)" in text and "resuming" in text
    assert_same(losses(site / "killed"), one_process)


def trainers(script: int) -> list[int]:
    """The children of the script, in the order they were started."""
    children = Path(f"/proc/{script}/task/{script}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return [pid for pid, name in names.items() if "lory_jax.train" in name]


@pytest.mark.parametrize(
    ("change", "status", "starts"),
    [("--data=/nowhere", 1, 2), ("--config.train.steps=none", 2, 1)],
)
def test_a_run_that_always_fails_ends(site, change, status, starts):
    (site / "starts").unlink(missing_ok=True)
    result = gpu(site, [*command(site, "failing", "--restarts=1"), change])
    assert result.returncode == status
    assert (site / "starts").read_text().count("start") == starts
    assert ("--restarts=1 allows" in result.stderr) == (status == 1)


def test_the_doctor_is_not_restarted(site):
    (site / "starts").unlink(missing_ok=True)
    script = str(ROOT / "launch" / "gpu.sh")
    result = gpu(site, ["bash", script, "doctor", f"--workdir={site / 'nothing'}"])
    assert_one_line_error(result, 1, "config.json")
    assert (site / "starts").read_text().count("start") == 1


def test_a_signal_saves_and_stops(site):
    words = [*command(site, "stopped"), "--config.train.steps=100000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(site))
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert list((site / "stopped" / "checkpoints").iterdir())


@pytest.mark.slow
def test_slurm_variables_place_the_processes(site, tmp_path, one_process):
    """One task a host, as srun starts them; here both hosts are this one."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho localhost\necho other\n")
    (tmp_path / "scontrol").chmod(0o755)
    words = [w for w in command(site, "slurm") if not w.startswith("--coordinator")]
    tasks = [
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(
                site,
                PATH=f"{tmp_path}:{os.environ['PATH']}",
                SLURM_JOB_ID="1",
                SLURM_JOB_NODELIST="localhost,other",
                SLURM_NTASKS="2",
                SLURM_PROCID=str(task),
                SLURM_LOCALID="0",
                SLURM_STEP_NUM_NODES="2",
                SLURM_STEP_NODELIST="localhost,other",
            ),
        )
        for task in range(2)
    ]
    outputs = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert_same(losses(site / "slurm"), one_process)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hosts=2", "train"], "--coordinator: missing"),
        (["--hosts=2", "--host=2", "train"], "--host: got 2, must be less than --hosts=2"),
        (["--processes=0", "train"], "--processes: got 0"),
        (["--gpus=2", "train"], "--gpus=2: unknown"),
        ([], "VERB: missing"),
    ],
)
def test_wrong_options_are_one_line(site, options, message):
    fails(gpu(site, ["bash", str(ROOT / "launch" / "gpu.sh"), *options]), message)


def test_no_gpu_says_so(site, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = gpu(site, command(site, "none"), JAX_PLATFORMS="cuda", PATH=path)
    fails(result, "nvidia-smi: found no GPU")


def test_xla_flags_exist_in_this_jax():
    """XLA ends the process at a flag that it does not know, on any platform."""
    text = (ROOT / "launch" / "gpu.sh").read_text()
    flags = " ".join(line.strip() for line in text.splitlines() if "  --xla_" in line)
    assert flags.count("--xla") == 2
    subprocess.run(
        [sys.executable, "-c", "import jax; jax.numpy.zeros(1)"],
        check=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
