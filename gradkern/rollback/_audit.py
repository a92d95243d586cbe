"""Checks of a ledger's files: that they are whole, fit together, and fit what conservation was followed with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gradkern.errors import LedgerError
from gradkern.rollback._layout import Layout
from gradkern.rollback._segment import Segment
from gradkern.rollback._store import FileEntry, StoreReader
from gradkern.rollback._together import StepsDigest
from gradkern.rollback._verify import Check

__all__ = ["CheckedFiles", "RecordAudit", "check_files"]


@dataclass(frozen=True, slots=True)
class CheckedFiles:
    """What reading every file found.

    Attributes:
        checks: The first says whether files are damaged.
        fidelity: The comparisons of records with exact gradients, shape ``(n, 4)``, as in a segment.
    """

    checks: tuple[Check, ...]
    fidelity: torch.Tensor


def check_files(store: StoreReader) -> CheckedFiles:
    """Read every committed file once."""
    fidelity = [torch.empty(0, 4, dtype=torch.float64)]
    damaged: list[str] = []
    problems: list[str] = []
    made = set()
    for part in store.parts:
        audit = RecordAudit(store.layout, is_partial="bytes_per_visit" in part.facts)
        digest = StepsDigest(store.layout, store.steps)
        deltas: dict[str, torch.Tensor] | None = None
        for entry in part.files:
            try:
                tensors = part.load(entry)
                if entry.role == "segment":
                    segment = Segment.from_tensors(store.layout, tensors)
                    audit.add(entry, segment)
                    digest.add(segment)
                    fidelity.append(segment.fidelity)
            except LedgerError as error:
                damaged.append(str(error))
                continue
            if entry.role == "deltas":
                deltas = tensors
        if part.closing is not None and deltas is not None:
            audit.finish(part.closing.decays, deltas)
        where = f"in {part.path.name}: " if len(store.parts) > 1 else ""
        problems += [where + problem for problem in audit.problems]
        made.add(digest.hex())
    detail = "; ".join(damaged) or f"all {len(store.files)} files match their checksums"
    files = Check("damaged files", not damaged, float(len(damaged)), 0.0, detail)
    if damaged:
        return CheckedFiles((files, Check("records", None, None, None, "a file is damaged")), torch.cat(fidelity))
    detail = "; ".join(problems) or "every record belongs to a visit, every step and decay is accounted for"
    checks = [files, Check("records", not problems, float(len(problems)), 0.0, detail)]
    if len(store.parts) > 1:
        same = f"all {len(store.parts)} ranks made the same {store.steps} steps"
        differ = "ranks differ in learning rates, decays, clip coefficients or preconditioners"
        detail = same if len(made) == 1 else differ
        checks.append(Check("ranks", len(made) == 1, float(len(made) - 1), 0.0, detail))
    return CheckedFiles(tuple(checks), torch.cat(fidelity))


class RecordAudit:
    """Looks at one segment after the other, in order of steps, and keeps what does not fit.

    Args:
        layout: The ledger's layout.
        is_partial: Whether a parameter may have moved without a record, for want of bytes.

    Attributes:
        problems: One sentence for each, in the order found.
    """

    def __init__(self, layout: Layout, *, is_partial: bool = False) -> None:
        self._layout = layout
        self._is_partial = is_partial
        self._end_step = 0
        self._decays = [1.0] * len(layout.parameters)
        self._recorded: set[int] = set()
        self.problems: list[str] = []

    def add(self, entry: FileEntry, segment: Segment) -> None:
        """Check one segment: its place, its visits, and that every record belongs to one of them."""
        visits = len(segment.visit_ids)
        bounds = segment.visit_bounds.tolist()
        if entry.first_step != self._end_step or segment.steps != entry.end_step - entry.first_step:
            self.problems.append(f"{entry.name} holds {segment.steps} steps where {self._end_step} came before")
        if bounds[0] != 0 or bounds[-1] != entry.visits or visits != entry.visits or bounds != sorted(bounds):
            self.problems.append(f"{entry.name} bounds {bounds[-1]} of {visits} visits, {entry.visits} were committed")
        for stream, record in segment.records.items():
            if len(record.visit) and not 0 <= int(record.visit.min()) <= int(record.visit.max()) < visits:
                self.problems.append(f"{entry.name} has records of stream {stream} for visits that it does not hold")
            if len(record.visit):
                self._recorded.add(self._layout.streams[stream].parameter)
        self._end_step = entry.end_step
        for step in range(segment.steps):
            for index in range(len(self._decays)):
                scalars = segment.step_scalars(step, index)
                if scalars is not None:
                    self._decays[index] *= scalars.decay

    def finish(self, decays: Sequence[float], deltas: Mapping[str, torch.Tensor]) -> None:
        """Compare a complete ledger's records with the decays and sums that were written at close."""
        for index, info in enumerate(self._layout.parameters):
            if not math.isclose(self._decays[index], decays[index], rel_tol=1e-12):
                self.problems.append(
                    f"the decays of {info.name} multiply to {self._decays[index]:.9g} over the recorded steps, to "
                    f"{decays[index]:.9g} at close"
                )
            is_missing = index not in self._recorded and not self._is_partial
            if info.owned and is_missing and bool(deltas[info.name].any()):
                self.problems.append(f"{info.name} moved but has no record")
