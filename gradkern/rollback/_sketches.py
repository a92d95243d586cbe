"""Sketches: what every sample did, in a few hundred bytes, so that millions are searched in milliseconds.

By ``estimator="direct"`` a sample's score is ``⟨v_i, q⟩``: linear in the query's gradient ``q``, where ``v_i`` is what
the sample's own steps took off the parameters. A sketch is ``v_i`` seen by the random functions of
:mod:`gradkern.rollback._projection`: their scores by that estimator, in int8 with one scale.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gradkern.errors import LedgerError
from gradkern.loss import Batch, LossFn
from gradkern.rollback._estimators import Influence, query_gradients
from gradkern.rollback._layout import Layout
from gradkern.rollback._projection import directions, project
from gradkern.rollback._reading import read_segments, recorded_ids
from gradkern.rollback._reduce import quantize_rows
from gradkern.rollback._scan import Rows, scan
from gradkern.rollback._sketch_index import SketchIndex
from gradkern.rollback._store import StoreReader
from gradkern.rollback._sweep import Adjoint
from gradkern.rollback._tensor_file import safetensors_torch, write_whole
from gradkern.rollback._top import TopScores, quantize_queries, require_k

__all__ = ["Sketches", "open_sketches", "write_sketches"]

FORMAT_VERSION = 1

_MOST_WIDTH = 1 << 16

# Of the random functions that go through the ledger together, with all that is kept of them.
_BLOCK_BYTES = 1 << 28

# Samples that are quantised together.
_CHUNK = 1 << 14


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a file says beside its tensors."""

    width: int
    seed: int
    ledger_id: str | None
    steps: int
    parameter_digest: str
    layout: str
    format_version: int = FORMAT_VERSION


