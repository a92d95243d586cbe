"""The report in a real browser, in its light and its dark form."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import load
from torch import nn

import gradkern as gk
from gradkern.rollback import Scores

DIGITS = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
HOSTILE = (
    "\n first <script>window.ran = 1</script>\n\tand <img src=x onerror='window.ran = 1'> &amp; שלום " + "long" * 200
)

# What a reader gets to see: numbers, texts and pixels as the browser made them of the page, where they stand, and how
# far every text stands out from what is behind it (the contrast ratio of WCAG 2).
PROBE = """
const seen = {ran: window.ran === 1, lists: {}, texts: [], images: [], contrast: []};
for (const list of document.querySelectorAll("ol")) {
  seen.lists[list.getAttribute("aria-labelledby")] = [...list.children].map(item =>
    [item.querySelector(".id").textContent, item.querySelector("data").value, item.querySelector("data").textContent]);
}
seen.texts = [...document.querySelectorAll("pre")].map(each => each.textContent);
for (const image of document.querySelectorAll("img")) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const box = image.getBoundingClientRect();
  seen.images.push([image.alt, [...pixels].filter((_, index) => index % 4 == 0), box.width, box.height]);
}
const channels = color => color.match(/[0-9.]+/g).map(Number);
const luminance = color => {
  const [r, g, b] = channels(color).map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
for (const element of document.querySelectorAll("body *")) {
  const text = [...element.childNodes].filter(node => node.nodeType == 3).map(node => node.data.trim()).join("");
  if (!text || element.tagName == "SCRIPT") continue;
  const style = getComputedStyle(element);
  let behind = element;
  while (behind && channels(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const pair = [luminance(element.tagName == "text" ? style.fill : style.color),
                luminance(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
  seen.contrast.push([(pair[0] + 0.05) / (pair[1] + 0.05), text.slice(0, 40)]);
}
seen.ground = luminance(getComputedStyle(document.body).backgroundColor);
seen.page = [document.documentElement.scrollWidth, window.innerWidth];
document.body.dataset.seen = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def scores() -> Scores:
    generator = torch.Generator().manual_seed(0)
    return Scores(torch.arange(40), torch.randn(2, 40, generator=generator, dtype=torch.float64))


@pytest.fixture(scope="module")
def page(scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = gk.AdamW(model.parameters(), lr=1e-2)
    folder = tmp_path_factory.mktemp("report")
    with gk.rollback.record(model, optimizer, folder / "run") as recorder:
        with recorder.batch(torch.arange(4)):
            nn.functional.cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
    ledger = gk.rollback.open(folder / "run")
    ledger.report(
        folder / "report.html",
        scores,
        show=lambda id: (DIGITS[id], "label 3, is a 5") if id % 4 else HOSTILE,
        queries=[HOSTILE, torch.from_numpy(DIGITS[7])],
        verified=ledger.verify(model),
    )
    return folder / "report.html"


def seen(dom: str) -> dict[str, Any]:
    (encoded,) = re.findall(r'data-seen="([^"]+)"', dom)
    return json.loads(html.unescape(encoded))


def test_page_loads_in_silence_and_lets_no_script_run(page: Path, tmp_path: Path) -> None:
    loaded = load(page, tmp_path)
    assert "Which training samples did this?" in loaded.dom
    assert loaded.console == []
    # The console does tell, and a script that got into the page would not run.
    smuggled = tmp_path / "smuggled.html"
    smuggled.write_text(page.read_text().replace("</main>", "<script>document.body.id = 'ran'</script></main>"))
    loaded = load(smuggled, tmp_path)
    assert 'id="ran"' not in loaded.dom
    assert len(loaded.console) == 1
    assert "Content Security Policy" in loaded.console[0]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (500, False)])
def test_reader_sees_what_was_given(page: Path, scores: Scores, tmp_path: Path, width: int, dark: bool) -> None:
    loaded = load(page, tmp_path, probe=PROBE, width=width, dark=dark)
    found = seen(loaded.dom)
    assert loaded.console == []
    assert not found["ran"]

    for number, row in enumerate(scores.scores, 1):
        for side, falling in (("helped", True), ("harmed", False)):
            order = row.argsort(descending=falling)[:10].tolist()
            expected = [(f"sample {id}", float(row[id])) for id in order]
            cells = found["lists"][f"query-{number}-{side}"]
            assert [(name, float(value)) for name, value, _ in cells] == expected
            for _, value, shown in cells:
                assert float(shown.replace("−", "-")) == pytest.approx(float(value), rel=5e-3)

    listed = {name for cells in found["lists"].values() for name, _, _ in cells}
    assert set(found["texts"]) == {HOSTILE}
    images = {name: (pixels, size) for name, pixels, *size in found["images"]}
    pictured = {f"training {name}" for name in listed if int(name.split()[1]) % 4}
    assert set(images) == pictured | {"query 2"}
    for name, (pixels, (shown_width, shown_height)) in images.items():
        id = 7 if name == "query 2" else int(name.split()[-1])
        assert pixels == DIGITS[id].reshape(-1).tolist()
        assert shown_width == shown_height
        assert shown_width >= 64

    content_width, window_width = found["page"]
    assert window_width == width
    assert content_width <= window_width, "the page scrolls sideways"
    assert (found["ground"] < 0.05) if dark else (found["ground"] > 0.8)
    assert len(found["contrast"]) > 100
    assert [each for each in found["contrast"] if each[0] < 4.5] == []
