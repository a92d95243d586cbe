"""Recording a training run: per-sample gradients out of backward, steps out of the optimizer, to disk."""

from __future__ import annotations

import math
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradkern.errors import LedgerError
from gradkern.rollback._capture import captured
from gradkern.rollback._cut import resume_store
from gradkern.rollback._fidelity import Comparison
from gradkern.rollback._intake import Intake, Visits
from gradkern.rollback._ownership import claim
from gradkern.rollback._packing import Block, unpack
from gradkern.rollback._ranks import Ranks
from gradkern.rollback._records import Record
from gradkern.rollback._replay_log import StepLog, describe_options, digest_model
from gradkern.rollback._rewind import States, require_restorable, restore
from gradkern.rollback._sample_ids import sample_ids
from gradkern.rollback._segment import StepRecord
from gradkern.rollback._selection import CANDIDATES, Selection
from gradkern.rollback._shadows import Applied, Shadows
from gradkern.rollback._shards import recorded_ranks, require_ranks
from gradkern.rollback._store import Closing, StoreWriter
from gradkern.rollback._writer import Writer
from gradkern.step_event import ParamStep, StepEvent, StepEventSource

__all__ = ["RecordableOptimizer", "Recorder"]

# Directions of a matrix that are kept where nobody says how many.
_RANK = 2

# Every so many steps, of the first so many, the first sample of each micro-batch is compared exactly with its record,
# and what was captured with the gradients; and every so many later.
_COMPARE_EVERY, _EARLY, _COMPARE_LATER = 8, 128, 64

# Every so many steps of a replayable run the model's digest is kept.
_DIGEST_EVERY = 8

# The scalars of a parameter that a step left alone.
_LEFT_ALONE = (math.nan,) * 5


class RecordableOptimizer(StepEventSource, Protocol):
    """What recording needs of an optimizer: its parameters, its state, and its step events."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As in ``torch.optim.Optimizer``."""
        ...

    @property
    def state(self) -> Any:
        """As in ``torch.optim.Optimizer``."""
        ...


