"""Which operators a unit runs forward, and which of their outputs are worth holding while it is recomputed.

A recomputed unit runs every operator again whose outputs were not held, up to the last tensor that backward needs
(torch stops there). So the seconds that an option adds are a sum over operators and the bytes that it holds are one
too, and for every price of a byte the best set is that of the operators whose seconds a byte are above it: those sets,
one inside the other, are the lower convex hull of all sets. No cut through the graph does better, for torch runs an
operator even where all who use its outputs were held.
"""

from __future__ import annotations

import bisect
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import SAC_IGNORED_OPS

from gradkern.checkpoint._recompute import OpCall
from gradkern.checkpoint._units import unit_module

__all__ = ["Operator", "UnitOperators", "record_operators", "saving_sets"]

# Of a unit, that differ in what they hold.
_MOST_SETS = 12


@dataclass(frozen=True)
class Operator:
    """One call of an operator in a unit's forward.

    Attributes:
        call: The operator, and which of its calls.
        outputs: Shape and dtype of every tensor it gave.
        seconds: How long it took.
        held_bytes: Bytes that holding its outputs takes; None where they cannot be held: views, what is written in
            place, and draws from a generator, which must be drawn again for those that follow.
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

    def held_bytes(self, saved_ops: Sequence[OpCall]) -> int:
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
    """Sets of calls whose outputs to hold, one inside the next, of units that ran the same operators.

    Args:
        alike: The units; of each operator the median of its seconds counts.
        most_bytes: No set holds more.

    Returns:
        Of the sets that are best for some price of a byte at most ``_MOST_SETS``, evenly by the bytes they hold, the
        largest among them. Empty where nothing can be held.
    """
    operators = alike[0].operators[: alike[0].needed]
    seconds = [statistics.median(unit.operators[at].seconds for unit in alike) for at in range(len(operators))]
    holdable = [
        (spent / max(1, op.held_bytes), at)
        for at, (op, spent) in enumerate(zip(operators, seconds, strict=True))
        if op.held_bytes is not None and spent > 0
    ]
    held: list[int] = []
    sets: list[tuple[int, tuple[OpCall, ...]]] = []
    held_bytes = 0
    # Best first; equal ones in order of execution.
    for _, at in sorted(holdable, key=lambda pair: (-pair[0], pair[1])):
        held_bytes += operators[at].held_bytes or 0
        if held_bytes > most_bytes:
            break
        held.append(at)
        sets.append((held_bytes, tuple(operators[each].call for each in sorted(held))))
    if not sets:
        return []
    wanted = [sets[-1][0] * step / _MOST_SETS for step in range(1, _MOST_SETS + 1)]
    chosen = {bisect.bisect_left(sets, nbytes, key=lambda pair: pair[0]) for nbytes in wanted}
    return [sets[at][1] for at in sorted(chosen)]


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
    return recorder.found


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run while a unit is entered."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, UnitOperators] = {}
        self._clock = clock
        self._unit: str | None = None

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of a unit."""
        self._unit = name
        self._operators: list[Operator] = []
        self._counts: Counter[str] = Counter()
        self._made_by: dict[int, int] = {}  # by storage, the position of the operator that made it
        self._storages: list[torch.UntypedStorage] = []  # kept alive, so that no two have one address
        self._needed = 0

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a unit."""
        if self._unit is not None:
            self.found[self._unit] = UnitOperators(tuple(self._operators), self._needed)
        self._unit = None
        self._storages = []

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
                self._operators[maker] = _not_held(self._operators[maker])
        self._made_by.update(dict.fromkeys(made.keys() - inputs, len(self._operators)))
        self._storages.extend(made.values())
        is_draw = _draws(func, args, kwargs)
        held_bytes = sum(storage.nbytes() for storage in made.values()) if is_fresh and not is_draw else None
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


def _not_held(op: Operator) -> Operator:
    return Operator(op.call, op.outputs, op.seconds, None)


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
