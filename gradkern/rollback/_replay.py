"""Running a recorded training again, in whole or without some samples, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradkern.errors import LedgerError
from gradkern.loss import Batch, LossFn, compute_loss
from gradkern.rollback._reading import read_segment
from gradkern.rollback._replay_log import StepLog, digest_model
from gradkern.rollback._store import StoreReader

__all__ = ["LoggedStep", "Replay", "Replayer", "Training", "named_tensors"]


@dataclass(frozen=True)
class Replay:
    """What a ledger cannot know of the training that it recorded; all of it must be as it was then.

    Attributes:
        fetch: Takes sample ids, shape ``(n,)``, int64, and returns the batch of those samples in that order, as the
            model saw it. Asked more than once for the same samples, with torch's generator as it was then.
        make_optimizer: Takes a model and returns the optimizer over it, with the options of the first step.
        loss_fn: As in :func:`gradkern.loss.compute_loss`; a mean over the batch, or whatever was differentiated.
        accumulate: What the loss was divided by before ``backward``.
    """

    fetch: Callable[[Tensor], Batch]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss_fn: LossFn | None = None
    accumulate: int = 1


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """What the ledger knows of how an optimizer step came about.

    Attributes:
        number: From 0.
        log: Its log.
        ids: Sample ids of each micro-batch.
    """

    number: int
    log: StepLog
    ids: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Training:
    """A training that is under way again.

    Attributes:
        model: The model, which steps change.
        optimizer: Over its parameters.
        replay: What both were made from.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    replay: Replay

    def set_options(self, step: LoggedStep) -> None:
        """Give modules the modes and the optimizer the options that they had at a step."""
        is_evaluating = set(step.log.options["eval"])
        for name, module in self.model.named_modules():
            module.training = name not in is_evaluating
        for group, values in zip(self.optimizer.param_groups, step.log.options["groups"], strict=True):
            for key, value in values.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = tuple(value) if isinstance(group.get(key), tuple) else value

    def losses(self, step: LoggedStep) -> Iterator[Tensor]:
        """Run the model on each micro-batch of a step, as it is, with the random numbers that it had.

        Returns:
            What was differentiated for each; micro-batches without a sample are left out.
        """
        for ids, state in zip(step.ids, step.log.states, strict=True):
            if len(ids):
                # A copy: torch reads it as aligned, which a view into a file's bytes need not be.
                torch.set_rng_state(state.clone())
                loss = compute_loss(self.model, self.replay.fetch(ids), self.replay.loss_fn)
                yield loss / self.replay.accumulate if self.replay.accumulate != 1 else loss

    def make(self, step: LoggedStep) -> list[float]:
        """Make a step, and return its losses."""
        self.set_options(step)
        found = []
        for loss in self.losses(step):
            loss.backward()
            found.append(float(loss.detach()))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found


