"""Recomputing several units together, and again inside that: nested checkpoints around calls that a model makes itself.

A *segment* is units that run one after the other. In forward each computes its output as ever, but none of what
autograd would save is held: of the whole segment only what flows into it is, and what flows in from the side. When
backward first asks for something, the segment runs again from there and now holds what it saved before; of an inner
segment again only what flows into it, until backward reaches that one.

``torch.utils.checkpoint`` does the same for one call. The calls of a segment are made by the model's own loop, so its
bookkeeping spans them here. What a unit gets from the one before is recognised by being the very tensor that came out;
anything else that goes in is held.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import get_device_states, set_device_states

from gradkern.checkpoint._preserve import same_bits
from gradkern.checkpoint._recompute import Recompute, RecomputedForward, buffers_replaced, refuse_cache

__all__ = ["Nest", "SegmentedForward", "make_segments", "names_in"]

Nest = tuple[Any, ...]
"""Units by name, and inner segments, in order of execution: ``("h.0", ("h.1", "h.2"), "h.3")``."""


def names_in(nest: Nest) -> list[str]:
    """All units of a segment, in order."""
    return [name for item in nest for name in ([item] if isinstance(item, str) else names_in(item))]


@dataclass(frozen=True)
class _Former:
    """Stands for the tensor that came out of the unit before, by position among the leaves of its output."""

    leaf: int


@dataclass(frozen=True)
class _Output:
    """A tensor that came out of a unit, as it was then; not held."""

    reference: weakref.ref[Tensor]
    version: int
    requires_grad: bool

    @classmethod
    def of(cls, leaf: object) -> _Output | None:
        """None for what is no tensor."""
        if not isinstance(leaf, Tensor):
            return None
        return cls(weakref.ref(leaf), leaf._version, leaf.requires_grad)

    def is_still(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, and nothing has been done to it."""
        # Changes in place move the version on, and cutting it off takes its gradient away.
        same = self.reference() is tensor and self.version == tensor._version
        return same and self.requires_grad == tensor.requires_grad


@dataclass(frozen=True)
class _Held:
    """A tensor that flows in, and what it was when it did."""

    tensor: Tensor
    version: int
    requires_grad: bool


@dataclass(frozen=True)
class _Call:
    """One unit as it was called, ready to be called again.

    Attributes:
        cpu_state: The generator's; None where the call before leaves it so, which saves 5 kB a unit.
    """

    name: str
    forward: SegmentedForward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cpu_state: Tensor | None
    device_states: tuple[list[int], list[Tensor]]
    autocast: list[tuple[str, dict[str, Any]]]
    parameters: tuple[tuple[int, int], ...]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class _Expected:
    """What autograd saved at a place, to be compared with what is there the second time."""

    shape: torch.Size
    dtype: torch.dtype


class _Enough(Exception):
    """All that backward needs is there again."""


@dataclass(frozen=True)
class _Handle:
    """What autograd holds in place of a tensor."""

    run: _Run
    index: int

    def tensor(self) -> Tensor:
        """The tensor, computed again if need be."""
        return self.run.tensor(self.index)