def write_sketches(store: StoreReader, path: Path, width: int, seed: int) -> None:
    """Sketch all samples of a ledger; see :meth:`gradkern.rollback.Ledger.sketch`."""
    if not 1 <= width <= _MOST_WIDTH:
        raise ValueError(f"sketch: width must be from 1 to {_MOST_WIDTH}, got {width}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"sketch: seed must be from 0 to 2**63 - 1, got {seed}")
    if path.exists():
        raise LedgerError(f"sketch: {str(path)!r} exists, and is not overwritten; choose another path or remove it")
    closing = store.closing
    if closing is None:
        raise LedgerError(
            f"sketch: recording ended without close() after {store.steps} committed steps, so that it is not known of "
            "which parameters they are; resume it and close it, or ask the ledger itself"
        )
    ids = recorded_ids(store)
    tensors = {"ids": ids, **_sketch(store, ids, width, seed)}
    facts = _Facts(
        width, seed, store.facts.get("ledger_id"), store.steps, closing.parameter_digest, store.layout.to_json()
    )
    text = json.dumps(asdict(facts))
    metadata = {"facts": text, "sha256": _digest(text, tensors)}
    write_whole(path, safetensors_torch().save(tensors, metadata=metadata))


def _sketch(store: StoreReader, ids: Tensor, width: int, seed: int) -> dict[str, Tensor]:
    layout = store.layout
    shapes = {index: info.shape for index, info in enumerate(layout.parameters) if info.owned}
    # Of each function its gradient, and what is carried back of the parameters and of their momenta; all fp32.
    block = max(1, _BLOCK_BYTES // (12 * sum(torch.Size(shape).numel() for shape in shapes.values())))
    sums = torch.zeros(width, len(ids))
    for first in range(0, width, block):
        end = min(first + block, width)
        adjoint = Adjoint(layout, directions(shapes, width, seed, first, end), curvature=None)
        for segment in read_segments(store, backwards=True):
            rows = torch.searchsorted(ids, segment.visit_ids)
            sums[first:end].index_add_(1, rows, adjoint.through(segment).float())
    if not bool(torch.isfinite(sums).all()):
        raise LedgerError("sketch: influence on the final parameters is not finite: the recorded training diverged")
    codes, scales = torch.empty(len(ids), width, dtype=torch.int8), torch.empty(len(ids))
    for first in range(0, len(ids), _CHUNK):
        part = slice(first, first + _CHUNK)
        codes[part], scales[part] = quantize_rows(sums[:, part].t().contiguous())
    return {"scales": scales, "codes": codes}


def open_sketches(path: str | os.PathLike[str]) -> Sketches:
    """Open what :meth:`gradkern.rollback.Ledger.sketch` wrote, memory-mapped.

    The whole file is read once, to compare its checksum; its pages stay with the operating system.

    Args:
        path: The file.

    Raises:
        LedgerError: There is no such file, it is damaged, or of another format version.
        ImportError: safetensors is not installed.
    """
    safetensors_torch()
    from safetensors import SafetensorError, safe_open  # lazy: an extra

    file = Path(path)
    if not file.is_file():
        raise LedgerError(f"{str(file)!r} is no file; pass a path that was given to Ledger.sketch()")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise LedgerError(
            f"{str(file)!r} cannot be read ({error}): it is damaged or holds no sketches; write them again with "
            "Ledger.sketch()"
        ) from error
    text = metadata.get("facts", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise LedgerError(
            f"{str(file)!r} is damaged or holds no sketches: its checksum differs from what it holds; write them again "
            "with Ledger.sketch()"
        )
    facts = json.loads(text)
    if facts["format_version"] != FORMAT_VERSION:
        raise LedgerError(
            f"the sketches {str(file)!r} have format version {facts['format_version']}, this gradkern reads version "
            f"{FORMAT_VERSION}; write them again with Ledger.sketch()"
        )
    return Sketches(_Facts(**facts), tensors["ids"], tensors["codes"], tensors["scales"])


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all that a file says; equal only for the same content."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Sketches:
    """Every sample of a ledger in ``width + 12`` bytes; made by :func:`open_sketches`.

    Attributes:
        ids: Sample ids, ascending, int64, shape ``(n,)``.
        codes: int8, shape ``(n, width)``, from -127 to 127.
        scales: fp32, shape ``(n,)``; a sample's sketch is its codes times its scale.
    """

    def __init__(self, facts: _Facts, ids: Tensor, codes: Tensor, scales: Tensor) -> None:
        self._facts = facts
        self._layout = Layout.from_json(facts.layout)
        self.ids = ids
        self.codes = codes
        self.scales = scales

    @property
    def _rows(self) -> Rows:
        return Rows(self.codes, self.scales, self.ids)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.ids)

    @property
    def width(self) -> int:
        """Numbers in a sketch."""
        return self._facts.width

    @property
    def origin(self) -> tuple[str | None, str]:
        """What they are of: the ledger's id, None where it is too old to have one, and the final parameters' digest."""
        return self._facts.ledger_id, self._facts.parameter_digest

    def explain(
        self,
        model: nn.Module,
        query: Batch,
        k: int = 10,
        *,
        loss_fn: LossFn | None = None,
        index: SketchIndex | None = None,
    ) -> list[Influence]:
        """Name the samples that lowered a query's loss most, as ``Ledger.explain(..., estimator="direct")`` would.

        Args:
            model: The trained model, with the parameters it had when recording ended.
            query: A batch, see :func:`gradkern.loss.compute_loss`.
            k: Most samples to return.
            loss_fn: ``(output, target) -> scalar``; any scalar function of the output works.
            index: Where to search, made by :meth:`index`; None goes through all sketches.

        Returns:
            At most ``k`` influences by estimated scores, the most helpful first.

        Raises:
            ValueError: ``k`` is below 1, or the loss depends on no recorded parameter or has no finite gradient.
            LedgerError: ``model`` is another model or has other parameter values than were recorded.
        """
        require_k(k)
        found = (index or self).top(self.project(model, query, loss_fn=loss_fn), k)
        pairs = zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True)
        return [Influence(id, score) for id, score in pairs if score > -math.inf]

    def project(self, model: nn.Module, query: Batch | list[Batch], *, loss_fn: LossFn | None = None) -> Tensor:
        """Sketch the gradients of queries.

        Args:
            model: See :meth:`explain`.
            query: A batch, or a list of batches.
            loss_fn: See :meth:`explain`.

        Returns:
            fp32, shape ``(queries, width)``: what :meth:`top` takes.

        Raises:
            ValueError: The loss depends on no recorded parameter.
            LedgerError: See :meth:`explain`.
        """
        parameters = self._layout.trained_parameters(model)
        if self._layout.digest(parameters) != self._facts.parameter_digest:
            raise LedgerError(
                "the model's parameters differ from those at the end of the recording that the sketches are of; load "
                "the parameters of the recorded run's last step into the model"
            )
        owned = self._layout.owned(parameters)
        queries = query if isinstance(query, list) else [query]
        gradients = (query_gradients(model, owned, each, loss_fn) for each in queries)
        rows = [project(each, self._facts.width, self._facts.seed) for each in gradients]
        return torch.stack(rows) if rows else torch.empty(0, self.width)

    def top(self, queries: Tensor, k: int = 10) -> TopScores:
        """Find the samples with the highest scores for each query, going through all of them.

        Args:
            queries: Shape ``(queries, width)``, fp32, from :meth:`project`; quantised to int8 here.
            k: How many; all where there are fewer.

        Returns:
            The samples; of equal scores the smaller id comes first.

        Raises:
            ValueError: ``k`` is below 1, ``queries`` have another shape or dtype, or are not finite.

        Numerics:
            Inner products of codes are exact integers. Each is rounded to fp32 and multiplied by both scales, the
            sample's first: the same bits for any number of threads and instruction set, with or without native code.
        """
        require_k(k)
        codes, scales = quantize_queries(queries, self.width)
        everything = torch.tensor([[0, len(self)]])
        scores, ids = scan(self._rows, everything, codes, scales, min(k, len(self)))
        return TopScores(ids, scores)

    def index(self, *, lists: int | None = None, probes: int | None = None) -> SketchIndex:
        """Build an index that looks at few of the samples for a query.

        Args:
            lists: Clusters of sketches; None takes the root of their number.
            probes: Clusters that a query looks into; None takes a tenth of them.

        Raises:
            ImportError: faiss is not installed.
            ValueError: ``probes`` is not between 1 and ``lists``, or ``lists`` is above the number of samples.
        """
        return SketchIndex(self._rows, lists, probes)
