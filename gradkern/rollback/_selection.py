"""Which directions of a visit's gradients are worth their bytes.

With a budget of bytes a visit is not given the same rank in every matrix. More directions than can be kept are found of
each, and turned so that the energies of what they change, by the preconditioner of the step, add up; then the bytes go
to whatever captures most energy a byte: a direction of a matrix or an embedding, or the gradient of a vector, in codes
of 4 bits or of 8. Every visit has its own choice, and every step its own preconditioner: nothing is estimated
beforehand, and nothing needs to be remembered.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.rollback._fidelity import Comparison
from gradkern.rollback._layout import Layout
from gradkern.rollback._packed_records import (
    NARROW,
    PackedEmbedding,
    PackedMatrix,
    PackedVector,
    embedding_bytes,
    matrix_bytes,
    vector_bytes,
)
from gradkern.rollback._records import EmbeddingRecord, MatrixRecord, Record, VectorRecord
from gradkern.rollback._reduce import dequantize_rows, quantize_rows
from gradkern.rollback._smoothing import smoothed_sizes

__all__ = ["CANDIDATES", "Selection", "least_bytes"]

# Directions of a matrix to choose from; finding more takes more time.
CANDIDATES = 8

# The largest codes of 4 and of 8 bits.
_CODES = (NARROW, 127)

# Below this share of the largest, a direction's energy is rounding.
_NOTHING = 1e-12


def least_bytes(layout: Layout) -> tuple[int, str]:
    """The bytes of the smallest record there can be, and the parameter that it is of."""
    sizes = []
    for stream in layout.streams:
        info = layout.parameters[stream.parameter]
        if stream.kind == "vector":
            nbytes = vector_bytes(math.prod(info.shape), is_narrow=True)
        elif stream.kind == "matrix":
            nbytes = matrix_bytes(*smoothed_sizes(info.shape), is_narrow=True)
        else:
            nbytes = int(embedding_bytes(torch.tensor(1), info.shape[1], is_narrow=True))
        sizes.append((nbytes, info.name))
    return min(sizes)


@dataclass(frozen=True, slots=True)
class _Candidates:
    """All that streams of records of one shape offer.

    Attributes:
        entry: Of every item the entry that it is a direction of, shape ``(items,)``.
        visit: Of every item.
        energy: Captured by codes of 4 and of 8 bits, shape ``(items, 2)``.
        nbytes: Likewise.
        forms: The records of all items with either.
    """

    entry: Tensor
    visit: Tensor
    energy: Tensor
    nbytes: Tensor
    forms: tuple[Record, Record]


class Selection:
    """Spends a budget of bytes on the records of every visit.

    Args:
        layout: Of the records.
        nbytes: Most bytes that the records of a visit may take in a file.

    Raises:
        ValueError: No record is that small.
    """

    def __init__(self, layout: Layout, nbytes: int) -> None:
        least, name = least_bytes(layout)
        if nbytes < least:
            raise ValueError(
                f"record: bytes_per_visit={nbytes} is too small for any record; the smallest, of {name!r}, takes "
                f"{least} bytes. Pass at least that, and some hundred times more for a useful ledger"
            )
        self._layout = layout
        self._nbytes = nbytes

    def select(
        self,
        visits: int,
        records: Sequence[tuple[int, Record]],
        comparisons: Sequence[tuple[int, Comparison]],
        smoothed: Tensor,
    ) -> tuple[list[tuple[int, Record]], list[tuple[int, Comparison]]]:
        """Choose among what a step's visits left.

        Args:
            visits: Their number.
            records: ``(stream, record)``, in host memory, with as many directions as can be chosen from.
            comparisons: ``(stream, comparison)``, of the same visits in the same order.
            smoothed: The step's smoothed preconditioners, see :meth:`gradkern.rollback._shadows.Shadows.step`.

        Returns:
            Records and comparisons of what was chosen.
        """
        if not records:
            return [], []
        by_stream: defaultdict[int, list[Record]] = defaultdict(list)
        for stream, record in records:
            by_stream[stream].append(record)
        joined = {stream: type(each[0]).join(each) for stream, each in by_stream.items()}
        weights = self._weights(smoothed)
        # Those of equal shapes together: most models have many small layers.
        groups: defaultdict[tuple[type[Record], tuple[torch.Size, ...]], list[int]] = defaultdict(list)
        for stream, record in joined.items():
            shapes = tuple(tensor.shape[1:] for tensor in record.tensors().values())
            groups[type(record), shapes].append(stream)
        offers = [self._offer(streams, joined, weights) for streams in groups.values()]
        chosen: dict[int, tuple[Record, Tensor]] = {}
        for streams, offer, form in zip(groups.values(), offers, _spend(offers, visits, self._nbytes), strict=True):
            picked = _pick(offer, form, [len(joined[stream].visit) for stream in streams])
            chosen.update(zip(streams, picked, strict=True))
        kept = [(stream, chosen[stream][0]) for stream in joined if len(chosen[stream][0].visit)]
        return kept, _compared(comparisons, joined, chosen)

    def _weights(self, smoothed: Tensor) -> dict[int, tuple[Tensor, ...]]:
        """Of every owned parameter the preconditioner: of its rows and columns, or of its elements.

        Zeros where it did not move; where none did, ones.
        """
        pieces: dict[int, tuple[Tensor, ...]] = {}
        start = 0
        for index, info in enumerate(self._layout.parameters):
            if info.owned:
                sizes = smoothed_sizes(info.shape)
                pieces[index] = smoothed[start : start + sum(sizes)].float().split(list(sizes))
                start += sum(sizes)
        weights = {index: _weights_of(piece) for index, piece in pieces.items()}
        if any(bool(each.any()) for piece in weights.values() for each in piece):
            return weights
        return {index: tuple(torch.ones_like(each) for each in piece) for index, piece in weights.items()}

    def _offer(
        self, streams: Sequence[int], joined: Mapping[int, Record], weights: Mapping[int, tuple[Tensor, ...]]
    ) -> _Candidates:
        """Of streams whose records have one shape."""
        members = [joined[stream] for stream in streams]
        record = type(members[0]).join(members)
        own = [weights[self._layout.streams[stream].parameter] for stream in streams]
        if isinstance(record, VectorRecord):
            flat = [weight[0] if len(weight) == 1 else torch.outer(*weight).flatten() for weight in own]
            return _vectors(record, _for_entries(flat, members))
        columns = _for_entries([weight[1] for weight in own], members)
        if isinstance(record, EmbeddingRecord):
            index = [member.tensors()["index"].long() for member in members]
            return _matrices(
                record, torch.cat([weight[0][each] for weight, each in zip(own, index, strict=True)]), columns
            )
        if isinstance(record, MatrixRecord):
            return _matrices(record, _for_entries([weight[0] for weight in own], members), columns)
        raise TypeError(f"of records of {type(record).__name__} none can be chosen")


def _for_entries(weights: Sequence[Tensor], members: Sequence[Record]) -> Tensor:
    """A row for every entry of several records: the weight of its record."""
    counts = torch.tensor([len(member.visit) for member in members])
    return torch.stack(list(weights)).repeat_interleave(counts, dim=0)


def _compared(
    comparisons: Sequence[tuple[int, Comparison]],
    joined: Mapping[int, Record],
    chosen: Mapping[int, tuple[Record, Tensor]],
) -> list[tuple[int, Comparison]]:
    """The comparisons with what was chosen of the entries that they are of."""
    seen: defaultdict[tuple[int, int], int] = defaultdict(int)
    compared = []
    for stream, comparison in comparisons:
        visit = int(comparison.record.visit[0])
        # A layer that was called twice was compared twice.
        entry = (joined[stream].visit == visit).nonzero()[seen[stream, visit]]
        seen[stream, visit] += 1
        record, entries = chosen[stream]
        compared.append((stream, Comparison(record.take(entries == entry), comparison.exact)))
    return compared


def _weights_of(piece: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors of what :func:`~gradkern.rollback._smoothing.unsmooth` makes of a preconditioner."""
    if len(piece) == 1:
        return (piece[0],)
    rows, columns = piece
    if not bool(torch.isfinite(rows).all()) or not bool(rows.any()):
        return torch.zeros_like(rows), torch.zeros_like(columns)
    return rows.mean().sqrt() * rows.rsqrt(), columns.rsqrt()


