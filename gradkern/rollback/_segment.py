"""A segment: the records of some consecutive optimizer steps, as one flat set of named tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import TypeVar

import torch

from gradkern.errors import LedgerError
from gradkern.rollback._curvature import curvature_weights
from gradkern.rollback._fidelity import Comparison
from gradkern.rollback._layout import Layout
from gradkern.rollback._packed_records import read_record
from gradkern.rollback._packing import Block, Packing, unpack
from gradkern.rollback._records import Record
from gradkern.rollback._replay_log import ReplayLog, StepLog
from gradkern.rollback._sharing import share_equal, unshare
from gradkern.rollback._smoothing import smoothed_sizes

__all__ = ["Segment", "StepRecord", "StepScalars"]

_Part = TypeVar("_Part")
_Whole = TypeVar("_Whole")


@dataclass(frozen=True, slots=True)
class StepScalars:
    """What one step applied to one parameter; see :class:`gradkern.step_event.ParamStep`."""

    lr: float
    decay: float
    momentum: float
    grad_weight: float
    multiplier: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything recorded between one optimizer step and the next.

    Attributes:
        ids: Shape ``(visits,)``, int64: the sample id of every visit.
        bends: Numbers of visits, and what :func:`~gradkern.rollback._curvature.measure_bends` found for them.
        blocks: Records that are packed; ``visit`` counts from the first of ``ids``.
        records: ``(stream, record)``; likewise.
        comparisons: ``(stream, comparison)``.
        scalars: Of every parameter five, in the order of :class:`StepScalars`; NaN where the step left it alone.
        smoothed: The smoothed preconditioners, see :meth:`gradkern.rollback._shadows.Shadows.step`.
        log: What replaying needs; None where the run cannot be.
    """

    ids: torch.Tensor
    bends: Sequence[tuple[torch.Tensor, torch.Tensor]]
    blocks: Sequence[Block]
    records: Sequence[tuple[int, Record]]
    comparisons: Sequence[tuple[int, Comparison]]
    scalars: Sequence[tuple[float, ...]]
    smoothed: torch.Tensor
    log: StepLog | None = None

    def nbytes(self) -> int:
        """Bytes of all records, comparisons, preconditioners and states."""
        log = 0 if self.log is None else self.log.nbytes()
        packed = sum(block.packing.record_bytes for block in self.blocks)
        exact = sum(comparison.nbytes() for _, comparison in self.comparisons)
        return packed + sum(record.nbytes() for _, record in self.records) + exact + self.smoothed.nbytes + log


