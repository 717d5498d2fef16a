"""The documentation: the site builds, links lead somewhere, and commands are ones that exist."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lory_jax.__main__ import VERBS
from tests.support.tiny import ROOT, verb

OUTSIDE_THE_SITE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")
PAGES = [
    *(ROOT / name for name in OUTSIDE_THE_SITE),
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Pages that speak of what was, with the flags of their day.
HISTORY = {"CHANGELOG.md"}

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4,}\S.*\n?)+", re.M)
INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
FLAG = re.compile(r"(?<![\w-])--[a-z_]\w*(?:\.\w+)*")
FIELD = re.compile(r"\bconfig\.(?:model|train|checkpoint|parallel|data)\.\w+")

# A verb after what runs it, or at the beginning of an inline command.
COMMAND = re.compile(
    r"(?:python -m lory_jax[. ]|(?<![\w./-])lory |launch/gpu\.sh (?:--\S+ )*| -- )([a-z]\w*)(.*)"
)


def test_the_site_builds_without_a_broken_link(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert result.returncode == 0, result.stderr
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    broken = broken_links(page.read_text("utf-8"), page)
    assert not broken, f"{page.relative_to(ROOT)}: {broken}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_field_exists(page):
    if page.name in HISTORY:
        pytest.skip("names what was removed")
    problems = unknown_commands(page.read_text("utf-8"))
    assert not problems, f"{page.relative_to(ROOT)}: {problems}"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("    python -m lory_jax.tarin --data=DATA", "tarin"),
        ("    python -m lory_jax.train --dta=DATA", "--dta"),
        ("```\nlory train \\\n  --dta=DATA\n```", "--dta"),
        ("    bash launch/gpu.sh --hosts=2 train --dta=DATA", "--dta"),
        ("    bash launch/gpu.sh bench --minute=5", "--minute"),
        ("Use `generate --top_k_expert=K`.", "--top_k_expert"),
        ("    lory convert to-hf --hf=DIR", "--hf"),
        ("    lory train --config.train.stepz=3", "--config.train.stepz"),
        ("The field `config.model.num_expert`.", "config.model.num_expert"),
    ],
)
def test_a_wrong_command_is_found(text, named):
    assert any(named in problem for problem in unknown_commands(text))


def test_a_broken_link_is_found():
    page = ROOT / "README.md"
    assert broken_links("[a](docs/nowhere.md) [b](docs/log.md#nowhere)", page) == [
        "docs/nowhere.md",
        "docs/log.md#nowhere",
    ]


# ---------------------------------------------------------------- links


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links whose file or heading does not exist."""
    broken = []
    for target in LINK.findall(without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(target)
    return broken


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and the site make them."""
    lines = re.findall(r"^#+ (.*)$", without_code(page.read_text("utf-8")), re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", line.lower())) for line in lines}


def without_code(text: str) -> str:
    return INLINE.sub("", FENCED.sub("", text))


# ---------------------------------------------------------------- commands


def unknown_commands(text: str) -> list[str]:
    """Verbs, flags and config fields in the code of a page that do not exist."""
    text = text.replace("\\\n", " ")  # a command continued on the next line
    blocks = [*FENCED.findall(text), *INDENTED.findall(FENCED.sub("", text))]
    commands = [line for block in blocks for line in block.splitlines()]
    inline = [" ".join(code.split()) for code in INLINE.findall(FENCED.sub("", text))]
    commands += [f"lory {code}" if code.split(" ")[0] in VERBS else code for code in inline]
    problems = [problem for line in commands for problem in unknown_in(line)]
    fields = {field for line in commands for field in FIELD.findall(line)}
    known = flags_of("train")
    return problems + sorted(field for field in fields if f"--{field}" not in known)


def unknown_in(line: str) -> list[str]:
    """What a line of code names that does not exist: a verb, or a flag of its verb."""
    found = COMMAND.search(line)
    if not found:
        return []
    name, rest = found.groups()
    if name == "bench" and "launch/gpu.sh" in line:  # a script, not a verb of the package
        return [f"bench {flag}" for flag in FLAG.findall(rest) if flag not in flags_of_bench()]
    if name not in VERBS:
        return [name]
    kind = re.match(r" (to-hf|from-hf|prune)\b", rest) if name == "convert" else None
    known = flags_of(name, *([kind.group(1)] if kind else []))
    return [f"{name} {flag}" for flag in FLAG.findall(rest) if flag not in known]


@functools.cache
def flags_of_bench() -> frozenset[str]:
    """The flags of `launch/gpu.sh bench`."""
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--help"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    return frozenset(FLAG.findall(done.stdout))


@functools.cache
def flags_of(name: str, *subcommand: str) -> frozenset[str]:
    """The flags that `--help` of a verb lists, config fields included."""
    result = verb(name, *subcommand, "--help")
    assert result.returncode == 0, result.stderr
    return frozenset(FLAG.findall(result.stdout))


def test_the_readme_states_the_ratios_of_the_committed_plans():
    def ratio(experts, devices, name):
        path = ROOT / f"docs/plans/lory_0_3b_{experts}e_v5e-{devices}.json"
        plan = json.loads(path.read_text())
        return f"{plan['estimate'][name] / plan['dense']['estimate'][name]:.2f}"

    computing = [ratio(experts, 64, "compute_seconds") for experts in (8, 32)]
    step = [ratio(experts, 64, "step_seconds_lower_bound") for experts in (8, 32)]
    larger = [ratio(experts, 256, "step_seconds_lower_bound") for experts in (8, 32)]
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    whole = f"{step[0]} (8 experts) and {step[1]} (32 experts) times as long as the dense model's"
    assert whole in readme
    assert f"Computing alone takes {computing[0]} and {computing[1]} times as long" in readme
    assert f"on 256 chips, the ratios are {larger[0]} and {larger[1]} (" in readme
