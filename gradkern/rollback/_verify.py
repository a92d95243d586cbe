"""Checks of a finished ledger, recomputed from its files and the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gradkern.rollback._conservation import Balance
from gradkern.rollback._layout import Layout, ParameterInfo

__all__ = ["Check", "Compression", "VerifyReport", "compression", "conservation_checks", "report_lines"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: What was checked.
        passed: Whether it held; None when it could not be run.
        value: The measured number; None when it could not be run.
        limit: The largest value that passes; None for numbers that are only reported.
        detail: One sentence for a person.
        least: The smallest value that passes; None where small is good.
    """

    name: str
    passed: bool | None
    value: float | None
    limit: float | None
    detail: str
    least: float | None = None


@dataclass(frozen=True, slots=True)
class Compression:
    """How well compressed records stand for the exact gradients, over the samples that were compared.

    Attributes:
        layer: The layer's name.
        parameter: The parameter's name.
        cosine: Mean cosine between gradient and record.
        energy: Captured share of the energy, ``1 - sum ‖G - R‖² / sum ‖G‖²``.
        compared: Number of samples compared.
    """

    layer: str
    parameter: str
    cosine: float
    energy: float
    compared: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What :meth:`Ledger.verify` found; ``str(report)`` is a readable table.

    Attributes:
        checks: All checks.
        compression: Per recorded stream; not part of the verdict, because the law is checked on exact factors.
    """

    checks: tuple[Check, ...]
    compression: tuple[Compression, ...]

    @property
    def passed(self) -> bool:
        """True only if every check could be run and held."""
        return all(check.passed is True for check in self.checks)

    def __str__(self) -> str:
        lines = report_lines("ledger verification", self.passed, self.checks)
        if self.compression:
            worst = min(self.compression, key=lambda entry: entry.cosine)
            mean = sum(entry.cosine for entry in self.compression) / len(self.compression)
            lines.append(
                f"  [info] compression: mean cosine {mean:.3f} over {len(self.compression)} streams, worst "
                f"{worst.cosine:.3f} at {worst.layer} ({worst.parameter})"
            )
        return "\n".join(lines)


def report_lines(title: str, passed: bool, checks: Sequence[Check]) -> list[str]:
    """A verdict and its checks, for a person."""
    marks = {True: "pass", False: "FAIL", None: "not run"}
    lines = [f"{title}: {marks[passed]}"]
    for check in checks:
        value = "" if check.value is None else f" {check.value:.3g}"
        limit = "" if check.limit is None else f" (limit {check.limit:.3g})"
        least = "" if check.least is None else f" (at least {check.least:.3g})"
        lines.append(f"  [{marks[check.passed]}] {check.name}:{value}{limit}{least} {check.detail}")
    return lines


def compression(layout: Layout, fidelity: torch.Tensor) -> tuple[Compression, ...]:
    """Summarise the comparisons of a whole ledger, shape ``(n, 4)`` as in a segment, by stream."""
    by_stream: Mapping[int, Sequence[list[float]]] = _grouped(fidelity)
    summaries = []
    for stream, rows in sorted(by_stream.items()):
        nonzero = [row for row in rows if row[1] > 0]
        if not nonzero:
            continue
        exact = sum(row[1] for row in nonzero)
        missed = sum(row[1] - 2 * row[2] + row[3] for row in nonzero)
        cosines = [row[2] / math.sqrt(row[1] * row[3]) if row[3] > 0 else 0.0 for row in nonzero]
        summaries.append(
            Compression(
                layer=layout.streams[stream].layer,
                parameter=layout.parameters[layout.streams[stream].parameter].name,
                cosine=sum(cosines) / len(cosines),
                energy=1.0 - missed / exact,
                compared=len(nonzero),
            )
        )
    return tuple(summaries)


def _grouped(fidelity: torch.Tensor) -> dict[int, list[list[float]]]:
    grouped: dict[int, list[list[float]]] = {}
    for row in fidelity.tolist():
        grouped.setdefault(int(row[0]), []).append(row)
    return grouped


def conservation_checks(found: Balance, parameters: Sequence[ParameterInfo], steps: int) -> list[Check]:
    """What the conservation law says after ``steps`` steps, of all parameters together and of the worst one."""
    unowned = [info.name for info in parameters if not info.owned]
    residual = (
        f"; {found.unowned_share:.1%} of all movement is outside it, in unowned {', '.join(unowned)}" if unowned else ""
    )
    return [
        Check(
            "conservation",
            found.error <= found.bound,
            found.error,
            found.bound,
            f"sum of all recorded changes against the real one after {steps} steps{residual}",
        ),
        Check(
            "conservation by parameter",
            found.worst_ratio <= 1.0,
            found.worst_ratio,
            1.0,
            f"largest error over what rounding allows, at {found.worst_parameter or 'no parameter'}",
        ),
    ]
