"""Which operators a unit runs forward, and which of their outputs are worth holding while it is recomputed.

A recomputed unit runs every operator again whose outputs were not held, up to the last tensor that backward needs
(torch stops there). So the seconds that an option adds are a sum over operators and the bytes that it holds are one
too: the sets that none beats in both are those of a knapsack. For every price of a byte the best is that of the
operators whose seconds a byte are above it; those sets, one inside the other, are the lower convex hull of all, and few
where a unit has few operators. No cut through the graph does better, for torch runs an operator even where all who use
its outputs were held.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import SAC_IGNORED_OPS

from gradkern.checkpoint._recompute import OpCall
from gradkern.checkpoint._units import unit_module

__all__ = ["Operator", "UnitOperators", "record_operators", "saving_sets"]

# Sets of a unit that has no equals. What lies between two sets, units that are equal fill by taking different ones, so
# that of many fewer do.
_MOST_SETS, _LEAST_SETS, _EQUALS = 48, 12, 6

# Sets that are kept in mind while they are searched for.
_MOST_STATES = 256


@dataclass(frozen=True)
class Operator:
    """One call of an operator in a unit's forward.

    Attributes:
        call: The operator, and which of its calls.
        outputs: Shape and dtype of every tensor it gave.
        seconds: How long it took.
        held_bytes: Bytes that holding its outputs takes beyond what the unit returns, which is alive anyway. None where
            they cannot be held: views, what is written in place, and draws from a generator, which must be drawn again
            for those that follow.
    """

    call: OpCall
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    seconds: float
    held_bytes: int | None


@dataclass(frozen=True)
class UnitOperators:
    """What a unit ran forward.

    Attributes:
        operators: In order.
        needed: How many of them run again when all of the unit is recomputed.
    """

    operators: tuple[Operator, ...]
    needed: int

    def held_bytes(self, saved_ops: Iterable[OpCall]) -> int:
        """Bytes that holding the outputs of these takes."""
        held = frozenset(saved_ops)
        return sum(op.held_bytes or 0 for op in self.operators if op.call in held)

    @property
    def signature(self) -> object:
        """Equal for units that ran the same operators on the same shapes."""
        return self.needed, tuple((op.call, op.outputs, op.held_bytes) for op in self.operators)

    def share_again(self, saved_ops: Sequence[OpCall] = ()) -> float:
        """The share of the forward's seconds that runs again where the outputs of ``saved_ops`` are held."""
        total = sum(op.seconds for op in self.operators)
        held = frozenset(saved_ops)
        again = sum(op.seconds for op in self.operators[: self.needed] if op.call not in held)
        return again / total if total else 1.0


