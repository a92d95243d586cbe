"""How a recording begins: what may be asked for, checked before anything is changed."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gradkern.rollback._ranks import find_ranks, unwrapped
from gradkern.rollback._recorder import RecordableOptimizer, Recorder

__all__ = ["record"]

# Of what Recorder.state_dict() gives.
_STATE = {"ledger_id", "steps", "optimizer_steps", "parameter_digest", "scale", "sums"}


def record(
    model: nn.Module,
    optimizer: RecordableOptimizer,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    bytes_per_visit: int | None = None,
    steps_per_segment: int | None = None,
    unowned: Sequence[str] = (),
    shared_inputs: Sequence[str] = (),
    output: str | None = None,
    replayable: bool = False,
    rewind: int = 0,
    on_write_error: Literal["raise", "stop"] = "raise",
    resume: Mapping[str, Any] | None = None,
) -> Recorder:
    """Start recording what every training sample does to ``model``.

    Recording begins at once, before the first optimizer step, and ends with :meth:`Recorder.close` or the
    ``with`` block; with ``resume`` it goes on where a checkpoint left off. Training itself is unchanged: gradients are
    bit-equal to those of the unrecorded model.

    Args:
        model: In fp32. Its Linear, Conv1d, Conv2d, Conv3d, Embedding, LayerNorm, RMSNorm (Llama's too), GroupNorm,
            MultiheadAttention and transformers' Conv1D layers are recorded, also under autocast. Under
            ``DistributedDataParallel`` the wrapped model or what it wraps, after wrapping; every rank must call this,
            and each records its own samples into a shard of its own.
        optimizer: One of gradkern's, over parameters of ``model``, before its first step.
        path: Folder to create for the ledger; must not exist. With ``resume`` that of the ledger to go on with.
        rank: Directions kept of a sample's gradient of a matrix. A sample with at most ``rank`` rows (tokens)
            is kept exactly. Bytes per visit grow with it. None for 2, or with ``bytes_per_visit`` for what fits.
        bytes_per_visit: Most bytes of a file that the records of a visit (a row of a micro-batch) may take, in place of
            ``rank``. Every visit keeps what captures most of the energy of its change of the parameters: directions of
            matrices and embeddings, at most 8 of each, and the gradients of vectors, in codes of 4 or 8 bits. What
            does not fit is not recorded and taken for zero by influence; the conservation law is followed with exact
            sums all the same. Takes more time than ``rank``, and until the step the bytes of rank 8. None for no
            budget.
        steps_per_segment: Optimizer steps per file, written while the next ones are recorded; where writing is slower
            than training, training waits. A crash loses at most twice so many steps. None for as many as make
            four megabytes, at least 10 and at most 1,000.
        unowned: Patterns (``fnmatch``) of parameter names that are trained but not recorded, such as BatchNorm's.
        shared_inputs: Patterns of names of embeddings whose ids are the same for all samples and come without
            a sample dimension (``wpe(torch.arange(T))``). Ids of shape ``(1, T)`` are recognised by themselves.
        output: Name of the Linear, trained or not, whose outputs are the logits of a cross-entropy, for the estimators
            that follow later steps. None takes the last one in ``model.named_modules()`` and checks that its gradients
            are those of a cross-entropy with one right class a row and one weight for all rows of a micro-batch; where
            they are not, nothing is kept and those estimators refuse the ledger. A name vouches for it, rows may then
            have weights of their own (``weight=`` of the classes, means over sequences of unequal length). Terms of
            the loss that do not go through these logits bend it too, which nobody notices: leave such runs to
            ``"direct"``.
        replayable: Keep what running the training again needs: the micro-batches, the state of torch's generator before
            each (5 kB where random numbers are drawn), the optimizer's options, the model's buffers at the start.
            For a model on the CPU. Forward must run inside :meth:`Recorder.batch`.
        rewind: How many steps :meth:`Recorder.rewind` can go back. Takes ``rewind + 1`` times the bytes of parameters,
            buffers, the optimizer's state and two fp32 tensors of every recorded parameter's size, in host memory, and
            a copy of all that after every step. :meth:`Recorder.close` writes them to the ledger.
        on_write_error: What a step does when the ledger cannot be written (a full disk): ``"raise"`` the error from
            ``optimizer.step()``, made by then, and keep the records, which are written as soon as that works; or
            ``"stop"`` recording with a warning while training goes on. The ledger stays valid either way.
        resume: What :meth:`Recorder.state_dict` gave when the checkpoint was made that ``model`` and ``optimizer`` have
            been loaded from. Steps that the ledger holds of after it are taken out. The other arguments must be those
            of the first time.

    Note:
        Inputs of recorded layers, but for those of torch's attention and Transformers, must be sample-major:
        dimension 0 is the micro-batch, or the rows of the first sample come first, then those of the second.
        Time-major inputs whose length equals the batch size cannot be told apart by shape and would be credited to
        the wrong samples without an error. Clip with the optimizer's ``max_norm=``, not ``clip_grad_norm_``: what is
        edited after backward was not recorded.

    Raises:
        LedgerError: ``path`` exists, the optimizer has already made steps, or gradients are there already. With
            ``resume``: ``path`` is not the ledger that it belongs to or lacks steps before it, something records there,
            or the parameters or the optimizer's steps are not those of the checkpoint. Nothing is changed then. Or
            ranks differ in what they begin, or one of them cannot.
        ValueError: ``rank`` and ``bytes_per_visit`` are both given, or the latter is too small for any record, of which
            the smallest is named; ``rank`` or ``steps_per_segment`` is below 1, ``rewind`` below 0;
            ``on_write_error`` is neither; ``output`` names no Linear; a trained parameter can neither be
            recorded nor is in ``unowned``; a pattern matches nothing; under ``DistributedDataParallel``:
            ``replayable=True``, ``on_write_error="stop"``, or a trained parameter that it does not average.
        TypeError: A trained parameter is not fp32, or the optimizer reports no steps.
        ImportError: safetensors is not installed.

    Example:
        >>> recorder = record(model, optimizer, "runs/a")       # doctest: +SKIP
        >>> with recorder.batch(ids):                           # doctest: +SKIP
        ...     loss_fn(model(inputs), targets).backward()
    """
    for name, value, least in (
        ("rank", rank, 1),
        ("bytes_per_visit", bytes_per_visit, 1),
        ("steps_per_segment", steps_per_segment, 1),
        ("rewind", rewind, 0),
    ):
        if value is not None and operator.index(value) < least:
            raise ValueError(f"record: {name} must be at least {least}, got {value}")
    if rank is not None and bytes_per_visit is not None:
        raise ValueError(
            f"record: got rank={rank} and bytes_per_visit={bytes_per_visit}; the budget chooses the ranks, pass one of "
            f"the two"
        )
    if on_write_error not in ("raise", "stop"):
        raise ValueError(f"record: on_write_error must be 'raise' or 'stop', got {on_write_error!r}")
    if not hasattr(optimizer, "register_step_event_hook"):
        raise TypeError(
            f"record: {type(optimizer).__name__} does not report its steps (no register_step_event_hook); "
            f"use an optimizer of gradkern, for example gradkern.AdamW in place of torch.optim.AdamW"
        )
    if resume is not None and _STATE - resume.keys():
        raise ValueError(
            f"record: resume must be what Recorder.state_dict() gave, got a mapping without "
            f"{', '.join(sorted(_STATE - resume.keys()))}"
        )
    ranks = find_ranks(model, [each for group in optimizer.param_groups for each in group["params"]])
    if ranks is not None:
        _require_together(replayable, on_write_error)
    return Recorder(
        unwrapped(model),
        optimizer,
        Path(path),
        rank,
        steps_per_segment,
        unowned,
        shared_inputs,
        output,
        bytes_per_visit=bytes_per_visit,
        replayable=replayable,
        rewind=rewind,
        stops=on_write_error == "stop",
        resume=resume,
        ranks=ranks,
    )


def _require_together(replayable: bool, on_write_error: str) -> None:
    """Refuse what several ranks cannot do."""
    if replayable:
        raise ValueError(
            "record: replayable=True is for one process, got a model under DistributedDataParallel, whose training one "
            "process cannot run again bit for bit; leave it away: estimator='ref' and undo(method='fast') do without"
        )
    if on_write_error == "stop":
        raise ValueError(
            "record: on_write_error='stop' is for one process, got a model under DistributedDataParallel, where the "
            "other ranks would wait for the one that has stopped; leave it at 'raise', and go on after the error: "
            "steps that could not be written are kept"
        )
