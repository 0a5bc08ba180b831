"""One self-contained HTML page: from sections of statements, tables and text, and PNG pictures, to its text."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReportSection:
    """What a caller adds to the page: statements, a table (its first row is the head), and text shown as it stands."""

    title: str
    statements: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""


STYLE = """
:root { color-scheme: light dark; --text: #1d232a; --page: #fbfbfa; --line: #d8dbe0; --soft: #eef0f3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --page: #16191d; --line: #3a4048; --soft: #22272d; }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--text); background: var(--page); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .25rem .9rem .25rem .4rem; border-bottom: 1px solid var(--line);
         vertical-align: top; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { background: var(--soft); } td:first-child { min-width: 15rem; }
figure { margin: 1.5rem 0; } figcaption { margin-top: .3rem; }
img { max-width: 100%; border-radius: 6px; background: #fff; }
pre { padding: .8rem; background: var(--soft); border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(name: str, *, sections: Sequence[ReportSection], pictures: Sequence[tuple[bytes, str]]) -> str:
    """The whole page: the first section (the summary), the pictures, given as (PNG, caption), the other sections."""
    figures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in pictures
    )
    first, *others = map(_section, sections)
    title = html.escape(f"Report of {name}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>{first}<h2>Pictures</h2>{figures}{''.join(others)}</body></html>\n"
    )


def _section(section: ReportSection) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.statements:
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in section.statements) + "</ul>")
    if section.rows:
        head, *body = [[html.escape(cell) for cell in row] for row in section.rows]
        rows = ["".join(f"<th>{cell}</th>" for cell in head)]
        rows += ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
        parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>")
    if section.text:
        parts.append(f"<pre>{html.escape(section.text)}</pre>")
    return "<section>" + "".join(parts) + "</section>"
