"""A finished ledger: of every sample what it added to the parameters, and no longer step by step.

Over a run the deltas of a sample (:mod:`gradkern.rollback._deltas`) come to nearly a multiple of one outer product for
each matrix. A rank of 1 in int8 takes about a sixtieth of their fp32 bytes and can be subtracted again, which a
projection cannot. One file holds all samples; it is written as those of a ledger are, so it is whole or absent.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gradkern.errors import LedgerError
from gradkern.loss import Batch, LossFn
from gradkern.rollback._deltas import Deltas, RowDeltas, read_deltas
from gradkern.rollback._estimators import Scores, query_gradients
from gradkern.rollback._json_tensor import from_tensor, to_tensor
from gradkern.rollback._layout import Layout, digest_parameters
from gradkern.rollback._records import RECORD_TYPES, EmbeddingRecord, MatrixRecord, Record, VectorRecord
from gradkern.rollback._reduce import low_rank_matrix, quantize_rows
from gradkern.rollback._sample_ids import sample_ids
from gradkern.rollback._shards import open_store
from gradkern.rollback._tensor_file import load_tensors, write_tensors

__all__ = ["FinishedLedger", "finish", "open_finished"]

_FORMAT_VERSION = 1


def finish(path: str | os.PathLike[str], out: str | os.PathLike[str], *, rank: int = 1) -> FinishedLedger:
    """Write what every sample added to the parameters into one small file.

    For a Linear of 64 to 64 a sample takes 136 bytes instead of 16,384; what later steps did in reaction, ``ref`` and
    ``undo`` still need the ledger itself for. The preconditioner is the smoothed one, as in all estimators.

    Args:
        path: The folder of a complete ledger. It is read once, and once more for every 256 MiB of fp32 deltas.
        out: File to create, with the ending ``.safetensors``; must not exist. Its folder must.
        rank: Directions kept of a sample's delta of a matrix. Those of vectors are kept element by element, those of an
            embedding in the rows that the sample used.

    Returns:
        The file, opened.

    Raises:
        ValueError: ``rank`` is below 1, or ``out`` ends in something else.
        LedgerError: There is no ledger, it is damaged or incomplete, or ``out`` exists.
        ImportError: safetensors is not installed.
        OSError: ``out`` cannot be written.
    """
    target = Path(out)
    if operator.index(rank) < 1:
        raise ValueError(f"finish: rank must be at least 1, got {rank}")
    if target.suffix != ".safetensors":
        raise ValueError(f"finish: out must end in .safetensors, got {str(target)!r}")
    if target.exists():
        raise LedgerError(f"finish: {str(target)!r} exists and is never overwritten; choose another name")
    store = open_store(Path(path))
    closing = store.closing
    if closing is None:
        raise LedgerError(
            f"finish: recording into {str(store.path)!r} ended without close(), so the parameters that the deltas "
            f"belong to are not known; go on with it: record(..., resume=), or record again"
        )
    layout = store.layout
    ids = [torch.empty(0, dtype=torch.int64)]
    parts: dict[int, list[Record]] = {}
    for chunk in read_deltas(store):
        for index in chunk.shapes:
            parts.setdefault(index, []).append(_compress(layout, chunk, index, rank))
        ids.append(chunk.ids)
    head = {
        "format_version": _FORMAT_VERSION,
        "rank": rank,
        "layout": layout.to_json(),
        "parameter_digest": closing.parameter_digest,
    }
    tensors = {"ids": torch.cat(ids), "head": to_tensor(head)}
    for index, records in parts.items():
        for name, tensor in records[0].join(records).tensors().items():
            if name != "visit":  # one entry a sample, in their order
                tensors[f"delta/{index}/{name}"] = tensor
    write_tensors(target, {**tensors, "digest": to_tensor(_digest(tensors))})
    return open_finished(target)


def open_finished(path: str | os.PathLike[str]) -> FinishedLedger:
    """Open what :func:`finish` wrote. All of it is read into memory and checked.

    Raises:
        LedgerError: There is no such file, it is damaged, or has another format version.
        ImportError: safetensors is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise LedgerError(f"{str(file)!r} is no file; pass the one that was given to finish() as out")
    try:
        tensors = load_tensors(file.read_bytes())
        digest = from_tensor(tensors.pop("digest"))
        head = from_tensor(tensors["head"])
        version = head["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(
            f"{str(file)!r} is no finished ledger, or it is damaged ({error}); finish() the ledger again"
        ) from error
    if version != _FORMAT_VERSION:
        raise LedgerError(
            f"{str(file)!r} has format version {version}, this gradkern reads version {_FORMAT_VERSION}; read it with "
            f"the version that wrote it"
        )
    if digest != _digest(tensors):
        raise LedgerError(f"{str(file)!r} is damaged: its digest is not that of its tensors; finish() the ledger again")
    return FinishedLedger(file, head, tensors)


