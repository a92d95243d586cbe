"""A segment: the records of some consecutive optimizer steps, as one flat set of named tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from gradkern.errors import LedgerError
from gradkern.rollback._fidelity import Fidelity
from gradkern.rollback._layout import Layout
from gradkern.rollback._records import RECORD_TYPES, Record
from gradkern.rollback._replay_log import ReplayLog, StepLog
from gradkern.rollback._sharing import share_equal, unshare

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
        curvature: Shape ``(visits,)``, fp32: see :mod:`gradkern.rollback._curvature`; NaN where it is not known.
        records: ``(stream, record)``; ``visit`` counts from the first of ``ids``.
        fidelity: ``(stream, comparison)``.
        scalars: By parameter; parameters the step left alone are missing.
        preconditioners: The smoothed preconditioner of every owned parameter that took part.
        log: What replaying needs; None where the run cannot be.
    """

    ids: torch.Tensor
    curvature: torch.Tensor
    records: Sequence[tuple[int, Record]]
    fidelity: Sequence[tuple[int, Fidelity]]
    scalars: Mapping[int, StepScalars]
    preconditioners: Mapping[int, tuple[torch.Tensor, ...]]
    log: StepLog | None = None

    def nbytes(self) -> int:
        """Bytes of all records, preconditioners and states."""
        preconditioners = sum(tensor.nbytes for stored in self.preconditioners.values() for tensor in stored)
        log = 0 if self.log is None else self.log.nbytes()
        return sum(record.nbytes() for _, record in self.records) + preconditioners + log


@dataclass(frozen=True, slots=True)
class Segment:
    """The records of ``steps`` consecutive steps.

    Attributes:
        visit_ids: Shape ``(visits,)``, int64: sample ids, in the order seen.
        curvature: Shape ``(visits,)``, fp32: as in :class:`StepRecord`.
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
        return cls(
            visit_ids=torch.cat([step.ids for step in steps]),
            curvature=torch.cat([step.curvature for step in steps]),
            visit_bounds=bounds,
            scalars=_join_scalars(steps, len(layout.parameters)),
            preconditioners=_join_preconditioners(steps),
            records=_join_records(layout, bounds.tolist(), [step.records for step in steps]),
            fidelity=torch.tensor(
                [
                    (stream, comparison.exact_sq, comparison.inner, comparison.record_sq)
                    for step in steps
                    for stream, comparison in step.fidelity
                ],
                dtype=torch.float64,
            ).reshape(-1, 4),
            comparisons=torch.tensor([len(step.fidelity) for step in steps]),
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
            records=_join_records(layout, first_visits, [part.records.items() for part in parts]),
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
            for name, tensor in record.tensors().items():
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
                    stream: RECORD_TYPES[layout.streams[stream].kind].from_tensors(stored)
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


def _join_records(
    layout: Layout, first_visits: Sequence[int], parts: Sequence[Iterable[tuple[int, Record]]]
) -> dict[int, Record]:
    """By stream, of parts that each number their visits from 0."""
    records: defaultdict[int, list[Record]] = defaultdict(list)
    for first_visit, part in zip(first_visits, parts, strict=False):
        for stream, record in part:
            records[stream].append(replace(record, visit=record.visit + first_visit))
    return {stream: RECORD_TYPES[layout.streams[stream].kind].join(each) for stream, each in records.items()}


def _join_scalars(steps: Sequence[StepRecord], parameters: int) -> torch.Tensor:
    scalars = torch.full((len(steps), parameters, len(fields(StepScalars))), torch.nan, dtype=torch.float64)
    for row, step in enumerate(steps):
        for parameter, applied in step.scalars.items():
            values = [applied.lr, applied.decay, applied.momentum, applied.grad_weight, applied.multiplier]
            scalars[row, parameter] = torch.tensor(values, dtype=torch.float64)
    return scalars


def _join_preconditioners(steps: Sequence[StepRecord]) -> dict[int, tuple[torch.Tensor, ...]]:
    joined: dict[int, tuple[torch.Tensor, ...]] = {}
    for row, step in enumerate(steps):
        for parameter, stored in step.preconditioners.items():
            if parameter not in joined:
                joined[parameter] = tuple(
                    torch.zeros((len(steps), *tensor.shape), dtype=tensor.dtype) for tensor in stored
                )
            for target, tensor in zip(joined[parameter], stored, strict=True):
                target[row] = tensor.cpu()
    return joined


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