class Recorder:
    """A recording in progress; made by :func:`gradkern.rollback.record`.

    One recorder belongs to one training loop in one thread. It holds three fp32 tensors of every recorded
    parameter's size (the conservation check) and the records of up to two files of steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: RecordableOptimizer,
        path: Path,
        rank: int | None,
        steps_per_segment: int | None,
        unowned: Sequence[str],
        shared_inputs: Sequence[str],
        output: str | None,
        *,
        bytes_per_visit: int | None,
        replayable: bool,
        rewind: int,
        stops: bool,
        resume: Mapping[str, Any] | None,
        ranks: Ranks | None,
    ) -> None:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ownership = claim(model, trained, unowned, shared_inputs, output)
        if replayable and any(parameter.device.type != "cpu" for parameter in model.parameters()):
            raise ValueError(
                "record: replayable=True needs a model on the CPU; the random numbers of others are not kept"
            )
        self._model = model
        self._ranks = ranks
        self._replayed = model if replayable else None
        self._layout = ownership.layout
        self._parameters = ownership.parameters
        self._indices = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        self._model_parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._shadows = Shadows(self._parameters, self._layout.parameters)
        self._selection = None if bytes_per_visit is None else Selection(self._layout, bytes_per_visit)
        kept = CANDIDATES if bytes_per_visit is not None else _RANK if rank is None else rank
        self._intake = Intake(ownership, self._shadows, kept, is_declared=output is not None)
        self._steps = 0
        self._optimizer = optimizer
        if resume is None:
            self._require_fresh()
        else:
            self._load_state(resume)
        self._require_no_gradients()
        self._is_whole = True
        self._states = States(model, optimizer, self._named(), rewind) if rewind else None
        self._keep_state(())
        self._stops = stops
        self._stopped = False
        self._detached = False
        self._closed = False
        with ExitStack() as attaching:
            handle = optimizer.register_step_event_hook(self._on_step)
            attaching.callback(handle.remove)
            attaching.enter_context(captured(ownership.layers, self._intake))
            self._store = self._open_store(path, _facts(kept, bytes_per_visit), resume)
            self._attached = attaching.pop_all()
        self._writer = Writer(self._store, self._layout, steps_per_segment)

    @contextmanager
    def batch(self, ids: Sequence[int] | Tensor) -> Iterator[None]:
        """Attribute the gradients of a micro-batch to its samples.

        Run ``backward`` inside; ``forward`` may run before, except for models with shared embedding ids
        (positions of shape ``(1, T)``, as in GPT-2).

        Args:
            ids: One integer per row of the micro-batch, whose samples lie along dimension 0 of every recorded
                layer's input. Rows may share an id; influence is then reported for the id as a whole.

        Raises:
            LedgerError: The recorder is closed, or another batch is open.
            TypeError: ``ids`` are not integers.
            ValueError: ``ids`` are empty or not one-dimensional.
        """
        numbers = sample_ids(ids, "recorder.batch")
        if self._stopped:
            yield
            return
        if self._detached:
            raise LedgerError("recorder.batch: the recorder is closed; start another with record()")
        if self._intake.active:
            raise LedgerError("recorder.batch: a batch is already open; leave it before opening the next")
        if self._ranks is not None:
            self._ranks.require_even()
        state = None if self._replayed is None else torch.get_rng_state()
        self._intake.begin(numbers, compare=self._is_compared(), state=state)
        try:
            yield
        finally:
            self._intake.end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the model unrecorded, forward and backward: to plan checkpoints, or for gradients on other data.

        The gradients must not reach the next step: clear them, or compute them with ``torch.autograd.grad``.
        """
        before, self._intake.paused = self._intake.paused, True
        try:
            yield
        finally:
            self._intake.paused = before

    def discard(self) -> None:
        """Forget the gradients recorded since the last step.

        Call it when gradients are cleared without a step (a skipped step of a stock ``GradScaler``, a loss
        that was not finite); otherwise the conservation check fails.
        """
        self._intake.drop()
        self._shadows.drop_gradients()

    def held_bytes(self) -> int:
        """Bytes that recording holds while training, for memory plans.

        Exact for what depends on the model; the records waiting to be written count with the most seen so far, nothing
        before the first step.
        """
        states = 0 if self._states is None else self._states.nbytes()
        return self._shadows.nbytes() + self._intake.nbytes() + self._writer.most_bytes + states

    def state_dict(self) -> dict[str, Any]:
        """What ``record(..., resume=)`` needs to go on from a checkpoint.

        Save it together with those of the model and the optimizer, after a step and before the next backward. Every
        step so far is durable when this returns, in a file that ends here. A run that goes on from here records the
        very bytes that it would have without the break.

        Returns:
            Numbers, text and tensors, in all two fp32 tensors of every recorded parameter's size. The tensors are those
            in use, as in torch: save or copy them before the next step.

        Raises:
            LedgerError: The recorder is closed or has stopped, gradients wait for a step, or a step could not be
                recorded.
            OSError, sqlite3.Error: The ledger cannot be written.
        """
        if self._detached:
            raise LedgerError(
                "recorder.state_dict: the recorder is closed or has stopped, there is nothing to go on with"
            )
        if self._intake.waiting_visits:
            raise LedgerError(
                f"recorder.state_dict: gradients of {self._intake.waiting_visits} visits wait for a step; call it "
                f"after optimizer.step() and before the next backward, or discard() them"
            )
        if not self._is_whole:
            raise LedgerError(
                "recorder.state_dict: an earlier step was made whose records were interrupted or refused, so this "
                "recording lacks it for good; go back to a checkpoint from before it"
            )
        self._writer.flush()
        return {
            "ledger_id": self._store.ledger_id,
            "optimizer_steps": self._optimizer_steps(),
            "steps": self._steps,
            "parameter_digest": self._layout.digest(self._parameters),
            "scale": self._intake.scale,
            "sums": self._shadows.state_dict(),
        }

    def rewind(self, *, steps: int) -> int:
        """Go back some optimizer steps, as after a loss spike: bit for bit, as if they had not been made.

        Parameters, the model's buffers, the optimizer's state with the memory of its clip policy, the recorder and the
        ledger are as they were after the step gone back to; what is recorded from there on are the bytes of a run that
        had a checkpoint there. Gradients are dropped, recorded or not. Everything else is the caller's: options such as
        learning rates stay as they are now, likewise schedulers, gradient scalers, random numbers, the data loader and
        parameters that this optimizer does not train.

        Args:
            steps: Recorded steps to take back, at most ``rewind`` of :func:`record`. 0 takes back what has been done to
                the model since the last of them: a step whose gradients were not finite has been made, but not
                recorded.

        Returns:
            How many steps the ledger has now, all of them durable.

        Raises:
            LedgerError: The recording keeps no states, or not that one; it is closed or has stopped; a batch is open;
                or the ledger is damaged. Nothing has been changed then.
            ValueError: ``steps`` is negative, or the optimizer clips by another policy than then. Likewise.
            OSError, sqlite3.Error: The ledger cannot be written. The model is as before; call again.
        """
        if self._states is None:
            raise LedgerError("recorder.rewind: no states were kept to go back to; record with rewind=, say rewind=5")
        if self._detached:
            raise LedgerError(
                "recorder.rewind: the recorder is closed or has stopped; go back by its ledger, "
                "gradkern.rollback.open(path).rewind(), or to a checkpoint"
            )
        if self._intake.active:
            raise LedgerError("recorder.rewind: a batch is open; leave 'with recorder.batch(ids)' before going back")
        state = self._states.before(self._steps, steps)
        named = self._named()
        require_restorable(state, self._optimizer, named)
        self._writer.flush()
        self._is_whole, was_whole = False, self._is_whole
        try:
            self._writer.go_back(state.step)
        except LedgerError:
            self._is_whole = was_whole
            raise
        restore(state, self._model, self._optimizer, named)
        self.discard()
        self._shadows.load_state_dict(state.sums())
        self._intake.scale = state.facts["scale"]
        self._states.forget_after(state.step)
        self._steps = state.step
        self._is_whole = state.facts["is_whole"]
        return self._steps

    def close(self) -> None:
        """Restore the model, write what is left and complete the ledger. A second call does nothing.

        When writing fails (a full disk, say) nothing is forgotten: make room and call again.
        """
        if self._closed:
            return
        self._detach()
        if not self._stopped:
            self._write(self._writer.flush)
        if not self._stopped:
            infos = self._layout.parameters
            deltas = {infos[index].name: delta.cpu() for index, delta in self._shadows.deltas.items()}
            digest = self._layout.digest(self._parameters)
            closing = Closing(tuple(self._shadows.decays), tuple(self._shadows.roundings), digest)
            self._write(lambda: self._complete(deltas, closing))
        self._writer.close()
        self._store.close()
        self._closed = True

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @torch.no_grad()
    def _on_step(self, event: StepEvent) -> None:
        """Attribute the finished step to the visits since the one before."""
        if event.skipped is not None and bool(event.skipped):
            self.discard()
            return
        if self._ranks is not None:
            self._require_in_step()
        self._is_whole, was_whole = False, self._is_whole
        updates = self._tracked(event)
        visits = self._intake.take()
        if self._is_compared():
            self._require_captured(updates)
        applied = _applied(updates, 1 if self._ranks is None else self._ranks.count)
        smoothed = self._shadows.step(applied)
        if smoothed is None:
            raise self._not_finite(visits)
        scalars = [_LEFT_ALONE] * len(self._parameters)
        for index, update, multiplier in applied:
            scalars[index] = (update.lr, update.decay, update.momentum, update.grad_weight, multiplier)
        blocks: Sequence[Block] = visits.blocks
        records: Sequence[tuple[int, Record]] = visits.records
        comparisons: Sequence[tuple[int, Comparison]] = visits.comparisons
        if self._selection is not None:
            unpacked = [each for block in blocks for each in unpack([block])]
            blocks = ()
            records, comparisons = self._selection.select(visits.count, [*unpacked, *records], comparisons, smoothed)
        step = StepRecord(
            ids=torch.cat(visits.ids) if visits.ids else torch.empty(0, dtype=torch.int64),
            bends=visits.bends,
            blocks=blocks,
            records=records,
            comparisons=comparisons,
            scalars=scalars,
            smoothed=smoothed,
            log=self._log(visits),
        )
        self._writer.put(step)
        self._steps += 1
        self._is_whole = was_whole
        self._keep_state(each.parameter for each in applied)
        self._write(self._writer.write_full)

    def _is_compared(self) -> bool:
        """Whether this step's gradients, and the records of its first sample, are compared with what they stand for."""
        return self._steps % (_COMPARE_EVERY if self._steps < _EARLY else _COMPARE_LATER) == 0

    def _log(self, visits: Visits) -> StepLog | None:
        if self._replayed is None:
            return None
        digest = digest_model(self._replayed) if (self._steps + 1) % _DIGEST_EVERY == 0 else None
        options = describe_options(self._replayed, self._optimizer.param_groups)
        return StepLog([len(ids) for ids in visits.ids], visits.states, options, digest)

    def _write(self, write: Callable[[], None]) -> None:
        """Write, or where that is impossible do what was asked for."""
        try:
            write()
        except (OSError, sqlite3.Error) as error:
            if not self._stops:
                raise
            self._stopped = True
            self._detach()
            warnings.warn(
                f"the ledger cannot be written ({error}); recording has stopped, and the ledger ends with step "
                f"{self._store.steps} of {self._steps}. Training goes on",
                stacklevel=2,
            )

    def _keep_state(self, stepped: Iterable[int]) -> None:
        """Keep the state after a step that some parameters, by index, took part in."""
        if self._states is not None:
            own = {"scale": self._intake.scale, "is_whole": self._is_whole, "sums": self._shadows.state_dict()}
            self._states.keep(self._steps, [self._layout.parameters[index].name for index in stepped], own)

    def _complete(self, deltas: Mapping[str, Tensor], closing: Closing) -> None:
        for state in self._states or ():
            if state.facts["is_whole"]:  # or no recording can go on from it
                self._store.commit_state(state.step, state.to_file())
        self._store.commit_closing(deltas, closing)

    def _detach(self) -> None:
        """Leave the model and the optimizer as they were."""
        self._detached = True
        self._attached.close()

    def _named(self) -> dict[str, Tensor]:
        infos = self._layout.parameters
        return {info.name: parameter for info, parameter in zip(infos, self._parameters, strict=True)}

    def _tracked(self, event: StepEvent) -> list[tuple[int, ParamStep]]:
        """The event's entries for this model's parameters, checked before anything is changed."""
        updates = []
        for update in event.params:
            index = self._indices.get(id(update.param))
            if index is not None:
                updates.append((index, update))
            elif id(update.param) in self._model_parameters:
                raise LedgerError(
                    f"record: the optimizer stepped parameter {self._model_parameters[id(update.param)]!r}, "
                    f"which it did not train when recording began; unfreeze and add parameters before record()"
                )
        return updates

    def _not_finite(self, visits: Visits) -> LedgerError:
        """A NaN would rank first in every explanation."""
        self._shadows.drop_gradients()
        ids = torch.cat(visits.ids)
        where = "a gradient"
        unpacked = [each for block in visits.blocks for each in unpack([block])]
        for stream, record in [*unpacked, *visits.records]:
            for scale in record.scales():
                bad = record.visit[~torch.isfinite(scale).reshape(len(record.visit), -1).all(dim=1).cpu()]
                if len(bad):
                    info = self._layout.parameters[self._layout.streams[stream].parameter]
                    where = f"sample {int(ids[bad[0]])} left a non-finite gradient on {info.name!r}"
        return LedgerError(
            f"record: {where}, expected finite ones; the optimizer step has been made and its records are dropped, so "
            f"the law cannot hold any more: skip such steps (a GradScaler, or recorder.discard() and zero_grad() in "
            f"place of step())"
        )

    def _require_captured(self, updates: Sequence[tuple[int, ParamStep]]) -> None:
        """Compare what was captured with the gradient that the optimizer saw, while both are there."""
        infos = self._layout.parameters
        gradients = {
            index: update.param.grad
            for index, update in updates
            if update.param.grad is not None and infos[index].owned
        }
        for index, missing, norm in self._missing(gradients) if gradients else ():
            waiting = self._shadows.waiting(index)
            if missing <= 1e-3 * norm + 1e-6 or (waiting is not None and not bool(torch.isfinite(waiting).all())):
                continue  # what is not finite is told by itself
            raise LedgerError(
                f"record: the gradient of {infos[index].name!r} at this step is not what the recorded batches gave it "
                f"(difference {missing:.3g} of {norm:.3g}). Clip with the optimizer's max_norm= rather than by editing "
                f"gradients, run every backward inside recorder.batch(ids), and call recorder.discard() when gradients "
                f"are cleared without a step"
            )

    def _missing(self, gradients: Mapping[int, Tensor]) -> list[tuple[int, float, float]]:
        if self._ranks is None:
            return self._shadows.missing(gradients)
        return self._ranks.missing(gradients, self._shadows.waiting, len(self._parameters))

    def _require_in_step(self) -> None:
        """A step that one rank lacks would put its later visits with steps of the others that they were not in."""
        if not self._is_whole:
            raise LedgerError(
                "record: an earlier step was made whose records this rank lacks, so its shard of the ledger ends "
                "before that; go back to a checkpoint from before it, in all ranks"
            )

    def _open_store(self, path: Path, kept: Mapping[str, str], resume: Mapping[str, Any] | None) -> StoreWriter:
        if self._ranks is None:
            if resume is not None:
                require_ranks(path, recorded_ranks(path, 0), 1)
            return self._open_part(path, kept, resume)
        begun = {**kept, "steps": self._steps, "ledger_id": resume and resume["ledger_id"]}
        return self._ranks.open_shard(path, self._layout, begun, partial(self._open_part, kept=kept, resume=resume))

    def _open_part(
        self,
        path: Path,
        kept: Mapping[str, str],
        resume: Mapping[str, Any] | None,
        facts: Mapping[str, str] = MappingProxyType({}),
        ledger_id: str | None = None,
    ) -> StoreWriter:
        """Open what this process records into, with further facts."""
        settings = {
            **facts,
            **kept,
            "torch": str(torch.__version__),
            "threads": str(torch.get_num_threads()),
            "replayable": "0" if self._replayed is None else "1",
        }
        if resume is not None:
            return resume_store(path, self._layout, settings, resume["ledger_id"], self._steps)
        initial = {name: parameter.detach().cpu() for name, parameter in self._named().items()}
        if self._replayed is not None:
            # Copies, for a file cannot hold buffers that share memory.
            initial |= {f"buffer/{name}": buffer.detach().clone() for name, buffer in self._replayed.named_buffers()}
        return StoreWriter.create(path, self._layout, initial, settings, ledger_id)

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        if self._layout.digest(self._parameters) != state["parameter_digest"]:
            raise LedgerError(
                "record: the parameters differ from those of the checkpoint that resume= belongs to; load that "
                "checkpoint into the model and the optimizer first"
            )
        if self._optimizer_steps() != state["optimizer_steps"]:
            raise LedgerError(
                f"record: the optimizer has made {max(self._optimizer_steps().values(), default=0)} steps, expected "
                f"{max(state['optimizer_steps'].values(), default=0)} as in the checkpoint that resume= belongs to; "
                f"load its state into the optimizer first"
            )
        self._steps = state["steps"]
        self._intake.scale = state["scale"]
        self._shadows.load_state_dict(state["sums"])

    def _optimizer_steps(self) -> dict[str, int]:
        """How many steps the optimizer has made on each parameter; 0 where it does not count them."""
        states = {name: self._optimizer.state.get(parameter) or {} for name, parameter in self._named().items()}
        return {name: int(state.get("step", 0)) for name, state in states.items()}

    def _require_fresh(self) -> None:
        """Momentum from before the recording would belong to no sample."""
        for name, steps in self._optimizer_steps().items():
            if steps:
                raise LedgerError(
                    f"record: the optimizer has already made {steps} steps on {name!r}, whose "
                    f"momentum belongs to no recorded sample; start recording before the first step, or go on with the "
                    f"ledger of those steps: resume="
                )

    def _require_no_gradients(self) -> None:
        for name, parameter in self._named().items():
            if parameter.grad is not None and bool(parameter.grad.any()):
                raise LedgerError(
                    f"record: {name!r} has a gradient already, which belongs to no recorded sample; start recording "
                    f"before the first backward, or call optimizer.zero_grad()"
                )


def _facts(rank: int, bytes_per_visit: int | None) -> dict[str, str]:
    """What the ledger says about how much is kept."""
    budget = {} if bytes_per_visit is None else {"bytes_per_visit": str(bytes_per_visit)}
    return {"rank": str(rank), **budget}


def _applied(updates: Sequence[tuple[int, ParamStep]], ranks: int) -> list[Applied]:
    """What was applied to the gradients of this rank's samples, of which a step takes the mean over ranks."""
    multipliers: dict[int, float] = {}
    applied = []
    for index, update in updates:
        # Parameters mostly share the tensor; reading it synchronises a GPU, so once is enough.
        key = id(update.grad_multiplier)
        if key not in multipliers:
            multipliers[key] = float(update.grad_multiplier) / ranks
        applied.append(Applied(index, update, multipliers[key]))
    return applied
