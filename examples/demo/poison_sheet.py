"""One picture of a backdoor: the digit that was asked about, who is to blame for it, and what taking them back does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .digit_sheet import draw_digit
from .digits import SIDE, NoisyDigits
from .plots import BLUE, INK, MUTED, RED
from .poison import TARGET

__all__ = ["draw_poison"]

_COLUMNS = 5


def draw_poison(
    path: Path,
    digits: NoisyDigits,
    query: torch.Tensor,
    ids: torch.Tensor,
    shares: Mapping[str, tuple[float, float]],
    *,
    shows: int,
) -> None:
    """Draw it as a PNG file.

    Args:
        path: File to write.
        digits: Where the training samples are from.
        query: The image that was asked about, shape ``(1, 64)``.
        ids: Training samples, most suspect first.
        shares: Attack success and accuracy, 0 to 1, by the name of the model.
        shows: What the image shows.
    """
    rows = max(1, -(-len(ids) // _COLUMNS))
    figure = Figure(figsize=(13.0, max(4.2, 1.25 * rows + 1.0)), dpi=110, layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[2.0, 5.0, 5.0])
    left.suptitle("asked about", color=INK, fontsize=13)
    axes = left.subplots()
    axes.imshow(query.reshape(SIDE, SIDE).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"taken for a {TARGET}", fontsize=11, color=RED)
    axes.set_xlabel(f"is a {shows}", fontsize=11, color=INK)
    middle.suptitle(f"most to blame, of {len(digits.images)} training samples", color=INK, fontsize=13)
    grid = middle.subplots(rows, _COLUMNS, squeeze=False).flat
    for rank, axes in enumerate(grid):
        if rank < len(ids):
            draw_digit(axes, digits, int(ids[rank]))
        else:
            axes.set_axis_off()
    poisoned, innocent = Patch(fill=False, edgecolor=RED, linewidth=2.5), Patch(fill=False, edgecolor=MUTED)
    middle.legend(
        [poisoned, innocent],
        ["poisoned", "innocent"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        labelcolor=INK,
    )
    right.suptitle("what the model does then", color=INK, fontsize=13)
    axes = right.subplots()
    places = torch.arange(len(shares)).flip(0)
    for offset, part, name, color in ((0.2, 0, "backdoor works", RED), (-0.2, 1, "right without a patch", BLUE)):
        values = [each[part] for each in shares.values()]
        bars = axes.barh((places + offset).tolist(), values, height=0.36, color=color, label=name)
        axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, color=INK, fontsize=9)
    axes.set_yticks(places.tolist(), list(shares), color=INK)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    right.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
    figure.savefig(path)
