"""Running a module under ``torch.utils.checkpoint``."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["OpCall", "Recompute", "RecomputedForward", "buffers_replaced", "refuse_cache"]

OpCall = tuple[str, int]
"""An operator such as ``aten.mm.default``, and which of its calls in a unit's forward, from 0."""


@dataclass(frozen=True)
class Recompute:
    """How a unit is recomputed.

    Attributes:
        mutated_buffers: Names of buffers that a forward changes, such as BatchNorm's running statistics.
            Recomputation starts from their values before the forward and leaves no trace in them.
        saved_ops: Calls of operators whose outputs are held from forward to backward instead of computed again.
    """

    mutated_buffers: tuple[str, ...] = ()
    saved_ops: tuple[OpCall, ...] = ()


class RecomputedForward:
    """Stands as ``module.forward`` and lets backward recompute what forward would have saved.

    An object in the module's ``__dict__`` rather than a closure or a new class, so that ``copy.deepcopy`` and
    ``pickle`` of the module carry it over to the copy.

    Args:
        module: The unit.
        recompute: How.
        plan_id: The plan that this belongs to.
    """

    def __init__(self, module: nn.Module, recompute: Recompute, plan_id: str) -> None:
        self.module = module
        self.recompute = recompute
        self.plan_id = plan_id
        # RReLU fills the noise that its backward needs after autograd has saved it; a recomputation that stops
        # at the last saved tensor would hand over noise not yet drawn.
        self.early_stop = not any(isinstance(part, nn.RReLU) for part in module.modules())
        # Another tool may have put its own forward there; it stays inside ours.
        self.inner = vars(module).get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.run if self.inner is None else self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        refuse_cache(args, kwargs)
        values = (*args, *kwargs.values())
        # Only tensors among the arguments of ``checkpoint`` itself are guarded against changes in place between
        # forward and recomputation, so keywords go positionally and what containers hold goes along once more.
        inside = [leaf for value in values for leaf in tree_leaves(value) if leaf is not value]
        # torch.compile traces ``checkpoint`` only where no contexts are given.
        contexts: dict[str, Any] = {} if self.recompute == Recompute() else {"context_fn": self._forward_and_recompute}
        parameters = None if torch.compiler.is_compiling() else self.parameters()
        return checkpoint(
            partial(self._run_flat, parameters, len(args), tuple(kwargs)),
            *values,
            *(leaf for leaf in inside if isinstance(leaf, Tensor)),
            use_reentrant=False,
            early_stop=self.early_stop,
            **contexts,
        )

    def parameters(self) -> tuple[tuple[int, int], ...]:
        """Which tensors the unit's parameters are, and what was done to them so far."""
        return tuple((id(param), param._version) for param in self.module.parameters())

    def check_parameters(self, before: tuple[tuple[int, int], ...]) -> None:
        """Raise RuntimeError where the unit's parameters are not what they were in its forward."""
        if self.parameters() != before:
            raise RuntimeError(
                f"parameters of a recomputed {type(self.module).__name__} were changed or replaced between its forward "
                "and backward (by an optimizer step, or by torch.func.functional_call), so that it cannot be computed "
                "again; run backward before they change, or remove the plan"
            )

    def _run_flat(
        self, parameters: tuple[tuple[int, int], ...] | None, count: int, names: tuple[str, ...], *values: Any
    ) -> Any:
        """Run with ``count`` positional arguments and then the named ones; what follows is not passed on."""
        if parameters is not None:
            self.check_parameters(parameters)
        return self.run(*values[:count], **dict(zip(names, values[count:], strict=False)))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the unit itself, or what another tool had put in its place."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _forward_and_recompute(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """Contexts for the forward and for its recomputation."""
        before = {name: self.module.get_buffer(name).detach().clone() for name in self.recompute.mutated_buffers}
        if not self.recompute.saved_ops:
            return nullcontext(), buffers_replaced(self.module, before)
        forward, again = create_selective_checkpoint_contexts(_Saves(self.recompute.saved_ops))
        return forward, _both(buffers_replaced(self.module, before), again) if before else again


class _Saves:
    """A policy for one forward: hold the outputs of these calls."""

    def __init__(self, calls: tuple[OpCall, ...]) -> None:
        self._calls = frozenset(calls)
        self._counts: Counter[str] = Counter()

    def __call__(self, context: object, op: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(op)
        call = name, self._counts[name]
        self._counts[name] += 1
        return CheckpointPolicy.MUST_SAVE if call in self._calls else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager[object], inner: AbstractContextManager[object]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(outer)
        stack.enter_context(inner)
        yield


def refuse_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise RuntimeError where a unit gets a key/value cache to write into."""
    for value in (*args, *kwargs.values()):
        if hasattr(value, "get_seq_length") and hasattr(value, "update"):
            raise RuntimeError(
                f"a recomputed unit got a {type(value).__name__}, which recomputation would update a second "
                "time; call the model without past_key_values and with use_cache=False while gradients are "
                "enabled"
            )


@contextmanager
def buffers_replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``module`` see copies of ``values`` as its buffers for a while; its own are never written."""
    own: dict[str, Tensor] = {}
    copies: dict[Tensor, Tensor] = {}  # by the buffer itself, for one may be registered under several names
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            buffers = module.get_submodule(path)._buffers
            own[name] = module.get_buffer(name)
            buffers[leaf] = copies.setdefault(own[name], value.clone())
        yield
    finally:
        for name, buffer in own.items():
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._buffers[leaf] = buffer