class _Run:
    """One run of a segment: its calls, and once backward has asked, what they saved."""

    def __init__(self, nest: Nest) -> None:
        self.calls: list[_Call] = []
        self._nest = nest
        self._names = names_in(nest)
        self._expected: list[_Expected] = []
        self._found: dict[int, Tensor | _Handle] = {}
        self._outputs: list[_Output | None] = []
        self._state_after: Tensor | None = None

    def follows(self, name: str) -> bool:
        """Whether this unit is the next of the segment."""
        return not self.is_complete and self._names[len(self.calls)] == name

    @property
    def is_complete(self) -> bool:
        """Whether all units of the segment have run."""
        return len(self.calls) == len(self._names)

    def call(self, forward: SegmentedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a unit without holding what autograd saves."""
        self.calls.append(_recorded(forward, args, kwargs, self._outputs, self._state_after))
        with saved_tensors_hooks(self._pack, _unpack):
            output = forward.run(*args, **kwargs)
        self._outputs = [] if self.is_complete else [_Output.of(leaf) for leaf in tree_leaves(output)]
        self._state_after = None if self.is_complete else torch.get_rng_state()
        return output

    def tensor(self, index: int) -> Tensor:
        """What was saved at a place."""
        if index not in self._found:
            self._run_again()
        found = self._found.pop(index)
        tensor = found.tensor() if isinstance(found, _Handle) else found
        expected = self._expected[index]
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise RuntimeError(
                f"a recomputed segment saved {tuple(tensor.shape)} {tensor.dtype} where its forward had saved "
                f"{tuple(expected.shape)} {expected.dtype}: it does not do the same when run again; plan anew"
            )
        return tensor

    def _pack(self, tensor: Tensor) -> _Handle:
        self._expected.append(_Expected(tensor.shape, tensor.dtype))
        return _Handle(self, len(self._expected) - 1)

    def _collect(self, tensor: Tensor) -> None:
        self._put(tensor.detach())

    def _put(self, found: Tensor | _Handle) -> None:
        self._found[len(self._found)] = found
        if len(self._found) == len(self._expected) and all(call.forward.early_stop for call in self.calls):
            raise _Enough

    def _run_again(self) -> None:
        """Run from what flows in, holding what was not held, of inner segments what flows into them."""
        self._found = {}
        nest = self._nest if self.is_complete else tuple(call.name for call in self.calls)
        calls = iter(self.calls)
        outputs: list[Any] = []
        devices = sorted({device for call in self.calls for device in call.device_states[0]})
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                for item in nest:
                    if isinstance(item, str):
                        with saved_tensors_hooks(self._collect, _never):
                            outputs = _called(next(calls), outputs)
                    else:
                        outputs = self._run_inner(item, calls, outputs)
        except _Enough:
            pass
        if len(self._found) != len(self._expected):
            raise RuntimeError(
                f"a recomputed segment saved {len(self._found)} tensors where its forward had saved "
                f"{len(self._expected)}: it does not do the same when run again; plan anew"
            )

    def _run_inner(self, nest: Nest, calls: Iterator[_Call], outputs: list[Any]) -> list[Any]:
        """Run an inner segment, whose handles take the place of what it saves."""
        inner = _Run(nest)

        def pack(tensor: Tensor) -> None:
            self._put(inner._pack(tensor))

        for _ in names_in(nest):
            call = next(calls)
            if not inner.calls:
                # What flows into the first must be there when this runs again.
                args, kwargs = _filled(call, outputs, hold=True)
                state = torch.get_rng_state() if call.cpu_state is None else call.cpu_state
                call = replace(call, args=args, kwargs=kwargs, cpu_state=state)
            inner.calls.append(call)
            with saved_tensors_hooks(pack, _never):
                outputs = _called(call, outputs)
        return outputs


class _Segment:
    """A segment of a model; shared by the forwards of its units."""

    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self._run: _Run | None = None

    def call(self, forward: SegmentedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a unit of it."""
        run = self._run
        if run is None or not run.follows(forward.name):
            run = _Run(self.nest if names_in(self.nest)[0] == forward.name else (forward.name,))
        # Set only after the call: one that fails leaves no half of a run behind.
        self._run = None
        output = run.call(forward, args, kwargs)
        self._run = None if run.is_complete else run
        return output

    def end(self) -> None:
        """Let go of a run that a failed step has left half done."""
        self._run = None

    def __getstate__(self) -> dict[str, Any]:
        return {"nest": self.nest, "_run": None}


class SegmentedForward(RecomputedForward):
    """Stands as ``module.forward`` of a unit in a segment.

    Args:
        module: The unit.
        recompute: How; ``saved_ops`` are not held.
        plan_id: The plan that this belongs to.
        name: The unit's name.
        segment: What it belongs to.
    """

    def __init__(self, module: nn.Module, recompute: Recompute, plan_id: str, name: str, segment: _Segment) -> None:
        super().__init__(module, recompute, plan_id)
        self.name = name
        self.segment = segment

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            self.segment.end()
            return self.run(*args, **kwargs)
        refuse_cache(args, kwargs)
        return self.segment.call(self, args, kwargs)


def make_segments(nests: Sequence[Nest]) -> dict[str, _Segment]:
    """A segment for each, by the names of their units."""
    return {name: segment for segment in map(_Segment, nests) for name in names_in(segment.nest)}


def _recorded(
    forward: SegmentedForward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    former: list[_Output | None],
    state_after: Tensor | None,
) -> _Call:
    """Write down a call before it runs; ``former`` and ``state_after`` are what the call before it left."""

    def held(tensor: Tensor) -> _Former | _Held:
        for at, output in enumerate(former):
            if output is not None and output.is_still(tensor):
                return _Former(at)
        return _Held(tensor.detach(), tensor._version, tensor.requires_grad)

    values = tree_leaves((args, kwargs))
    state = torch.get_rng_state()
    with _disable_current_modes():  # in a simulation this is no work of the GPU
        follows = state_after is not None and same_bits(state_after, state)
    return _Call(
        name=forward.name,
        forward=forward,
        args=tree_map_only(Tensor, held, args),
        kwargs=tree_map_only(Tensor, held, kwargs),
        cpu_state=None if follows else state,
        device_states=get_device_states(*values),
        autocast=_autocast_now({leaf.device.type for leaf in values if isinstance(leaf, Tensor)}),
        parameters=forward.parameters(),
        buffers={name: forward.module.get_buffer(name).detach().clone() for name in forward.recompute.mutated_buffers},
    )


def _called(call: _Call, former: list[Any]) -> list[Any]:
    """Run a call again and return the leaves of what comes out, cut off from the graph."""
    args, kwargs = _filled(call, former, hold=False)
    call.forward.check_parameters(call.parameters)
    if call.cpu_state is not None:
        torch.set_rng_state(call.cpu_state)
    if call.device_states[0]:
        set_device_states(*call.device_states)
    with ExitStack() as stack:
        for device_type, settings in call.autocast:
            stack.enter_context(torch.autocast(device_type, **settings))
        stack.enter_context(buffers_replaced(call.forward.module, call.buffers))
        output = call.forward.run(*args, **kwargs)
    return [_cut_off(leaf) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(output)]


def _cut_off(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _filled(call: _Call, former: list[Any], *, hold: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with tensors where stand-ins were; ``hold`` leaves them ready for another time."""

    def fill(value: _Former | _Held) -> Tensor | _Held:
        if isinstance(value, _Former):
            tensor = former[value.leaf]
            return _Held(tensor.detach(), tensor._version, tensor.requires_grad) if hold else tensor
        if hold:
            return value
        if value.tensor._version != value.version:
            raise RuntimeError(
                f"a tensor that went into unit {call.name!r} was modified by an inplace operation before backward, "
                f"which needs it as it was: it is at version {value.tensor._version}, expected {value.version}"
            )
        return value.tensor.requires_grad_(value.requires_grad) if value.requires_grad else value.tensor

    args, kwargs = tree_map_only((_Former, _Held), fill, (call.args, call.kwargs))
    return args, kwargs


def _autocast_now(device_types: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """Settings of autocast for the CPU and for the devices in use."""
    return [
        (
            device_type,
            {
                "enabled": torch.is_autocast_enabled(device_type),
                "dtype": torch.get_autocast_dtype(device_type),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            },
        )
        for device_type in sorted({"cpu", *device_types})
        if torch.amp.is_autocast_available(device_type)
    ]


def _unpack(handle: _Handle) -> Tensor:
    return handle.tensor()


def _never(nothing: None) -> Tensor:
    raise AssertionError("the graph of a recomputation is not run backward")
