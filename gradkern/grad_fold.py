"""Folding gradients into their accumulator while backward runs, with the norm from the same registers.

Autograd accumulates a parameter's gradient in its ``AccumulateGrad`` node. A pre-hook on that node sees the fresh
gradient first; when it returns ``None`` in its place, the node leaves ``p.grad`` alone. So the hook adds the fresh
gradient to ``p.grad`` itself, in one pass that also yields the sum of squares of the result. The hook does not run
under ``torch.autograd.grad``, and a backward that raises midway leaves nothing aside: ``p.grad`` is always what it
shows.

The first micro-batch after ``zero_grad`` is left to autograd, which hands its own tensor over without a copy; only
low-precision parameters with an fp32 accumulator are folded from the first one on, overwriting.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from gradkern import functional
from gradkern.ops._chunks import DTYPE_CODES, is_dense
from gradkern.ops._table import AddressTable

__all__ = ["FOLD_MIN_NUMEL", "GradFold", "GradMeter", "distributed", "fold_list_", "known_partials"]

FOLD_MIN_NUMEL = 1 << 18
"""Smallest fp32 parameter whose fold by a Python hook pays: below it, one batched norm at ``step()`` is cheaper."""

_version = attrgetter("_version")

# What fold_list_ left behind, by the first gradient of the list.
_LISTS: WeakIdKeyDictionary = WeakIdKeyDictionary()

# Which fold a parameter belongs to: two would add the same gradient twice.
_OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()


class _FoldedList:
    """Gradients folded in one call, and the partials of all of them together while none has changed."""

    __slots__ = ("_grads", "_partials", "_versions")

    def __init__(self, grads: Sequence[torch.Tensor], partials: torch.Tensor) -> None:
        self._grads = list(map(weakref.ref, grads))
        self._versions = list(map(_version, grads))
        self._partials = partials

    def partials(self, grads: Sequence[torch.Tensor]) -> torch.Tensor | None:
        same = len(grads) == len(self._grads) and all(map(is_, grads, (ref() for ref in self._grads)))
        return self._partials if same and list(map(_version, grads)) == self._versions else None


def fold_list_(
    main_grads: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], *, overwrite: bool, cache: AddressTable
) -> None:
    """Fold many gradients in one launch and remember their partials for :func:`known_partials`.

    Args:
        main_grads: fp32 accumulators, mutated.
        grads: What is added, or set with ``overwrite``; one dtype.
        overwrite: Set instead of add.
        cache: Table kept from the last call with the same operands.
    """
    partials = functional.accumulate_with_partials_(main_grads, grads, overwrite=overwrite, cache=cache)
    _LISTS[main_grads[0]] = _FoldedList(main_grads, partials)


def known_partials(grads: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Partials of exactly these gradients, in this order, if :func:`fold_list_` left them so; else None."""
    folded: _FoldedList | None = _LISTS.get(grads[0]) if grads else None
    return None if folded is None else folded.partials(grads)


