"""The best 10 of a million samples by their sketches, and how often those are the best 10 by direct scores.

What is searched is made up like real sketches: 100 clusters in a space where the variance of direction j is as j^-1.3,
the norms log-normal with a standard deviation of 0.8; the queries alike. ``gaussian`` is the worst case: no direction
and no cluster says anything, and an index can only look at a share of all samples.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gradkern.rollback._reduce import quantize_rows
from gradkern.rollback._scan import Rows, scan
from gradkern.rollback._sketch_index import SketchIndex

from .harness import Report, Triad, interleave
from .influence import digits_mlp, record_run

__all__ = ["run_top_k"]

SAMPLES, WIDTH, K, QUERIES = 1_000_000, 256, 10, 100
WIDTHS = (64, 256)

# Queries that are timed one by one in each turn: an index takes longer for some than for others.
TURN = 10

_CHUNK = 1 << 16

Draw = Callable[[int], Tensor]


def run_top_k(report: Report, rounds: int) -> None:
    """Search, then the agreement with direct scores."""
    for name, draw in {"": _like_sketches(), ", gaussian": _gaussian()}.items():
        _search(report, f"{SAMPLES / 1e6:g} M samples, d = {WIDTH}{name}", draw, rounds)
    _agreement(report)


def _search(report: Report, case: str, draw: Draw, rounds: int) -> None:
    rows, queries = _rows(draw), draw(QUERIES)
    codes, scales = quantize_rows(queries)
    everything = torch.tensor([[0, SAMPLES]])
    _, exact = scan(rows, everything, codes, scales, K)
    try:
        index = SketchIndex(rows, None, None)
    except ImportError as error:
        print(f"without an index: {error}")
        index = None
    triad = Triad(report.device)
    single, turns = [slice(i, i + 1) for i in range(QUERIES)], itertools.count()

    def each(search: Callable[[slice], object]) -> None:
        first = next(turns) * TURN % QUERIES
        for one in single[first : first + TURN]:
            search(one)

    systems: dict[str, Callable[[], object]] = {
        **triad.systems(),
        "exact": lambda: each(lambda one: scan(rows, everything, codes[one], scales[one], K)),
    }
    if index is not None:
        systems["ann"] = lambda: each(lambda one: index.top(queries[one], K))
    timings = interleave(systems, report.device, rounds=rounds)
    floor_ms = 1e3 * rows.codes.nbytes / triad.bandwidth(timings)
    report.add(case, "triad's bandwidth", "floor_exact_ms", floor_ms, "ms")
    for system in systems.keys() - triad.systems().keys():
        report.add(case, "gradkern", f"top10_{system}_ms", 1e3 * min(timings[system]) / TURN, "ms")
        median = 1e3 * statistics.median(timings[system]) / TURN
        report.add(case, "gradkern", f"top10_{system}_median_ms", median, "ms")
    if index is not None:
        report.add(case, "gradkern", "recall", _recall(index.top(queries, K).ids, exact), "")
        report.add(case, "gradkern", "probed", 100 * index.probes / index.lists, "%")


def _agreement(report: Report) -> None:
    """With direct scores, of a recorded run."""
    setting, loss_fn = digits_mlp(), nn.functional.cross_entropy
    with tempfile.TemporaryDirectory() as folder:
        model, ledger = record_run(setting, 0, Path(folder) / "ledger")
        truth = ledger.scores(model, setting.queries(), loss_fn=loss_fn, estimator="direct")
        best = truth.ids[truth.scores.topk(K, dim=1).indices]
        for width in WIDTHS:
            sketches = ledger.sketch(Path(folder) / f"{width}", width=width)
            queries = sketches.project(model, setting.queries(), loss_fn=loss_fn)
            for candidates in (K, 5 * K):
                found = sketches.top(queries, candidates).ids
                report.add(
                    "digits, MLP", f"sketches of {width}", f"direct_top10_in_{candidates}", _recall(found, best), ""
                )


def _recall(found: Tensor, truth: Tensor) -> float:
    """Of the true ones the share that was found."""
    return float((truth.unsqueeze(2) == found.unsqueeze(1)).any(2).float().mean())


def _rows(draw: Draw) -> Rows:
    parts = [quantize_rows(draw(min(_CHUNK, SAMPLES - first))) for first in range(0, SAMPLES, _CHUNK)]
    codes, scales = (torch.cat(column) for column in zip(*parts, strict=True))
    return Rows(codes, scales, torch.arange(SAMPLES))


def _like_sketches() -> Draw:
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator)
    rotation = torch.linalg.qr(normal(WIDTH, WIDTH))[0]
    basis = torch.arange(1, WIDTH + 1).float().pow(-0.65).unsqueeze(1) * rotation
    centres = normal(100, WIDTH)

    def draw(count: int) -> Tensor:
        of = torch.randint(0, len(centres), (count,), generator=generator)
        return (normal(count, WIDTH) + centres[of]) @ basis * (0.8 * normal(count, 1)).exp()

    return draw


def _gaussian() -> Draw:
    generator = torch.Generator().manual_seed(0)
    return lambda count: torch.randn(count, WIDTH, generator=generator)