def _vectors(record: VectorRecord, weight: Tensor) -> _Candidates:
    rows = record.gradients()
    energy = _square(rows * weight)
    forms, energies = [], []
    for most in _CODES:
        codes, scale = quantize_rows(rows, most)
        forms.append(PackedVector(record.visit, codes, scale))
        energies.append(energy - _square((rows - dequantize_rows(codes, scale)) * weight))
    nbytes = [vector_bytes(rows.shape[1], is_narrow=most == NARROW) for most in _CODES]
    return _Candidates(
        entry=torch.arange(len(rows)),
        visit=record.visit.long(),
        energy=torch.stack(energies, dim=1),
        nbytes=torch.tensor(nbytes).expand(len(rows), -1),
        forms=(forms[0], forms[1]),
    )


def _matrices(record: MatrixRecord | EmbeddingRecord, row_weight: Tensor, column_weight: Tensor) -> _Candidates:
    """Of matrices and embeddings: ``row_weight`` has shape ``(n, rows)``, ``column_weight`` ``(n, columns)``."""
    entries, rank, height = record.left.shape
    left = dequantize_rows(record.left, record.left_scale)
    right = dequantize_rows(record.right, record.right_scale)
    left, right = _turn(left, right, row_weight.unsqueeze(1), column_weight.unsqueeze(1))
    row_weight, column_weight = (each.repeat_interleave(rank, dim=0) for each in (row_weight, column_weight))
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    visit = record.visit.repeat_interleave(rank)
    forms: list[Record] = []
    energies, nbytes = [], []
    energy = _square(left * row_weight) * _square(right * column_weight)
    for most in _CODES:
        left_codes, left_scale = quantize_rows(left, most)
        right_codes, right_scale = quantize_rows(right, most)
        # Of the product of two rounded factors; what rounding one changes is nearly orthogonal to the rest.
        lost = _share(left, dequantize_rows(left_codes, left_scale), row_weight)
        lost = lost + _share(right, dequantize_rows(right_codes, right_scale), column_weight)
        energies.append(energy * (1.0 - lost).clamp_min(0.0))
        scale = (left_scale * right_scale).unsqueeze(1)
        codes = (left_codes.unsqueeze(1), scale, right_codes.unsqueeze(1), torch.ones_like(scale))
        is_narrow = most == NARROW
        if isinstance(record, EmbeddingRecord):
            index = record.index.repeat_interleave(rank, dim=0)
            forms.append(PackedEmbedding(visit, index, *codes))
            nbytes.append(embedding_bytes((left_codes != 0).sum(dim=1), right.shape[1], is_narrow=is_narrow))
        else:
            forms.append(PackedMatrix(visit, *codes))
            each = matrix_bytes(height, right.shape[1], is_narrow=is_narrow)
            nbytes.append(torch.full((len(left),), each))
    return _Candidates(
        entry=torch.arange(entries).repeat_interleave(rank),
        visit=visit.long(),
        energy=torch.stack(energies, dim=1),
        nbytes=torch.stack(nbytes, dim=1),
        forms=(forms[0], forms[1]),
    )