def distributed() -> bool:
    """Whether collectives may write gradients: they bump no version, so that no partials can be trusted."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class GradMeter:
    """Bytes of gradients, counted whenever one arrives in backward.

    That is: the gradients shown, the buffers kept for them, and the fresh gradients for as long as they live.

    Attributes:
        peak_bytes: The most that was there at once.
    """

    __slots__ = ("_entries", "_fresh", "_fresh_bytes", "_held_bytes", "peak_bytes")

    def __init__(self) -> None:
        self._entries: weakref.WeakSet[_Entry] = weakref.WeakSet()
        self._fresh: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._fresh_bytes = 0
        self._held_bytes = 0
        self.peak_bytes = 0

    def add(self, entry: _Entry) -> None:
        """Count what an entry holds."""
        self._entries.add(entry)

    def recount(self) -> None:
        """Look at every gradient again."""
        self._held_bytes = sum(entry.count_held() for entry in self._entries)
        self._note_peak()

    def arrived(self, entry: _Entry, grad: torch.Tensor) -> None:
        """Count a fresh gradient before anything is done with it."""
        before, now = entry.held_bytes, entry.count_held()
        self._held_bytes += now - before
        if now < before:
            self.recount()  # zero_grad() tells nobody: one gradient is gone, so are the others, all seen at once
        ref = weakref.ref(grad, self._gone)
        self._fresh[id(ref)] = (ref, grad.nbytes)
        self._fresh_bytes += grad.nbytes
        self._note_peak()

    def settled(self, entry: _Entry, *, taken: int) -> None:
        """Count what has become of it; ``taken``: bytes that autograd is about to take as they are."""
        before, now = entry.held_bytes, entry.count_held()
        self._held_bytes += now - before
        self._note_peak()
        self._held_bytes += taken
        entry.held_bytes += taken

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._held_bytes + self._fresh_bytes)

    def _gone(self, ref: weakref.ref[torch.Tensor]) -> None:
        self._fresh_bytes -= self._fresh.pop(id(ref))[1]


class _Entry:
    """One parameter: its hook, and the partials of the gradient that the hook last left behind."""

    __slots__ = (
        "__weakref__",
        "_address",
        "_cache",
        "_grad",
        "_guard",
        "_handle",
        "_main_grad",
        "_meter",
        "_node",
        "_param",
        "_partials",
        "_storage",
        "_version",
        "held_bytes",
    )

    def __init__(self, param: torch.Tensor, meter: GradMeter | None, guard: Callable[[], None] | None) -> None:
        self._param = weakref.ref(param)
        self._node = get_gradient_edge(param).node
        self._handle: RemovableHandle = self._node.register_prehook(_hook(weakref.ref(self)))
        self._cache = AddressTable()
        self._partials = functional.new_partials([param])
        self._grad: weakref.ref[torch.Tensor] | None = None
        self._version = -1
        self._main_grad: torch.Tensor | None = None
        self._storage: torch.UntypedStorage | None = None
        self._address = 0
        self._guard = guard
        self._meter = meter
        self.held_bytes = 0
        if meter is not None:
            meter.add(self)

    def arrive(self, grad: torch.Tensor | None) -> tuple[None] | None:
        """What the hook does with a fresh gradient; ``(None,)`` keeps it from autograd."""
        param = self._param()
        if param is None or grad is None:
            return None
        if self._guard is not None:
            self._guard()
        if self._meter is None:
            return self._fold(param, grad)
        self._meter.arrived(self, grad)
        outcome = self._fold(param, grad)
        self._meter.settled(self, taken=grad.nbytes if outcome is None and param.grad is None else 0)
        return outcome

    def count_held(self) -> int:
        """Bytes of the gradient shown and of the buffer kept for it; remembered in ``held_bytes``."""
        param = self._param()
        shown = None if param is None else param.grad
        self.held_bytes = 0 if shown is None else shown.nbytes
        if self._main_grad is not None and self._main_grad is not shown:
            self.held_bytes += self._main_grad.nbytes
        return self.held_bytes

    def _fold(self, param: torch.Tensor, grad: torch.Tensor) -> tuple[None] | None:
        if torch.is_grad_enabled() or grad.dtype not in DTYPE_CODES:
            return None
        shown = param.grad
        overwrite = shown is None
        if shown is None:
            if grad.dtype == torch.float32:
                return None  # autograd takes it without a copy
            target = self.fresh_main_grad(param)
        elif shown.dtype != torch.float32 and param.grad_dtype is None and not shown.requires_grad:
            target = shown.float()  # as cast_grads_() left it
        else:
            target = shown
        if target.dtype != torch.float32 or not _same_layout(target, grad):
            return None
        functional.accumulate_([target], [grad], self._partials, overwrite=overwrite, cache=self._cache)
        if target is not shown:
            param.grad = target
        self._grad = weakref.ref(target)
        self._version = target._version
        return (None,)

    def partials(self, grad: torch.Tensor) -> torch.Tensor | None:
        """Partials of ``grad`` if it is, unchanged, what the hook left behind."""
        if self._grad is not None and self._grad() is grad and grad._version == self._version:
            return self._partials
        return None

    def detach(self) -> None:
        self._handle.remove()
        param = self._param()
        if param is not None:
            _OWNERS.pop(param, None)

    def fresh_main_grad(self, param: torch.Tensor) -> torch.Tensor:
        """An fp32 buffer of the parameter's layout to overwrite: the last one, unless a user still sees it."""
        if self._main_grad is None or not _alone(self):
            self._main_grad = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
            self._storage = self._main_grad.untyped_storage()
            self._address = self._main_grad.data_ptr()
        return self._main_grad


