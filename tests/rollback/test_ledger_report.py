"""The report: what it says is what was computed, it shows what was given, and nothing given can break it."""

from __future__ import annotations

import base64
import io
import math
import re
import signal
import sqlite3
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recorded_models import TokenModel, token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern.rollback import Influence, Ledger, Scores
from gradkern.rollback._histogram import signed

HOSTILE = "</pre></li><script>alert('&')</script><img src=x onerror=alert(1)><!-- \x00\x1b \ud800 \u202e abc"


class Page(HTMLParser):
    """A page's elements, as ``(tag, attributes, text inside)``, in the order in which they begin."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in ("meta", "img", "line", "rect"):
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "rect"):
            return
        assert self.elements[self._open.pop()][0] == tag, f"{tag} closes nothing"

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def find(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            (attrs, "".join(text))
            for each, attrs, text in self.elements
            if each == tag and wanted.items() <= attrs.items()
        ]

    def samples(self, list_id: str) -> list[tuple[int, float]]:
        """Ids and scores of one of the lists."""
        (start,) = (
            index for index, (_, attrs, _) in enumerate(self.elements) if attrs.get("aria-labelledby") == list_id
        )
        found, score = [], math.nan
        for tag, attrs, text in self.elements[start + 1 :]:
            if tag == "ol":
                break
            if tag == "data":
                score = float(attrs["value"])
                assert "".join(text) == signed(score)
            if attrs.get("class") == "id":
                found.append((int("".join(text).removeprefix("sample ")), score))
        return found


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ledger_path(tmp_path_factory) -> Path:
    """Of a run whose records matter to no test."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = gk.AdamW(model.parameters(), lr=1e-2)
    path = tmp_path_factory.mktemp("report") / "run"
    with gk.rollback.record(model, optimizer, path) as recorder:
        with recorder.batch(torch.arange(4)):
            nn.functional.cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
    return path


@pytest.fixture
def ledger(ledger_path) -> Ledger:
    return gk.rollback.open(ledger_path)


def made_up(queries: int, samples: int = 40) -> Scores:
    generator = torch.Generator().manual_seed(queries)
    scores = torch.randn(queries, samples, generator=generator, dtype=torch.float64) ** 3
    return Scores(torch.arange(samples) * 7 + 3, scores)


def test_lists_are_the_highest_and_lowest_scores_to_the_last_bit(train, token_model, tmp_path):
    data = token_data(30)
    run = train(token_model, data, steps=8)
    ledger = gk.rollback.open(run.path)
    queries = [data[:1], data[3:5]]
    scores = ledger.scores(run.model, queries, loss_fn=token_loss)
    ledger.report(tmp_path / "a.html", scores, k=4)
    page = read(tmp_path / "a.html")
    for number, query in enumerate(queries, 1):
        best = ledger.explain(run.model, query, 4, loss_fn=token_loss)
        helped = page.samples(f"query-{number}-helped")
        assert [id for id, _ in helped] == [each.id for each in best if each.score > 0]
        assert len(helped) == 4
        pairs = sorted(zip(scores.scores[number - 1].tolist(), scores.ids.tolist(), strict=True))
        assert page.samples(f"query-{number}-harmed") == [(id, score) for score, id in pairs[:4] if score < 0]
        assert helped == [(id, score) for score, id in reversed(pairs[-4:]) if score > 0]


def test_errors_are_shown_beside_their_scores_where_there_are_any(ledger, tmp_path):
    scores = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    errors = torch.tensor([0.25, 0.5, math.nan], dtype=torch.float64)
    ledger.report(tmp_path / "a.html", Scores(torch.arange(3), scores, errors))
    assert [text for _, text in read(tmp_path / "a.html").find("span", class_="error")] == ["±0.2", "±0.5"]
    ledger.report(tmp_path / "b.html", Scores(torch.arange(3), scores))
    assert not read(tmp_path / "b.html").find("span", class_="error")


