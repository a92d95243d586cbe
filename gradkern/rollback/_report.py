"""The report on a ledger and what it was asked: one HTML page that needs nothing beside itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradkern._page import Html, document, figure, section, table
from gradkern.rollback._estimators import Scores
from gradkern.rollback._histogram import histogram, signed
from gradkern.rollback._report_ledger import headline, ledger_section
from gradkern.rollback._self_test import SelfTest
from gradkern.rollback._showing import Showing, render
from gradkern.rollback._store import StoreReader
from gradkern.rollback._tensor_file import write_whole
from gradkern.rollback._top import require_k
from gradkern.rollback._verify import VerifyReport

__all__ = ["write_report"]

_STYLE_SHEET = Path(__file__).with_name("report.css")
_SAMPLE_SIDE, _QUERY_SIDE = 88, 144
_SCALE = "Bars count them on a logarithmic scale; ticks below are those listed."
# Of a query's text, in the table of all of them.
_EXCERPT = 70
_NOTHING = Showing("", is_tile=False)


@dataclass(frozen=True, slots=True)
class _Entry:
    id: int
    score: float
    error: float


@dataclass(frozen=True, slots=True)
class _Query:
    """What the page says of one query.

    Attributes:
        content: As the user gave it; None where not given.
        scores: Of all samples, fp64.
        helped: Those that helped most, the first most.
        harmed: Those that harmed most, the first most.
    """

    content: object
    scores: Tensor
    helped: tuple[_Entry, ...]
    harmed: tuple[_Entry, ...]


def write_report(
    path: Path,
    store: StoreReader,
    layer_bytes: Mapping[tuple[str, str], int],
    scores: Scores | None,
    *,
    show: Callable[[int], object] | None,
    queries: Sequence[object] | None,
    k: int,
    title: str,
    verified: VerifyReport | SelfTest | None,
) -> None:
    """Write the page; see :meth:`gradkern.rollback.Ledger.report`."""
    require_k(k)
    if not isinstance(verified, VerifyReport | SelfTest | None):
        raise TypeError(
            f"report: verified must be what ledger.verify(...) or ledger.self_test(...) returned, got "
            f"{type(verified).__name__}"
        )
    asked = _queries(scores, queries, k)
    showings = {entry.id: _NOTHING for query in asked for entry in (*query.helped, *query.harmed)}
    if show is not None:
        showings = {id: render(show(id), f"training sample {id}", side=_SAMPLE_SIDE) for id in showings}
    body = [
        headline(store, scores, verified),
        *([_overview(asked)] if len(asked) > 1 else []),
        *(_query_section(number, query, showings) for number, query in enumerate(asked, 1)),
        ledger_section(store, layer_bytes, verified),
    ]
    lead = (
        "A score is what a training sample did to a query's loss: how much the loss would rise, had the sample not "
        "been trained on. Positive: it helped. Negative: it harmed."
    )
    page = document(
        title,
        lead if asked else "What a training run recorded of its samples.",
        body,
        footer="Written by gradkern.rollback.",
        style=_STYLE_SHEET.read_text(encoding="utf-8"),
    )
    write_whole(path, page.encode("utf-8"))


def _queries(scores: Scores | None, contents: Sequence[object] | None, k: int) -> list[_Query]:
    if scores is None:
        if contents:
            raise ValueError(
                f"report: got {len(contents)} queries without scores; pass what ledger.scores(...) returned"
            )
        return []
    if not isinstance(scores, Scores):
        raise TypeError(
            f"report: scores must be what ledger.scores(...) returned, which has those of all samples, got "
            f"{type(scores).__name__}"
        )
    rows = scores.scores.detach().cpu().double()
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[1:] != scores.ids.shape:
        raise ValueError(
            f"report: scores must be of shape (queries, samples) for {tuple(scores.ids.shape)} ids, got "
            f"{tuple(scores.scores.shape)}"
        )
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(
            f"report: {int((~torch.isfinite(rows)).sum())} of {rows.numel()} scores are not finite and "
            "cannot be ranked; leave those queries out"
        )
    if scores.errors is not None and scores.errors.shape != scores.scores.shape:
        raise ValueError(
            f"report: errors must be of the shape of their scores, {tuple(scores.scores.shape)}, got "
            f"{tuple(scores.errors.shape)}"
        )
    if contents is not None and len(contents) != len(rows):
        raise ValueError(
            f"report: got {len(contents)} queries to show and scores for {len(rows)}; pass what shows each, in "
            "the order of the scores"
        )
    errors = torch.full_like(rows, torch.nan) if scores.errors is None else scores.errors.detach().cpu().view_as(rows)
    shown = [None] * len(rows) if contents is None else contents
    return [
        _query(content, scores.ids.cpu(), row, own_errors, k)
        for content, row, own_errors in zip(shown, rows, errors, strict=True)
    ]


def _query(content: object, ids: Tensor, scores: Tensor, errors: Tensor, k: int) -> _Query:
    # Stable: of equal scores the smaller id comes first, as in Ledger.explain.
    rising = scores.sort(stable=True).indices[:k]
    falling = scores.sort(descending=True, stable=True).indices[:k]
    return _Query(
        content,
        scores,
        helped=tuple(_Entry(int(ids[at]), float(scores[at]), float(errors[at])) for at in falling if scores[at] > 0),
        harmed=tuple(_Entry(int(ids[at]), float(scores[at]), float(errors[at])) for at in rising if scores[at] < 0),
    )


def _overview(asked: Sequence[_Query]) -> str:
    def best(entries: tuple[_Entry, ...]) -> tuple[str, str]:
        return (signed(entries[0].score), f"sample\N{NO-BREAK SPACE}{entries[0].id}") if entries else ("", "none")

    rows = [
        (
            Html(f'<a href="#query-{number}">Query\N{NO-BREAK SPACE}{number}</a>'),
            _excerpt(query.content),
            *best(query.helped),
            *best(query.harmed),
        )
        for number, query in enumerate(asked, 1)
    ]
    head = ("", "", "helped most", "", "harmed most", "")
    said = "Of each the samples with the highest and lowest score."
    links = f'<nav aria-label="queries">{table(head, rows, numbers={2, 4})}</nav>'
    return section("queries", f"{len(asked)} queries", said, links)


def _excerpt(content: object) -> str:
    texts = [each for each in (content if isinstance(content, tuple) else (content,)) if isinstance(each, str)]
    text = " ".join(" ".join(texts)[: 4 * _EXCERPT].split())
    return text if len(text) <= _EXCERPT else f"{text[: _EXCERPT - 1]}…"


def _query_section(number: int, query: _Query, showings: Mapping[int, Showing]) -> str:
    anchor = f"query-{number}"
    shown = ""
    if query.content is not None:
        showing = render(query.content, f"query {number}", side=_QUERY_SIDE)
        shown = f'<div class="asked{" tile" if showing.is_tile else ""}">{showing.html}</div>'
    total, helped, harmed = len(query.scores), int((query.scores > 0).sum()), int((query.scores < 0).sum())
    neither = f", {total - helped - harmed:,} did neither" if total > helped + harmed else ""
    spread = f"{total:,} samples: {helped:,} helped, {harmed:,} harmed{neither}."
    marked = [entry.score for entry in (*query.helped, *query.harmed)]
    chart = figure(f"{anchor}-spread", histogram(query.scores, marked), f"{spread} {_SCALE}")
    widest = max(map(abs, marked), default=1.0)
    lists = "".join(
        _list(f"{anchor}-{side}", side, entries, part, widest, showings)
        for side, entries, part in (
            ("helped", query.helped, query.scores.clamp_min(0)),
            ("harmed", query.harmed, query.scores.clamp_max(0)),
        )
    )
    what = f'<div class="query">{shown}{chart}</div><div class="pair">{lists}</div>'
    return section(anchor, f"Query {number}", "", what)


def _list(
    identifier: str,
    side: str,
    entries: Sequence[_Entry],
    part: Tensor,
    widest: float,
    showings: Mapping[int, Showing],
) -> str:
    """The samples on one side; ``part`` are all scores on that side."""
    heading = f'<h3 id="{identifier}">{side.capitalize()} most</h3>'
    if not entries:
        return f'<div class="{side}">{heading}<p class="note">No sample {side}.</p></div>'
    share = sum(entry.score for entry in entries) / float(part.sum())
    said = (
        f"{len(entries):,} of {int((part != 0).sum()):,} samples that {side}, {share:.0%} of what those did together."
    )
    are_tiles = all(showings[entry.id].is_tile for entry in entries)
    items = "".join(_item(entry, side, showings[entry.id], widest, are_tiles) for entry in entries)
    kind = "tiles" if are_tiles else "rows"
    return (
        f'<div class="{side}">{heading}<p class="note">{said}</p>'
        f'<ol class="samples {kind}" aria-labelledby="{identifier}">{items}</ol></div>'
    )


def _item(entry: _Entry, side: str, showing: Showing, widest: float, is_tile: bool) -> str:
    width = 100 * abs(entry.score) / widest
    error = ""
    if math.isfinite(entry.error):
        error = (
            f'<span class="error" title="how far it scatters over the visits of the sample">±{entry.error:.1g}</span>'
        )
    who = (
        f'<div class="who"><data class="score" value="{entry.score!r}">{signed(entry.score)}</data>{error}'
        f'<span class="bar" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'
        f'<span class="id">sample {entry.id}</span></div>'
    )
    what = f'<div class="what">{showing.html}</div>' if showing.html else ""
    return f"<li>{what}{who}</li>" if is_tile else f"<li>{who}{what}</li>"
