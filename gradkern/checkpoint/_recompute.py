"""Running a module under ``torch.utils.checkpoint`` in place: same module, same class, same state_dict."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from gradkern.checkpoint._units import unit_module

__all__ = ["apply_recompute", "is_applied", "remove_recompute"]

_MARKER = "_gradkern_checkpoint"


@dataclass(frozen=True)
class _Applied:
    """What was put around a model; lives in its ``__dict__`` and is copied and pickled with it."""

    plan_id: str
    unit_names: tuple[str, ...]
    cache_hook: RemovableHandle | None


class RecomputedForward:
    """Stands as ``module.forward`` and lets backward recompute what forward would have saved.

    An object in the module's ``__dict__`` rather than a closure or a new class, so that ``copy.deepcopy`` and
    ``pickle`` of the module carry it over to the copy.

    Args:
        module: The unit.
        mutated_buffers: Names of buffers that a forward in train mode changes, such as BatchNorm's running
            statistics. Recomputation starts from their values before the forward and leaves no trace in them.
    """

    def __init__(self, module: nn.Module, mutated_buffers: tuple[str, ...]) -> None:
        self.module = module
        self.mutated_buffers = mutated_buffers
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
        _refuse_cache(args, kwargs)
        return checkpoint(
            partial(self._run, **kwargs),
            *args,
            use_reentrant=False,
            context_fn=self._forward_and_recompute,
            early_stop=self.early_stop,
        )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _forward_and_recompute(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for the forward and for its recomputation."""
        if not self.mutated_buffers or not self.module.training:
            return nullcontext(), nullcontext()
        before = {name: self.module.get_buffer(name).detach().clone() for name in self.mutated_buffers}
        return nullcontext(), _buffers_replaced(self.module, before)


def apply_recompute(model: nn.Module, mutated_buffers: Mapping[str, tuple[str, ...]], *, plan_id: str) -> None:
    """Make the named units recompute in backward.

    Args:
        model: Mutated in place.
        mutated_buffers: For each unit to recompute, the buffers its forward changes.
        plan_id: Written down with the model, for ``is_applied``.
    """
    cache_hook = None
    if mutated_buffers and "use_cache" in inspect.signature(model.forward).parameters:
        cache_hook = model.register_forward_pre_hook(_without_cache, with_kwargs=True)
    for name, buffers in mutated_buffers.items():
        module = unit_module(model, name)
        vars(module)["forward"] = RecomputedForward(module, buffers)
    vars(model)[_MARKER] = _Applied(plan_id, tuple(mutated_buffers), cache_hook)


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
        if type(vars(module).get("forward")) is not RecomputedForward:
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
    if applied.cache_hook is not None:
        applied.cache_hook.remove()
    del vars(model)[_MARKER]


def is_applied(model: nn.Module, plan_id: str | None = None) -> bool:
    """Whether a plan (this plan, if ``plan_id`` is given) is applied to ``model``."""
    applied = vars(model).get(_MARKER)
    return applied is not None and plan_id in (None, applied.plan_id)


def _without_cache(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: a key/value cache would be written a second time when a unit is recomputed."""
    if torch.is_grad_enabled():
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


def _refuse_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise RuntimeError where a unit gets a key/value cache to write into."""
    for value in (*args, *kwargs.values()):
        if hasattr(value, "get_seq_length") and hasattr(value, "update"):
            raise RuntimeError(
                f"a recomputed unit got a {type(value).__name__}, which recomputation would update a second "
                "time; call the model without past_key_values and with use_cache=False while gradients are "
                "enabled"
            )


@contextmanager
def _buffers_replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``module`` see copies of ``values`` as its buffers for a while; its own are never written."""
    own: dict[str, Tensor] = {}
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            buffers = module.get_submodule(path)._buffers
            own[name] = module.get_buffer(name)
            buffers[leaf] = value.clone()
        yield
    finally:
        for name, buffer in own.items():
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._buffers[leaf] = buffer
