"""The documents of a Python installation: a corpus that is on every machine.

Five domains: `python` (functions and classes), `prose` (docstrings, language topics, READMEs),
`headers` (C and C++), `stubs` (type stubs) and, where the machine has them, `manuals` (manual
pages and package documentation). A document is a natural unit of a few hundred bytes: a function,
a docstring, a section.
"""

import ast
import functools
import gzip
import hashlib
import inspect
import os
import re
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lory_jax.preparation.documents import Document, join_pieces, split_long

UNIT_BYTES = 320  # neighbouring pieces are joined up to about this size
LONGEST_UNIT_BYTES = 2000
LONG_DOCSTRING_BYTES = 200  # from this size on, a docstring is prose and not part of its code
BIG_PACKAGE_BYTES = 200_000
LARGEST_ORIGIN_SHARE = 0.04  # share of a domain: no package or program fills it alone

SKIPPED_DIRECTORIES = {"test", "tests", "testing", "__pycache__", "site-packages", "idlelib"}
VENDOR_DIRECTORIES = {"_vendor", "vendor", "vendored", "_vendored", "extern", "third_party"}
HEADER_SUFFIXES = {".h", ".hpp", ".hh", ".hxx"}
TEXT_SUFFIXES = {".rst", ".md", ".txt"}
# Where statements hold other statements; expressions hold none.
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
NO_LETTERS = bytes(i for i in range(128) if not (chr(i).isalpha() or chr(i) in " _"))
BOILERPLATE = re.compile(r"copyright|licen[cs]e|redistribut|warrant", re.IGNORECASE)

Units = list[tuple[str, str]]  # (domain, text)


@dataclass(frozen=True)
class File:
    """A file to read.

    Attributes:
      path: where it is.
      name: its path in the installation, the same on every machine.
      origin: the origin of its documents.
      read: the function that reads it.
      size: its bytes.
    """

    path: Path
    name: str
    origin: str
    read: Callable[[Path], Units]
    size: int


def read_python_installation(max_domain_bytes: int, seed: int) -> list[Document]:
    """Returns the documents of the running interpreter's installation and of its system."""
    return read_files(installation_files(), max_domain_bytes, seed)


def version() -> str:
    """Returns a hash of the names and sizes of the files, which changes with what is installed."""
    digest = hashlib.sha256()
    for name, size in sorted((file.name, file.size) for file in installation_files()):
        digest.update(f"{name}\n{size}\n".encode())
    return digest.hexdigest()


@functools.cache
def installation_files() -> tuple[File, ...]:
    """Returns the files of the running interpreter's installation and of its system.

    A process looks once: the plan and the reading that follows it see the same files.
    """
    paths = sysconfig.get_paths()
    packages = [Path(paths[name]) for name in ("stdlib", "purelib", "platlib")]
    files = package_files(dict.fromkeys(packages)) + header_files(Path(paths["include"]))
    return (*files, *manual_files(Path("/usr/share/man"), Path("/usr/share/doc")))


def read_files(files: Sequence[File], max_domain_bytes: int, seed: int) -> list[Document]:
    """Reads files, in an order that the seed decides, until every domain they can give is full.

    With `max_domain_bytes` 0, all are read. Documents are returned in the order of their files'
    names, so that the units of one file follow each other.
    """
    sizes: Counter[str] = Counter()
    origin_sizes: Counter[tuple[str, str]] = Counter()
    found: dict[str, list[Document]] = {}
    gives: dict[str, set[str]] = {
        ".py": {"python", "prose"},
        ".pyi": {"stubs"},
        **{suffix: {"headers"} for suffix in HEADER_SUFFIXES},
    }

    def is_full(file: File) -> bool:
        suffix = os.path.splitext(file.name)[1]
        domains = gives.get(suffix, {"manuals" if file.read is manual else "prose"})
        return max_domain_bytes > 0 and all(
            sizes[domain] >= max_domain_bytes
            or origin_sizes[domain, file.origin] >= LARGEST_ORIGIN_SHARE * max_domain_bytes
            for domain in domains
        )

    for file in sorted(files, key=lambda file: _hash(seed, file.name)):
        if is_full(file):
            continue
        documents = [
            Document(text, domain, file.origin)
            for domain, unit in _read(file)
            for text in split_long(unit, LONGEST_UNIT_BYTES)
            if is_clean(text)
        ]
        found[file.name] = documents
        for document in documents:
            size = len(document.text.encode())
            sizes[document.domain] += size
            origin_sizes[document.domain, file.origin] += size
    return [document for name in sorted(found) for document in found[name]]