class Replayer:
    """Runs a recorded training again on a copy of a model.

    Args:
        store: The ledger.
        model: A model that the ledger's layout fits, of which only what the training did not change is used.
        replay: The rest of what it takes.
        otherwise: What needs no replay, for messages.

    Raises:
        LedgerError: The ledger was recorded without ``replayable=True``, or by several ranks.
    """

    def __init__(self, store: StoreReader, model: nn.Module, replay: Replay, otherwise: str) -> None:
        if len(store.parts) > 1:
            raise LedgerError(
                f"the training cannot be run again: {len(store.parts)} ranks recorded it together, and one process "
                f"cannot repeat what they did bit for bit; use what needs no replay: {otherwise}"
            )
        if store.facts.get("replayable") != "1":
            raise LedgerError(
                "the training cannot be run again: the ledger was recorded without replayable=True, and lacks its "
                f"random numbers and options; record with it, or use what needs no replay: {otherwise}"
            )
        self._store = store
        self._model = model
        self._replay = replay
        self._otherwise = otherwise

    @property
    def steps(self) -> int:
        """Number of steps of the training."""
        return self._store.steps

    def check(
        self,
        progress: Callable[[int, int], None],
        observe: Callable[[int, Training, Sequence[float]], None] | None = None,
    ) -> Training:
        """Run the training as it was, all samples included, and compare it with what the ledger knows came out.

        Args:
            progress: As for :meth:`train`.
            observe: Called before the first step and after each: with the number of steps made, the training, and the
                losses of the last step's micro-batches.

        Returns:
            The training, at its end.

        Raises:
            LedgerError: Something else came out, or the ledger knows nothing to compare with.
        """
        training, compared = self._run(torch.empty(0, dtype=torch.int64), progress, observe)
        if not compared:
            raise LedgerError(
                f"the training cannot be run again: the ledger ends after {self._store.steps} steps without close(), "
                f"before the first of its digests, so that nothing would tell a wrong replay; use {self._otherwise}"
            )
        return training

    def train(self, forgotten: Tensor, progress: Callable[[int, int], None]) -> nn.Module:
        """Train without some samples.

        Args:
            forgotten: Their ids.
            progress: Called with the number of steps made and of all.

        Returns:
            The model that comes out, a new one.
        """
        return self._run(forgotten, progress, None)[0].model

    def begin(self) -> Training:
        """A copy of the model with the parameters and buffers that training began with, and an optimizer over it."""
        model = copy.deepcopy(self._model)
        stored = self._store.load_role("initial")
        named = named_tensors(model)
        with torch.no_grad():
            for name, value in stored.items():
                named[name].copy_(value)
        model.zero_grad()
        return Training(model, self._replay.make_optimizer(model), self._replay)

    def changed_buffers(self) -> list[str]:
        """Names of the buffers, of floating point, that are not in the model as they were when training began."""
        stored, now = self._store.load_role("initial"), dict(self._model.named_buffers())
        return [
            name
            for name, buffer in now.items()
            if buffer.is_floating_point() and not torch.equal(stored[f"buffer/{name}"], buffer)
        ]

    def logged(self, first: int = 0, end: int | None = None) -> Iterator[LoggedStep]:
        """The steps from ``first`` to before ``end``, read from the ledger one file at a time."""
        end = self._store.steps if end is None else end
        for entry in self._store.segments:
            if entry.end_step <= first or entry.first_step >= end:
                continue
            segment = read_segment(self._store, entry)
            if segment.log is None:
                raise LedgerError(f"{entry.name} of the ledger lacks what a replay needs; restore it from a copy")
            bounds = segment.visit_bounds.tolist()
            for at, log in enumerate(segment.log.steps()):
                if first <= entry.first_step + at < end:
                    ids = segment.visit_ids[bounds[at] : bounds[at + 1]].split(list(log.sizes))
                    yield LoggedStep(entry.first_step + at, log, ids)

    @contextmanager
    def as_recorded(self) -> Iterator[None]:
        """With as many threads as then, and random numbers that nobody else notices."""
        before = torch.get_num_threads()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_num_threads(int(self._store.facts["threads"]))
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def _run(
        self,
        forgotten: Tensor,
        progress: Callable[[int, int], None],
        observe: Callable[[int, Training, Sequence[float]], None] | None,
    ) -> tuple[Training, int]:
        """The training at its end, and how often it was compared on the way; never once a sample is missing."""
        training = self.begin()
        is_whole, compared = True, 0
        if observe is not None:
            observe(0, training, [])
        with self.as_recorded():
            for step in self.logged():
                kept = [each[~torch.isin(each, forgotten)] for each in step.ids]
                is_whole &= all(len(each) == len(all_of) for each, all_of in zip(kept, step.ids, strict=True))
                losses = training.make(replace(step, ids=kept))
                if observe is not None:
                    observe(step.number + 1, training, losses)
                if is_whole and step.log.digest is not None:
                    compared += 1
                    if digest_model(training.model) != step.log.digest:
                        raise self._went_apart(step.number + 1)
                progress(step.number + 1, self._store.steps)
        closing = self._store.closing
        if is_whole and closing is not None:
            compared += 1
            layout = self._store.layout
            if layout.digest(layout.trained_parameters(training.model)) != closing.parameter_digest:
                raise self._went_apart(self._store.steps)
        return training, compared

    def _went_apart(self, steps: int) -> LedgerError:
        facts = self._store.facts
        return LedgerError(
            f"running the training again gave other parameters after {steps} steps than were recorded: fetch, "
            f"loss_fn, accumulate or make_optimizer are not those of the run or changed in it, micro-batches were "
            f"discarded or gradients zeroed rather than set to None, forward ran outside recorder.batch, random "
            f"numbers come from elsewhere than torch's generator, parameters that are not trained have changed, "
            f"or this machine computes otherwise (recorded with torch {facts['torch']} and {facts['threads']} threads, "
            f"this is torch {torch.__version__})"
        )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that a ledger's start has them under."""
    buffers = {f"buffer/{name}": each for name, each in model.named_buffers()}
    return {**dict(model.named_parameters()), **buffers}
