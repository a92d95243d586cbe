"""Running a recorded training again, in whole or without some samples, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradkern.errors import LedgerError
from gradkern.loss import Batch, LossFn, compute_loss
from gradkern.rollback._reading import read_segment
from gradkern.rollback._replay_log import StepLog, digest_model
from gradkern.rollback._store import StoreReader

__all__ = ["Replay", "Replayer"]


@dataclass(frozen=True)
class Replay:
    """What a ledger cannot know of the training that it recorded; all of it must be as it was then.

    Attributes:
        fetch: Takes sample ids, shape ``(n,)``, int64, and returns the batch of those samples in that order, as the
            model saw it.
        make_optimizer: Takes a model and returns the optimizer over it, with the options of the first step.
        loss_fn: As in :func:`gradkern.loss.compute_loss`; a mean over the batch, or whatever was differentiated.
        accumulate: What the loss was divided by before ``backward``.
    """

    fetch: Callable[[Tensor], Batch]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss_fn: LossFn | None = None
    accumulate: int = 1


class Replayer:
    """Runs a recorded training again on a copy of a model.

    Args:
        store: The ledger.
        model: A model that the ledger's layout fits, of which only what the training did not change is used.
        replay: The rest of what it takes.

    Raises:
        LedgerError: The ledger was recorded without ``replayable=True``.
    """

    def __init__(self, store: StoreReader, model: nn.Module, replay: Replay) -> None:
        if store.facts.get("replayable") != "1":
            raise LedgerError(
                "the training cannot be run again: the ledger was recorded without replayable=True, and lacks its "
                "random numbers and options; record with it, or use what needs no replay: method='fast'"
            )
        self._store = store
        self._model = model
        self._replay = replay

    def check(self, progress: Callable[[int, int], None]) -> None:
        """Run the training as it was, all samples included, and compare it with what the ledger knows came out.

        Args:
            progress: As for :meth:`train`.

        Raises:
            LedgerError: Something else came out, or the ledger knows nothing to compare with.
        """
        if not self._run(torch.empty(0, dtype=torch.int64), progress)[1]:
            raise LedgerError(
                f"the training cannot be run again: the ledger ends after {self._store.steps} steps without close(), "
                f"before the first of its digests, so that nothing would tell a wrong replay; use method='fast'"
            )

    def train(self, forgotten: Tensor, progress: Callable[[int, int], None]) -> nn.Module:
        """Train without some samples.

        Args:
            forgotten: Their ids.
            progress: Called with the number of steps made and of all.

        Returns:
            The model that comes out, a new one.
        """
        return self._run(forgotten, progress)[0]

    def _initial(self) -> nn.Module:
        """A copy of the model with the parameters and buffers that training began with."""
        model = copy.deepcopy(self._model)
        stored = self._store.load_role("initial")
        named = {**dict(model.named_parameters()), **{f"buffer/{name}": each for name, each in model.named_buffers()}}
        with torch.no_grad():
            for name, value in stored.items():
                named[name].copy_(value)
        model.zero_grad()
        return model

    def _run(self, forgotten: Tensor, progress: Callable[[int, int], None]) -> tuple[nn.Module, int]:
        """The model that comes out, and how often it was compared on the way; never once a sample is missing."""
        model = self._initial()
        optimizer = self._replay.make_optimizer(model)
        is_whole, compared = True, 0
        with _as_recorded(int(self._store.facts["threads"])):
            for step, log, ids in self._logged():
                kept = [each[~torch.isin(each, forgotten)] for each in ids]
                is_whole &= all(len(each) == len(all_of) for each, all_of in zip(kept, ids, strict=True))
                _set_options(model, optimizer, log.options)
                for each, state in zip(kept, log.states, strict=True):
                    if len(each):
                        # A copy: torch reads it as aligned, which a view into a file's bytes need not be.
                        torch.set_rng_state(state.clone())
                        loss = compute_loss(model, self._replay.fetch(each), self._replay.loss_fn)
                        (loss / self._replay.accumulate if self._replay.accumulate != 1 else loss).backward()
                optimizer.step()
                optimizer.zero_grad()
                if is_whole and log.digest is not None:
                    compared += 1
                    if digest_model(model) != log.digest:
                        raise self._went_apart(step + 1)
                progress(step + 1, self._store.steps)
        closing = self._store.closing
        if is_whole and closing is not None:
            compared += 1
            layout = self._store.layout
            if layout.digest(layout.trained_parameters(model)) != closing.parameter_digest:
                raise self._went_apart(self._store.steps)
        return model, compared

    def _logged(self) -> Iterator[tuple[int, StepLog, list[Tensor]]]:
        """Of every step its number, its log and the ids of its micro-batches."""
        for entry in self._store.segments:
            segment = read_segment(self._store, entry)
            if segment.log is None:
                raise LedgerError(f"{entry.name} of the ledger lacks what a replay needs; restore it from a copy")
            bounds = segment.visit_bounds.tolist()
            for at, log in enumerate(segment.log.steps()):
                ids = segment.visit_ids[bounds[at] : bounds[at + 1]].split(list(log.sizes))
                yield entry.first_step + at, log, list(ids)

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


@contextmanager
def _as_recorded(threads: int) -> Iterator[None]:
    """With so many threads, and random numbers that nobody else notices."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _set_options(model: nn.Module, optimizer: torch.optim.Optimizer, options: Mapping[str, Any]) -> None:
    is_evaluating = set(options["eval"])
    for name, module in model.named_modules():
        module.training = name not in is_evaluating
    for group, values in zip(optimizer.param_groups, options["groups"], strict=True):
        for key, value in values.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
