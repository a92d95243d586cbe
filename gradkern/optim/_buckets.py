"""What one launch updates, and what is kept of a parameter group from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, eq
from typing import Any

import torch

from gradkern.ops._kinds import Kinds
from gradkern.ops._step.codecs import param_dtypes, state_dtype
from gradkern.ops._step.rule import Codecs, State
from gradkern.ops._table import AddressTable, Operands
from gradkern.optim._state import Changes

__all__ = ["Bucket", "GroupPlan"]

# Attributes by way of map(): with thousands of small tensors, gathering costs as much as the update itself.
_dtype = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_layout = torch.Tensor.layout.__get__  # type: ignore[attr-defined]
_device = torch.Tensor.device.__get__
_data_ptr = torch.Tensor.data_ptr
_numel = torch.Tensor.numel
_is_contiguous = torch.Tensor.is_contiguous
_stride = torch.Tensor.stride
_shape = attrgetter("shape")

_LARGE = 1 << 14
"""Elements of a tensor whose update takes so much longer than a look at its address that every step can afford one."""


@dataclass(slots=True)
class Bucket:
    """Parameters of one group that one launch updates: same device, dtypes and codecs.

    Attributes:
        codecs: How the operands are stored; None where kernels cannot run it and torch's own update does (fp64,
            complex, sparse, odd strides).
        settled: Whether the operands of the last step passed their checks: only parameters and gradients can have moved
            since.
        same_kinds: Whether parameters and gradients are surely of the dtypes, shapes and strides of the last step.
        ids: Numbers of the parameters in the optimizer, as in its ``state_dict``.
        columns: State tensors by operand name.
        steps: Step counters, also of optimizers whose state has none.
        relaid: Whether some gradient lies otherwise in memory than its parameter; ``grads`` then has a copy of it.
        versions: Of parameters with a master after the last step; None where it is not known.
        held: State, masters and counters of a bucket that kernels update, the largest first, and ``held_at`` where they
            lay; ``large`` of them are looked at before every step.
        large_kinds: Of those.
        storages: Of the rest: their addresses stay valid whatever becomes of the tensors.
    """

    group: dict[str, Any]
    codecs: Codecs | None
    states: tuple[State, ...]
    params: list[torch.Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    columns: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    masters: list[torch.Tensor] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    operands: Operands | None = None
    settled: bool = False
    relaid: bool = False
    same_kinds: bool = False
    versions: list[int | None] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)
    held_at: list[int] = field(default_factory=list)
    large: int = 0
    large_kinds: Kinds = field(default_factory=Kinds)
    storages: list[torch.UntypedStorage] = field(default_factory=list)
    step_cache: AddressTable = field(default_factory=AddressTable)
    norm_cache: AddressTable = field(default_factory=AddressTable)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.params[0].device

    def hold(self) -> None:
        """Remember where everything lies but parameters and gradients."""
        held = [*self.masters, *self.steps, *chain.from_iterable(self.columns.values())]
        self.held = sorted(held, key=_numel, reverse=True)
        self.held_at = list(map(_data_ptr, self.held))
        self.large = sum(t.numel() >= _LARGE for t in held) + 1
        self.large_kinds.remember(self.held[: self.large])
        self.storages = [t.untyped_storage() for t in self.held[self.large :]]

    def lies_still(self, *, surely: bool, same_kinds: bool) -> bool:
        """Whether everything lies where and as it did; of small tensors only one is looked at unless ``surely``."""
        if not self.held or torch.compiler.is_compiling():
            return True
        count = len(self.held) if surely else self.large
        if list(map(_data_ptr, self.held[:count])) != self.held_at[:count]:
            return False
        if surely:
            self.settled = False  # the table looks at what may have become of it
            return not same_kinds or self._is_laid_as_params()
        # The same address proves nothing: memory that was freed is handed out again, for other shapes and dtypes.
        return self.large_kinds.are_those_of(self.held[:count])

    def _is_laid_as_params(self) -> bool:
        """Whether states and masters still are of the dtypes of the codecs, and laid out as their parameters."""
        if self.codecs is None:
            return True
        state, (_, master) = state_dtype(self.codecs.state), param_dtypes(self.codecs.param)
        kept = [(self.columns[f"{rule_state.name}s"], state) for rule_state in self.states]
        if master is not None:
            kept.append((self.masters, master))
        return all(
            set(map(_dtype, column)) == {dtype}
            and all(map(eq, map(_shape, column), map(_shape, self.params)))
            and all(map(eq, map(_stride, column), map(_stride, self.params)))
            for column, dtype in kept
        )

    def tensors(self) -> dict[str, Sequence[torch.Tensor] | None]:
        """Operands of the step by name."""
        return {
            "params": self.params,
            "grads": self.grads,
            "steps": self.steps,
            "remainders": self.masters or None,
            **self.columns,
        }


class GroupPlan:
    """The buckets of one group, kept while the same parameters have gradients of the same kind."""

    __slots__ = ("buckets", "changes", "grad_kinds", "key", "kinds", "param_kinds", "step_buffer")

    def __init__(self) -> None:
        self.key: object = None
        self.changes = 0
        self.kinds: object = None  # what the last step found, equal where it is the same to the buckets
        self.param_kinds, self.grad_kinds = Kinds(), Kinds()
        self.buckets: list[Bucket] = []
        self.step_buffer: torch.Tensor | None = None

    def recall(self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> bool:
        """Whether these are surely of the kinds of the last step; else look at each, for ``kinds``."""
        if self.param_kinds.are_those_of(params) and self.grad_kinds.are_those_of(grads):
            return True
        contiguous = all(map(_is_contiguous, params)) and all(map(_is_contiguous, grads))
        self.kinds = (
            *(list(map(look, tensors)) for look in (_dtype, _device) for tensors in (params, grads)),
            list(map(_layout, grads)),
            None if contiguous else (list(map(_stride, params)), list(map(_stride, grads))),
            list(map(_numel, params)),
        )
        self.param_kinds.remember(params)
        self.grad_kinds.remember(grads)
        for bucket in self.buckets:
            bucket.settled = False  # until they have passed the checks of a step, which may not reach them at once
        return False

    def holds(self, key: object, changes: Changes, *, same_kinds: bool) -> bool:
        """Whether the buckets are those of this step too: so are parameters and state, which lies where it lay.

        ``tensor.data = ...`` leaves no trace. Who does that has looked the tensor up just before; or has kept it since
        an earlier step, and then sends away what is large, or all. What else they might do is not seen, but does no
        harm: small tensors have their old memory held.
        """
        return (
            self.changes == changes.count
            and self.key == key
            and all(bucket.lies_still(surely=changes.read, same_kinds=same_kinds) for bucket in self.buckets)
        )

    def counters(self) -> list[torch.Tensor]:
        """Tensors of the step counters that kernels advance: the whole buffer at once where that is right."""
        counted = [bucket for bucket in self.buckets if bucket.codecs is not None]
        if self.step_buffer is not None and sum(len(b.params) for b in counted) == len(self.step_buffer):
            return [self.step_buffer]
        return [step for bucket in counted for step in bucket.steps]
