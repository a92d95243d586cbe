"""Recording a training run: per-sample gradients out of backward, steps out of the optimizer, to disk."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradkern.errors import LedgerError
from gradkern.rollback._capture import captured
from gradkern.rollback._conservation import Shadows
from gradkern.rollback._intake import Intake
from gradkern.rollback._layout import digest_parameters
from gradkern.rollback._ownership import claim
from gradkern.rollback._records import Record
from gradkern.rollback._segment import Segment, StepRecord, StepScalars
from gradkern.rollback._smoothing import smooth
from gradkern.rollback._store import Closing, StoreWriter
from gradkern.step_event import ParamStep, StepEvent, StepEventSource

__all__ = ["RecordableOptimizer", "Recorder", "record"]

# Every so many steps the first sample of each micro-batch is compared exactly with its compressed record.
_COMPARE_EVERY = 8


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


def record(
    model: nn.Module,
    optimizer: RecordableOptimizer,
    path: str | os.PathLike[str],
    *,
    rank: int = 2,
    steps_per_segment: int = 10,
    unowned: Sequence[str] = (),
    shared_inputs: Sequence[str] = (),
    output: str | None = None,
) -> Recorder:
    """Start recording what every training sample does to ``model``.

    Recording begins at once, before the first optimizer step, and ends with :meth:`Recorder.close` or the
    ``with`` block. Training itself is unchanged: gradients are bit-equal to those of the unrecorded model.

    Args:
        model: In fp32. Its Linear, Conv1d, Conv2d, Conv3d, Embedding, LayerNorm, RMSNorm (Llama's too), GroupNorm and
            transformers' Conv1D layers are recorded.
        optimizer: One of gradkern's, over parameters of ``model``, before its first step.
        path: Folder to create for the ledger; must not exist.
        rank: Directions kept of a sample's gradient of a matrix. A sample with at most ``rank`` rows (tokens)
            is kept exactly. Bytes per visit grow with it.
        steps_per_segment: Optimizer steps per file. A crash loses at most the steps since the last file;
            their records wait in memory.
        unowned: Patterns (``fnmatch``) of parameter names that are trained but not recorded, such as BatchNorm's.
        shared_inputs: Patterns of names of embeddings whose ids are the same for all samples and come without
            a sample dimension (``wpe(torch.arange(T))``). Ids of shape ``(1, T)`` are recognised by themselves.
        output: Name of the trained Linear whose outputs are the logits of a cross-entropy, for the estimators that
            follow later steps. None takes the last one in ``model.named_modules()`` and checks that its gradients are
            those of a cross-entropy with one right class a row and one weight for all rows of a micro-batch; where
            they are not, nothing is kept and those estimators refuse the ledger. A name vouches for it, rows may then
            have weights of their own (``weight=`` of the classes, means over sequences of unequal length). Terms of
            the loss that do not go through these logits bend it too, which nobody notices: leave such runs to
            ``"direct"``.

    Note:
        Inputs of recorded layers must be sample-major: dimension 0 is the micro-batch, or the rows of the first
        sample come first, then those of the second. Time-major inputs whose length equals the batch size cannot be
        told apart by shape and would be credited to the wrong samples without an error. Clip with the optimizer's
        ``max_norm=``, not ``clip_grad_norm_``: what is edited after backward was not recorded.

    Raises:
        LedgerError: ``path`` exists, the optimizer has already made steps, or gradients are there already.
        ValueError: ``rank`` or ``steps_per_segment`` is below 1; ``output`` names no recorded Linear; a trained
            parameter can neither be recorded nor is in ``unowned``; a pattern matches nothing.
        TypeError: A trained parameter is not fp32, or the optimizer reports no steps.
        ImportError: safetensors is not installed.

    Example:
        >>> recorder = record(model, optimizer, "runs/a")       # doctest: +SKIP
        >>> with recorder.batch(ids):                           # doctest: +SKIP
        ...     loss_fn(model(inputs), targets).backward()
    """
    for name, value in (("rank", rank), ("steps_per_segment", steps_per_segment)):
        if operator.index(value) < 1:
            raise ValueError(f"record: {name} must be at least 1, got {value}")
    if not hasattr(optimizer, "register_step_event_hook"):
        raise TypeError(
            f"record: {type(optimizer).__name__} does not report its steps (no register_step_event_hook); "
            f"use an optimizer of gradkern, for example gradkern.AdamW in place of torch.optim.AdamW"
        )
    return Recorder(model, optimizer, Path(path), rank, steps_per_segment, unowned, shared_inputs, output)


class Recorder:
    """A recording in progress; made by :func:`record`.

    One recorder belongs to one training loop in one thread. It holds three fp32 tensors of every recorded
    parameter's size (the conservation check) and the records of the steps since the last file.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: RecordableOptimizer,
        path: Path,
        rank: int,
        steps_per_segment: int,
        unowned: Sequence[str],
        shared_inputs: Sequence[str],
        output: str | None,
    ) -> None:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ownership = claim(model, trained, unowned, shared_inputs, output)
        self._layout = ownership.layout
        self._parameters = ownership.parameters
        self._indices = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        self._model_parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._require_fresh(optimizer)
        self._shadows = Shadows(self._parameters, self._layout.parameters)
        self._intake = Intake(ownership, self._shadows, rank, is_declared=output is not None)
        self._steps_per_segment = steps_per_segment
        self._pending: list[StepRecord] = []
        self._pending_bytes = 0
        self._most_pending_bytes = 0
        self._steps = 0
        self._committed_steps = 0
        self._detached = False
        self._closed = False
        with ExitStack() as attaching:
            handle = optimizer.register_step_event_hook(self._on_step)
            attaching.callback(handle.remove)
            attaching.enter_context(captured(ownership.layers, self._intake))
            self._store = self._create_store(path, rank)
            self._attached = attaching.pop_all()

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
        numbers = _sample_ids(ids)
        if self._detached:
            raise LedgerError("recorder.batch: the recorder is closed; start another with record()")
        if self._intake.active:
            raise LedgerError("recorder.batch: a batch is already open; leave it before opening the next")
        self._intake.begin(numbers, compare=self._steps % _COMPARE_EVERY == 0)
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
        self._intake.take()
        self._shadows.drop_gradients()

    def held_bytes(self) -> int:
        """Bytes that recording holds while training, for memory plans.

        Exact for what depends on the model; the records waiting for the next file count with the most seen so
        far, nothing before the first step.
        """
        return self._shadows.nbytes() + self._intake.nbytes() + self._most_pending_bytes

    def close(self) -> None:
        """Restore the model, write what is left and complete the ledger. A second call does nothing.

        When writing fails (a full disk, say) nothing is forgotten: make room and call again.
        """
        if self._closed:
            return
        self._detached = True
        self._attached.close()
        self._commit_pending()
        infos = self._layout.parameters
        deltas = {infos[index].name: delta.cpu() for index, delta in self._shadows.deltas.items()}
        named = {info.name: parameter for info, parameter in zip(infos, self._parameters, strict=True)}
        closing = Closing(tuple(self._shadows.decays), tuple(self._shadows.roundings), digest_parameters(named))
        self._store.commit_closing(deltas, closing)
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
        updates = self._tracked(event)
        visits = self._intake.take()
        records = [(stream, record.cpu()) for stream, record in visits.records]
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *visits.ids])
        self._require_finite(records, ids)
        if self._steps % _COMPARE_EVERY == 0:
            self._require_captured(updates)
        scalars: dict[int, StepScalars] = {}
        preconditioners: dict[int, tuple[Tensor, ...]] = {}
        multipliers: dict[int, float] = {}
        for index, update in updates:
            # Parameters mostly share the tensor; reading it synchronises a GPU, so once is enough.
            key = id(update.grad_multiplier)
            if key not in multipliers:
                multipliers[key] = float(update.grad_multiplier)
            multiplier = multipliers[key]
            exact = update.preconditioner() if self._layout.parameters[index].owned else None
            self._shadows.step(index, update, multiplier, exact)
            scalars[index] = StepScalars(update.lr, update.decay, update.momentum, update.grad_weight, multiplier)
            if exact is not None:
                preconditioners[index] = smooth(exact)
        self._shadows.drop_gradients()
        step = StepRecord(
            ids=ids,
            curvature=visits.curvature(),
            records=records,
            fidelity=visits.fidelity,
            scalars=scalars,
            preconditioners=preconditioners,
        )
        self._pending.append(step)
        self._steps += 1
        self._pending_bytes += step.nbytes()
        self._most_pending_bytes = max(self._most_pending_bytes, self._pending_bytes)
        if len(self._pending) >= self._steps_per_segment:
            self._commit_pending()

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

    def _require_finite(self, records: Sequence[tuple[int, Record]], ids: Tensor) -> None:
        """A NaN would rank first in every explanation."""
        scales = [scale.reshape(-1) for _, record in records for scale in record.scales()]
        if not scales or bool(torch.isfinite(torch.cat(scales)).all()):
            return
        for stream, record in records:
            for scale in record.scales():
                bad = record.visit[~torch.isfinite(scale).reshape(len(record.visit), -1).all(dim=1)]
                if len(bad):
                    info = self._layout.parameters[self._layout.streams[stream].parameter]
                    raise LedgerError(
                        f"record: sample {int(ids[bad[0]])} left a non-finite gradient on {info.name!r}, expected "
                        f"finite ones; the optimizer step has been made and its records are dropped, so the law cannot "
                        f"hold any more: skip such steps (a GradScaler, or recorder.discard() and zero_grad() in place "
                        f"of step())"
                    )

    def _require_captured(self, updates: Sequence[tuple[int, ParamStep]]) -> None:
        """Compare what was captured with the gradient that the optimizer saw, while both are there."""
        for index, update in updates:
            grad = update.param.grad
            if grad is None or not self._layout.parameters[index].owned:
                continue
            waiting = self._shadows.waiting(index)
            missing = grad if waiting is None else grad - waiting
            if not float(missing.norm()) <= 1e-3 * float(grad.norm()) + 1e-6:
                raise LedgerError(
                    f"record: the gradient of {self._layout.parameters[index].name!r} at this step is not what the "
                    f"recorded batches gave it (difference {float(missing.norm()):.3g} of {float(grad.norm()):.3g}). "
                    f"Clip with the optimizer's max_norm= rather than by editing gradients, run every backward inside "
                    f"recorder.batch(ids), and call recorder.discard() when gradients are cleared without a step"
                )

    def _commit_pending(self) -> None:
        # A commit that was interrupted after it took effect must not be made twice.
        done = self._store.committed_steps() - self._committed_steps
        del self._pending[:done]
        self._committed_steps += done
        if self._pending:
            segment = Segment.build(self._layout, self._pending)
            self._store.commit_segment(segment.tensors(), segment.steps, len(segment.visit_ids))
            self._committed_steps += segment.steps
        self._pending = []
        self._pending_bytes = 0

    def _create_store(self, path: Path, rank: int) -> StoreWriter:
        infos = self._layout.parameters
        initial = {info.name: parameter.detach().cpu() for info, parameter in zip(infos, self._parameters, strict=True)}
        return StoreWriter(path, self._layout, initial, {"rank": str(rank), "torch": str(torch.__version__)})

    def _require_fresh(self, optimizer: RecordableOptimizer) -> None:
        """Momentum from before the recording would belong to no sample."""
        for name, parameter in ((self._model_parameters[id(p)], p) for p in self._parameters):
            state = optimizer.state.get(parameter) or {}
            if float(state.get("step", 0)) > 0:
                raise LedgerError(
                    f"record: the optimizer has already made {int(state['step'])} steps on {name!r}, whose "
                    f"momentum belongs to no recorded sample; start recording before the first step"
                )
            if parameter.grad is not None and bool(parameter.grad.any()):
                raise LedgerError(
                    f"record: {name!r} has a gradient already, which belongs to no recorded sample; start recording "
                    f"before the first backward, or call optimizer.zero_grad()"
                )


def _sample_ids(ids: Sequence[int] | Tensor) -> Tensor:
    """Sample ids as a one-dimensional int64 tensor in host memory."""
    if isinstance(ids, Tensor):
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise TypeError(f"recorder.batch: ids must be integers, got a tensor of {ids.dtype}")
        numbers = ids.detach().to("cpu", torch.int64, copy=True)
    else:
        numbers = torch.tensor([operator.index(number) for number in ids], dtype=torch.int64)
    if numbers.dim() != 1 or numbers.numel() == 0:
        raise ValueError(
            f"recorder.batch: ids must be one-dimensional with one entry per row of the micro-batch, got "
            f"shape {tuple(numbers.shape)}"
        )
    return numbers
