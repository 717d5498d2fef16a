"""Makes a corpus of Debian packages: thirteen kinds of text in six languages, about 100 MB.

    python -m tools.debian_corpus --out=DIR

It requires a Debian system whose archive is reachable (`apt-get download` and `dpkg-deb`; nothing
is installed). The documents go to DIR/documents.jsonl with a domain and an origin, the packages'
versions to DIR/packages.json: the archive replaces some of them (Linux, PostgreSQL, Erlang) by
newer ones, which makes another corpus.
"""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from lory_jax import cli
from lory_jax.console import say
from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document, join_pieces, split_long
from lory_jax.preparation.sources.python_installation import is_clean
from lory_jax.storage import write_atomically

DOMAIN_BYTES = 10_000_000
UNIT_BYTES, LONGEST_UNIT_BYTES = 500, 2000
LINE, LONGEST_LINE = 100, 300  # characters; HTML has paragraphs of one line
LARGEST_ORIGIN_SHARE = 0.02  # of a domain, so that no manual or driver fills it alone
BOILERPLATE = re.compile(r"copyright|licen[cs]e|redistribut|warrant", re.IGNORECASE)
BLOCKS = {"p", "div", "li", "dt", "dd", "pre", "tr", "table", "blockquote", "section", "br"}
BLOCKS |= {f"h{level}" for level in range(1, 7)}


@dataclass(frozen=True)
class Kind:
    """Texts of one domain in a package.

    Attributes:
      domain: its name.
      paths: which files of the package; its first group is their origin.
      read: their contents as text pieces, which are joined to documents.
      inside: a tar archive inside the package that holds them.
    """

    domain: str
    paths: re.Pattern[str]
    read: Callable[[str], Iterator[str]]
    inside: str | None = None


def main(argv: list[str]) -> None:
    parser = cli.Parser("debian_corpus", __doc__)
    parser.prog = "python -m tools.debian_corpus"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    make_corpus(parser.parse(argv).out)


def make_corpus(out: Path) -> Path:
    """Returns the path of the documents in `out`, made if they are not there.

    Raises:
      InputError: this is no Debian system, or a package cannot be downloaded.
    """
    documents = out / "documents.jsonl"
    if documents.is_file():
        return documents
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    say(f"downloading {len(PACKAGES)} packages of Debian (240 MB)")
    _download(packages)
    found: dict[str, list[tuple[str, Document]]] = defaultdict(list)
    for package, kind in PACKAGES.items():
        (path,) = packages.glob(f"{package}_*.deb")
        say(f"reading {path.name}")
        for name, document in read_package(path, package, kind):
            found[document.domain].append((name, document))
    lines = [
        json.dumps({"text": d.text, "domain": d.domain, "source": d.origin}, ensure_ascii=False)
        for domain in sorted(found)
        for d in choose(found[domain])
    ]
    names = {path.name: _sha256(path) for path in sorted(packages.glob("*.deb"))}
    write_atomically(out / "packages.json", json.dumps(names, indent=1) + "\n")
    write_atomically(documents, "\n".join(lines) + "\n")
    shutil.rmtree(packages)
    return documents


def choose(documents: list[tuple[str, Document]]) -> list[Document]:
    """Documents of whole files, in an order decided by a hash, until the domain is full.

    They are returned in the order of their files' names, so that one file's stay together.
    """
    files: dict[str, list[Document]] = defaultdict(list)
    for name, document in documents:
        files[name].append(document)
    kept, size = [], 0
    sizes: Counter[str] = Counter()
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        origin = files[name][0].origin
        if size >= DOMAIN_BYTES or sizes[origin] >= LARGEST_ORIGIN_SHARE * DOMAIN_BYTES:
            continue
        kept.append(name)
        added = sum(len(document.text.encode()) for document in files[name])
        size += added
        sizes[origin] += added
    return [document for name in sorted(kept) for document in files[name]]


# ---------------------------------------------------------------- packages


def is_possible() -> bool:
    """Whether this system has Debian's tools."""
    return all(map(shutil.which, ("apt-get", "dpkg-deb")))


def _download(directory: Path) -> None:
    missing = [name for name in PACKAGES if not list(directory.glob(f"{name}_*.deb"))]
    if not is_possible():
        raise InputError("apt-get: not found; this corpus can be made on a Debian system only")
    if (
        missing
        and subprocess.run(["apt-get", "-qq", "download", *missing], cwd=directory).returncode
    ):
        raise InputError(
            "apt-get: could not download the packages; `apt-get update` refreshes what it knows"
        )


def read_package(path: Path, package: str, kind: Kind) -> Iterator[tuple[str, Document]]:
    """Yields the documents of a package, each with the name of its file; says what it left out."""
    left_out: Counter[str] = Counter()
    for name, contents in _files(path, kind):
        found = kind.paths.search(name)
        if not found:
            continue
        data = gzip.decompress(contents) if name.endswith((".gz", ".dz")) else contents
        for origin, piece in _pieces(data.decode("utf-8", "replace"), found[1], kind):
            if "\ufffd" in piece:
                left_out["in another encoding"] += 1
            elif not is_clean(piece):
                left_out["tables, numbers or overlong lines"] += 1
            else:
                # A dictionary is one file: its parts count as files.
                part = f"{name}:{origin}" if origin != found[1] else name
                yield part, Document(piece, kind.domain, f"{package}/{origin}")
    for reason, count in left_out.items():
        say(f"{path.name}: {count:,} pieces left out ({reason})")


