from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from demo.corpus import Snippet
from demo.figures import Figures, Influential, LedgerSummary, Memory, Prediction, Setup, Timing, Training
from demo.plots import memory_chart
from demo.report import render_report

HOSTILE = "</pre><script>alert('&')</script><!--"


@pytest.fixture(scope="module")
def figures() -> Figures:
    timeline = tuple((0.001 * step, 10_000_000 + 1_000_000 * (step % 50)) for step in range(4000))
    return Figures(
        setup=Setup(HOSTILE, 1234567, HOSTILE, HOSTILE, HOSTILE),
        memory=Memory(80 << 20, 48 << 20, 47 << 20, 46 << 20, timeline, timeline[:10], ((HOSTILE, "keep", 5),)),
        training=Training((5.0, 4.0, 3.0, 2.0, 1.0, 1.0), (2.0, 1.0, 0.5, 0.5, 0.5, 0.5), 3.0, 6144, 5.5, 1.5),
        update_cycle=Timing("cycle", 0.010, 0.015, 100, 200, 7),
        whole_step=Timing("step", 0.5, 0.55, None, None, 7),
        ledger=LedgerSummary(
            3e-7, 1e-5, 1000, 96, (("conservation", True, HOSTILE), ("reconstruction", False, "x")), 0.9
        ),
        prediction=Prediction(
            Snippet(HOSTILE, 3, HOSTILE.encode()),
            HOSTILE,
            (Influential(7, 0.25, Snippet(HOSTILE, 12, HOSTILE.encode())),),
        ),
    )


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in {"src", "href", "xlink:href", "srcset"}:
                self.references.append(value or "")


@pytest.fixture(scope="module")
def page(figures: Figures) -> _Page:
    page = _Page()
    page.feed(render_report(figures, max_norm=1.0))
    return page


def test_text_from_files_and_models_is_escaped(figures: Figures, page: _Page) -> None:
    assert page.tags["script"] == 0
    assert HOSTILE not in render_report(figures, max_norm=1.0)


def test_page_needs_nothing_from_outside_itself(page: _Page) -> None:
    assert page.tags["link"] == page.tags["img"] == 0
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)


def test_ids_are_unique_and_references_resolve(page: _Page) -> None:
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert {reference[1:] for reference in page.references} <= page.ids.keys()


def test_parts_are_there(page: _Page) -> None:
    sections = {"headline", "memory", "training", "timing", "influence", "ledger"}
    assert sections | {"memory-timeline", "loss-curve", "norm-curve", "influence-table"} <= page.ids.keys()
    assert page.tags["svg"] == 3


def test_long_timelines_keep_their_peak() -> None:
    spike = 77 << 20
    timeline = [(float(step), spike if step == 4321 else 1 << 20) for step in range(10_000)]
    flat = [(float(step), 1 << 20) for step in range(10_000)]
    with_spike = memory_chart("a", timeline, flat, budget_bytes=1 << 20)
    without = memory_chart("a", flat, flat, budget_bytes=1 << 20)
    # The axis reaches as far as the highest point drawn.
    assert ">80<" in with_spike
    assert ">80<" not in without
    assert len(with_spike) < 400_000


def test_json_has_exactly_the_headline_figures(figures: Figures, tmp_path: Path) -> None:
    target = tmp_path / "quickstart.json"
    figures.write_json(target)
    assert json.loads(target.read_text()) == {
        "natural_peak_bytes": 80 << 20,
        "budget_bytes": 48 << 20,
        "predicted_peak_bytes": 47 << 20,
        "measured_peak_bytes": 46 << 20,
        "conservation_error": 3e-7,
        "cycle_ratio": pytest.approx(1.5),
        "step_ratio": pytest.approx(1.1),
        "steps": 6,
        "loss_first": 5.0,
        "loss_last": pytest.approx(2.2),
    }
