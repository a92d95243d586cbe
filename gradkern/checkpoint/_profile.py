"""What each unit of a model costs, by running the model.

A *span* is a unit with what follows it up to the start of the next unit; the stem is the span before the
first unit, the head (loss included) the last one. Attribution goes by time: a span owns the bytes that
appeared between its start and the start of the next span and are still there, so a boundary tensor belongs
to the span that made it, and to the next one's credit if that lets it go.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradkern.checkpoint._apply import apply_recompute, remove_recompute
from gradkern.checkpoint._meter import Mark, Meter, Source
from gradkern.checkpoint._offload import Link, Offload, link_of
from gradkern.checkpoint._operators import UnitOperators, record_operators
from gradkern.checkpoint._recompute import Recompute
from gradkern.checkpoint._segments import Nest
from gradkern.checkpoint._survey import find_order, find_repeatable
from gradkern.checkpoint._units import unit_module
from gradkern.loss import Batch, LossFn, compute_loss

__all__ = ["CycleCost", "Difference", "Span", "Trial"]


class Visit(NamedTuple):
    """One time that a span was entered, forward or backward.

    Attributes:
        peak_bytes: Most bytes above what earlier spans of the same micro-batch had left, gradients of parameters that
            were there at its start not counted.
        gradient_bytes: Those gradients.
    """

    peak_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class Span:
    """One span as it ran.

    Attributes:
        saved_bytes: Bytes it left behind for backward and for its successors; negative if it freed more.
        visits: What it needed, for each micro-batch forward and then backward.
        forward_s: Seconds forward.
        backward_s: Seconds backward.
    """

    saved_bytes: int
    visits: tuple[Visit, ...]
    forward_s: float
    backward_s: float

    @property
    def peak_bytes(self) -> int:
        """Most bytes above what earlier spans of the same micro-batch had left, forward or backward."""
        return max((visit.peak_bytes + visit.gradient_bytes for visit in self.visits), default=0)

    def beyond(self, other: Span) -> Difference:
        """What this needs more than the same unit did when it ran otherwise."""
        if len(self.visits) != len(other.visits):
            return Difference(self.saved_bytes - other.saved_bytes, (self.peak_bytes - other.peak_bytes,))
        pairs = zip(self.visits, other.visits, strict=True)
        return Difference(
            self.saved_bytes - other.saved_bytes, tuple(own.peak_bytes - its.peak_bytes for own, its in pairs)
        )

    def with_difference(self, difference: Difference) -> tuple[int, int]:
        """Saved bytes and peak of a unit like this one that needs so much more."""
        more = difference.peak_bytes
        if len(more) != len(self.visits):
            more = (max(more, default=0),) * len(self.visits)
        pairs = zip(self.visits, more, strict=True)
        peak_bytes = max((visit.peak_bytes + visit.gradient_bytes + each for visit, each in pairs), default=0)
        return self.saved_bytes + difference.saved_bytes, peak_bytes


class Difference(NamedTuple):
    """What a unit needs more than when it ran otherwise: bytes saved, and at the peak of every visit."""

    saved_bytes: int
    peak_bytes: tuple[int, ...]


@dataclass(frozen=True)
class CycleCost:
    """One optimizer cycle without its step.

    Attributes:
        spans: Stem, units, head.
        peak_bytes: Largest live bytes, relative to the start of the cycle.
        end_bytes: Live bytes at its end: the gradients.
        has_grad: Parameters that received a gradient.
        grad_bits: Of every parameter the sum of its gradient's bit patterns, None without one: equal where all
            gradients are, bit for bit. Empty where tensors hold no values.
    """

    spans: tuple[Span, ...]
    peak_bytes: int
    end_bytes: int
    has_grad: frozenset[Tensor]
    grad_bits: tuple[int | None, ...]

    @property
    def seconds(self) -> float:
        """Of a micro-batch, forward and backward."""
        return math.fsum(span.forward_s + span.backward_s for span in self.spans)


class Trial:
    """Runs cycles of forward and backward passes of one model on one batch.

    Args:
        model: Run as it is; its gradients are overwritten.
        batch: See ``gradkern.loss.compute_loss``.
        loss_fn: See there.
        accumulate: Micro-batches a step. Two stand for any larger number: from the second on each finds the
            gradients of all parameters made.
        rewind: Sets the global generators back; called before every cycle, so that all run the same program.
        source: Where bytes and seconds are read.
        progress: Told what runs next, in a few words.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        loss_fn: LossFn | None,
        accumulate: int,
        rewind: Callable[[], None],
        source: Source,
        progress: Callable[[str], None],
    ) -> None:
        self.model = model
        self.batch = batch
        self.loss_fn = loss_fn
        self.micro_batches = min(accumulate, 2)
        self.rewind = rewind
        self.source = source
        self.progress = progress

    def survey(self, candidates: list[str]) -> tuple[list[str], frozenset[str]]:
        """Return the units among ``candidates`` in order of execution, and those of them that can be recomputed.

        Raises:
            ValueError: The loss has no gradient.
        """
        with _recomputing(self.model, {}):
            self.rewind()
            names, changed = find_order(self.model, candidates, self._forward, self.micro_batches)
            unchanged = [name for name in names if name not in changed]
            if not self.source.compares_bits:
                return names, frozenset(unchanged)
            self.rewind()
            return names, find_repeatable(self.model, unchanged, self._forward)

    def operators(self, units: Sequence[str]) -> dict[str, UnitOperators]:
        """Return what these units run forward."""
        with _recomputing(self.model, {}):
            self.rewind()
            return record_operators(self.model, units, self._forward, self.source.clock)

    def warm_up(self, recompute: Mapping[str, Recompute]) -> None:
        """Run one cycle unmeasured, for what is allocated once and kept; ``recompute`` as in ``measure``."""
        with _recomputing(self.model, recompute):
            self._cycle(_Boundaries([], self.model, None))

    def measure(
        self,
        units: Sequence[str],
        recompute: Mapping[str, Recompute] | None = None,
        segments: Sequence[Nest] = (),
        offloads: Sequence[Offload] = (),
    ) -> CycleCost:
        """Run one cycle in its steady state.

        Args:
            units: Units in order of execution.
            recompute: Units to recompute, and how; None runs the model as it is.
            segments: Of those, units that are recomputed together.
            offloads: Other units, that are offloaded.
        """
        with _recomputing(self.model, recompute, segments, offloads, self.source.link):
            self._drop_gradients()
            # A collection in the middle would make the peak depend on what else the process does.
            was_enabled = gc.isenabled()
            gc.disable()
            try:
                meter = self.source.meter()
                boundaries = _Boundaries(units, self.model, meter)
                with meter:
                    self._cycle(boundaries)
            finally:
                if was_enabled:
                    gc.enable()
        params = list(self.model.parameters())
        has_grad = frozenset(param for param in params if param.grad is not None)
        bits = (None if param.grad is None else _bit_sum(param.grad) for param in params)
        grad_bits = tuple(bits) if self.source.compares_bits else ()
        self._drop_gradients()
        return boundaries.read(meter.marks, has_grad, grad_bits)

    def _forward(self) -> None:
        """Run one forward pass."""
        if not compute_loss(self.model, self.batch, self.loss_fn).requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter that requires grad, so there is no backward pass "
                "to plan for; set requires_grad on what is to be trained"
            )

    def _cycle(self, boundaries: _Boundaries) -> None:
        """Run the micro-batches of one step as a training loop would."""
        self.rewind()
        with boundaries.watching(self.model), torch.enable_grad():
            for _ in range(self.micro_batches):
                boundaries.enter_forward(0)
                # As in most loops, the name keeps the last loss until the new one is there.
                loss = compute_loss(self.model, self.batch, self.loss_fn)
                boundaries.start_backward()
                (loss / self.micro_batches).backward()
                boundaries.end_backward()

    def _drop_gradients(self) -> None:
        for param in self.model.parameters():
            param.grad = None