def _pieces(text: str, origin: str, kind: Kind) -> Iterator[tuple[str, str]]:
    if kind.read is entries:
        for entry in join_pieces(kind.read(text), UNIT_BYTES):
            yield entry.strip()[:2].lower(), entry
        return
    kept = (piece for piece in kind.read(text) if piece.strip() and not BOILERPLATE.search(piece))
    for unit in join_pieces(kept, UNIT_BYTES):
        for piece in split_long(unit, LONGEST_UNIT_BYTES):
            yield origin, piece


def _files(path: Path, kind: Kind) -> Iterator[tuple[str, bytes]]:
    """Yields the regular files of a package, or of the archive inside it, as a stream."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                file = archive.extractfile(member)
                assert file is not None
                if kind.inside is None:
                    yield member.name, file.read()
                elif PurePosixPath(member.name).name == kind.inside:
                    with tarfile.open(fileobj=file, mode="r|xz") as inner:
                        for part in inner:
                            if part.isfile() and kind.paths.search(part.name):
                                opened = inner.extractfile(part)
                                assert opened is not None
                                yield part.name, opened.read()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- from files to pieces


def paragraphs(text: str) -> Iterator[str]:
    """What empty lines separate."""
    yield from re.split(r"\n[ \t]*\n", text)


def manual(text: str) -> Iterator[str]:
    """The sections and paragraphs of a manual page, in its roff source without comments."""
    without_comments = re.sub(r'(?m)^[.\']\\".*\n', "", text)
    yield from re.split(r"(?m)^(?=\.S[HS] |\.PP|\.TP|\.IP)|\n\s*\n", without_comments)


def entries(text: str) -> Iterator[str]:
    """The entries of a dictionary, without its preface and the names of its sources."""
    body = text.partition("[1913 Webster]")[2]
    yield from paragraphs(re.sub(r"(?m)^ +\[[^\]]*(Webster|PJC)[^\]]*\]\n", "", body))


def html(text: str) -> Iterator[str]:
    """The blocks of an HTML page, without markup, scripts and navigation."""
    parser = _Blocks()
    parser.feed(text)
    parser.close()
    for piece in paragraphs("".join(parser.parts)):
        is_long = max(map(len, piece.splitlines()), default=0) > LONGEST_LINE
        yield textwrap.fill(piece, LINE) if is_long else piece


class _Blocks(HTMLParser):
    HIDDEN = ("script", "style", "head", "nav")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self.HIDDEN:
            self._hidden += 1
        elif tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.HIDDEN:
            self._hidden = max(self._hidden - 1, 0)
        elif tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def _kind(
    domain: str, paths: str, read: Callable[[str], Iterator[str]], inside: str | None = None
) -> Kind:
    return Kind(domain, re.compile(paths), read, inside)


def _manuals(language: str, directory: str = "") -> Kind:
    return _kind(f"manual_{language}", rf"man/{directory}man\d/([^/.]+)", manual)


PACKAGES = {
    "manpages": _manuals("en"),
    "manpages-dev": _manuals("en"),
    **{
        f"manpages-{code}{suffix}": _manuals(code, f"{code}/")
        for code, suffixes in {"de": ("", "-dev"), "fr": ("", "-dev"), "pl": ("", "-dev")}.items()
        for suffix in suffixes
    },
    "manpages-es": _manuals("es", "es/"),
    "manpages-ru": _manuals("ru", "ru/"),
    "linux-doc-6.1": _kind("kernel_doc", r"/Documentation/(.+)/[^/]+\.rst\.gz$", paragraphs),
    "linux-source-6.1": _kind(
        "c",
        r"^[^/]+/((?:block|crypto|fs|ipc|kernel|lib|mm|net|security|sound)/[^/]+).*\.c$",
        paragraphs,
        "linux-source-6.1.tar.xz",
    ),
    "dict-gcide": _kind("dictionary", r"(gcide)\.dict\.dz$", entries),
    "anarchism": _kind("prose", r"/html/(\w+)\.html$", html),
    "debian-reference-en": _kind("prose", r"/([\w.-]+)\.en\.html$", html),
    "debian-handbook": _kind("prose", r"/en-US/(?:.*/)?([\w.-]+)\.html$", html),
    "postgresql-doc-15": _kind("postgresql", r"/html/([\w-]+)\.html$", html),
    "erlang-doc": _kind("erlang", r"/erlang-doc/(?:lib/)?([\w.-]+/.*)\.html$", html),
    "texlive-latex-recommended": _kind(
        "latex",
        r"/(?:tex|source)/(?:latex|generic)/([^/]+/[\w-]+).*\.(?:sty|cls|def|tex|cfg|dtx)$",
        paragraphs,
    ),
}


if __name__ == "__main__":
    cli.run(main)
