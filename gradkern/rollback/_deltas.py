"""What every sample added to the parameters, as the recorded steps have it.

A step leaves ``θ_t = decay_t θ_{t-1} - P_t ⊙ M_t`` with ``M_t = momentum_t M_{t-1} + share_t g_t``, both linear in the
gradients, so that each sample has a part ``D_i`` in what training made of the parameters. Unrolled,

    D_i = -Σ_t share_t g_{i,t} ⊙ A_t,    A_t = P_t Π_{r>t} decay_r + momentum_{t+1} A_{t+1},

where ``A_t``, minus what a change of ``M_t`` does to the last parameters, is one tensor of a parameter's size for all
samples. It is carried from the last step to the first; nothing is held of a sample but ``D_i``, and of an embedding
only the rows that the sample ever used. The samples are gone through in chunks, each of which reads the ledger once.

``P`` is the preconditioner that the ledger keeps: smoothed to rows and columns where the parameter is a matrix, itself
where it is not. The sum of all ``D_i`` therefore parts from what conservation is checked with by just that smoothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.rollback._layout import Layout
from gradkern.rollback._reading import read_segments
from gradkern.rollback._records import EmbeddingRecord, Record
from gradkern.rollback._segment import Segment
from gradkern.rollback._smoothing import unsmooth
from gradkern.rollback._store import StoreReader

__all__ = ["Deltas", "RowDeltas", "read_deltas"]

# Of the deltas that are held at a time.
_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class RowDeltas:
    """Deltas of an embedding: the rows that each sample ever used; all others are zero.

    Attributes:
        position: Of the sample in the chunk, int64, shape ``(n,)``, ascending.
        row: Of the embedding, int64, shape ``(n,)``, ascending within a sample.
        values: fp32, shape ``(n, columns)``.
    """

    position: Tensor
    row: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Deltas:
    """Of a chunk of samples.

    Attributes:
        ids: Different sample ids, ascending, int64, shape ``(samples,)``.
        shapes: Of every owned parameter, by index.
        whole: Deltas of parameters by index, fp32, shape ``(samples, *parameter)``.
        rows: Of the parameters that only embeddings use, by index.
    """

    ids: Tensor
    shapes: Mapping[int, tuple[int, ...]]
    whole: Mapping[int, Tensor]
    rows: Mapping[int, RowDeltas]

    def dense(self, first: int, end: int) -> dict[int, Tensor]:
        """Of the samples at these positions: fp32, shape ``(end - first, *parameter)``, by parameter."""
        found = {index: each[first:end] for index, each in self.whole.items()}
        for index, each in self.rows.items():
            found[index] = torch.zeros(end - first, *self.shapes[index])
            low, high = torch.searchsorted(each.position, torch.tensor([first, end])).tolist()
            found[index][each.position[low:high] - first, each.row[low:high]] = each.values[low:high]
        return found


def read_deltas(store: StoreReader, *, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[Deltas]:
    """The deltas of all recorded samples, ascending by id.

    Args:
        store: The ledger. It is read once to see which samples used what, and once more for each chunk.
        chunk_bytes: Most bytes of deltas in a chunk, unless a single sample has more.

    Raises:
        LedgerError: A file is damaged.
    """
    used = _Used.read(store)
    for first, end in used.chunks(chunk_bytes):
        part = used.between(first, end)
        sums = _Sums(store.layout, part)
        for segment in read_segments(store, backwards=True):
            sums.through(segment)
        yield sums.deltas()


@dataclass(frozen=True, slots=True)
class _Used:
    """Which samples there are, and which rows of embeddings each of them used.

    Attributes:
        ids: Ascending, int64, shape ``(samples,)``.
        shapes: Of every owned parameter, by index.
        keys: Of the parameters that only embeddings use, by index: ``position in ids * height + row``, ascending.
    """

    ids: Tensor
    shapes: Mapping[int, tuple[int, ...]]
    keys: Mapping[int, Tensor]

    @classmethod
    def read(cls, store: StoreReader) -> _Used:
        """Go through a ledger."""
        layout = store.layout
        shapes = {index: info.shape for index, info in enumerate(layout.parameters) if info.owned}
        streams = layout.streams_by_parameter(shapes)
        only_rows = [
            index for index, each in streams.items() if all(layout.streams[one].kind == "embedding" for one in each)
        ]
        ids = [torch.empty(0, dtype=torch.int64)]
        pairs: dict[int, list[Tensor]] = {index: [torch.empty(2, 0, dtype=torch.int64)] for index in only_rows}
        for segment in read_segments(store):
            own, position = torch.unique(segment.visit_ids, return_inverse=True)
            ids.append(own)
            for index in only_rows:
                keys = _keys(segment, streams[index], position, shapes[index][0])
                pairs[index].append(torch.stack([own[keys // shapes[index][0]], keys % shapes[index][0]]))
        all_ids = torch.unique(torch.cat(ids))
        keys_of = {}
        for index in only_rows:
            sample, row = torch.cat(pairs[index], dim=1)
            keys_of[index] = torch.unique(torch.searchsorted(all_ids, sample) * shapes[index][0] + row)
        return cls(all_ids, shapes, keys_of)

    def chunks(self, chunk_bytes: int) -> Iterator[tuple[int, int]]:
        """Bounds of runs of samples whose deltas come to so many bytes."""
        whole = sum(4 * torch.Size(shape).numel() for index, shape in self.shapes.items() if index not in self.keys)
        sizes = torch.full((len(self.ids),), whole)
        for index, keys in self.keys.items():
            height, columns = self.shapes[index]
            sizes += (4 * columns + 16) * torch.bincount(keys // height, minlength=len(self.ids))
        first, held = 0, 0
        for position, size in enumerate(sizes.tolist()):
            if held and held + size > chunk_bytes:
                yield first, position
                first, held = position, 0
            held += size
        if first < len(self.ids):
            yield first, len(self.ids)

    def between(self, first: int, end: int) -> _Used:
        """Those samples alone."""
        keys_of = {}
        for index, keys in self.keys.items():
            height = self.shapes[index][0]
            low, high = torch.searchsorted(keys, torch.tensor([first * height, end * height])).tolist()
            keys_of[index] = keys[low:high] - first * height
        return _Used(self.ids[first:end], self.shapes, keys_of)


def _keys(segment: Segment, streams: list[int], position: Tensor, height: int) -> Tensor:
    """Which rows of an embedding the samples of a segment used: ``position * height + row``, ascending."""
    found = [torch.empty(0, dtype=torch.int64)]
    for stream in streams:
        record = segment.records.get(stream)
        if isinstance(record, EmbeddingRecord):
            found.append((position[record.visit.long()].unsqueeze(1) * height + record.index).flatten())
    keys: Tensor = torch.unique(torch.cat(found))
    return keys


class _Sums:
    """``D_i`` of some samples and, of every parameter, ``A`` and the product of the decays so far."""

    def __init__(self, layout: Layout, used: _Used) -> None:
        self._used = used
        self._streams = layout.streams_by_parameter(used.shapes)
        self._reach = {index: torch.zeros(shape) for index, shape in used.shapes.items()}
        self._decays = dict.fromkeys(used.shapes, 1.0)
        self._values = {
            index: torch.zeros(len(used.keys[index]), shape[1])
            if index in used.keys
            else torch.zeros(len(used.ids), *shape)
            for index, shape in used.shapes.items()
        }

    def through(self, segment: Segment) -> None:
        """Go back through a segment."""
        position = torch.searchsorted(self._used.ids, segment.visit_ids).clamp(max=len(self._used.ids) - 1)
        is_meant = self._used.ids[position] == segment.visit_ids
        records = {stream: record.take(is_meant[record.visit.long()]) for stream, record in segment.records.items()}
        bounds = {
            stream: torch.searchsorted(record.visit.long(), segment.visit_bounds).tolist()
            for stream, record in records.items()
        }
        for step in reversed(range(segment.steps)):
            for index, reach in self._reach.items():
                scalars = segment.step_scalars(step, index)
                if scalars is None:
                    continue
                stored = [tensor[step] for tensor in segment.preconditioners[index]]
                reach.add_(unsmooth(stored, reach.shape), alpha=self._decays[index])
                share = scalars.grad_weight * scalars.multiplier
                for stream in self._streams[index]:
                    if stream in records:
                        record = records[stream].take(slice(*bounds[stream][step : step + 2]))
                        self._subtract(index, record, position[record.visit.long()], share)
                self._decays[index] *= scalars.decay
                reach.mul_(scalars.momentum)

    def _subtract(self, index: int, record: Record, position: Tensor, share: float) -> None:
        """Take ``share g ⊙ A`` of every entry off the delta of its sample."""
        values, reach = self._values[index], self._reach[index]
        if not isinstance(record, EmbeddingRecord):
            moved = record.gradients().reshape(-1, *reach.shape) * reach
            values.index_add_(0, position, moved, alpha=-share)
            return
        height, columns = reach.shape
        key = (position.unsqueeze(1) * height + record.index).flatten()
        moved = (record.gradients() * reach[record.index]).flatten(0, 1)
        if index in self._used.keys:
            key = torch.searchsorted(self._used.keys[index], key)
        values.view(-1, columns).index_add_(0, key, moved, alpha=-share)

    def deltas(self) -> Deltas:
        """What there is by now."""
        used = self._used
        rows = {
            index: RowDeltas(keys // used.shapes[index][0], keys % used.shapes[index][0], self._values[index])
            for index, keys in used.keys.items()
        }
        whole = {index: each for index, each in self._values.items() if index not in rows}
        return Deltas(used.ids, used.shapes, whole, rows)