def test_equal_scores_are_listed_by_id_and_zero_is_on_neither_side(ledger, tmp_path):
    scores = Scores(torch.tensor([2, 5, 7, 8]), torch.tensor([0.5, 0.5, 0.0, -1.0], dtype=torch.float64))
    ledger.report(tmp_path / "a.html", scores)
    page = read(tmp_path / "a.html")
    assert page.samples("query-1-helped") == [(2, 0.5), (5, 0.5)]
    assert page.samples("query-1-harmed") == [(8, -1.0)]
    (caption,) = [text for _, text in page.find("figcaption")]
    assert caption.startswith("4 samples: 2 helped, 1 harmed, 1 did neither.")


@pytest.mark.parametrize("scale", [1e-300, 1e-6, 1.0, 1e12])
def test_histogram_counts_every_sample_once_on_its_side(ledger, tmp_path, scale):
    scores = made_up(1, samples=500)
    scores.scores[0, :20] = 0.0
    ledger.report(tmp_path / "a.html", Scores(scores.ids, scores.scores * scale))
    page = read(tmp_path / "a.html")
    reach = float(scores.scores.abs().max())
    edges = np.linspace(0, reach, 25)
    for side, sign in (("helped", 1), ("harmed", -1)):
        drawn = sorted(
            ((float(attrs["x"]), int(attrs["data-count"])) for attrs, _ in page.find("rect", class_=side)),
            reverse=sign < 0,
        )
        values = sign * scores.scores[0].numpy()
        expected, _ = np.histogram(values[values > 0], edges)
        assert [count for _, count in drawn] == [count for count in expected.tolist() if count]
        assert len(page.find("line", class_=f"mark {side}")) == 10


def test_shares_of_layers_are_those_of_the_real_movement(train, tmp_path):
    torch.manual_seed(1)
    model = TokenModel()
    before = {name: each.detach().double().clone() for name, each in model.named_parameters()}
    run = train(model, token_data(12), steps=9, lr=1e-2, weight_decay=0.1)
    ledger = gk.rollback.open(run.path)
    verified = ledger.verify(run.model)
    ledger.report(tmp_path / "a.html", verified=verified)
    decay = (1 - 1e-2 * 0.1) ** 9
    after = {name: each.detach().double() for name, each in model.named_parameters()}
    moved = {name: float((after[name] - decay * before[name]).square().sum()) for name in before}
    nbytes = ledger.layer_bytes()
    layers = {
        "embed, head": (["embed.weight"], ["embed", "head"]),
        "norm": (["norm.weight", "norm.bias"], ["norm"]),
        "hidden": (["hidden.weight", "hidden.bias"], ["hidden"]),
        "back": (["back.weight", "back.bias"], ["back"]),
    }
    cells = [text for _, text in read(tmp_path / "a.html").find("td")]
    for row, (parameters, names) in layers.items():
        found = cells[cells.index(row) : cells.index(row) + 7]
        size = sum(nbytes[name, parameter] for parameter in parameters for name in names)
        share = sum(moved[each] for each in parameters) / sum(moved.values())
        worst = min(each.cosine for each in verified.compression if each.parameter in parameters)
        assert float(found[3].removesuffix("%")) == pytest.approx(100 * share, abs=0.06)
        assert found[4:] == [f"{size:,}", f"{size / sum(nbytes.values()):.1%}", f"{worst:.3f}"]
    assert cells.count("passed") == len(verified.checks)
    for check in verified.checks:
        assert check.detail in cells


def test_incomplete_ledger_says_so_and_knows_no_update(train, token_model, tmp_path):
    run = train(token_model, token_data(12), steps=6)
    with sqlite3.connect(run.path / "catalog.sqlite") as catalog:
        catalog.execute("DELETE FROM meta WHERE key IN ('decays', 'roundings', 'parameter_digest')")
        catalog.execute("DELETE FROM files WHERE role = 'deltas'")
    catalog.close()
    ledger = gk.rollback.open(run.path)
    ledger.report(tmp_path / "a.html", verified=ledger.verify())
    page = read(tmp_path / "a.html")
    cells = [text for _, text in page.find("td")]
    assert "ended without close() after 6 committed steps" in cells
    assert cells[cells.index("norm") + 3] == "–"
    assert "not run" in cells
    assert [text for _, text in page.find("div", class_="value")][3] == "not passed"


