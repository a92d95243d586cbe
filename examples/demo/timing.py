"""Gradkern beside torch's best own way: the same work, in turn, in one process."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import gradkern as gk

from .figures import Timing

__all__ = ["time_update_cycle", "time_whole_step"]

_WARM_UP = 2


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
        The timing. Bytes are counted as passes over the fp32 parameters' size S. Both take the first
        micro-batch's gradients as they are, as autograd hands them over, and add each later one (3 S: two
        reads, one write), torch tensor by tensor, gradkern in one call. Then torch reads the gradients for the
        norm (S), scales them (2 S) and steps (7 S: parameter and two moments read and written, gradient read);
        gradkern has the norm from the last addition and clips and steps in one pass (7 S).
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
        ours_bytes=(adds + 7) * size,
        torch_bytes=(adds + 1 + 2 + 7) * size,
        rounds=rounds,
    )


def time_whole_step(model: torch.nn.Module, batches: Sequence[torch.Tensor], *, max_norm: float, rounds: int) -> Timing:
    """Time forward, backward and update over the micro-batches ``batches``, without plan and recording."""
    ours, theirs = _whole_steps(model, max_norm)
    ours_s, theirs_s = _interleave(ours, theirs, lambda: list(batches), rounds)
    return Timing("forward, backward, update", ours_s, theirs_s, None, None, rounds)


def _update_cycles(
    model: torch.nn.Module, max_norm: float
) -> tuple[Callable[[list[Any]], None], Callable[[list[Any]], None]]:
    our_params, their_params = (list(copy.deepcopy(model).parameters()) for _ in range(2))
    our_optimizer = gk.AdamW(our_params, lr=1e-4, max_norm=max_norm)
    their_optimizer = torch.optim.AdamW(their_params, lr=1e-4, fused=True)
    our_optimizer.detach()  # no backward runs here: the accumulator folds what it is given
    accumulator = gk.GradAccumulator(our_params)

    def ours(prepared: list[Any]) -> None:
        _take(our_params, prepared.pop())
        for gradients in prepared:
            accumulator.accumulate_(gradients)
        our_optimizer.step()
        our_optimizer.zero_grad()

    def theirs(prepared: list[Any]) -> None:
        _take(their_params, prepared.pop())
        for gradients in prepared:
            for param, gradient in zip(their_params, gradients, strict=True):
                param.grad.add_(gradient)
        torch.nn.utils.clip_grad_norm_(their_params, max_norm, foreach=True)
        their_optimizer.step()
        their_optimizer.zero_grad()

    return ours, theirs


def _take(params: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


def _whole_steps(
    model: torch.nn.Module, max_norm: float
) -> tuple[Callable[[list[Any]], None], Callable[[list[Any]], None]]:
    # One set of parameters for both: two copies differ by where they lie in memory more than by their optimizers.
    model = copy.deepcopy(model)
    our_optimizer = gk.AdamW(model.parameters(), lr=1e-4, max_norm=max_norm)
    their_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    our_optimizer.detach()  # in the other side's turn, backward is autograd's own

    def accumulate(batches: list[Any]) -> None:
        for rows in batches:
            (model(input_ids=rows, labels=rows).loss / len(batches)).backward()

    def ours(batches: list[Any]) -> None:
        our_optimizer.attach()
        accumulate(batches)
        our_optimizer.step()
        our_optimizer.zero_grad()
        our_optimizer.detach()

    def theirs(batches: list[Any]) -> None:
        accumulate(batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True)
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