def is_clean(text: str) -> bool:
    """Returns False for tables of numbers, encoded data and minified code."""
    if text.isascii():  # nearly always, and then this is thirty times faster
        letters = len(text.encode().translate(None, NO_LETTERS))
    else:
        letters = sum(character.isalpha() or character in " _" for character in text)
    return letters > 0.6 * len(text) and max(map(len, text.splitlines()), default=0) < 400


# ---------------------------------------------------------------- which files


def package_files(roots: Sequence[Path] | dict[Path, None]) -> list[File]:
    """Returns the sources, stubs, headers and texts below directories such as site-packages."""
    readers: dict[str, Callable[[Path], Units]] = {".py": python_code, ".pyi": stubs}
    readers |= dict.fromkeys(HEADER_SUFFIXES, headers) | dict.fromkeys(TEXT_SUFFIXES, text_file)
    files = []
    for root in roots:
        below = []
        sizes: Counter[str] = Counter()
        for name, size in _walk(str(root), SKIPPED_DIRECTORIES):
            last = name.rpartition("/")[2]
            reader = metadata if last == "METADATA" else readers.get(os.path.splitext(last)[1])
            if reader is not None:
                below.append((name, size, reader))
                sizes[name.partition("/")[0]] += size
        for name, size, reader in sorted(below, key=lambda found: found[0].split("/")):
            is_big = sizes[name.partition("/")[0]] > BIG_PACKAGE_BYTES
            origin = package_origin(name.split("/"), is_big)
            files.append(File(root / name, f"{root.name}/{name}", origin, reader, size))
    return files


def _walk(root: str, skipped: set[str], below: str = "") -> Iterator[tuple[str, int]]:
    """Yields the files below a directory, relative to it, with their sizes.

    Links to directories are not followed. A directory that cannot be read has no files.
    """
    try:
        with os.scandir(os.path.join(root, below)) as found:
            entries = list(found)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in skipped:
                yield from _walk(root, skipped, f"{below}{entry.name}/")
        elif entry.is_file():
            yield below + entry.name, entry.stat().st_size


def package_origin(path: Sequence[str], is_big: bool) -> str:
    """Returns the package of a file; a vendored copy belongs to the package it was copied from.

    `path` holds the names of the directories below the root, and that of the file. A big package is
    divided by the name of the file's directory (or module), so that its code, stubs and headers of
    one topic stay together.
    """
    parts = [part.split(".")[0].lower() for part in path]
    for i, part in enumerate(parts[:-1]):
        if part in VENDOR_DIRECTORIES:
            return parts[i + 1]
    package = re.sub(r"-\d.*", "", parts[0]).replace("-", "_")  # name-1.2.dist-info
    if not is_big:
        return package
    return f"{package}/{parts[-2] if len(parts) > 2 else parts[-1]}"


def header_files(include: Path) -> list[File]:
    """Returns the headers of Python itself."""
    names = sorted(
        (name.split("/"), size)
        for name, size in _walk(str(include), {"site-packages"})
        if name.endswith(".h")
    )
    return [
        File(
            include.joinpath(*parts),
            f"include/{'/'.join(parts)}",
            f"include/{parts[-1].removesuffix('.h').split('_')[0]}",
            headers,
            size,
        )
        for parts, size in names
    ]


