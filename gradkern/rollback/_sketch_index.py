"""An index over sketches that looks at few of them for a query.

faiss clusters the directions of the sketches; those of a cluster lie together, in a copy. A query looks into the
clusters where the largest inner products are expected: that of the centre, times the largest norm in the cluster. There
the scores are those of the exact search, bit for bit, so that all that can be lost is a sample.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from gradkern.rollback._reduce import dequantize_rows
from gradkern.rollback._scan import Rows, scan
from gradkern.rollback._top import TopScores, quantize_queries, require_k

__all__ = ["SketchIndex"]

# Sketches that are converted together.
_CHUNK = 1 << 16

# Sketches that a centre is found from, at most, and rounds of k-means.
_POINTS_PER_LIST, _ROUNDS = 64, 10


class SketchIndex:
    """Made by :meth:`gradkern.rollback.Sketches.index`; holds ``width + 12`` bytes a sample in memory.

    Attributes:
        lists: Number of clusters.
        probes: Clusters that a query looks into; may be set, from 1 to ``lists``.
    """

    def __init__(self, rows: Rows, lists: int | None, probes: int | None) -> None:
        faiss = _faiss()
        count = len(rows.ids)
        self.lists = max(1, math.isqrt(count)) if lists is None else lists
        self.probes = max(1, self.lists // 10) if probes is None else probes
        if not 1 <= self.lists <= max(1, count):
            raise ValueError(f"index: lists must be from 1 to the number of samples, {count}, got {self.lists}")
        if not 1 <= self.probes <= self.lists:
            raise ValueError(f"index: probes must be from 1 to lists, {self.lists}, got {self.probes}")
        directions = _directions(faiss, rows, self.lists)
        list_of = torch.zeros(count, dtype=torch.int64)
        norms = torch.zeros(self.lists)
        for first in range(0, count, _CHUNK):
            part = slice(first, first + _CHUNK)
            sketches = dequantize_rows(rows.codes[part], rows.scales[part])
            list_of[part] = (sketches @ directions.t()).argmax(dim=1)
            norms.scatter_reduce_(0, list_of[part], sketches.norm(dim=1), "amax")
        order = list_of.argsort(stable=True)
        self._rows = Rows(rows.codes[order], rows.scales[order], rows.ids[order])
        self._centres = directions * norms.unsqueeze(1)
        ends = list_of.bincount(minlength=self.lists).cumsum(0)
        self._ranges = torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], dim=1)

    def top(self, queries: Tensor, k: int = 10) -> TopScores:
        """As :meth:`gradkern.rollback.Sketches.top`, of what the index looks at.

        Args:
            queries: See there.
            k: How many. Where the clusters of a query hold fewer, its last ids are -1 and their scores minus infinity.

        Raises:
            ValueError: See there.
        """
        require_k(k)
        codes, scales = quantize_queries(queries, self._rows.codes.shape[1])
        k = min(k, len(self._rows.ids))
        scores = torch.full((len(queries), k), -torch.inf)
        ids = torch.full((len(queries), k), -1, dtype=torch.int64)
        nearest = (codes.float() @ self._centres.t()).topk(self.probes, dim=1).indices.sort(dim=1).values
        for row, lists in enumerate(nearest):
            ranges = self._ranges[lists]
            kept = min(k, int((ranges[:, 1] - ranges[:, 0]).sum()))
            part = slice(row, row + 1)
            scores[part, :kept], ids[part, :kept] = scan(self._rows, ranges, codes[part], scales[part], kept)
        return TopScores(ids, scores)


def _directions(faiss: ModuleType, rows: Rows, lists: int) -> Tensor:
    """Unit vectors in the middle of the directions of so many clusters, fp32, shape ``(lists, width)``."""
    count, width = rows.codes.shape
    if count == 0:
        return torch.zeros(lists, width)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: lists * _POINTS_PER_LIST]
    points = torch.nn.functional.normalize(rows.codes[chosen].float())
    clusters = faiss.Kmeans(
        width,
        lists,
        niter=_ROUNDS,
        spherical=True,
        seed=1,
        min_points_per_centroid=1,
        max_points_per_centroid=_POINTS_PER_LIST,
    )
    clusters.train(points.numpy())
    return torch.from_numpy(clusters.centroids)


def _faiss() -> ModuleType:
    """The optional package, loaded on first use."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "Sketches.index() is built with faiss, which is not installed; install it with pip install "
            "'gradkern[ann]', or search without an index"
        ) from error
    found: ModuleType = faiss
    return found