@dataclass(frozen=True)
class _Interval:
    """What runs from one mark to the next."""

    micro_batch: int
    span: int
    is_backward: bool
    gradient_bytes: int


class _Boundaries:
    """Marks on a meter where execution passes from one span to another."""

    def __init__(self, units: Sequence[str], model: nn.Module, meter: Meter | None) -> None:
        self._units = units
        self._params = list(model.parameters())
        self._meter = meter
        self._head = len(units) + 1
        self._intervals: list[_Interval] = []
        self._micro_batch = -1
        self._backward_span = 0
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Have the units report while the block runs."""
        try:
            for index, name in enumerate(self._units, start=1):
                module = unit_module(model, name)
                self._handles.append(
                    module.register_forward_pre_hook(partial(self._on_enter, index), prepend=True, with_kwargs=True)
                )
                if index == len(self._units):
                    self._handles.append(module.register_forward_hook(self._on_leave_last))
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    def enter_forward(self, span: int) -> None:
        """The forward of a span begins; that of the stem begins a micro-batch."""
        if span == 0:
            self._micro_batch += 1
        self._mark(span, is_backward=False)

    def start_backward(self) -> None:
        """The backward of the head begins."""
        self._backward_span = self._head
        self._mark(self._head, is_backward=True)

    def end_backward(self) -> None:
        """The backward of the stem is over."""
        self._backward_span = 0

    def read(self, marks: list[Mark], has_grad: frozenset[Tensor], grad_bits: tuple[int | None, ...]) -> CycleCost:
        """Turn the marks of the meter, which must have exited, into costs."""
        marks = marks[1:]  # the first is the meter's own start
        starts: dict[tuple[int, int], int] = {}
        for interval, mark in zip(self._intervals, marks, strict=False):
            if not interval.is_backward:
                starts[interval.micro_batch, interval.span] = mark.live_bytes
            elif interval.span == self._head:
                starts[interval.micro_batch, self._head + 1] = mark.live_bytes
        for micro_batch, span in itertools.product(range(self._micro_batch + 1), range(1, self._head)):
            if (micro_batch, span) not in starts:
                raise ValueError(
                    f"unit {self._units[span - 1]!r} ran in one forward pass and not in another on the same batch "
                    "with the same random state; what a step costs cannot be measured: make the model run the same "
                    "modules each time while planning"
                )
        saved = [
            max(
                starts[micro_batch, span + 1] - starts[micro_batch, span]
                for micro_batch in range(self._micro_batch + 1)
            )
            for span in range(self._head + 1)
        ]
        visits: list[list[Visit]] = [[] for _ in range(self._head + 1)]
        seconds: dict[tuple[int, bool], list[float]] = {}
        for interval, (mark, following) in zip(self._intervals, itertools.pairwise(marks), strict=True):
            prefix = starts[interval.micro_batch, interval.span] - starts[interval.micro_batch, 0]
            peak_bytes = following.peak_bytes - prefix - interval.gradient_bytes
            visits[interval.span].append(Visit(peak_bytes, interval.gradient_bytes))
            seconds.setdefault((interval.span, interval.is_backward), []).append(following.time_s - mark.time_s)
        spans = tuple(
            Span(
                saved[span],
                tuple(visits[span]),
                min(seconds.get((span, False), [0.0])),
                min(seconds.get((span, True), [0.0])),
            )
            for span in range(self._head + 1)
        )
        peak_bytes = max(mark.peak_bytes for mark in marks)
        return CycleCost(spans, peak_bytes, marks[-1].live_bytes, has_grad, grad_bits)

    def _mark(self, span: int, *, is_backward: bool) -> None:
        if self._meter is not None:
            self._meter.mark()
            there = sum(self._meter.bytes_of(param.grad) for param in self._params if param.grad is not None)
            self._intervals.append(_Interval(self._micro_batch, span, is_backward, there))

    def _on_enter(self, span: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of a unit; what flows in tells when backward leaves the unit."""
        self.enter_forward(span)
        self._watch_gradients(span - 1, (args, kwargs))

    def _on_leave_last(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the last unit: the head begins."""
        self.enter_forward(self._head)
        self._watch_gradients(self._head - 1, output)

    def _watch_gradients(self, span: int, values: Any) -> None:
        """Mark the start of a span's backward when the first gradient of ``values`` is there."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._handles.append(leaf.register_hook(partial(self._on_gradient, span)))

    def _on_gradient(self, span: int, grad: Tensor) -> None:
        # A tensor used by many spans gets its gradient late; backward only ever moves towards the stem.
        if span < self._backward_span:
            self._backward_span = span
            self._mark(span, is_backward=True)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _bit_sum(grad: Tensor) -> int:
    """Sum of a gradient's bits as integers: differs, but for one case in billions, where any bit does."""
    if grad.layout != torch.strided:
        coalesced = grad.coalesce()
        return _bit_sum(coalesced.values()) + _bit_sum(coalesced.indices())
    values = torch.view_as_real(grad) if grad.is_complex() else grad
    return int(values.view(_WORDS[values.itemsize]).sum(dtype=torch.int64))


@contextmanager
def _recomputing(
    model: nn.Module,
    recompute: Mapping[str, Recompute] | None,
    segments: Sequence[Nest] = (),
    offloads: Sequence[Offload] = (),
    link: Callable[[torch.device], Link | None] = link_of,
) -> Iterator[None]:
    """Apply a choice for the length of the block."""
    if recompute is None:
        yield
        return
    apply_recompute(model, recompute, segments, offloads, plan_id="trial", link=link)
    try:
        yield
    finally:
        remove_recompute(model)