def _references(holder: Any) -> int:
    return sys.getrefcount(holder._main_grad)


# How many references getrefcount counts to a tensor that only its slot holds: it differs between Python versions.
_REFERENCES_ALONE = _references(SimpleNamespace(_main_grad=torch.empty(0)))


def _alone(holder: Any) -> bool:
    """Whether nobody else holds an entry's buffer: by name, through a graph, or by view, detach() or numpy()."""
    if sys.getrefcount(holder._main_grad) > _REFERENCES_ALONE:
        return False
    tensor = holder._main_grad
    # The storage counts the tensor, and the Python object kept here. A tensor moved to another storage is not ours.
    return bool(torch._C._storage_Use_Count(holder._storage._cdata) == 2 and tensor.data_ptr() == holder._address)


def _owner_of(param: torch.Tensor) -> GradFold | None:
    owner: weakref.ref[GradFold] | None = _OWNERS.get(param)
    return None if owner is None else owner()


def _hook(entry_ref: weakref.ref[_Entry]) -> Callable[[tuple[torch.Tensor, ...]], tuple[None] | None]:
    # The node owns its hooks and the entry owns the node: a strong reference here would be a cycle through C++.
    def fold(grads: tuple[torch.Tensor, ...]) -> tuple[None] | None:
        entry = entry_ref()
        return None if entry is None else entry.arrive(grads[0])

    return fold


def _same_layout(target: torch.Tensor, grad: torch.Tensor) -> bool:
    return (
        grad.layout == torch.strided
        and grad.device == target.device
        and grad.shape == target.shape
        and grad.stride() == target.stride()
        and is_dense(grad)
    )


class GradFold:
    """Hooks that fold the gradients of some parameters.

    Args:
        params: Leaf parameters; those that autograd should keep to itself are left out by the caller.
        owner: Name of the object that folds, for the message when two want the same parameter.
        share: Leave parameters that another fold owns to it, instead of raising: ``p.grad`` is the same either way,
            only the norm then costs a pass. (``opt = AdamW(...)`` again in a notebook cell meets the old optimizer.)
        meter: Counts the bytes of the gradients.
        guard: Called before a gradient is folded; what it raises ends that backward.

    Raises:
        ValueError: Another fold owns one of the parameters; nothing is hooked then.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        owner: str,
        *,
        share: bool = False,
        meter: GradMeter | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        self._entries: dict[int, _Entry] = {}
        self._meter = meter
        self._guard = guard
        self._owner = owner
        self._share = share
        self.add(params)

    def add(self, params: Iterable[torch.Tensor]) -> None:
        """Fold the gradients of more parameters.

        Raises:
            ValueError: Another fold owns one of them; nothing is hooked then.
        """
        wanted = [p for p in params if id(p) not in self._entries]
        owned = [p for p in wanted if _owner_of(p) is not None]
        if owned and not self._share:
            gc.collect()  # an owner that waits in a reference cycle is no owner
            owned = [p for p in owned if _owner_of(p) is not None]
            if owned:
                raise ValueError(
                    f"{self._owner}: the gradient of a parameter of shape {tuple(owned[0].shape)} is already folded by "
                    "another optimizer or GradAccumulator, expected one owner; call detach() on the other first"
                )
        for param in wanted:
            if _owner_of(param) is not None:
                continue
            self._entries[id(param)] = _Entry(param, self._meter, self._guard)
            _OWNERS[param] = weakref.ref(self)

    @property
    def size(self) -> int:
        """How many parameters are folded."""
        return len(self._entries)

    def partials(self, param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
        """Partials of ``param.grad`` where they are current, else None."""
        entry = self._entries.get(id(param))
        return None if entry is None else entry.partials(grad)

    def fresh_main_grads(self, params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """fp32 buffers for the gradients of folded parameters, to be overwritten and shown as ``param.grad``."""
        entries = map(self._entries.__getitem__, map(id, params))
        kept = ((e, p, e._main_grad if _alone(e) else None) for e, p in zip(entries, params, strict=True))
        return [e.fresh_main_grad(p) if main_grad is None else main_grad for e, p, main_grad in kept]

    def detach(self) -> None:
        """Remove every hook; autograd accumulates by itself again."""
        for entry in self._entries.values():
            entry.detach()
        self._entries.clear()