def test_unowned_parameters_are_named(train, tmp_path):
    torch.manual_seed(0)
    run = train(TokenModel(), token_data(8), steps=2, unowned=["norm.*"])
    gk.rollback.open(run.path).report(tmp_path / "a.html")
    cells = [text for _, text in read(tmp_path / "a.html").find("td")]
    assert cells[cells.index("trained but not recorded") + 1] == "norm.weight, norm.bias"
    assert "norm" not in cells


@pytest.mark.parametrize("queries", [0, 1, 50])
def test_any_number_of_queries(ledger, tmp_path, queries):
    shown = [f"question {number}" for number in range(queries)]
    scores = made_up(queries) if queries else None
    ledger.report(tmp_path / "a.html", scores, show=lambda id: f"text {id}", queries=shown)
    page = read(tmp_path / "a.html")
    sections = [attrs["id"] for attrs, _ in page.find("section")]
    asked = [f"query-{number}" for number in range(1, queries + 1)]
    assert sections == [*(["queries"] if queries > 1 else []), *asked, "ledger"]
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs["href"] for attrs, _ in page.find("a")]
    assert links == ([f"#{each}" for each in asked] if queries > 1 else [])
    for text in shown:
        assert any(text in found for _, found in page.find("pre"))


def test_scores_of_no_sample_and_of_no_effect(ledger, tmp_path):
    for scores in (made_up(2, samples=0), Scores(torch.arange(3), torch.zeros(2, 3))):
        ledger.report(tmp_path / "a.html", scores)
        page = read(tmp_path / "a.html")
        notes = [text for _, text in page.find("p", class_="note")]
        assert notes.count("No sample helped.") == notes.count("No sample harmed.") == 2
        assert page.find("ol") == page.find("rect") == []


def test_hostile_text_is_text_everywhere(ledger, tmp_path):
    scores = made_up(2)
    ledger.report(
        tmp_path / "a.html",
        scores,
        show=lambda id: HOSTILE,
        queries=[HOSTILE, (np.zeros((2, 2)), "<b>'\"")],
        title=HOSTILE,
    )
    page = read(tmp_path / "a.html")
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "b"}
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert [text for _, text in page.find("h1")] == [shown]
    # A parser drops the line feed that follows the tag; this one does not.
    assert {text for _, text in page.find("pre")} == {f"\n{shown}"}
    assert [text for _, text in page.find("span", class_="caption")] == ["<b>'\""]
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs, _ in page.find("img"))
    assert not any(name.startswith("on") for _, attrs, _ in page.elements for name in attrs)


def test_long_texts_are_cut_and_say_so(ledger, tmp_path):
    lengths = {3: 2000, 10: 2001, 17: 1_234_567}
    scores = Scores(torch.tensor(list(lengths)), torch.tensor([3.0, 2.0, 1.0]))
    ledger.report(tmp_path / "a.html", scores, show=lambda id: "&" * lengths[id])
    page = read(tmp_path / "a.html")
    assert [len(text) for _, text in page.find("pre", tabindex="0")] == [2001] * 3  # and a line feed
    notes = [text for _, text in page.find("p", class_="note") if "characters" in text]
    assert notes == ["The first 2,000 of 2,001 characters.", "The first 2,000 of 1,234,567 characters."]
    assert (tmp_path / "a.html").stat().st_size < 60_000


def pixels(page: Path) -> list[np.ndarray]:
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]


RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
WITH_ALPHA = RANDOM.integers(0, 256, (5, 7, 4), dtype=np.uint8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GREY, GREY),
        (GREY[:, :, None], GREY),
        (COLOUR, COLOUR),
        (WITH_ALPHA, WITH_ALPHA),
        (np.asfortranarray(COLOUR)[::-1], COLOUR[::-1]),
        (GREY > 100, (GREY > 100) * np.uint8(255)),
        (GREY / 255, GREY),
        (torch.from_numpy(GREY), GREY),
        (torch.from_numpy(GREY)[None], GREY),
        (torch.from_numpy(COLOUR).permute(2, 0, 1), COLOUR),
        (torch.from_numpy(WITH_ALPHA).permute(2, 0, 1), WITH_ALPHA),
        ((torch.from_numpy(COLOUR).permute(2, 0, 1) / 255).requires_grad_(), COLOUR),
        ((torch.from_numpy(GREY) > 100).bfloat16(), (GREY > 100) * np.uint8(255)),
        (Image.fromarray(COLOUR), COLOUR),
        (Image.fromarray(GREY > 100), (GREY > 100) * np.uint8(255)),
        (Image.fromarray(COLOUR).convert("CMYK"), COLOUR),
    ],
)
def test_images_have_the_pixels_given(ledger, tmp_path, given, expected):
    ledger.report(tmp_path / "a.html", Scores(torch.tensor([4]), torch.tensor([1.0])), show=lambda id: given)
    (found,) = pixels(tmp_path / "a.html")
    assert np.array_equal(found, expected)
    ((attrs, _),) = read(tmp_path / "a.html").find("img")
    # A whole multiple, so that pixels stay squares of one size.
    assert (attrs["alt"], attrs["width"], attrs["height"]) == ("training sample 4", "84", "60")


