"""Which units of a model can be recomputed at all, found by running its forward pass and watching."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradkern.checkpoint._preserve import Generators, same_bits
from gradkern.checkpoint._recompute import buffers_replaced, refuse_cache
from gradkern.checkpoint._units import WHOLE_MODEL, unit_module

__all__ = ["find_order", "find_repeatable"]


@dataclass
class _Pass:
    """What one forward pass did: units in order of their calls, and the tensors that went into them."""

    calls: list[str] = field(default_factory=list)
    inputs: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)

    def note(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook."""
        self.calls.append(name)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.inputs[name] = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def changed(self, name: str) -> bool:
        """Whether an input of the unit was changed in place since the unit began."""
        return any(tensor._version != version for tensor, version in self.inputs[name])


def find_order(
    model: nn.Module, candidates: Sequence[str], forward: Callable[[], object], passes: int
) -> tuple[list[str], frozenset[str]]:
    """Find the units that every one of several forward passes calls once.

    Args:
        model: The model that ``forward`` runs.
        candidates: Names of modules.
        forward: Runs one forward pass, with its graph.
        passes: How many.

    Returns:
        The units in order of execution, ``WHOLE_MODEL`` alone if none is left, and those of them whose inputs
        are changed in place, by themselves or by what follows: backward could not run them again.
    """
    watched = dict.fromkeys([*candidates, WHOLE_MODEL])
    seen = []
    for _ in range(passes):
        one = _Pass()
        with _hooked() as handles:
            for name in watched:
                note = partial(one.note, name)
                handles.append(unit_module(model, name).register_forward_pre_hook(note, with_kwargs=True))
            forward()
        seen.append((one.calls, frozenset(name for name in one.inputs if one.changed(name))))
    once = [name for name in seen[0][0] if all(calls.count(name) == 1 for calls, _ in seen)]
    names = [name for name in once if name in candidates] or [WHOLE_MODEL]
    return names, frozenset(name for name in names if any(name in changed for _, changed in seen))


def find_repeatable(model: nn.Module, names: Sequence[str], forward: Callable[[], object]) -> frozenset[str]:
    """Find the units that give the same bits when run again, as backward would run them.

    Each unit runs twice, with torch's generator and its buffers put back in between and nothing else: one that
    draws from Python's or numpy's generator or from a ``torch.Generator`` of its own, or that counts its calls,
    shows by its output.

    Args:
        model: The model that ``forward`` runs.
        names: Units that change none of their inputs.
        forward: Runs one forward pass, with its graph.
    """
    repeats = {name: _Repeat() for name in names}
    with _hooked() as handles:
        for name, repeat in repeats.items():
            module = unit_module(model, name)
            # Innermost, where recomputation would run: after other hooks before, before other hooks after.
            handles.append(module.register_forward_pre_hook(repeat.run_first, with_kwargs=True))
            handles.append(module.register_forward_hook(repeat.compare, prepend=True))
        forward()
    return frozenset(name for name, repeat in repeats.items() if repeat.is_same)


class _Repeat:
    """Runs a unit once more before each call, and compares."""

    def __init__(self) -> None:
        self.is_same = True

    def run_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        refuse_cache(args, kwargs)
        buffers = dict(module.named_buffers(remove_duplicate=False))
        generators = Generators.now()
        with buffers_replaced(module, buffers):
            self._outputs = _tensors(module.forward(*args, **kwargs))
        generators.restore_torch()
        self._python_state, self._numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002

    def compare(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook."""
        again = _tensors(output)
        same = len(again) == len(self._outputs) and all(map(same_bits, again, self._outputs))
        self.is_same = self.is_same and same
        # What runs next finds the generators where a single run would have left them.
        random.setstate(self._python_state)
        np.random.set_state(self._numpy_state)  # noqa: NPY002


def _tensors(values: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@contextmanager
def _hooked() -> Iterator[list[RemovableHandle]]:
    """Collect handles and remove them at the end."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