@dataclass(frozen=True, slots=True)
class Segment:
    """The records of ``steps`` consecutive steps.

    Attributes:
        visit_ids: Shape ``(visits,)``, int64: sample ids, in the order seen.
        curvature: Shape ``(visits,)``, fp32: see :mod:`gradkern.rollback._curvature`; NaN where it is not known.
        visit_bounds: Shape ``(steps + 1,)``, int64: step ``t`` holds the visits from ``[t]`` to ``[t + 1]``.
        scalars: Shape ``(steps, parameters, 5)``, fp64, in the order of :class:`StepScalars`; NaN where a
            step left a parameter alone.
        preconditioners: By parameter: tensors of shape ``(steps, ...)`` as
            :func:`~gradkern.rollback._smoothing.smooth` makes them; zeros where a step left the parameter alone.
        records: By stream.
        fidelity: Shape ``(n, 4)``, fp64: stream, ``‖G‖²``, ``⟨G, R⟩``, ``‖R‖²``.
        comparisons: Shape ``(steps,)``, int64: how many rows of ``fidelity`` are of each step; None in a ledger written
            before they were counted.
        log: What replaying needs; None where the run cannot be.
    """

    visit_ids: torch.Tensor
    curvature: torch.Tensor
    visit_bounds: torch.Tensor
    scalars: torch.Tensor
    preconditioners: Mapping[int, tuple[torch.Tensor, ...]]
    records: Mapping[int, Record]
    fidelity: torch.Tensor
    comparisons: torch.Tensor | None
    log: ReplayLog | None = None

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.visit_bounds) - 1

    @classmethod
    def build(cls, layout: Layout, steps: Sequence[StepRecord]) -> Segment:
        """Join the records of consecutive steps; all tensors end in host memory."""
        bounds = torch.tensor([0] + [len(step.ids) for step in steps]).cumsum(0)
        scalars = torch.tensor([step.scalars for step in steps], dtype=torch.float64)
        return cls(
            visit_ids=torch.cat([step.ids for step in steps]),
            curvature=_curvature(bounds.tolist(), steps),
            visit_bounds=bounds,
            scalars=scalars,
            preconditioners=_split_smoothed(layout, scalars, steps),
            records=_join_records(*_unpacked(bounds.tolist(), steps)),
            fidelity=_measured(steps),
            comparisons=torch.tensor([len(step.comparisons) for step in steps]),
            log=_all_or_none(ReplayLog.build, [step.log for step in steps]),
        )

    @classmethod
    def join(cls, layout: Layout, parts: Sequence[Segment]) -> Segment:
        """Put consecutive segments into one."""
        first_visits = torch.tensor([0] + [len(part.visit_ids) for part in parts]).cumsum(0).tolist()
        ends = [part.visit_bounds[1:] + first for part, first in zip(parts, first_visits, strict=False)]
        return cls(
            visit_ids=torch.cat([part.visit_ids for part in parts]),
            curvature=torch.cat([part.curvature for part in parts]),
            visit_bounds=torch.cat([parts[0].visit_bounds[:1], *ends]),
            scalars=torch.cat([part.scalars for part in parts]),
            preconditioners=_stack_preconditioners(parts),
            records=_join_records(first_visits, [part.records.items() for part in parts]),
            fidelity=torch.cat([part.fidelity for part in parts]),
            comparisons=_all_or_none(torch.cat, [part.comparisons for part in parts]),
            log=_all_or_none(ReplayLog.join, [part.log for part in parts]),
        )

    def head(self, steps: int) -> Segment:
        """The first ``steps`` steps, as they were joined before the others came.

        Raises:
            LedgerError: Which comparisons are theirs is not known.
        """
        if self.comparisons is None:
            raise LedgerError(
                "a segment cannot be cut: it was written by a gradkern that did not yet count comparisons by step; go "
                "back to a step after which a file ends"
            )
        visits = int(self.visit_bounds[steps])
        records = {stream: record.between(0, visits).narrowed() for stream, record in self.records.items()}
        took_part = (self.scalars[:steps, :, 0] == self.scalars[:steps, :, 0]).any(dim=0).tolist()
        return Segment(
            visit_ids=self.visit_ids[:visits],
            curvature=self.curvature[:visits],
            visit_bounds=self.visit_bounds[: steps + 1],
            scalars=self.scalars[:steps],
            preconditioners={
                parameter: tuple(tensor[:steps] for tensor in stored)
                for parameter, stored in self.preconditioners.items()
                if took_part[parameter]
            },
            records={stream: record for stream, record in records.items() if len(record.visit)},
            fidelity=self.fidelity[: int(self.comparisons[:steps].sum())],
            comparisons=self.comparisons[:steps],
            log=None if self.log is None else ReplayLog.build(self.log.steps()[:steps]),
        )

    def step_scalars(self, step: int, parameter: int) -> StepScalars | None:
        """What step ``step`` of this segment applied to a parameter; None if it left it alone."""
        values = self.scalars[step, parameter].tolist()
        return None if values[0] != values[0] else StepScalars(*values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name; :meth:`from_tensors` reads them back."""
        named = {
            "visit/ids": self.visit_ids,
            "visit/curvature": self.curvature,
            "visit/bounds": self.visit_bounds,
            "step/scalars": self.scalars,
            "fidelity": self.fidelity,
        }
        if self.comparisons is not None:
            named["step/comparisons"] = self.comparisons
        for parameter, stored in self.preconditioners.items():
            for name, tensor in zip(_PRECONDITIONER_FIELDS[len(stored)], stored, strict=True):
                named[f"preconditioner/{parameter}/{name}"] = tensor
        for stream, record in self.records.items():
            for name, tensor in record.stored().items():
                named[f"stream/{stream}/{name}"] = tensor
        if self.log is not None:
            named |= {f"replay/{field.name}": getattr(self.log, field.name) for field in fields(self.log)}
        return share_equal(named)

    @classmethod
    def from_tensors(cls, layout: Layout, named: Mapping[str, torch.Tensor]) -> Segment:
        """Read what :meth:`tensors` gave.

        Raises:
            LedgerError: A tensor is missing or unknown.
        """
        named = unshare(named)
        grouped: dict[str, defaultdict[int, dict[str, torch.Tensor]]] = {
            "preconditioner": defaultdict(dict),
            "stream": defaultdict(dict),
        }
        for name, tensor in named.items():
            group, *path = name.split("/")
            if group in grouped:
                grouped[group][int(path[0])][path[1]] = tensor
        try:
            return cls(
                visit_ids=named["visit/ids"],
                curvature=named["visit/curvature"] if "visit/curvature" in named else _unknown(named["visit/ids"]),
                visit_bounds=named["visit/bounds"],
                scalars=named["step/scalars"],
                fidelity=named["fidelity"],
                comparisons=named.get("step/comparisons"),
                log=_read_log(named),
                preconditioners={
                    parameter: tuple(stored[name] for name in _PRECONDITIONER_FIELDS[len(stored)])
                    for parameter, stored in grouped["preconditioner"].items()
                },
                records={
                    stream: read_record(layout.streams[stream].kind, stored)
                    for stream, stored in grouped["stream"].items()
                },
            )
        except (KeyError, IndexError, TypeError) as error:
            raise LedgerError(
                f"a segment does not hold the tensors of this ledger format ({error}); it was written by "
                f"another version of gradkern: read it with that version"
            ) from error


def _read_log(named: Mapping[str, torch.Tensor]) -> ReplayLog | None:
    if "replay/options" not in named:
        return None
    return ReplayLog(**{field.name: named[f"replay/{field.name}"] for field in fields(ReplayLog)})


def _all_or_none(join: Callable[[list[_Part]], _Whole], parts: Sequence[_Part | None]) -> _Whole | None:
    known = [part for part in parts if part is not None]
    return join(known) if len(known) == len(parts) else None


def _unknown(visit_ids: torch.Tensor) -> torch.Tensor:
    """The curvature in a ledger written before it was measured."""
    return torch.full(visit_ids.shape, torch.nan)


_PRECONDITIONER_FIELDS: Mapping[int, tuple[str, ...]] = {1: ("values",), 2: ("rows", "columns")}


def _unpacked(
    bounds: Sequence[int], steps: Sequence[StepRecord]
) -> tuple[list[int], list[Iterable[tuple[int, Record]]]]:
    """The records of all steps as parts, and the first visit of each part: many blocks of one packing in one part."""
    placed = [
        [block._replace(visit=block.visit + first) for block in step.blocks]
        for first, step in zip(bounds, steps, strict=False)
    ]
    parts: list[Iterable[tuple[int, Record]]] = []
    for packings, run in groupby(placed, key=_packings):
        streams = [shape.stream for packing in packings for shape in packing.shapes]
        if len(set(streams)) == len(streams):
            parts += map(unpack, zip(*run, strict=True))
            continue
        # A stream has several places in a step, and its visits must ascend from step to step.
        for packing, group in groupby((block for blocks in run for block in blocks), key=_packing):
            same = list(group)
            parts += [unpack([block]) for block in same] if packing.repeats else [unpack(same)]
    firsts = [0] * len(parts) + list(bounds[: len(steps)])
    return firsts, parts + [step.records for step in steps]


def _packing(block: Block) -> Packing:
    return block.packing


def _packings(blocks: Sequence[Block]) -> tuple[Packing, ...]:
    return tuple(map(_packing, blocks))


def _join_records(first_visits: Sequence[int], parts: Sequence[Iterable[tuple[int, Record]]]) -> dict[int, Record]:
    """By stream, of parts that each number their visits from 0."""
    records: defaultdict[int, list[Record]] = defaultdict(list)
    firsts: defaultdict[int, list[int]] = defaultdict(list)
    for first_visit, part in zip(first_visits, parts, strict=False):
        for stream, record in part:
            records[stream].append(record)
            firsts[stream].append(first_visit)
    joined = {}
    for stream, each in records.items():
        together = type(each[0]).join(each)
        counts = torch.tensor([len(record.visit) for record in each])
        shifts = torch.tensor(firsts[stream], dtype=together.visit.dtype).repeat_interleave(counts)
        joined[stream] = replace(together, visit=together.visit + shifts)
    return joined


def _curvature(bounds: Sequence[int], steps: Sequence[StepRecord]) -> torch.Tensor:
    """The curvature weight of every visit; NaN where none was found."""
    numbers = [torch.empty(0, dtype=torch.int64)]
    bends = [torch.empty(0, 2, dtype=torch.float64)]
    for first, step in zip(bounds, steps, strict=False):
        numbers += [each + first for each, _ in step.bends]
        bends += [each.cpu() for _, each in step.bends]
    all_numbers = torch.cat(numbers)
    sums = torch.full((bounds[-1], 2), torch.nan, dtype=torch.float64)
    sums[all_numbers] = 0.0
    return curvature_weights(sums.index_add_(0, all_numbers, torch.cat(bends)))


def _measured(steps: Sequence[StepRecord]) -> torch.Tensor:
    found = [(stream, comparison.measure()) for step in steps for stream, comparison in step.comparisons]
    rows = [(stream, each.exact_sq, each.inner, each.record_sq) for stream, each in found]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def _split_smoothed(
    layout: Layout, scalars: torch.Tensor, steps: Sequence[StepRecord]
) -> dict[int, tuple[torch.Tensor, ...]]:
    """By parameter, of those that took part in any of the steps."""
    all_of = torch.stack([step.smoothed for step in steps])
    took_part = (~scalars[:, :, 0].isnan()).any(dim=0).tolist()
    split: dict[int, tuple[torch.Tensor, ...]] = {}
    start = 0
    for index, info in enumerate(layout.parameters):
        if not info.owned:
            continue
        sizes = smoothed_sizes(info.shape)
        if took_part[index]:
            columns = all_of[:, start : start + sum(sizes)].split(list(sizes), dim=1)
            split[index] = tuple(each.contiguous() for each in columns)
        start += sum(sizes)
    return split


def _stack_preconditioners(parts: Sequence[Segment]) -> dict[int, tuple[torch.Tensor, ...]]:
    """Those of all steps; zeros in parts whose steps left a parameter alone."""
    shapes = {
        index: [each.shape[1:] for each in stored] for part in parts for index, stored in part.preconditioners.items()
    }
    stacked = {}
    for index, fields_of in shapes.items():
        rows = [
            part.preconditioners.get(index) or tuple(torch.zeros(part.steps, *shape).bfloat16() for shape in fields_of)
            for part in parts
        ]
        stacked[index] = tuple(torch.cat(each) for each in zip(*rows, strict=True))
    return stacked
