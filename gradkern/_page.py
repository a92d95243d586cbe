"""Self-contained HTML pages: one style, its dark and its printed form, and the parts that reports are made of.

A page asks nothing of the network and runs no script, and its own policy says so to the browser: what a text from a
training set or a model might smuggle in past :func:`escaped` still could not load or run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path

__all__ = ["Html", "cards", "document", "escaped", "figure", "mib", "section", "table"]

_STYLE_SHEET = Path(__file__).with_name("page.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# What HTML cannot hold: control characters, halves of surrogate pairs (which UTF-8 cannot either) and noncharacters.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Text that is HTML already; :func:`escaped` leaves it as it is."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Any text as HTML that shows it, also inside an attribute; what HTML cannot hold is shown as U+FFFD."""
    return text if isinstance(text, Html) else Html(escape(_UNFIT.sub("\ufffd", text)))


def document(title: str, lead: str, body: Iterable[str], *, footer: str, style: str = "") -> str:
    """Return a whole page.

    Args:
        title: Heading of the page and of its window.
        lead: Under the heading.
        body: Elements, in order; HTML.
        footer: At the end.
        style: Further rules, after those that all pages share; CSS.
    """
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escaped(title)}</title>",
            f"<style>{_STYLE_SHEET.read_text(encoding='utf-8')}{style}</style></head><body>",
            f"<header><h1>{escaped(title)}</h1><p>{escaped(lead)}</p></header>",
            "<main>",
            *body,
            "</main>",
            f"<footer>{escaped(footer)}</footer>",
            "</body></html>\n",
        )
    )


def cards(identifier: str, entries: Iterable[tuple[str, str, str]]) -> str:
    """Return figures to see first: of each a label, the value, and what more there is to say."""
    return (
        f'<div class="cards" id="{identifier}">'
        + "".join(
            f'<div class="card"><div class="label">{escaped(label)}</div><div class="value">{escaped(value)}</div>'
            f'<div class="detail">{escaped(detail)}</div></div>'
            for label, value, detail in entries
        )
        + "</div>"
    )


def section(identifier: str, title: str, lead: str, *parts: str) -> str:
    """Return a section, with or without a ``lead``; ``parts`` are HTML."""
    note = f'<p class="note">{escaped(lead)}</p>' if lead else ""
    return f'<section id="{identifier}"><h2>{escaped(title)}</h2>{note}{"".join(parts)}</section>'


def figure(identifier: str, svg: str, caption: str) -> str:
    """Return a chart; who cannot see it is told its caption."""
    return (
        f'<figure id="{identifier}" role="img" aria-label="{escaped(caption)}">{svg}'
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Collection[int]) -> str:
    """Return a table that scrolls by itself where it is too wide; the columns ``numbers`` are set to the right."""

    def cells(tag: str, row: Sequence[str], scope: str = "") -> str:
        number = ' class="number"'
        return "".join(
            f"<{tag}{scope}{number if index in numbers else ''}>{escaped(cell)}</{tag}>"
            for index, cell in enumerate(row)
        )

    columns = cells("th", head, ' scope="col"')
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def mib(size: int) -> str:
    """Write a size in MiB."""
    return f"{size / 2**20:,.1f} MiB"
