"""Drawing a plan: needs the extra ``plots`` (matplotlib)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Picture", "draw"]

_GIB = 2.0**30


@dataclass(frozen=True)
class Picture:
    """What to draw.

    Attributes:
        title: Over both panels.
        planned: (seconds, live bytes) of a step under the plan.
        kept: The same with everything kept.
        budget_bytes: A line.
        pareto: (peak bytes, seconds added) of the choices that nothing beats in both.
        chosen: The plan among them.
        step_s: Seconds of forward and backward with everything kept.
    """

    title: str
    planned: Sequence[tuple[float, int]]
    kept: Sequence[tuple[float, int]]
    budget_bytes: int
    pareto: Sequence[tuple[int, float]]
    chosen: tuple[int, float]
    step_s: float


def draw(picture: Picture, path: str | os.PathLike[str]) -> None:
    """Write the picture; the ending of ``path`` says in which format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No format has this ending.
    """
    try:
        from matplotlib.figure import Figure  # lazy: an extra
    except ImportError as error:
        raise ImportError("drawing a plan needs matplotlib; pip install 'gradkern[plots]'") from error
    unit, scale = ("GiB", _GIB) if picture.budget_bytes >= _GIB else ("MiB", 2.0**20)
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(picture.title, fontsize=11)

    for points, label, style in (
        (picture.kept, "everything kept", {"color": "0.65", "linewidth": 1.2}),
        (picture.planned, "planned", {"color": "tab:blue", "linewidth": 1.8}),
    ):
        left.plot(
            [1e3 * seconds for seconds, _ in points], [nbytes / scale for _, nbytes in points], label=label, **style
        )
    left.axhline(picture.budget_bytes / scale, color="tab:red", linestyle="--", linewidth=1.2, label="budget")
    left.set(xlabel="ms since the micro-batch began", ylabel=f"live memory, {unit}", title="One step")
    left.set_ylim(bottom=0)

    peaks = [nbytes / scale for nbytes, _ in picture.pareto]
    shares = [100 * seconds / picture.step_s for _, seconds in picture.pareto]
    right.step(peaks, shares, where="post", color="tab:blue", linewidth=1.8, label="best for each budget")
    right.axvline(picture.budget_bytes / scale, color="tab:red", linestyle="--", linewidth=1.2, label="budget")
    right.plot(
        [picture.chosen[0] / scale],
        [100 * picture.chosen[1] / picture.step_s],
        marker="o",
        color="tab:blue",
        linestyle="none",
        label="this plan",
    )
    right.set(xlabel=f"budget, {unit}", ylabel="more time forward and backward, %", title="What budgets cost")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(visible=True, color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=140)
