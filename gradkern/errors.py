"""Errors that gradkern raises beyond the standard types.

Bad arguments raise ``ValueError`` or ``TypeError`` as in torch; these classes name states and promises that
have no standard type. Every message says what is wrong, what was got, what was expected and the way out.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "BudgetExceededError",
    "GradkernError",
    "LedgerError",
    "PlanInfeasibleError",
    "UndoRefusedError",
    "UnstableInfluenceError",
]


class GradkernError(RuntimeError):
    """Base of every error that only gradkern raises."""


class BackendUnavailableError(GradkernError):
    """A backend was asked for by name and cannot run here; the message says why."""


class BudgetExceededError(GradkernError):
    """An allocation would have passed the cap set by ``checkpoint.enforce``."""


class PlanInfeasibleError(GradkernError):
    """No checkpoint plan fits the budget; the message names the least feasible one.

    Attributes:
        least_feasible_bytes: The smallest budget, in bytes, for which a plan exists.
    """

    def __init__(self, message: str, *, least_feasible_bytes: int) -> None:
        super().__init__(message)
        self.least_feasible_bytes = least_feasible_bytes


class LedgerError(GradkernError):
    """A rollback ledger is missing, damaged, already there, or belongs to another model."""


class UndoRefusedError(GradkernError):
    """Taking samples back by what is known of them would harm the model rather than restore it."""


class UnstableInfluenceError(GradkernError):
    """What an estimator found is noise: influence grew on its way back to the first step, or made a loss not finite.

    Attributes:
        growth: Of each query, the norm at the first step over that at the last; above 1.25, or NaN, where it failed.
    """

    def __init__(self, message: str, *, growth: tuple[float, ...]) -> None:
        super().__init__(message)
        self.growth = growth
