"""Running a module under ``torch.utils.checkpoint`` in place: same module, same class, same state_dict."""

from __future__ import annotations

import inspect
import sys
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
from torch.utils.hooks import RemovableHandle

from gradkern.checkpoint._units import unit_module

__all__ = [
    "OpCall",
    "Recompute",
    "applied_within",
    "apply_recompute",
    "buffers_replaced",
    "is_applied",
    "refuse_cache",
    "remove_recompute",
    "uses_cache",
]

_MARKER = "_gradkern_checkpoint"

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


@dataclass(frozen=True)
class _Applied:
    """What was put around a model; lives in its ``__dict__`` and is copied and pickled with it."""

    plan_id: str
    unit_names: tuple[str, ...]
    cache_hooks: tuple[RemovableHandle, ...]


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
        return inspect.signature(self._run if self.inner is None else self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        refuse_cache(args, kwargs)
        values = (*args, *kwargs.values())
        # Only tensors among the arguments of ``checkpoint`` itself are guarded against changes in place between
        # forward and recomputation, so keywords go positionally and what containers hold goes along once more.
        inside = [leaf for value in values for leaf in tree_leaves(value) if leaf is not value]
        # torch.compile traces ``checkpoint`` only where no contexts are given.
        contexts: dict[str, Any] = {} if self.recompute == Recompute() else {"context_fn": self._forward_and_recompute}
        return checkpoint(
            partial(self._run_flat, len(args), tuple(kwargs)),
            *values,
            *(leaf for leaf in inside if isinstance(leaf, Tensor)),
            use_reentrant=False,
            early_stop=self.early_stop,
            **contexts,
        )

    def _run_flat(self, count: int, names: tuple[str, ...], *values: Any) -> Any:
        """Run with ``count`` positional arguments and then the named ones; what follows is not passed on."""
        return self._run(*values[:count], **dict(zip(names, values[count:], strict=False)))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
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


def apply_recompute(model: nn.Module, recompute: Mapping[str, Recompute], *, plan_id: str) -> None:
    """Make the named units recompute in backward.

    Args:
        model: Mutated in place.
        recompute: The units to recompute, and how.
        plan_id: Written down with the model, for ``is_applied``.

    Raises:
        ValueError: The model has no unit or no buffer of a given name; nothing is changed then.
    """
    modules = {name: _resolved(model, name, how.mutated_buffers) for name, how in recompute.items()}
    cache_hooks = tuple(
        module.register_forward_pre_hook(partial(_without_cache, position), with_kwargs=True)
        for module in model.modules()
        for position in _cache_positions(module)
    )
    for name, module in modules.items():
        vars(module)["forward"] = RecomputedForward(module, recompute[name], plan_id)
    vars(model)[_MARKER] = _Applied(plan_id, tuple(recompute), cache_hooks)


def remove_recompute(model: nn.Module) -> None:
    """Undo ``apply_recompute``; the model's modules hold again exactly what they held before.

    Raises:
        RuntimeError: Nothing is applied, or another tool has replaced the forward of a unit since; nothing is
            changed then.
    """
    applied = vars(model).get(_MARKER)
    if applied is None:
        raise RuntimeError("no checkpoint plan is applied to this model; nothing to remove")
    modules = [unit_module(model, name) for name in applied.unit_names]
    for name, module in zip(applied.unit_names, modules, strict=True):
        forward = vars(module).get("forward")
        if type(forward) is not RecomputedForward or forward.plan_id != applied.plan_id:
            raise RuntimeError(
                f"the forward of unit {name!r} was replaced after the plan was applied; undo that first, "
                "then remove the plan"
            )
    for module in modules:
        inner = vars(module)["forward"].inner
        if inner is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = inner
    for hook in applied.cache_hooks:
        hook.remove()
    del vars(model)[_MARKER]


def is_applied(model: nn.Module, plan_id: str | None = None) -> bool:
    """Whether a plan (this plan, if ``plan_id`` is given) is applied to ``model``."""
    applied = vars(model).get(_MARKER)
    return applied is not None and plan_id in (None, applied.plan_id)


def applied_within(model: nn.Module) -> str | None:
    """Name the first module in ``model`` (itself: ``""``) that a plan was applied to or that it wrapped, if any."""
    for name, module in model.named_modules():
        if _MARKER in vars(module) or type(vars(module).get("forward")) is RecomputedForward:
            return str(name)
    return None


def uses_cache(model: nn.Module) -> bool:
    """Whether a plan on ``model`` would turn a key/value cache off somewhere."""
    return any(_cache_positions(module) for module in model.modules())


def _resolved(model: nn.Module, name: str, buffers: tuple[str, ...]) -> nn.Module:
    """Return the module of a unit after checking that it and its buffers are there."""
    try:
        module = unit_module(model, name)
        for buffer in buffers:
            module.get_buffer(buffer)
    except AttributeError as error:
        raise ValueError(f"unit {name!r} does not fit this model: {error}; make a plan for this one") from error
    return module


def _cache_positions(module: nn.Module) -> list[int]:
    """Where ``use_cache`` stands among the positional arguments of ``module``'s forward; empty without it.

    A list, of one position at most; one past any call's arguments for a keyword-only argument.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    return [
        sys.maxsize if parameter.kind is inspect.Parameter.KEYWORD_ONLY else position
        for position, parameter in enumerate(parameters)
        if parameter.name == "use_cache"
    ]


def _without_cache(
    position: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: a key/value cache would be written a second time when a unit is recomputed."""
    if not torch.is_grad_enabled():
        return args, kwargs
    if position < len(args):
        return (*args[:position], False, *args[position + 1 :]), kwargs
    return args, {**kwargs, "use_cache": False}


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