def saving_sets(alike: Sequence[UnitOperators], most_bytes: int) -> list[tuple[OpCall, ...]]:
    """Sets of calls whose outputs to hold, of units that ran the same operators, ascending by their bytes.

    Args:
        alike: The units; of each operator the median of its seconds counts.
        most_bytes: No set holds more.

    Returns:
        Of the sets that none beats in both bytes and seconds some, evenly by their bytes: ``_MOST_SETS`` at most, fewer
        where more units than ``_EQUALS`` share them; half of them such as are best for some price of a byte, where
        there are so many. Empty where nothing can be held.
    """
    most = max(_LEAST_SETS, min(_MOST_SETS, _MOST_SETS * _EQUALS // len(alike)))
    operators = alike[0].operators[: alike[0].needed]
    seconds = [statistics.median(unit.operators[at].seconds for unit in alike) for at in range(len(operators))]
    items = [
        _Held(op.held_bytes, spent, 1 << at)
        for at, (op, spent) in enumerate(zip(operators, seconds, strict=True))
        if op.held_bytes is not None and spent > 0
    ]
    # Best first, what takes no bytes before all; equal ones in order of execution.
    items.sort(key=lambda item: (-item.seconds / item.nbytes if item.nbytes else -math.inf, item.calls))
    hull = itertools.takewhile(lambda held: held.nbytes <= most_bytes, itertools.accumulate(items, _Held.with_))
    chosen = _evenly(_unbeaten(hull), most // 2)
    others = [held for held in _unbeaten([*chosen, *_knapsack(items, most_bytes)]) if held not in chosen]
    sets = sorted([*chosen, *_evenly(others, most - len(chosen))])
    return [tuple(op.call for at, op in enumerate(operators) if held.calls >> at & 1) for held in sets]


class _Held(NamedTuple):
    """Operators whose outputs are held: bytes, the seconds that they spare, and their positions as bits."""

    nbytes: int
    seconds: float
    calls: int

    def with_(self, other: _Held) -> _Held:
        """Both."""
        return _Held(self.nbytes + other.nbytes, self.seconds + other.seconds, self.calls | other.calls)


def _knapsack(items: Sequence[_Held], most_bytes: int) -> list[_Held]:
    """Sets of items that none beats in both bytes and seconds, of many some evenly by their bytes."""
    sets = [_Held(0, 0.0, 0)]
    for item in items:
        more = [held.with_(item) for held in sets if held.nbytes + item.nbytes <= most_bytes]
        sets = _evenly(_unbeaten([*sets, *more]), _MOST_STATES)
    return [held for held in sets if held.calls]


def _unbeaten(sets: Iterable[_Held]) -> list[_Held]:
    """Those that no other beats in both bytes and seconds, in ascending order."""
    found: list[_Held] = []
    for held in sorted(sets, key=lambda held: (held.nbytes, -held.seconds)):
        if not found or held.seconds > found[-1].seconds:
            found.append(held)
    return found


def _evenly(sets: Sequence[_Held], most: int) -> list[_Held]:
    """At most so many of ``sets``, which ascend, evenly by their bytes, the first and the last among them."""
    if len(sets) <= most:
        return list(sets)
    wanted = [sets[-1].nbytes * step / (most - 1) for step in range(1, most)]
    chosen = {0} | {bisect.bisect_left(sets, nbytes, key=lambda held: held.nbytes) for nbytes in wanted}
    return [sets[at] for at in sorted(chosen)]


def record_operators(
    model: nn.Module, names: Sequence[str], forward: Callable[[], object], clock: Callable[[], float]
) -> dict[str, UnitOperators]:
    """Run ``forward`` once and return what each unit ran.

    Args:
        model: The model that ``forward`` runs.
        names: Its units; each runs once, none inside another.
        forward: Runs one forward pass, with its graph.
        clock: Seconds.
    """
    recorder = _Recorder(clock)
    with _told(model, names, recorder), saved_tensors_hooks(recorder.note_saved, _same), recorder:
        forward()
    recorder.finish()
    return recorder.found


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run while a unit is entered."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, UnitOperators] = {}
        self._clock = clock
        self._unit: str | None = None
        # What units returned: unit, positions of the operators that made it, and its version then.
        self._returned: list[tuple[str, frozenset[int], Tensor, int]] = []

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of a unit."""
        self._unit = name
        self._operators: list[Operator] = []
        self._counts: Counter[str] = Counter()
        self._made_by: dict[int, int] = {}  # by storage, the position of the operator that made it
        self._made: list[dict[int, int]] = []  # by position, bytes by storage
        self._storages: list[torch.UntypedStorage] = []  # kept alive, so that no two have one address
        self._needed = 0

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a unit."""
        if self._unit is not None:
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            for leaf in leaves:
                key = _storage_key(leaf)
                makers = frozenset(at for at, made in enumerate(self._made) if key in made)
                if makers and not leaf.is_inference():
                    self._returned.append((self._unit, makers, leaf, leaf._version))
            returned = {_storage_key(leaf) for leaf in leaves}
            operators = [
                op
                if op.held_bytes is None
                else replace(op, held_bytes=sum(made[key] for key in made.keys() - returned))
                for op, made in zip(self._operators, self._made, strict=True)
            ]
            self.found[self._unit] = UnitOperators(tuple(operators), self._needed)
        self._unit = None
        self._storages = []

    def finish(self) -> None:
        """After the forward pass: what was written in place after its unit had returned it cannot be held either."""
        for name, makers, leaf, version in self._returned:
            if leaf._version != version:
                ran = self.found[name]
                operators = [
                    replace(op, held_bytes=None) if at in makers else op for at, op in enumerate(ran.operators)
                ]
                self.found[name] = UnitOperators(tuple(operators), ran.needed)
        self._returned = []

    def note_saved(self, tensor: Tensor) -> Tensor:
        """Pack hook: backward needs what has run up to here."""
        if self._unit is not None:
            self._needed = len(self._operators)
        # Not the tensor itself: its graph would then hold it and it its graph, for good.
        return tensor.detach()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._unit is None or func in SAC_IGNORED_OPS:
            return func(*args, **kwargs)
        start_s = self._clock()
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result, self._clock() - start_s)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, seconds: float) -> None:
        name = str(func)
        call = name, self._counts[name]
        self._counts[name] += 1
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = {_storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = {_storage_key(leaf): leaf.untyped_storage() for leaf in outputs if leaf.layout is torch.strided}
        is_fresh = 0 < len(made) == len(outputs) and made.keys().isdisjoint(inputs | self._made_by.keys())
        for key in _written(func, args, kwargs):
            maker = self._made_by.get(key)
            if maker is not None:
                self._operators[maker] = replace(self._operators[maker], held_bytes=None)
        self._made_by.update(dict.fromkeys(made.keys() - inputs, len(self._operators)))
        self._storages.extend(made.values())
        is_draw = _draws(func, args, kwargs)
        self._made.append({key: storage.nbytes() for key, storage in made.items()})
        held_bytes = sum(self._made[-1].values()) if is_fresh and not is_draw else None
        shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in outputs)
        self._operators.append(Operator(call, shapes, seconds, held_bytes))


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws from a generator: attention is tagged as one that may, and does only to drop."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(given != 0.0)
    return True


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """Storages that an operator writes."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return set()
    written = set()
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written |= {_storage_key(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
    return written


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _told(model: nn.Module, names: Sequence[str], recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder when units begin and end: innermost, where recomputation would run."""
    handles = []
    try:
        for name in names:
            module = unit_module(model, name)
            handles.append(module.register_forward_pre_hook(partial(recorder.enter, name)))
            handles.append(module.register_forward_hook(recorder.leave, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
