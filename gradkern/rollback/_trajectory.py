"""What every step of a recorded training started from, from the last step to the first.

The training is run again once, compared with the ledger's digests on the way. Where the start of every step fits a
budget of bytes all are kept. Otherwise about ``sqrt(T)`` of ``T`` are, and the steps between two of them are run once
more when their turn comes (Chen and others, "Training deep nets with sublinear memory cost", 2016), which is safe
because a replay repeats every bit: the time of two trainings, and at most ``2 sqrt(T)`` starts in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradkern.errors import LedgerError
from gradkern.rollback._replay import LoggedStep, Replayer, Training, named_tensors

__all__ = ["StepStart", "Trajectory"]

# Bytes that the starts of all steps may take: parameters, buffers and what the optimizer keeps.
_KEEP_BYTES = 1 << 28


# Of a loss that is computed once more, by other kernels where those of the training cannot be differentiated twice.
_LOSS_ERROR = 1e-4


@dataclass(frozen=True, slots=True)
class StepStart:
    """What a step started from.

    Attributes:
        training: Its model has the parameters, buffers and modes of then until the next start is asked for. The state
            of its optimizer is not that of then.
        step: The ledger's log of the step.
        state: What the optimizer kept of each parameter, by its name; empty before its first step.
        told: The losses of the step's micro-batches when it was made.
    """

    training: Training
    step: LoggedStep
    state: Mapping[str, Mapping[str, Tensor]]
    told: Sequence[float]
    _replayer: Replayer

    def as_recorded(self) -> AbstractContextManager[None]:
        """Run the model within: see :meth:`gradkern.rollback._replay.Replayer.as_recorded`."""
        return self._replayer.as_recorded()

    def losses(self) -> Iterator[Tensor]:
        """The losses of the step's micro-batches, with their graphs; only within :meth:`as_recorded`.

        Raises:
            LedgerError: A loss is not what it was when the step was made.
        """
        for loss, told in zip(self.training.losses(self.step), self.told, strict=True):
            if not abs(float(loss.detach()) - told) <= _LOSS_ERROR * (1.0 + abs(told)):
                raise LedgerError(
                    f"a micro-batch of step {self.step.number + 1} had the loss {told:.6g} when the training was run "
                    f"again, and has {float(loss.detach()):.6g} when run once more: fetch must give the same batch "
                    f"whenever it is asked for the same samples, random numbers aside, which are those of then"
                )
            yield loss


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A training between two steps.

    Attributes:
        tensors: Parameters and buffers.
        optimizer: Of the optimizer, as ``state_dict()`` gives it.
    """

    tensors: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]

    @classmethod
    def of(cls, training: Training) -> _Snapshot:
        tensors = {name: each.detach().clone() for name, each in named_tensors(training.model).items()}
        saved = training.optimizer.state_dict()
        # By hand what there is much of: copy.deepcopy takes ten times as long.
        states = {number: _copied(state) for number, state in saved.pop("state").items()}
        return cls(tensors, {**copy.deepcopy(saved), "state": states})

    def nbytes(self) -> int:
        kept = [each for state in self.optimizer["state"].values() for each in state.values()]
        return sum(each.nbytes for each in [*self.tensors.values(), *kept] if isinstance(each, Tensor))

    def load_model(self, training: Training) -> None:
        named = named_tensors(training.model)
        with torch.no_grad():
            for name, value in self.tensors.items():
                named[name].copy_(value)


class Trajectory:
    """A recorded training that is run again, and then gone through backwards, once.

    Args:
        replayer: Of the training.

    Raises:
        LedgerError: Running it again gave something else than was recorded.
    """

    def __init__(self, replayer: Replayer) -> None:
        self._replayer = replayer
        self._spacing = 1
        self._kept: dict[int, _Snapshot] = {}
        self._losses: list[Sequence[float]] = []
        self._training = replayer.check(_untold, self._observe)

    def backwards(self) -> Iterator[StepStart]:
        """The start of every step from the last to the first; each is forgotten when the next one is asked for."""
        length = _root(self._replayer.steps)
        for first in reversed(range(0, self._replayer.steps, length)):
            steps = list(self._replayer.logged(first, first + length))
            snapshots = self._snapshots(steps)
            while steps:
                step, snapshot = steps.pop(), snapshots.pop()
                snapshot.load_model(self._training)
                self._training.set_options(step)
                yield StepStart(
                    self._training, step, self._named_state(snapshot), self._losses[step.number], self._replayer
                )

    def _observe(self, made: int, training: Training, losses: Sequence[float]) -> None:
        """Keep what the next step starts from, or not."""
        if made:
            self._losses.append(losses)
        if made == self._replayer.steps:
            return
        if made % self._spacing == 0:
            self._kept[made] = _Snapshot.of(training)
        # Before the first step the optimizer has no state.
        if made == 1 and self._replayer.steps * self._kept[1].nbytes() > _KEEP_BYTES:
            self._spacing = _root(self._replayer.steps)
            del self._kept[1]

    def _snapshots(self, steps: Sequence[LoggedStep]) -> list[_Snapshot]:
        """The starts of consecutive steps, the first of which is kept."""
        if self._spacing == 1:
            return [self._kept.pop(step.number) for step in steps]
        found = [self._kept.pop(steps[0].number)]
        found[0].load_model(self._training)
        self._training.optimizer.load_state_dict(copy.deepcopy(dict(found[0].optimizer)))
        with self._replayer.as_recorded():
            for step in steps[:-1]:
                self._training.make(step)
                found.append(_Snapshot.of(self._training))
        return found

    def _named_state(self, snapshot: _Snapshot) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state by parameter; in its ``state_dict()`` parameters are numbered through the groups."""
        names = {id(each): name for name, each in self._training.model.named_parameters()}
        trained = [each for group in self._training.optimizer.param_groups for each in group["params"]]
        return {names[id(trained[number])]: dict(state) for number, state in snapshot.optimizer["state"].items()}


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _root(steps: int) -> int:
    """The square root, rounded up, and at least 1."""
    return math.isqrt(max(steps - 1, 0)) + 1


def _untold(step: int, total: int) -> None:
    """Nobody asked for progress."""
