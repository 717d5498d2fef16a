"""The corpus of a Python installation: its files, their origins, and the units cut from them."""

import ast
import gzip
import statistics
from collections import defaultdict

import pytest

from lory_jax.preparation.documents import Document
from lory_jax.preparation.sources import python_installation as installation
from lory_jax.preparation.sources.corpus import read_documents
from lory_jax.preparation.sources.python_installation import (
    LONGEST_UNIT_BYTES,
    header_files,
    is_clean,
    manual_files,
    package_files,
    package_origin,
    read_files,
)
from lory_jax.preparation.sources.records import ReadOptions

DOCSTRING = "Return what the reader needs. " * 12
CODE = f'''"""{DOCSTRING}"""
import os

def short(x):
    """Too short to be prose."""
    return x

class Reader:
    @property
    def size(self):
        """{DOCSTRING.replace("reader", "caller")}

        And more.
        """
        return os.path.getsize(self.path)
'''
LICENCE = "/* Copyright someone; redistribution permitted. */"


@pytest.fixture
def root(tmp_path):
    """A small site-packages."""
    files = {
        "shop/__init__.py": CODE,
        "shop/stock/count.py": "def count(shelf):\n    return len(shelf)\n" * 3,
        "shop/stock/count.pyi": "def count(shelf: list[int]) -> int: ...\n",
        "shop/stock/count.h": f"{LICENCE}\n\nint count(const int *shelf);\n\n// more\nint m;\n",
        "shop/tests/test_count.py": "def test_count():\n    assert True\n",
        "shop/_vendor/six.py": "def u(s):\n    return s\n",
        "shop/README.md": "The shop sells things.\n\nIt is open.\n",
        "shop/old.py": "print 'python 2'\n",
        "six.py": "def b(s):\n    return s\n",
        "shop-1.0.dist-info/METADATA": "Name: shop\n\nA long description of the shop.\n",
        "shop-1.0.dist-info/LICENSE.txt": "Redistribution and use.\n",
    }
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "lib"


def by_domain(documents):
    domains = defaultdict(list)
    for document in documents:
        domains[document.domain].append(document)
    return domains


def test_packages_give_code_prose_stubs_and_headers(root):
    domains = by_domain(read_files(package_files([root]), 0, 0))
    assert set(domains) == {"python", "prose", "stubs", "headers"}
    code = "\n".join(document.text for document in domains["python"])
    prose = [document.text for document in domains["prose"]]
    assert '"""Too short to be prose."""' in code and DOCSTRING not in code
    assert "@property\n    def size(self):" in code
    assert sum(text.startswith("Return what the") for text in prose) == 2
    assert "A long description of the shop." in prose
    assert any(text.startswith("The shop sells things.\n\nIt is open.") for text in prose)
    assert [d.text for d in domains["headers"]] == [
        "int count(const int *shelf);\n\n// more\nint m;"
    ]
    everything = "\n".join(document.text for all_of in domains.values() for document in all_of)
    for left_out in ("test_count", "Redistribution", "Copyright", "python 2"):
        assert left_out not in everything


def test_a_vendored_copy_has_the_origin_of_the_original(root):
    origins = {file.name: file.origin for file in package_files([root])}
    assert origins["lib/shop/_vendor/six.py"] == origins["lib/six.py"] == "six"
    assert origins["lib/shop-1.0.dist-info/METADATA"] == origins["lib/shop/__init__.py"] == "shop"


@pytest.mark.parametrize(
    ("path", "is_big", "origin"),
    [
        ("numpy/linalg/lapack.pyi", False, "numpy"),
        ("numpy/linalg/lapack.pyi", True, "numpy/linalg"),
        ("argparse.py", True, "argparse/argparse"),
        ("pip/_vendor/rich/table.py", True, "rich"),
        ("Scikit_learn-1.9.dist-info/METADATA", False, "scikit_learn"),
    ],
)
def test_origins(path, is_big, origin):
    assert package_origin(path.split("/"), is_big) == origin


def test_manual_pages_and_package_readmes(tmp_path):
    page = '.\\" Copyright\n.TH GREP 1\n.SH NAME\ngrep prints lines\n.SH OPTIONS\n.TP\n-v invert\n'
    (tmp_path / "man/man1").mkdir(parents=True)
    (tmp_path / "man/man1/grep-x.1.gz").write_bytes(gzip.compress(page.encode(), mtime=0))
    (tmp_path / "man/man1/gone.1.gz").symlink_to(tmp_path / "nowhere")
    (tmp_path / "doc/grep").mkdir(parents=True)
    (tmp_path / "doc/grep/README.Debian").write_text("How this package was built.\n")
    documents = read_files(manual_files(tmp_path / "man", tmp_path / "doc"), 0, 0)
    assert {(d.domain, d.origin) for d in documents} == {("manuals", "man:grep")}
    texts = "\n".join(document.text for document in documents)
    assert "grep prints lines" in texts and "How this package" in texts and "Copyright" not in texts
    assert manual_files(tmp_path / "none", tmp_path / "none") == []


def test_headers_of_python_are_grouped_by_topic(tmp_path):
    for name in ("dictobject.h", "cpython/dict_view.h", "site-packages/x.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("int declared_here;\n")
    origins = [file.origin for file in header_files(tmp_path)]
    assert origins == ["include/dict", "include/dictobject"]


def test_tables_and_encoded_data_are_no_text():
    assert is_clean("def read(self):\n    return self.data")
    assert not is_clean("0x00, 0x1f, 0x3e, 0x5d, 0x7c")
    assert not is_clean("x" * 400)


def test_long_classes_are_cut_by_their_members(tmp_path):
    body = "\n".join(f"    def f{i}(self):\n        return {'x' * 300!r}\n" for i in range(20))
    path = tmp_path / "long.py"
    path.write_text(f"class Long:\n{body}")
    units = [text for _, text in installation.python_code(path)]
    assert len(units) > 5 and all(len(unit.encode()) <= LONGEST_UNIT_BYTES for unit in units)
    for unit in units:
        ast.parse("class Long:\n" + unit)


def test_caps_hold_whatever_the_place_and_the_order_of_the_files(root, tmp_path):
    for i in range(40):
        (root / f"shop/part{i}.py").write_text(f"def part{i}():\n    return 'part {i}'\n" * 20)
    files = package_files([root])
    capped = read_files(files, 5000, 0)
    assert capped == read_files(files[::-1], 5000, 0)
    size = sum(len(d.text.encode()) for d in capped if d.domain == "python")
    assert size < sum(len(d.text.encode()) for d in read_files(files, 0, 0) if d.domain == "python")
    moved = tmp_path / "elsewhere/lib"
    moved.parent.mkdir()
    root.rename(moved)
    assert [d.text for d in read_files(package_files([moved]), 5000, 0)] == [d.text for d in capped]


def test_this_installation_has_four_domains_of_a_megabyte():
    documents = list(read_documents(["python"], ReadOptions(max_domain_bytes=1_500_000)))
    domains = by_domain(documents)
    sizes = {name: sum(len(d.text.encode()) for d in mine) for name, mine in domains.items()}
    assert {"python", "prose", "headers", "stubs"} <= {n for n in sizes if sizes[n] >= 1_000_000}
    # Half an instance of the local recipe: 256 tokens of about 2.2 bytes.
    assert statistics.median(len(document.text.encode()) for document in documents) <= 560
    for mine in domains.values():
        assert len({document.origin for document in mine}) >= 30
    assert all(isinstance(document, Document) for document in documents)
