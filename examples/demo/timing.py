"""Gradkern beside torch's best own way: the same work, in turn, in one process."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

import gradkern as gk

from .figures import Timing

__all__ = ["time_update_cycle", "time_whole_step"]

_WARM_UP = 2


class _Deliver(torch.autograd.Function):
    """A backward pass that costs nothing: hands prepared gradients to the parameters as autograd would."""

    @staticmethod
    def forward(ctx: Any, box: list[tuple[torch.Tensor, ...]], *params: torch.Tensor) -> torch.Tensor:
        ctx.box = box
        return params[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Popped: autograd owns them alone and may hand them over without a copy, as in a real backward.
        return (None, *ctx.box.pop())


def time_update_cycle(
    model: torch.nn.Module, gradients: Sequence[Sequence[torch.Tensor]], *, max_norm: float, rounds: int
) -> Timing:
    """Time accumulate, clip, step and zero on the parameters of ``model``, from identical gradient tensors.

    Args:
        model: Copied; its own parameters are left alone.
        gradients: One list of gradients per micro-batch, in parameter order.
        max_norm: Clipping threshold.
        rounds: Interleaved rounds; the best one of each side counts.

    Returns:
        The timing. Bytes are counted as passes over the fp32 parameters' size S. Autograd hands the first
        micro-batch's gradient over and adds each later one (3 S: two reads, one write). Then torch reads the
        gradients for the norm (S), scales them (2 S) and steps (7 S: parameter and two moments read and
        written, gradient read); gradkern takes the norm (S) and clips and steps in one pass (7 S).
    """
    ours, theirs = _update_cycles(model, max_norm)
    accumulate = len(gradients)

    def prepare() -> list[tuple[torch.Tensor, ...]]:
        return [tuple(gradient.clone() for gradient in micro_batch) for micro_batch in gradients]

    ours_s, theirs_s = _interleave(ours, theirs, prepare, rounds)
    size = sum(param.numel() * param.element_size() for param in model.parameters())
    adds = 3 * (accumulate - 1)
    return Timing(
        name=f"accumulate {accumulate}, clip, step, zero",
        ours_s=ours_s,
        torch_s=theirs_s,
        ours_bytes=(adds + 1 + 7) * size,
        torch_bytes=(adds + 1 + 2 + 7) * size,
        rounds=rounds,
    )


def time_whole_step(model: torch.nn.Module, batches: Sequence[torch.Tensor], *, max_norm: float, rounds: int) -> Timing:
    """Time forward, backward and update over the micro-batches ``batches``, without plan and recording."""
    ours, theirs = _whole_steps(model, max_norm)
    ours_s, theirs_s = _interleave(ours, theirs, lambda: list(batches), rounds)
    return Timing("forward, backward, update", ours_s, theirs_s, None, None, rounds)


def _optimizers(
    model: torch.nn.Module, max_norm: float
) -> tuple[tuple[torch.nn.Module, gk.AdamW], tuple[torch.nn.Module, torch.optim.AdamW]]:
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    return (
        (ours, gk.AdamW(ours.parameters(), lr=1e-4, max_norm=max_norm)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)),
    )


def _update_cycles(
    model: torch.nn.Module, max_norm: float
) -> tuple[Callable[[list[Any]], None], Callable[[list[Any]], None]]:
    (our_model, our_optimizer), (their_model, their_optimizer) = _optimizers(model, max_norm)
    our_params, their_params = list(our_model.parameters()), list(their_model.parameters())

    def ours(prepared: list[Any]) -> None:
        while prepared:
            _Deliver.apply(prepared, *our_params).backward()
        our_optimizer.step()
        our_optimizer.zero_grad()

    def theirs(prepared: list[Any]) -> None:
        while prepared:
            _Deliver.apply(prepared, *their_params).backward()
        torch.nn.utils.clip_grad_norm_(their_params, max_norm, foreach=True)
        their_optimizer.step()
        their_optimizer.zero_grad()

    return ours, theirs


def _whole_steps(
    model: torch.nn.Module, max_norm: float
) -> tuple[Callable[[list[Any]], None], Callable[[list[Any]], None]]:
    (our_model, our_optimizer), (their_model, their_optimizer) = _optimizers(model, max_norm)

    def ours(batches: list[Any]) -> None:
        for rows in batches:
            (our_model(input_ids=rows, labels=rows).loss / len(batches)).backward()
        our_optimizer.step()
        our_optimizer.zero_grad()

    def theirs(batches: list[Any]) -> None:
        for rows in batches:
            (their_model(input_ids=rows, labels=rows).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(their_model.parameters(), max_norm, foreach=True)
        their_optimizer.step()
        their_optimizer.zero_grad()

    return ours, theirs


def _interleave(
    ours: Callable[[list[Any]], None],
    theirs: Callable[[list[Any]], None],
    prepare: Callable[[], list[Any]],
    rounds: int,
) -> tuple[float, float]:
    """Run both in turn, changing who goes first, and return the best seconds of each."""
    best = {ours: float("inf"), theirs: float("inf")}
    for turn in range(_WARM_UP + rounds):
        for work in (ours, theirs) if turn % 2 else (theirs, ours):
            prepared = prepare()
            started = time.perf_counter()
            work(prepared)
            seconds = time.perf_counter() - started
            if turn >= _WARM_UP:
                best[work] = min(best[work], seconds)
    return best[ours], best[theirs]