class FinishedLedger:
    """What every sample added to the parameters; made by :func:`finish` or :func:`open_finished`.

    Attributes:
        ids: Different sample ids, ascending, int64, shape ``(samples,)``.
        rank: Directions kept of a sample's delta of a matrix.
        nbytes: The file's size.
    """

    def __init__(self, file: Path, head: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        self.nbytes = file.stat().st_size
        self.rank = int(str(head["rank"]))
        self.ids = tensors["ids"]
        self._layout = Layout.from_json(str(head["layout"]))
        self._parameter_digest = head["parameter_digest"]
        self._records: dict[int, Record] = {}
        entries = torch.arange(len(self.ids), dtype=torch.int32)
        for index, info in enumerate(self._layout.parameters):
            fields = {
                name.rpartition("/")[2]: tensor
                for name, tensor in tensors.items()
                if name.startswith(f"delta/{index}/")
            }
            if info.owned and fields:
                kind = "vector" if "value" in fields else "embedding" if "index" in fields else "matrix"
                self._records[index] = RECORD_TYPES[kind].from_tensors({"visit": entries, **fields})

    def deltas(self, ids: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """What some samples added.

        Args:
            ids: Of the samples.

        Returns:
            fp32 of shape ``(len(ids), *parameter)``, by name of the owned parameter, in the order of ``ids``.

        Raises:
            TypeError: ``ids`` are not integers.
            ValueError: ``ids`` are empty or not one-dimensional.
            LedgerError: An id was never recorded.
        """
        wanted = sample_ids(ids, "deltas")
        unknown = wanted[~torch.isin(wanted, self.ids)]
        if len(unknown):
            raise LedgerError(
                f"deltas: {len(unknown)} of {len(wanted)} ids were never recorded, the first of them "
                f"{unknown[:5].tolist()}; pass ids as given to recorder.batch"
            )
        entries = torch.searchsorted(self.ids, wanted)
        infos = self._layout.parameters
        return {
            infos[index].name: _dense(record.take(entries), infos[index].shape)
            for index, record in self._records.items()
        }

    def scores(self, model: nn.Module, query: Batch, *, loss_fn: LossFn | None = None) -> Scores:
        """Score every sample for a query by ``estimator="direct"``, without the ledger.

        Args:
            model: See :meth:`Ledger.explain`; likewise what follows.
            query: See there.
            loss_fn: See there.

        Raises:
            ValueError: The loss depends on no recorded parameter.
            LedgerError: ``model`` is another model or has other parameter values than at the end of the recording.
        """
        parameters = self._layout.trained_parameters(model)
        if self._layout.digest(parameters) != self._parameter_digest:
            raise LedgerError(
                "the model's parameters differ from those at the end of the recording, and influence on them was never "
                "recorded; load the parameters of the recorded run's last step into the model"
            )
        gradients = query_gradients(model, self._layout.owned(parameters), query, loss_fn)
        scores = torch.zeros(len(self.ids), dtype=torch.float64)
        for index, record in self._records.items():
            scores -= record.inner(gradients[index].unsqueeze(0))[0].double()
        return Scores(self.ids, scores)


def _compress(layout: Layout, chunk: Deltas, index: int, rank: int) -> Record:
    """One entry for each sample of a chunk."""
    entries = torch.arange(len(chunk.ids), dtype=torch.int32)
    if index in chunk.rows:
        slots, values = _padded(chunk.rows[index], len(chunk.ids))
        left, right = low_rank_matrix(values, _start(index, rank, values))
        return EmbeddingRecord(entries, slots.to(torch.int32), *quantize_rows(left), *quantize_rows(right))
    whole = chunk.whole[index]
    if all(layout.streams[stream].kind == "vector" for stream in layout.streams_by_parameter([index])[index]):
        return VectorRecord(entries, *quantize_rows(whole.flatten(1)))
    matrices = whole.flatten(2)
    left, right = low_rank_matrix(matrices, _start(index, rank, matrices))
    return MatrixRecord(entries, *quantize_rows(left), *quantize_rows(right))


def _start(index: int, rank: int, matrices: Tensor) -> Tensor:
    """Directions to start from: the same for all chunks."""
    _, height, columns = matrices.shape
    generator = torch.Generator().manual_seed(index)
    return torch.randn(rank, columns, generator=generator)[: min(height, columns)]


def _padded(deltas: RowDeltas, samples: int) -> tuple[Tensor, Tensor]:
    """Rows of an embedding and their values, shapes ``(samples, u)`` and ``(samples, u, columns)``, padded by zeros."""
    counts = torch.bincount(deltas.position, minlength=samples)
    slot = torch.arange(len(deltas.position)) - (counts.cumsum(0) - counts)[deltas.position]
    width = int(counts.max()) if samples else 0
    rows = torch.zeros(samples, width, dtype=torch.int64)
    values = torch.zeros(samples, width, deltas.values.shape[1])
    rows[deltas.position, slot] = deltas.row
    values[deltas.position, slot] = deltas.values
    return rows, values


def _dense(record: Record, shape: tuple[int, ...]) -> Tensor:
    """Every entry in the parameter's shape."""
    if not isinstance(record, EmbeddingRecord):
        return record.gradients().reshape(-1, *shape)
    entry = torch.arange(len(record.index)).unsqueeze(1) * shape[0]
    found = torch.zeros(len(record.index) * shape[0], shape[1])
    found.index_add_(0, (entry + record.index).flatten(), record.gradients().flatten(0, 1))
    return found.reshape(-1, *shape)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest_parameters(dict(sorted(tensors.items())))