def manual_files(manuals: Path, documentation: Path) -> list[File]:
    """Returns English manual pages and READMEs of system packages; a directory may be missing."""
    pages = sorted(path for path in manuals.glob("man[1-8]/*.gz") if path.is_file())
    files = [
        File(
            path,
            f"man/{path.name}",
            f"man:{re.split(r'[-_.:]', path.name)[0].lower()}",
            manual,
            path.stat().st_size,
        )
        for path in pages
    ]
    for path in sorted(path for path in documentation.glob("*/README*") if path.is_file()):
        package = path.parent.name
        origin = f"man:{re.split(r'[-_.]', package)[0]}"
        name = f"doc/{package}/{path.name}"
        files.append(File(path, name, origin, manual, path.stat().st_size))
    return files


# ---------------------------------------------------------------- from files to units


def _read(file: File) -> Units:
    try:
        return file.read(file.path)
    except (SyntaxError, ValueError, OSError, EOFError, RecursionError):
        return []  # Python 2 templates, other encodings and dangling links are left out


def python_code(path: Path) -> Units:
    """Returns functions and methods without long docstrings, and those docstrings as prose."""
    source = path.read_text("utf-8")
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose: Units = []
    for node in _statements(tree):
        if not isinstance(node, documented) or not (text := ast.get_docstring(node, clean=False)):
            continue
        if len(text.encode()) >= LONG_DOCSTRING_BYTES:
            if not BOILERPLATE.search(text[:400]):
                prose.append(("prose", inspect.cleandoc(text)))
            literal = node.body[0]
            lines[literal.lineno - 1 : literal.end_lineno] = [""] * (
                literal.end_lineno - literal.lineno + 1  # type: ignore[operator]
            )
    code = join_pieces(_definitions(tree.body, lines), UNIT_BYTES)
    return [("python", unit) for unit in code] + prose


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yields a module and its statements, in the order of `ast.walk`, without expressions."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        for block in BLOCKS:
            waiting.extend(getattr(node, block, ()))
        yield node


def stubs(path: Path) -> Units:
    """Returns classes and functions of a type stub; neighbours, such as overloads, are joined."""
    source = path.read_text("utf-8")
    pieces = _definitions(ast.parse(source).body, source.splitlines(keepends=True))
    return [("stubs", unit) for unit in join_pieces(pieces, UNIT_BYTES)]


def _definitions(body: Sequence[ast.stmt], lines: Sequence[str]) -> Iterator[str]:
    """Yields the source of every function and class; of a long class, that of its members."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        text = "".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.ClassDef) and len(text) > LONGEST_UNIT_BYTES:
            yield from _definitions(node.body, lines)
        else:
            yield text


def headers(path: Path) -> Units:
    """Returns declarations with their comments: paragraphs, joined, without licences."""
    paragraphs = _paragraphs(path.read_text("utf-8"))
    kept = (text for text in paragraphs if not BOILERPLATE.search(text))
    return [("headers", unit) for unit in join_pieces(kept, UNIT_BYTES)]


def text_file(path: Path) -> Units:
    """Returns the paragraphs of a documentation file, with neighbours joined."""
    if BOILERPLATE.search(path.name) or path.parent.name.endswith(("-info", "licenses")):
        return []
    return _prose(path.read_text("utf-8"))


def metadata(path: Path) -> Units:
    """Returns the long description of an installed distribution, which is its README."""
    _, _, description = path.read_text("utf-8").partition("\n\n")
    return _prose(description)


def _prose(text: str) -> Units:
    kept = (piece for piece in _paragraphs(text) if not BOILERPLATE.search(piece))
    return [("prose", unit) for unit in join_pieces(kept, UNIT_BYTES)]


def manual(path: Path) -> Units:
    """Returns the sections of a manual page in its roff source, or the paragraphs of a README."""
    contents = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = contents.decode("utf-8")
    without_comments = re.sub(r'(?m)^[.\']\\".*\n', "", text)
    pieces = re.split(r"(?m)^(?=\.S[HS] |\.PP|\.TP|\.IP)|\n\s*\n", without_comments)
    kept = (piece for piece in pieces if piece.strip() and not BOILERPLATE.search(piece))
    return [("manuals", unit) for unit in join_pieces(kept, UNIT_BYTES)]


def _paragraphs(text: str) -> Iterator[str]:
    return (piece for piece in re.split(r"\n[ \t]*\n", text) if piece.strip())


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
