"""A sheet of suspect digits: what each shows, what its label says, and which labels are wrong."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .digits import SIDE, NoisyDigits
from .plots import INK, MUTED, RED

__all__ = ["draw_digit", "draw_sheet"]

_COLUMNS = 10


def draw_sheet(path: Path, digits: NoisyDigits, ids: torch.Tensor, *, title: str) -> None:
    """Draw training samples in the order of ``ids``, row by row, as a PNG file.

    Args:
        path: File to write.
        digits: Where the samples are from.
        ids: Their rows, int64, most suspect first.
        title: Of the sheet.
    """
    rows = -(-len(ids) // _COLUMNS)
    figure = Figure(figsize=(10.4, 1.35 * rows + 0.9), dpi=110, layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for rank, axes in enumerate(grid):
        if rank < len(ids):
            draw_digit(axes, digits, int(ids[rank]))
        else:
            axes.set_axis_off()
    figure.suptitle(title, color=INK, fontsize=13)
    wrong, right = Patch(fill=False, edgecolor=RED, linewidth=2.5), Patch(fill=False, edgecolor=MUTED, linewidth=0.8)
    figure.legend(
        [wrong, right],
        ["the label is wrong", "false alarm: the label is right"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        labelcolor=INK,
    )
    figure.savefig(path)


def draw_digit(axes: Axes, digits: NoisyDigits, id: int) -> None:
    """Draw a training sample with its label, framed in red with what it shows where the label is wrong."""
    given, true = int(digits.given[id]), int(digits.true[id])
    is_wrong = given != true
    axes.imshow(digits.images[id].reshape(SIDE, SIDE).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"label {given}", fontsize=10, color=RED if is_wrong else INK, pad=3)
    axes.set_xlabel(f"is a {true}" if is_wrong else "", fontsize=10, color=INK, labelpad=3)
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor=RED if is_wrong else MUTED, linewidth=2.5 if is_wrong else 0.8)
