"""How the influence of all samples on a query is spread, as an SVG element."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from gradkern._page import escaped

__all__ = ["histogram", "signed"]

_BINS = 48
_WIDTH, _HEIGHT = 620, 190
# Of the plot itself.
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 608, 10, 142
_MARK = 9


def signed(value: float) -> str:
    """Write a score: three digits, always with its sign."""
    return f"{value:+#.3g}".rstrip(".").replace("-", "\N{MINUS SIGN}") if value else "0"


def histogram(scores: Tensor, marked: Sequence[float]) -> str:
    """Draw the counts of negative and positive scores in equal bins, higher ones by the logarithm of ``1 + count``.

    Most samples of a run have next to no influence on a query and a few have a hundred times as much: on a plain scale
    those few, which are what one looks for, could not be seen.

    Args:
        scores: Of all samples, finite, fp64, shape ``(samples,)``. Those that are exactly 0 are not drawn.
        marked: Scores to mark under the axis.
    """
    reach = float(scores.abs().max()) if len(scores) else 0.0
    drawn = scores[scores != 0]
    # An even number of bins from -reach to reach: none takes in both sides of 0.
    places = ((drawn / (reach or 1.0) + 1) * (_BINS / 2)).long().clamp(0, _BINS - 1)
    places[drawn < 0] = places[drawn < 0].clamp(max=_BINS // 2 - 1)
    counts = places.bincount(minlength=_BINS).tolist()
    most = max(1, *counts)

    def height(count: int) -> float:
        return math.log1p(count) / math.log1p(most) * (_BOTTOM - _TOP)

    def x(score: float) -> float:
        return _LEFT + (score / (reach or 1.0) + 1) / 2 * (_RIGHT - _LEFT)

    width = (_RIGHT - _LEFT) / _BINS
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" class="histogram" aria-hidden="true" focusable="false">']
    for count in _levels(most):
        y = _BOTTOM - height(count)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{count:,}</text>')
    for place, count in enumerate(counts):
        if count:
            side = "harmed" if place < _BINS // 2 else "helped"
            parts.append(
                f'<rect class="{side}" x="{_LEFT + place * width + 0.75:.2f}" y="{_BOTTOM - height(count):.1f}" '
                f'width="{width - 1.5:.2f}" height="{height(count):.1f}" data-count="{count}"/>'
            )
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{_BOTTOM}" x2="{_RIGHT}" y2="{_BOTTOM}"/>')
    parts.append(f'<line class="zero" x1="{x(0):.1f}" y1="{_TOP}" x2="{x(0):.1f}" y2="{_BOTTOM + 4}"/>')
    for score in marked:
        side = "harmed" if score < 0 else "helped"
        line = f'x1="{x(score):.1f}" y1="{_BOTTOM + 4}" x2="{x(score):.1f}" y2="{_BOTTOM + 4 + _MARK}"'
        parts.append(f'<line class="mark {side}" {line}/>')
    ends = (-reach, reach) if reach else ()
    labels = [(score, escaped(signed(score))) for score in (-reach / 2, reach / 2, *ends) if score] + [(0.0, "0")]
    for score, label in labels:
        anchor = "start" if score == -reach and score else "end" if score == reach and score else "middle"
        parts.append(f'<text x="{x(score):.1f}" y="{_BOTTOM + 28}" text-anchor="{anchor}">{label}</text>')
    for anchor, end, label in (("start", _LEFT, "← harmed"), ("end", _RIGHT, "helped →")):
        parts.append(f'<text x="{end}" y="{_BOTTOM + 44}" text-anchor="{anchor}">{label}</text>')
    return "".join([*parts, "</svg>"])


def _levels(most: int) -> list[int]:
    """Counts to draw lines at: powers of ten, and the highest where it stands clear of the last of them."""
    powers = [10**exponent for exponent in range(len(str(most)))]
    clear = math.log1p(most) - math.log1p(powers[-1]) > 0.12 * math.log1p(most)
    return [*powers, most] if clear else powers if most == powers[-1] else [*powers[:-1], most]