def _turn(left: Tensor, right: Tensor, row_weight: Tensor, column_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Write ``leftᵀ @ right`` with directions that are orthogonal after weighting: its singular vectors then.

    In fp64, as squares of gradients leave the range of fp32.
    """
    if left.shape[1] == 1:
        return left, right
    wide_left, wide_right = left.double(), right.double()
    weighted_left, weighted_right = wide_left * row_weight, wide_right * column_weight
    squares, basis = torch.linalg.eigh(weighted_right @ weighted_right.transpose(1, 2))
    is_something = squares > _NOTHING * squares[:, -1:]
    root = torch.where(is_something, squares, 0.0).sqrt()
    inverse = torch.where(is_something, 1.0 / root, 0.0)
    to_left, to_right = root.unsqueeze(2) * basis.transpose(1, 2), inverse.unsqueeze(2) * basis.transpose(1, 2)
    turned = to_left @ weighted_left
    _, turn = torch.linalg.eigh(turned @ turned.transpose(1, 2))
    turn = turn.transpose(1, 2)
    return (turn @ to_left @ wide_left).float(), (turn @ to_right @ wide_right).float()


def _spend(offers: Sequence[_Candidates], visits: int, budget: int) -> list[Tensor]:
    """Of every item of every offer: 0 for not taken, 1 for taken with 4 bits, 2 for 8.

    Greedy by energy a byte, the wider codes as an item of their own; what does not fit any more is passed over.
    """
    visit = torch.cat([offer.visit for offer in offers])
    energy = torch.cat([offer.energy for offer in offers]).double()
    nbytes = torch.cat([offer.nbytes for offer in offers])
    density = energy[:, 0] / nbytes[:, 0]
    # Where wide codes are worth more a byte from the start there is no narrow item; where they never fit, no wide one.
    has_wide = nbytes[:, 1] <= budget
    is_wide = has_wide & (energy[:, 1] / nbytes[:, 1] > density)
    first_cost = torch.where(is_wide, nbytes[:, 1], nbytes[:, 0])
    first_gain = torch.where(is_wide, energy[:, 1], energy[:, 0])
    more_cost = nbytes[:, 1] - nbytes[:, 0]
    more_gain = torch.where(has_wide & ~is_wide, energy[:, 1] - energy[:, 0], 0.0)
    cost = torch.cat([first_cost, more_cost])
    worth = torch.cat([first_gain / first_cost, more_gain / more_cost.clamp_min(1)])
    owner = torch.cat([visit, visit])
    order = worth.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    is_taken = torch.zeros(len(cost), dtype=torch.bool)
    left = torch.full((visits,), budget)
    starts = torch.searchsorted(owner[order], torch.arange(visits))
    while True:
        fits = ~is_taken & (worth > 0) & (cost <= left[owner])
        first = is_taken[: len(visit)] | fits[: len(visit)]
        is_open = (fits & torch.cat([torch.ones_like(first), first]))[order]
        open_cost = torch.where(is_open, cost[order], 0)
        spent = open_cost.cumsum(0) - open_cost
        within = spent - torch.cat([spent, spent[-1:]])[starts][owner[order]] + open_cost
        taking = order[is_open & (within <= left[owner[order]])]
        if not len(taking):
            break
        is_taken[taking] = True
        left.index_add_(0, owner[taking], -cost[taking])
    first, more = is_taken.chunk(2)
    form = first.long() * (1 + (more | is_wide).long())
    return list(form.split([len(offer.visit) for offer in offers]))


def _pick(offer: _Candidates, form: Tensor, counts: Sequence[int]) -> list[tuple[Record, Tensor]]:
    """Of each stream, whose entries there are so many of, the items taken in order of visits, and their entries."""
    items = torch.cat([(form == which).nonzero()[:, 0] for which in (1, 2)])
    parts = [each.take(form == which) for each, which in zip(offer.forms, (1, 2), strict=True)]
    picked = type(offer.forms[0]).join(parts)
    order = items.argsort()
    order = order[offer.visit[items[order]].argsort(stable=True)]
    ends = torch.tensor(counts).cumsum(0)
    stream = torch.searchsorted(ends, offer.entry[items], right=True)
    found = []
    for at, (end, count) in enumerate(zip(ends.tolist(), counts, strict=True)):
        own = order[stream[order] == at]
        found.append((picked.take(own), offer.entry[items[own]] - (end - count)))
    return found


def _share(rows: Tensor, rounded: Tensor, weight: Tensor) -> Tensor:
    """The share of the energy that rounding took."""
    return _square((rows - rounded) * weight) / _square(rows * weight).clamp_min(torch.finfo(torch.float64).tiny)


def _square(rows: Tensor) -> Tensor:
    """In fp64, where squares of small gradients do not vanish."""
    return rows.double().square().sum(dim=-1)