def test_palette_keeps_its_transparency_and_nothing_else_is_kept(ledger, tmp_path):
    image = Image.fromarray(GREY // 64).convert("P")
    image.info |= {"transparency": 0, "icc_profile": b"x" * 999, "comment": b"taken at home"}
    ledger.report(tmp_path / "a.html", Scores(torch.tensor([4]), torch.tensor([1.0])), show=lambda id: image)
    (found,) = pixels(tmp_path / "a.html")
    assert np.array_equal(found, np.asarray(image.convert("RGBA")))
    assert (found[..., 3] == 0).any()
    (source,) = re.findall(r'base64,([^"]+)"', (tmp_path / "a.html").read_text())
    assert set(re.findall(rb"IHDR|PLTE|tRNS|iCCP|tEXt|iTXt|eXIf", base64.b64decode(source))) == {b"IHDR"}


def test_large_images_are_made_smaller(ledger, tmp_path):
    image = np.full((1000, 300, 3), [10, 200, 30], dtype=np.uint8)
    ledger.report(
        tmp_path / "a.html", Scores(torch.tensor([4]), torch.tensor([1.0])), show=lambda id: image, queries=[image]
    )
    for found in pixels(tmp_path / "a.html"):
        assert found.shape == (256, 77, 3)
        assert np.array_equal(found, np.broadcast_to(image[0, 0], found.shape))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (7, TypeError, r"training sample 3 is given as int, expected a text, an image"),
        (None, TypeError, r"given as NoneType"),
        (torch.arange(5), ValueError, r"has shape \(5,\), expected \(height, width\) or, .* decode what is no image"),
        (COLOUR.transpose(2, 0, 1), ValueError, r"shape \(3, 5, 7\), .* \(height, width, channels\)"),
        (torch.from_numpy(COLOUR), ValueError, r"shape \(5, 7, 3\), .* \(channels, height, width\)"),
        (Image.new("I;16", (4, 4)), ValueError, r"Pillow's mode 'I;16', expected 8 bits a channel"),
        (torch.zeros(0, 3), ValueError, r"has no pixels"),
        (torch.tensor([[0.0, 1.5]]), ValueError, r"values from 0 to 1.5, expected 0 to 1 for torch.float32"),
        (torch.tensor([[0.0, math.nan]]), ValueError, r"expected 0 to 1"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"of torch.int64, expected uint8, bool or a floating"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_written(ledger, tmp_path, content, error, message):
    with pytest.raises(error, match=message):
        ledger.report(tmp_path / "a.html", made_up(1), show=lambda id: content if id == 3 else "", k=40)
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("scores", "options", "error", "message"),
    [
        ([Influence(1, 0.5)], {}, TypeError, r"what ledger.scores\(...\) returned, .* got list"),
        (made_up(1), {"k": 0}, ValueError, r"k must be at least 1, got 0"),
        (made_up(2), {"queries": ["one"]}, ValueError, r"got 1 queries to show and scores for 2"),
        (None, {"queries": ["one"]}, ValueError, r"got 1 queries without scores"),
        (
            Scores(torch.arange(3), torch.zeros(2, 4)),
            {},
            ValueError,
            r"\(queries, samples\) for \(3,\) ids, got \(2, 4\)",
        ),
        (Scores(torch.arange(2), torch.tensor([1.0, math.nan])), {}, ValueError, r"1 of 2 scores are not finite"),
        (
            Scores(torch.arange(3), torch.zeros(3).double(), torch.zeros(3, 1).double()),
            {},
            ValueError,
            r"errors must be of the shape of their scores, \(3,\), got \(3, 1\)",
        ),
        (
            None,
            {"verified": True},
            TypeError,
            r"what ledger.verify\(...\) or ledger.self_test\(...\) returned, got bool",
        ),
    ],
)
def test_what_does_not_fit_is_refused(ledger, tmp_path, scores, options: dict[str, Any], error, message):
    with pytest.raises(error, match=message):
        ledger.report(tmp_path / "a.html", scores, **options)
    assert not (tmp_path / "a.html").exists()


def test_without_pillow_texts_can_be_shown_and_images_say_what_is_missing(ledger, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    ledger.report(tmp_path / "a.html", made_up(1), show=str)
    written = (tmp_path / "a.html").read_bytes()
    with pytest.raises(ImportError, match=r"pip install 'gradkern\[plots\]'"):
        ledger.report(tmp_path / "a.html", made_up(1), show=lambda id: GREY)
    assert (tmp_path / "a.html").read_bytes() == written


def test_same_scores_make_the_same_page_and_show_is_asked_once_an_id(ledger, tmp_path):
    asked: list[int] = []

    def show(id: int) -> str:
        asked.append(id)
        return f"sample {id}"

    ledger.report(tmp_path / "a.html", made_up(5), show=show)
    assert len(asked) == len(set(asked))
    ledger.report(tmp_path / "b.html", made_up(5), show=show)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_twenty_queries_over_small_digits_stay_below_a_megabyte(ledger, tmp_path):
    digits = np.random.default_rng(1).integers(0, 17, (600, 8, 8)) / 16
    ledger.report(
        tmp_path / "a.html",
        made_up(20, samples=80),
        show=lambda id: (digits[id], "label 3, is a 5"),
        queries=list(digits[:20]),
    )
    assert len(pixels(tmp_path / "a.html")) == 20 * 21
    assert (tmp_path / "a.html").stat().st_size < 500_000


# The first sync comes when the new page has been written, but not under its name.
WRITE_AND_DIE = """
import os, signal, sys
import gradkern as gk
ledger = gk.rollback.open(sys.argv[1])
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
ledger.report(sys.argv[2], title="new")
"""


def test_a_kill_in_the_middle_leaves_the_old_page(ledger_path, ledger, tmp_path):
    target = tmp_path / "a.html"
    ledger.report(target, title="old")
    old = target.read_bytes()
    killed = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(ledger_path), str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.read_bytes() == old
    ledger.report(target, title="new")
    assert ">new</h1>" in target.read_text()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.html"]


def test_missing_folder_is_an_error_of_the_system(ledger, tmp_path):
    with pytest.raises(FileNotFoundError):
        ledger.report(tmp_path / "missing" / "a.html")


def test_layers_of_the_model_itself_have_a_name(ledger, tmp_path):
    ledger.report(tmp_path / "a.html")
    cells = [text for _, text in read(tmp_path / "a.html").find("td")]
    assert cells[cells.index("(the model)") :][:3] == ["(the model)", "weight, bias", "8"]
