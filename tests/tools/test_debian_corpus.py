"""The second corpus: from a package that dpkg-deb builds here to documents with their origins."""

import gzip
import subprocess

import pytest

from tools import debian_corpus
from tools.debian_corpus import Kind, choose, entries, html, manual, read_package

PROSE = "A sentence of ordinary words that is long enough to be kept.\n" * 10


def test_html_gives_blocks_without_scripts_and_with_bounded_lines():
    line = PROSE.replace("\n", " ")
    page = f"<html><head><title>t</title></head><body><script>x()</script><p>{line}</p><p>b"
    first, second = [piece for piece in html(page) if piece.strip()]
    assert first.split() == PROSE.split() and second.strip() == "b"
    assert max(map(len, first.splitlines())) <= debian_corpus.LINE


def test_manual_pages_are_cut_at_sections_and_lose_comments():
    page = '.\\" a comment\n.TH LS 1\n.SH NAME\nls\n.SH SYNOPSIS\nls [option]\n'
    assert list(manual(page)) == [".TH LS 1\n", ".SH NAME\nls\n", ".SH SYNOPSIS\nls [option]\n"]


def test_dictionary_entries_follow_the_preface():
    text = "Preface.\n   [1913 Webster]\n\nAb, n.\n   One.\n   [1913 Webster]\n\nAc, n.\n   Two."
    assert [entry.strip() for entry in entries(text)] == [
        "",
        "Ab, n.\n   One.",
        "Ac, n.\n   Two.",
    ]


@pytest.mark.skipif(not debian_corpus.is_possible(), reason="requires dpkg-deb")
def test_documents_of_a_package(tmp_path, monkeypatch, capsys):
    pages = {
        "man1/ls.1": PROSE,
        "man1/odd.1": "caf\xe9 " + PROSE,
        "de/man1/ls.1": "Auf Deutsch. " + PROSE,
    }
    root = tmp_path / "root"
    for name, text in pages.items():
        path = root / "usr/share/man" / f"{name}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode("latin-1")))
    (root / "DEBIAN").mkdir()
    fields = {"Package": "pages", "Version": "1", "Architecture": "all", "Maintainer": "nobody"}
    control = "".join(f"{name}: {value}\n" for name, value in fields.items())
    (root / "DEBIAN" / "control").write_text(control + "Description: none\n")
    deb = tmp_path / "pages_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", root, deb], check=True, capture_output=True)

    (found,) = read_package(deb, "pages", debian_corpus._manuals("en"))
    name, document = found
    assert name.endswith("man1/ls.1.gz") and document.origin == "pages/ls"
    assert document.domain == "manual_en" and document.text.split() == PROSE.split()
    assert "another encoding" in capsys.readouterr().out
    ((_, german),) = read_package(deb, "pages", debian_corpus._manuals("de", "de/"))
    assert german.text.startswith("Auf Deutsch") and isinstance(
        debian_corpus.PACKAGES["manpages"], Kind
    )


def test_a_full_domain_holds_whole_files_and_no_dominating_origin(monkeypatch):
    monkeypatch.setattr(debian_corpus, "DOMAIN_BYTES", 5000)
    monkeypatch.setattr(debian_corpus, "LARGEST_ORIGIN_SHARE", 0.1)
    documents = [
        (f"{i:03}.html", debian_corpus.Document("x" * 100, "d", "big" if i < 50 else f"o{i}"))
        for i in range(200)
        for _ in range(2)
    ]
    kept = choose(documents)
    origins = [document.origin for document in kept]
    assert 5000 <= 100 * len(kept) < 5200 and origins.count("big") <= 6
    assert all(origins.count(origin) == 2 for origin in set(origins) - {"big"})
