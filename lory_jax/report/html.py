"""Self-contained HTML pages: no scripts, no links, pictures embedded, all text escaped.

Every function returns a piece of HTML; `page` joins the pieces.
"""

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 2.5rem 1.25rem 4rem; background: #fff;
  color: #1f2933; font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid #d9dee3; }
p { margin: .5rem 0; max-width: 44rem; }
li { margin: .3rem 0; max-width: 42rem; }
.lead { font-size: 1.12rem; }
.note, figcaption { color: #56606b; font-size: .9rem; }
.wide { overflow-x: auto; margin: 1.25rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .95rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; border-bottom: 1px solid #e4e7eb; text-align: right;
  white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: break-word; min-width: 7rem; }
thead tr:last-child th { border-bottom: 2px solid #1f2933; }
thead th.group { text-align: center; border-bottom: 1px solid #9aa5b1; }
tr.strong td { font-weight: 600; border-top: 2px solid #1f2933; }
.better { color: #00694c; font-weight: 600; }
.worse { color: #a33b00; font-weight: 600; }
figure { margin: 1.25rem 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: .35rem; max-width: 44rem; }
.sample { margin: 1rem 0 1.75rem; }
.sample h3 { font-size: .95rem; margin: 0 0 .3rem; }
pre { margin: 0; padding: .8rem 1rem; background: #f5f7f9; border-radius: 6px; color: #56606b;
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre mark { unicode-bidi: isolate; background: #dcecf7; color: #003e63; border-radius: 2px; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  .sample, figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  pre mark { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


# HTML allows no control characters other than tab and newline.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def escape(text: str) -> str:
    """Text as HTML, safe inside and outside of attributes."""
    return html.escape(text.translate(CONTROLS))


def page(title: str, pieces: Iterable[str]) -> str:
    """The whole document."""
    body = "\n".join(pieces)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def style(rules: str) -> str:
    """CSS rules for one page. They must come from code, never from data."""
    return f"<style>{rules}</style>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of a `kind`: "" for plain text, "lead" for larger or "note" for smaller text."""
    return f'<p class="{escape(kind)}">{escape(text)}</p>'


def items(texts: Iterable[str], *, numbered: bool = False) -> str:
    """A list."""
    tag = "ol" if numbered else "ul"
    return f"<{tag}>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</{tag}>"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    groups: Sequence[tuple[str, int]] = (),
    strong_rows: Iterable[int] = (),
    judged_columns: Iterable[int] = (),
    text_columns: Sequence[int] = (),
) -> str:
    """A table whose first column names the row.

    Args:
      header: one name per column.
      rows: cells as text.
      groups: names above the header, each with the number of columns that it spans.
      strong_rows: indices of the rows that summarise the others.
      judged_columns: indices of the columns with differences, where a minus is better.
      text_columns: indices of the columns that hold text rather than figures.
    """
    strong, judged = set(strong_rows), set(judged_columns)
    spans = "".join(
        f'<th class="group" colspan="{span}">{escape(name)}</th>' if name else "<th></th>" * span
        for name, span in groups
    )
    names = "".join(
        f"<th{' class=text' if column in text_columns else ''}>{escape(name)}</th>"
        for column, name in enumerate(header)
    )
    lines = []
    for index, row in enumerate(rows):
        cells = []
        for column, cell in enumerate(row):
            kind = "text" if column in text_columns else ""
            if column in judged:
                kind = {"−": "better", "+": "worse"}.get(cell[:1], "")
            cells.append(f'<td class="{kind}">{escape(cell)}</td>')
        kind = "strong" if index in strong else ""
        lines.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    head = (f"<tr>{spans}</tr>" if spans else "") + f"<tr>{names}</tr>"
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def figure(svg: bytes, caption: str) -> str:
    """An SVG picture, embedded in the page; its caption is its alternative text, too."""
    data = base64.b64encode(svg).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def sample_box(title: str, prompt: str, continuation: str) -> str:
    """A prompt and, marked, the continuation by a model."""
    return (
        f'<div class="sample"><h3>{escape(title)}</h3>'
        f"<pre>{escape(prompt)}<mark>{escape(continuation)}</mark></pre></div>"
    )
